"""The prefill rate measured so far, for cost estimates."""

from dataclasses import dataclass


@dataclass(slots=True)
class PrefillRate:
    """Tokens per second of the largest of the latest prefills."""

    tokens_per_s: float | None = None
    tokens: int = 0

    def note(self, tokens: int, seconds: float) -> None:
        """Records a measured prefill; small ones are ignored, since they measure overhead."""
        if tokens >= max(64, self.tokens // 4) and seconds > 0:
            self.tokens, self.tokens_per_s = tokens, tokens / seconds

    def hint(self, tokens_per_s: float) -> None:
        """Sets the rate of earlier sessions, used until this one has measured its own."""
        if self.tokens_per_s is None and tokens_per_s > 0:
            self.tokens_per_s = tokens_per_s

    def seconds(self, tokens: int) -> float | None:
        """Estimated seconds to prefill so many tokens; None before anything was measured."""
        return tokens / self.tokens_per_s if self.tokens_per_s else None
