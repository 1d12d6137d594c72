"""The engine in a child process: both halves of the wire.

The child imports torch, holds the model and may die; none of that may freeze the screen or lose a message. So
nothing here ever makes its caller wait for the child: a thread writes requests, a thread reads events, and
death shows on the process's sentinel. It knows processes and pipes; it refuses to know textual, and imports
the engine in the child only.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from kvchat.contract import (
    CacheAct,
    Died,
    Loading,
    Ready,
    Refused,
    Report,
    Status,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
)
from kvchat.diagnose import report_on_signal
from kvchat.errors import KvchatError
from kvchat.openmp import wait_politely

BATCH_S = 1 / 15
"""Tokens cross the wire in batches at most this often."""
LOG_TAIL_LINES = 6
ENGINE_NICENESS = 5
"""The model takes every core; with this, a key pressed meanwhile is served first."""
CLOSING_S = 3.0
"""How long a closing child may take, to save what is not saved, before it is killed."""


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


@dataclass(frozen=True, slots=True)
class Stop:
    turn: str


@dataclass(frozen=True, slots=True)
class Forget:
    conversation: str


Request = TurnRequest | Stop | Forget | CacheAct


def allow_spawning() -> None:
    """Starts multiprocessing's helper now: it needs a real stderr, and a running screen has none."""
    resource_tracker.ensure_running()


class LinkedEngine:
    """An engine in a child process; satisfies `contract.Engine` and never blocks but in `turn`."""

    def __init__(self, options: EngineOptions, on_status: Callable[[Status], None]) -> None:
        """`on_status` is called from a thread of this object."""
        self._options = options
        self._on_status = on_status
        self._waiting: dict[str, SimpleQueue[TurnEvent]] = {}
        self._outbox: SimpleQueue[Request | None] = SimpleQueue()
        self._closing = False
        self._process: SpawnProcess | None = None
        self._dead = False

    def start(self) -> None:
        """Starts the child; `Loading` and then `Ready` or `Died` follow. Also restarts one that died."""
        if self._dead:
            # in this order: a turn that sees a living engine must not write to the dead one
            self._outbox = SimpleQueue()
            self._dead = False
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self._options), daemon=True)
        process.start()
        theirs.close()
        self._process = process
        Thread(target=self._write, args=(ours, self._outbox), daemon=True, name="engine-writer").start()
        Thread(target=self._read, args=(ours, process), daemon=True, name="engine-reader").start()

    @property
    def pid(self) -> int | None:
        """Process id of the child."""
        return self._process.pid if self._process else None

    def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
        """Sends the request and yields what comes back; blocks between events."""
        events = self._waiting[request.turn] = SimpleQueue()
        if self._dead:
            events.put(TurnFailed(request.turn, "The engine is not running."))
        else:
            self._outbox.put(request)
        try:
            while True:
                event = events.get()
                yield event
                if isinstance(event, TurnFinished | TurnFailed):
                    return
        finally:
            del self._waiting[request.turn]

    def stop(self, turn: str) -> None:
        """Ends that turn soon."""
        self._outbox.put(Stop(turn))

    def act(self, act: CacheAct) -> None:
        """Does something to the caches, after the turn under way; reports come as a status."""
        if self._dead:
            self._on_status(Refused("The engine is not running."))
        else:
            self._outbox.put(act)

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache."""
        self._outbox.put(Forget(conversation))

    def close(self) -> None:
        """Ends the child; kills it if it takes too long."""
        self._closing = True
        self._outbox.put(None)
        if self._process:
            self._process.join(CLOSING_S)
            self._process.kill()
            self._process.join()

    def _write(self, pipe: Connection, outbox: "SimpleQueue[Request | None]") -> None:
        with suppress(OSError):  # a dead child: the reader notices and tells
            while (request := outbox.get()) is not None:
                pipe.send(request)
            pipe.send(None)

    def _read(self, pipe: Connection, process: SpawnProcess) -> None:
        failed = ""
        while True:
            ready = wait([pipe, process.sentinel])
            try:
                while pipe in ready and pipe.poll():
                    event = pipe.recv()
                    if isinstance(event, Died):
                        failed = event.reason
                    elif isinstance(event, Loading | Ready | Report):
                        self._on_status(event)
                    elif events := self._waiting.get(event.turn):
                        events.put(event)
            except (EOFError, OSError):
                break
            if process.sentinel in ready and not pipe.poll():
                break
        process.join()
        self._bury(failed or _cause_of_death(process.exitcode), explained=bool(failed))

    def _bury(self, reason: str, *, explained: bool) -> None:
        """The child is gone: whoever waits is told."""
        self._dead = True
        self._outbox.put(None)
        for turn, events in list(self._waiting.items()):
            events.put(TurnFailed(turn, reason))
        if not self._closing:
            self._on_status(Died(reason, () if explained else log_tail(self._options.log_file)))


def _cause_of_death(exit_code: int | None) -> str:
    if exit_code == -signal.SIGKILL:
        return "The engine was killed (signal 9: often the system ran out of memory)."
    if exit_code is not None and exit_code < 0:
        return f"The engine was ended by signal {-exit_code}."
    return f"The engine ended with code {exit_code}."


def log_tail(log_file: Path) -> tuple[str, ...]:
    """The last lines the engine printed."""
    try:
        lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    return tuple(line for line in lines if line.strip())[-LOG_TAIL_LINES:]


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _redirect_output(options.log_file)
    report_on_signal(options.log_file.parent)
    wait_politely()
    os.nice(ENGINE_NICENESS)
    pipe.send(Loading("importing torch"))
    code = 0
    try:
        _serve(pipe, options)
    except KvchatError as error:
        pipe.send(Died(str(error)))
        code = 1
    except BrokenPipeError:
        pass
    os._exit(code)  # taking torch down in order takes a second, and nothing is left to save


def _serve(pipe: Connection, options: EngineOptions) -> None:
    from kvchat.engine.build import load_draft, open_engine
    from kvchat.engine.load import load_model
    from kvchat.engine.meter import memory_in_use

    pipe.send(Loading(f"loading {options.name}"))
    loaded = load_model(
        options.folder,
        options.name,
        precision=options.precision,
        threads=options.threads,
        context=options.context,
        device=options.device,
    )
    draft = load_draft(options.draft, options.draft_folder, options.threads)
    kv = options.kv_budget, options.kv_folder, options.kv_disk
    engine = open_engine(loaded, *kv, pipe.send, draft)
    requests: SimpleQueue[TurnRequest | Forget | CacheAct | None] = SimpleQueue()

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
        if isinstance(request, Forget):
            try:
                engine.forget(request.conversation)
            except KvchatError as error:  # another process holds the shelf, or the folder can't be removed
                pipe.send(Refused(str(error)))
        elif isinstance(request, TurnRequest):
            for event in batched(engine.turn(request)):
                pipe.send(event)
        else:
            engine.act(request)
    engine.close()


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
    log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
