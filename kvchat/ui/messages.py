"""What the engine's threads tell the screen."""

from textual.message import Message

from kvchat.chat.port import EngineEvent


class EngineReported(Message):
    """The engine reported something about itself, its caches or a turn."""

    def __init__(self, event: EngineEvent) -> None:
        super().__init__()
        self.event = event
