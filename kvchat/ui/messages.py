"""What the engine's threads tell the screen."""

from textual.message import Message

from kvchat.contract import Status, TurnEvent


class EngineStatus(Message):
    """The engine is loading, ready or dead."""

    def __init__(self, status: Status) -> None:
        super().__init__()
        self.status = status


class TurnProgress(Message):
    """Something happened in the turn under way."""

    def __init__(self, event: TurnEvent) -> None:
        super().__init__()
        self.event = event
