"""Starts the engine, starts it again when it died, and replaces it by another one.

It knows the `EngineClient` protocol; whether a process is behind it is not its business.
"""

from dataclasses import replace
from threading import Thread

from kvchat.chat.port import EngineClient, EngineEvent, EngineFactory, OnEvent
from kvchat.contract import CacheCommand, Died, Ready, TurnEvent, TurnRequest

RESTARTS = 3
"""Deaths in a row, none of them after a `Ready`, before the engine is left alone."""


class EngineSupervisor:
    """The engine that answers now; satisfies `EngineClient` itself."""

    def __init__(self, factory: EngineFactory, on_event: OnEvent) -> None:
        """`on_event` is called from threads of the engine."""
        self._on_event = on_event
        self.commands = 0
        """Sent so far; the engine reports something about each."""
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

    def submit(self, request: TurnRequest) -> None:
        """Asks for a turn."""
        self._engine.submit(request)

    def stop(self, turn: str) -> None:
        """Ends a turn soon."""
        self._engine.stop(turn)

    def command(self, act: CacheCommand) -> None:
        """Does something to the caches; what came of it is reported."""
        self.commands += 1
        self._engine.command(act)

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache."""
        self._engine.forget(conversation)

    def close(self) -> None:
        """Ends the engine."""
        self._closing = True
        self._engine.close()

    def _made(self, factory: EngineFactory) -> EngineClient:
        """An engine whose statuses are dropped once another one was made; the end of its turn never is."""
        self._factory = factory
        self._engines += 1
        number = self._engines

        def report(event: EngineEvent) -> None:
            if isinstance(event, TurnEvent):
                self._on_event(event)
            elif number == self._engines and not self._closing:
                self._report(event)

        return factory(report)

    def _report(self, status: EngineEvent) -> None:
        if isinstance(status, Ready):
            self._deaths = 0
        if not isinstance(status, Died):
            self._on_event(status)
            return
        self._deaths += 1
        for_good = self._deaths >= RESTARTS
        # counted here: by the time it is handled, there may have been another death
        self._on_event(replace(status, for_good=for_good))
        # after the report: what the next process reports must not come before this one's end
        if not for_good:
            self.start()
