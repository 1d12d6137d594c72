"""Between the screen and an engine: a thread per turn that turns events into messages, and nothing else.

It knows the `Engine` protocol; whether a process is behind it is not its business.
"""

from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Protocol

from textual.message import Message

from kvchat.contract import CacheCommand, Died, Engine, Ready, Status, TurnRequest
from kvchat.ui.messages import EngineStatus, TurnProgress

RESTARTS = 3
"""Deaths in a row, none of them after a `Ready`, before the engine is left alone."""


class StartableEngine(Engine, Protocol):
    """An engine that takes a while to come, and may have to come again."""

    def start(self) -> None:
        """Loads; reports by status."""
        ...


EngineFactory = Callable[[Callable[[Status], None]], StartableEngine]


class Target(Protocol):
    """Whoever is told; callable from any thread."""

    def post_message(self, message: Message) -> object:
        """Takes a message."""
        ...


class EngineBridge:
    """Starts the engine, runs turns on it, and starts it again when it died."""

    def __init__(self, factory: EngineFactory, target: Target) -> None:
        self._target = target
        self._deaths = 0
        self._closing = False
        self._engines = 0
        self._engine = self._made(factory)

    def start(self) -> None:
        """Starts loading; returns at once."""
        Thread(target=self._engine.start, daemon=True, name="engine-start").start()

    def switch(self, factory: EngineFactory) -> None:
        """Ends the engine and starts another one; returns at once. Two models at a time may not fit."""
        old, self._deaths = self._engine, 0
        new = self._engine = self._made(factory)

        def follow() -> None:
            old.close()
            if not self._closing:
                new.start()

        Thread(target=follow, daemon=True, name="engine-switch").start()

    def restart(self) -> None:
        """Ends the engine as if the program ended, and starts it again; returns at once."""
        self.switch(self._factory)

    def run_turn(self, request: TurnRequest) -> None:
        """Runs a turn; its events arrive as `TurnProgress`."""
        Thread(target=self._relay, args=(request,), daemon=True, name="turn").start()

    def stop(self, turn: str) -> None:
        """Ends a turn soon."""
        self._engine.stop(turn)

    def command(self, act: CacheCommand) -> None:
        """Does something to the caches; what came of it arrives as an `EngineStatus`."""
        self._engine.command(act)

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache."""
        self._engine.forget(conversation)

    def close(self) -> None:
        """Ends the engine."""
        self._closing = True
        self._engine.close()

    def _made(self, factory: EngineFactory) -> StartableEngine:
        """An engine of which nothing is heard any more once another one was made."""
        self._factory = factory
        self._engines += 1
        number = self._engines

        def report(status: Status) -> None:
            if number == self._engines:
                self._report(status)

        return factory(report)

    def _relay(self, request: TurnRequest) -> None:
        for event in self._engine.turn(request):
            self._target.post_message(TurnProgress(event))

    def _report(self, status: Status) -> None:
        if self._closing:
            return
        if isinstance(status, Ready):
            self._deaths = 0
        if isinstance(status, Died):
            self._deaths += 1
            # told with the death itself: by the time it is read, there may have been another one
            status = replace(status, for_good=self._deaths >= RESTARTS)
        self._target.post_message(EngineStatus(status))
        # after telling: what the next life reports must not come before this one's end
        if isinstance(status, Died) and not status.for_good:
            self.start()
