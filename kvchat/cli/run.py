"""Turns without a screen: the answer goes to stdout, figures go to stderr, or both to stdout as JSON."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from kvchat.chat.session import Session
from kvchat.contract import (
    Engine,
    FinishReason,
    Tokens,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    TurnStats,
)
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
    for prompt in prompts:
        turn = _Turn(session, engine, session.begin_turn(prompt), echo=not as_json)
        finished = turn.run()
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
        if turn.unsaved:
            raise turn.unsaved
        if turn.signals:
            return exit_code(turn.signals[0])
    return 0


class _Turn:
    """One turn; a signal stops it, and a second one does not wait for that."""

    def __init__(self, session: Session, engine: Engine, request: TurnRequest, *, echo: bool) -> None:
        self._session = session
        self._engine = engine
        self._request = request
        self._echo = echo
        self._running = True
        """Whether a second signal may interrupt; not once the answer is saved for the last time."""
        self.signals: list[int] = []
        """Those that came."""
        self.unsaved: KvchatError | None = None
        """Why the answer is not saved as it is shown."""

    def run(self) -> TurnFinished:
        """Answers."""
        with on_signals(self._signalled):
            try:
                return self._answer()
            finally:
                self._running = False
                self._keep(self._session.abandon_turn)

    def _signalled(self, number: int) -> None:
        self.signals.append(number)
        self._engine.stop(self._request.turn)
        if len(self.signals) > 1 and self._running:
            raise Ended(self.signals[0])

    def _answer(self) -> TurnFinished:
        session = self._session
        for event in self._engine.turn(self._request):
            if isinstance(event, TurnStarted):
                session.note_started(event)
            elif isinstance(event, Tokens):
                self._keep(session.keep_partial, event)
                if self._echo:
                    print(clean(event.text), end="", flush=True)  # noqa: T201
            elif isinstance(event, TurnFailed):
                self._keep(session.fail_turn, event.turn)
                raise KvchatError(event.reason)
            elif isinstance(event, TurnFinished):
                self._running = False
                self._keep(session.finish_turn, event)
                return event
        raise KvchatError("The engine ended the turn without an answer.")

    def _keep(self, save: Callable[..., object], *given: object) -> None:
        """Saves; what fails is reported after the answer, which can still be read."""
        try:
            save(*given)
        except KvchatError as error:
            self.unsaved = error


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
