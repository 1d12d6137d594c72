"""The engine as the terminal process uses it: starts the child process, sends requests, receives events.

The child imports torch, holds the model and may die; none of that may freeze the screen or lose a message. So
nothing here but `close` makes its caller wait for the child: one thread writes requests, one reads events and
passes them to a callback, and the process's sentinel shows when the child has ended. Must not import textual,
torch or the engine.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from kvchat.contract import (
    CacheCommand,
    Died,
    Loading,
    Ready,
    Refused,
    Report,
    Status,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
)
from kvchat.engine_process.server import CLOSING_S, FROM_TERMINAL, EngineOptions, Forget, Request, Stop, serve

LOG_TAIL_LINES = 6


def allow_spawning() -> None:
    """Starts multiprocessing's helper now: it needs a real stderr, and a running screen has none."""
    resource_tracker.ensure_running()


class LinkedEngine:
    """An engine in a child process; satisfies `kvchat.chat.port.EngineClient`."""

    def __init__(self, options: EngineOptions, on_event: Callable[[TurnEvent | Status], None]) -> None:
        """`on_event` is called from a thread of this object, or from that of the caller."""
        self._options = options
        self._on_event = on_event
        self._waiting: dict[str, TurnRequest] = {}
        """Turns whose last event has not come, by their ids."""
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
        with _signals_blocked():
            process.start()
        theirs.close()
        self._process = process
        Thread(target=self._write, args=(ours, self._outbox), daemon=True, name="engine-writer").start()
        Thread(target=self._read, args=(ours, process), daemon=True, name="engine-reader").start()

    @property
    def pid(self) -> int | None:
        """Process id of the child."""
        return self._process.pid if self._process else None

    def submit(self, request: TurnRequest) -> None:
        """Sends a request; every event of the turn is reported, the last one exactly once."""
        self._waiting[request.turn] = request
        if self._dead:
            self._fail(request.turn, "The engine is not running.")
        else:
            self._outbox.put(request)

    def stop(self, turn: str) -> None:
        """Ends that turn soon."""
        self._outbox.put(Stop(turn))

    def command(self, act: CacheCommand) -> None:
        """Does something to the caches, after the turn under way; reports come as a status."""
        if self._dead:
            self._on_event(Refused("The engine is not running."))
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
                        self._on_event(event)
                    elif event.turn in self._waiting:
                        if isinstance(event, TurnFinished | TurnFailed):
                            del self._waiting[event.turn]
                        self._on_event(event)
            except (EOFError, OSError):
                break
            if process.sentinel in ready and not pipe.poll():
                break
        process.join()
        self._bury(failed or _cause_of_death(process.exitcode), explained=bool(failed))

    def _bury(self, reason: str, *, explained: bool) -> None:
        """The child is gone: every turn that has no end yet fails."""
        self._dead = True
        self._outbox.put(None)
        for turn in list(self._waiting):
            self._fail(turn, reason)
        if not self._closing:
            self._on_event(Died(reason, () if explained else log_tail(self._options.log_file)))

    def _fail(self, turn: str, reason: str) -> None:
        # two threads may get here for one turn; `pop` lets one of them report
        if self._waiting.pop(turn, None):
            self._on_event(TurnFailed(turn, reason))


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process that is started inside the block has SIGINT and SIGHUP blocked, until it ignores them.

    The terminal sends them to every process that belongs to it, also to one that has only begun.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_TERMINAL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
