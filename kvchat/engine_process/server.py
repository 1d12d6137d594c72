"""The child process that holds the engine: loads the model, answers requests, ends when the pipe closes.

Imports the engine, and with it torch, only once it runs: the client imports this module for its values.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from kvchat.contract import (
    CacheCommand,
    Died,
    Loading,
    Ready,
    Refused,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnRequest,
)
from kvchat.engine_process.diagnostics import report_on_signal
from kvchat.engine_process.openmp import limit_spinning
from kvchat.errors import KvchatError, as_sentence, cause
from kvchat.system.interrupts import SIGNALS
from kvchat.system.ownership import make_private
from kvchat.validation.checks import InvalidError, checked

BATCH_S = 1 / 15
"""Tokens cross the wire in batches at most this often."""
CLOSING_S = 3.0
"""How long a closing child may take, to save what is not saved, before it is killed."""
ENGINE_NICENESS = 5
"""The model takes every core; with this, a key pressed meanwhile is served first."""
FROM_TERMINAL = tuple(number for number in SIGNALS if number != signal.SIGTERM)
"""Signals that a terminal sends to all processes that belong to it."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the child has to load."""

    folder: Path
    name: str
    log_file: Path
    precision: str = "auto"
    threads: int | None = None
    context: int | None = None
    device: str = "auto"
    kv_budget: int | None = None
    """Bytes in memory for all caches; None takes a quarter of what is available."""
    kv_folder: Path | None = None
    """Where caches are saved; None saves none."""
    kv_disk: int = 0
    """Bytes that saved caches may take."""
    draft: str = "lookup"
    draft_folder: Path | None = None
    """Of the model that guesses ahead, if one does."""
    unload_after: float = 0
    """Idle seconds after which the weights leave memory; 0 keeps them."""
    compiled: Path | None = None
    """Where compiled code is loaded from; None loads none."""


@dataclass(frozen=True, slots=True)
class Stop:
    turn: str


@dataclass(frozen=True, slots=True)
class Forget:
    conversation: str


Request = TurnRequest | Stop | Forget | CacheCommand


def batched(events: Iterator[TurnEvent], seconds: float = BATCH_S) -> Iterator[TurnEvent]:
    """Joins tokens that come within `seconds`; the first ones, and everything else, pass at once."""
    waiting: Tokens | None = None
    passed = -seconds
    for event in events:
        if isinstance(event, Tokens):
            waiting = waiting.joined(event) if waiting else event
            if time.monotonic() - passed < seconds:
                continue
            event, waiting, passed = waiting, None, time.monotonic()
        elif waiting:
            yield waiting
            waiting = None
        yield event
    if waiting:
        yield waiting


def serve(pipe: Connection, options: EngineOptions) -> None:
    """The child's whole life: load, then answer until the other side hangs up."""
    _ignore_terminal()
    _end_with_parent()
    code = 0
    try:
        _redirect_output(options.log_file)
        report_on_signal(options.log_file.parent)
        limit_spinning()
        os.nice(ENGINE_NICENESS)
        pipe.send(Loading("importing torch"))
        _serve(pipe, options)
    except BrokenPipeError:  # the other side is gone
        pass
    except Exception as error:
        code = 1
        if cause(error) is None:
            traceback.print_exc()
        with suppress(OSError):
            pipe.send(Died(as_sentence(error)))
    os._exit(code)  # taking torch down in order takes a second, and nothing is left to save


def _ignore_terminal() -> None:
    """Ends that block: the other side decides what Ctrl-C and a closed terminal mean."""
    for number in FROM_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FROM_TERMINAL)


def _end_with_parent() -> None:
    """Ends this process soon after the one that started it, even where the model is stuck in a computation.

    A parent that is killed closes nothing in order; what the engine can still save it saves meanwhile.
    """

    def watch() -> None:
        if parent := parent_process():
            wait([parent.sentinel])
            time.sleep(CLOSING_S)
            os._exit(1)

    Thread(target=watch, daemon=True, name="parent").start()


def _serve(pipe: Connection, options: EngineOptions) -> None:
    from kvchat.engine.factory import load_draft, open_engine
    from kvchat.engine.model.loader import load_model
    from kvchat.engine.turn_timer import memory_in_use

    pipe.send(Loading(f"loading {options.name}"))
    loaded = load_model(
        options.folder,
        options.name,
        precision=options.precision,
        threads=options.threads,
        context=options.context,
        device=options.device,
        compiled=options.compiled,
    )
    draft = load_draft(options.draft, options.draft_folder, options.threads, options.compiled)
    kv = options.kv_budget, options.kv_folder, options.kv_disk
    engine = open_engine(loaded, *kv, pipe.send, draft)
    requests: SimpleQueue[TurnRequest | Forget | CacheCommand | None] = SimpleQueue()

    def receive() -> None:
        with suppress(EOFError, OSError):
            while (request := pipe.recv()) is not None:
                if isinstance(request, Stop):
                    engine.stop(request.turn)
                else:
                    requests.put(request)
        requests.put(None)
        engine.stop_all()

    Thread(target=receive, daemon=True, name="requests").start()
    pipe.send(Ready(engine.facts, memory_in_use()))
    pipe.send(engine.pool())
    while (request := _next(requests, options.unload_after, loaded.unload)) is not None:
        if problem := problem_of(request):
            failed = isinstance(request, TurnRequest)
            pipe.send(TurnFailed(request.turn, problem) if failed else Refused(problem))
        elif isinstance(request, Forget):
            try:
                engine.forget(request.conversation)
            except KvchatError as error:  # another process holds the shelf, or the folder can't be removed
                pipe.send(Refused(str(error)))
        elif isinstance(request, TurnRequest):
            for event in batched(engine.turn(request)):
                pipe.send(event)
        else:
            engine.command(request)
    engine.close()


def problem_of(request: Request) -> str:
    """What is wrong with the values of a request, as a sentence; empty where nothing is."""
    try:
        checked(type(request), request)
    except InvalidError as error:
        return f"The engine was sent a request with a wrong value: {error}."
    return ""


def _next(requests: "SimpleQueue[Any]", patience: float, unload: Callable[[], None]) -> Any:  # noqa: ANN401
    """The next request; where none comes for so many seconds, the weights go first."""
    if patience:
        try:
            return requests.get(timeout=patience)
        except Empty:
            unload()
    return requests.get()


def _redirect_output(log_file: Path) -> None:
    """Points file descriptors 1 and 2 at the log: whatever prints would paint over the screen."""
    make_private(log_file.parent)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
