"""Measures one turn; never estimates."""

import time
from dataclasses import dataclass, field

import psutil

from kvchat.contract import CacheMode, FinishReason, ModelFacts, TurnStats


@dataclass(slots=True)
class TurnTimer:
    """Times in seconds and token counts of one turn; starts when the request arrives."""

    started: float = field(default_factory=time.perf_counter)
    prefill_started: float = 0.0
    prefill_ended: float = 0.0
    first_token: float = 0.0
    first_text: float = 0.0
    last_token: float = 0.0
    generated: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_read: int = 0
    """Tokens of the prompt read so far: fewer than planned where the turn was stopped."""
    reuse_note: str = ""
    evicted_tokens: int = 0
    restored_tokens: int = 0
    restore_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def begin_prefill(self) -> None:
        """Starts the prefill clock."""
        self.prefill_started = self.prefill_ended = time.perf_counter()

    def read(self, tokens: int) -> None:
        """Records that the first `tokens` unread tokens of the prompt are read."""
        self.prefill_ended = time.perf_counter()
        self.prefill_read = tokens

    def token(self, text: str) -> float:
        """Records a generated token; returns the seconds since the previous one, or since prefill began."""
        now = time.perf_counter()
        took = now - (self.last_token or self.prefill_started)
        self.last_token = now
        self.first_token = self.first_token or now
        self.generated += 1
        if text and not self.first_text:
            self.first_text = now
        return took

    @property
    def prefill_s(self) -> float:
        return max(0.0, self.prefill_ended - self.prefill_started)

    @property
    def ttft_s(self) -> float:
        return (self.first_text or time.perf_counter()) - self.started

    def stats(
        self,
        mode: CacheMode,
        model: ModelFacts,
        finish: FinishReason,
        *,
        evaluated: int,
        kv_tokens: int,
        kv_bytes: int,
        kv_used_bytes: int,
    ) -> TurnStats:
        """The figures of the turn."""
        decode_s = self.last_token - self.first_token
        return TurnStats(
            cache_mode=mode.value,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            prefilled_tokens=self.prompt_tokens - self.reused_tokens,
            generated_tokens=self.generated,
            evaluated_tokens=evaluated,
            ttft_s=self.ttft_s,
            prefill_s=self.prefill_s,
            decode_s=decode_s,
            prefill_tok_s=_rate(self.prefill_read, self.prefill_s),
            decode_tok_s=_rate(self.generated - 1, decode_s),
            kv_tokens=kv_tokens,
            kv_bytes=kv_bytes,
            kv_used_bytes=kv_used_bytes,
            kv_dtype=model.kv_dtype,
            weights_dtype=model.weights_dtype,
            weights_bytes=model.weights_bytes,
            path=model.path,
            rss_bytes=memory_in_use(),
            context_limit=model.context_limit,
            finish_reason=finish.value,
            reuse_note=self.reuse_note,
            evicted_tokens=self.evicted_tokens,
            restored_tokens=self.restored_tokens,
            restore_s=self.restore_s,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )


def memory_in_use() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0
