"""Turns without a screen: the answer goes to stdout, figures go to stderr, or both to stdout as JSON."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType

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
from kvchat.errors import INTERRUPTED, KvchatError
from kvchat.text import clean, megabytes
from kvchat.validation.plain_json import write_json


def run_turns(session: Session, engine: Engine, prompts: Sequence[str], *, as_json: bool) -> int:
    """Sends the prompts as turns of the open conversation; returns the exit code.

    Raises:
        KvchatError: a turn failed; what was answered before it is saved, and no later turn has its prompt.
    """
    for prompt in prompts:
        finished = _run_turn(session, engine, session.begin_turn(prompt), echo=not as_json)
        if as_json:
            line = {
                "text": finished.text,
                "conversation": session.current.id,
                "stats": asdict(finished.stats),
            }
            print(write_json(line), flush=True)  # noqa: T201
        else:
            print(file=sys.stdout, flush=True)  # noqa: T201
            print(f"[{figures(finished.stats)} · {session.current.id}]", file=sys.stderr, flush=True)  # noqa: T201
        if finished.stats.finish_reason == FinishReason.CANCELLED:
            return INTERRUPTED
    return 0


def _run_turn(session: Session, engine: Engine, request: TurnRequest, *, echo: bool) -> TurnFinished:
    try:
        with _stopping_on_interrupt(engine, request.turn):
            for event in engine.turn(request):
                if isinstance(event, TurnStarted):
                    session.note_started(event)
                elif isinstance(event, Tokens):
                    session.keep_partial(event)
                    if echo:
                        print(clean(event.text), end="", flush=True)  # noqa: T201
                elif isinstance(event, TurnFailed):
                    session.fail_turn(event.turn)
                    raise KvchatError(event.reason)
                elif isinstance(event, TurnFinished):
                    session.finish_turn(event)
                    return event
    finally:
        session.abandon_turn()  # whoever read the answer may be gone; what was written of it stays
    raise KvchatError("The engine ended the turn without an answer.")


@contextmanager
def _stopping_on_interrupt(engine: Engine, turn: str) -> Iterator[None]:
    """Ctrl-C stops the answer and keeps what there is of it."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        engine.stop(turn)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
