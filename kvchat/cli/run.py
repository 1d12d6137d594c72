"""Turns without a screen: the answer goes to stdout, figures go to stderr, or both to stdout as JSON."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from kvchat.chat.controller import ChatController
from kvchat.chat.engine_supervisor import EngineSupervisor
from kvchat.chat.local_engine import LocalEngine
from kvchat.chat.port import EngineEvent, Port, complete
from kvchat.chat.session import Session
from kvchat.contract import Engine, FinishReason, Tokens, TurnFailed, TurnFinished, TurnStats
from kvchat.errors import KvchatError
from kvchat.system.interrupts import Ended, exit_code, on_signals
from kvchat.text import clean, megabytes
from kvchat.validation.plain_json import write_json


def run_turns(session: Session, engine: Engine, prompts: Sequence[str], *, as_json: bool) -> int:
    """Sends the prompts as turns of the open conversation; returns the exit code.

    Ctrl-C, SIGTERM and SIGHUP stop the answer under way, which is kept, and later prompts are not sent.

    Raises:
        KvchatError: a turn failed, or could not be saved; what was answered before it is saved, and no later
            turn has the prompt of one that failed.
        Ended: a second signal came before the answer stopped; what there is of it is saved.
    """
    turns = _Turns(session, engine, echo=not as_json)
    for prompt in prompts:
        finished = turns.run(prompt)
        if as_json:
            line = {
                "text": finished.text,
                "conversation": session.current.id,
                "stats": asdict(finished.stats),
            }
            print(write_json(line), flush=True)  # noqa: T201
        else:
            print(file=sys.stdout, flush=True)  # noqa: T201
            if sys.stderr:  # without one, print would take stdout
                print(f"[{figures(finished.stats)} · {session.current.id}]", file=sys.stderr, flush=True)  # noqa: T201
        if turns.unsaved:
            raise turns.unsaved
        if turns.signals:
            return exit_code(turns.signals[0])
    return 0


class _Turns(Port):
    """One turn after the other; a signal stops one, and a second signal does not wait for that."""

    def __init__(self, session: Session, engine: Engine, *, echo: bool) -> None:
        self._echo = echo
        self._running = False
        """Whether a second signal may interrupt; not once the answer is saved for the last time."""
        self.signals: list[int] = []
        """Those that came."""
        self.unsaved: KvchatError | None = None
        """Why the answer is not saved as it is shown."""
        self._last: TurnFinished | TurnFailed | None = None
        supervisor = EngineSupervisor(partial(LocalEngine, engine), self._on_event)
        self._controller = ChatController(session, supervisor, self)

    def run(self, prompt: str) -> TurnFinished:
        """Answers."""
        self._running, self._last = True, None
        with on_signals(self._signalled):
            try:
                complete(self._controller.send(clean(prompt)))
            finally:
                self._running = False
                self._controller.abandon()
        return self._ended()

    def _ended(self) -> TurnFinished:
        if isinstance(self._last, TurnFinished):
            return self._last
        raise KvchatError(self._last.reason if self._last else "The engine ended the turn without an answer.")

    def not_saved(self, error: KvchatError) -> None:
        """It is reported after the answer, which can still be read."""
        self.unsaved = error

    def _signalled(self, number: int) -> None:
        self.signals.append(number)
        self._controller.stop()
        if len(self.signals) > 1 and self._running:
            raise Ended(self.signals[0])

    def _on_event(self, event: EngineEvent) -> None:
        if isinstance(event, TurnFinished | TurnFailed):
            self._last = event
            self._running = False
        self._controller.on_event(event)
        if isinstance(event, Tokens) and self._echo:
            print(clean(event.text), end="", flush=True)  # noqa: T201


def figures(stats: TurnStats) -> str:
    """One line for people: what was reused, read and written, how fast, and what the cache holds."""
    parts = [
        f"cache {stats.cache_mode}",
        f"reused {stats.reused_tokens:,}",
        f"read {stats.prefilled_tokens:,}",
        f"wrote {stats.generated_tokens:,} tokens",
        f"TTFT {stats.ttft_s:.2f} s",
        f"prefill {stats.prefill_tok_s:,.0f} tok/s",
        f"decode {stats.decode_tok_s:,.1f} tok/s",
        f"KV {megabytes(stats.kv_used_bytes)}",
        f"context {stats.prompt_tokens + stats.generated_tokens:,}/{stats.context_limit:,}",
    ]
    if stats.reuse_note:
        parts.append(stats.reuse_note)
    if stats.finish_reason != FinishReason.STOP:
        parts.append(f"ended: {stats.finish_reason}")
    return " · ".join(parts)
