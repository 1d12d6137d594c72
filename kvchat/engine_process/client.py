"""The client of the engine process: starts the child, sends requests, receives events.

No method but `close` waits for the child: one thread writes requests, one reads events and passes them to a
callback, and the process's sentinel shows when the child has ended. Must not import textual, torch or the
engine.
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
    """Starts multiprocessing's resource tracker, which needs a real stderr. Call before the screen starts."""
    resource_tracker.ensure_running()


class LinkedEngine:
    """An engine in a child process; implements `kvchat.chat.port.EngineClient`. Only `close` blocks."""

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
        """Starts the child, or restarts it after it died; reports `Loading`, then `Ready` or `Died`."""
        if self._dead:
            # in this order: a turn that sees a running engine must not write to the old outbox
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

    def command(self, command: CacheCommand) -> None:
        """Executes a command after the current turn; the result is reported as a status."""
        if self._dead:
            self._on_event(Refused("The engine is not running."))
        else:
            self._outbox.put(command)

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache."""
        self._outbox.put(Forget(conversation))

    def close(self) -> None:
        """Ends the child; kills it after `CLOSING_S`."""
        self._closing = True
        self._outbox.put(None)
        if self._process:
            self._process.join(CLOSING_S)
            self._process.kill()
            self._process.join()

    def _write(self, pipe: Connection, outbox: "SimpleQueue[Request | None]") -> None:
        with suppress(OSError):  # the child is dead; the reader reports it
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
        self._report_end(failed or _cause_of_death(process.exitcode), explained=bool(failed))

    def _report_end(self, reason: str, *, explained: bool) -> None:
        """The child has ended: every turn without an end fails, and the status is `Died`."""
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
    """A process started inside the block has SIGINT and SIGHUP blocked, until it ignores them.

    The terminal sends them to its whole process group, also while a process starts.
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
    """The last lines that are not blank in the engine's log."""
    try:
        lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    return tuple(line for line in lines if line.strip())[-LOG_TAIL_LINES:]
