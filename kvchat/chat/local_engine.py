"""An engine in this process, used like one in a process of its own."""

from kvchat.chat.port import OnEvent
from kvchat.contract import CacheCommand, Engine, TurnRequest


class LocalEngine:
    """Satisfies `EngineClient`; `submit` runs the whole turn and reports in the caller's thread."""

    def __init__(self, engine: Engine, on_event: OnEvent) -> None:
        self._engine = engine
        self._on_event = on_event

    def start(self) -> None:
        """It is loaded already."""

    def submit(self, request: TurnRequest) -> None:
        """Runs a turn; returns after its last event."""
        for event in self._engine.turn(request):
            self._on_event(event)

    def stop(self, turn: str) -> None:
        """Ends a turn soon; callable from a signal handler."""
        self._engine.stop(turn)

    def command(self, act: CacheCommand) -> None:
        """Does something to the caches."""
        self._engine.command(act)

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache."""
        self._engine.forget(conversation)

    def close(self) -> None:
        """Saves what is not saved."""
        self._engine.close()
