"""The child process: loads the model, runs the engine, answers requests, ends when the pipe closes.

Must import the engine, and with it torch, inside functions only: the client imports this module for its
dataclasses.
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
"""Least time between two batches of tokens in the pipe."""
CLOSING_S = 3.0
"""Time for a closing child to save its caches, before it is killed."""
ENGINE_NICENESS = 5
"""The model uses every core; a lower priority keeps the screen responsive."""
FROM_TERMINAL = tuple(number for number in SIGNALS if number != signal.SIGTERM)
"""Signals that a terminal sends to its whole process group."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of the child process: what to load, and the limits."""

    folder: Path
    name: str
    log_file: Path
    precision: str = "auto"
    threads: int | None = None
    context: int | None = None
    device: str = "auto"
    kv_budget: int | None = None
    """Bytes in memory for all caches; None: a quarter of the available memory."""
    kv_folder: Path | None = None
    """Folder of saved caches; None: nothing is saved."""
    kv_disk: int = 0
    """Limit of all saved caches in bytes."""
    draft: str = "lookup"
    draft_folder: Path | None = None
    """Folder of the draft model; None without one."""
    unload_after: float = 0
    """Idle seconds until the weights are unloaded; 0: never."""
    compiled: Path | None = None
    """Folder of compiled code; None: compiled code is not used."""


@dataclass(frozen=True, slots=True)
class Stop:
    """`Engine.stop` as a message."""

    turn: str


@dataclass(frozen=True, slots=True)
class Forget:
    """`Engine.forget` as a message."""

    conversation: str


Request = TurnRequest | Stop | Forget | CacheCommand


def batched(events: Iterator[TurnEvent], seconds: float = BATCH_S) -> Iterator[TurnEvent]:
    """Joins tokens that arrive within `seconds`; the first ones and all other events pass immediately."""
    batch: Tokens | None = None
    sent_at = -seconds
    for event in events:
        if isinstance(event, Tokens):
            batch = batch.joined(event) if batch else event
            if time.monotonic() - sent_at < seconds:
                continue
            event, batch, sent_at = batch, None, time.monotonic()
        elif batch:
            yield batch
            batch = None
        yield event
    if batch:
        yield batch


def serve(pipe: Connection, options: EngineOptions) -> None:
    """Main function of the child: loads the model, then answers requests until the pipe closes."""
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
    except BrokenPipeError:  # the client has ended
        pass
    except Exception as error:
        code = 1
        if cause(error) is None:
            traceback.print_exc()
        with suppress(OSError):
            pipe.send(Died(as_sentence(error)))
    os._exit(code)  # a regular exit with torch takes a second, and everything is saved


def _ignore_terminal() -> None:
    """Ignores and unblocks the terminal's signals: the client handles Ctrl-C and a closed terminal."""
    for number in FROM_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FROM_TERMINAL)


def _end_with_parent() -> None:
    """Ends this process `CLOSING_S` after its parent, even during a long computation.

    A killed parent sends no closing message. The closed pipe makes the engine save its caches meanwhile.
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
            except KvchatError as error:  # another process has locked the disk store, or deleting failed
                pipe.send(Refused(str(error)))
        elif isinstance(request, TurnRequest):
            for event in batched(engine.turn(request)):
                pipe.send(event)
        else:
            engine.command(request)
    engine.close()


def problem_of(request: Request) -> str:
    """A sentence about an invalid request; empty for a valid one."""
    try:
        checked(type(request), request)
    except InvalidError as error:
        return f"The engine received an invalid request: {error}."
    return ""


def _next(requests: "SimpleQueue[Any]", idle_s: float, unload: Callable[[], None]) -> Any:  # noqa: ANN401
    """The next request; after `idle_s` seconds without one (0: never), the weights are unloaded."""
    if idle_s:
        try:
            return requests.get(timeout=idle_s)
        except Empty:
            unload()
    return requests.get()


def _redirect_output(log_file: Path) -> None:
    """Redirects stdout and stderr to the log file: output would overwrite the screen."""
    make_private(log_file.parent)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
