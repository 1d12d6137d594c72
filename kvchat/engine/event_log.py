"""What happened to caches, until somebody asks. Threads may tell; one reads."""

import time

from kvchat.contract import CacheEvent, CacheEventKind


class EventLog:
    """Collects events."""

    def __init__(self) -> None:
        self._events: list[CacheEvent] = []

    def log(
        self,
        conversation: str,
        kind: CacheEventKind,
        tokens: int,
        *,
        size: int = 0,
        seconds: float = 0.0,
        note: str = "",
    ) -> None:
        """Notes that it happened now; `size` in bytes."""
        self._events.append(CacheEvent(conversation, kind, tokens, size, seconds, note, time.time()))

    def take(self) -> tuple[CacheEvent, ...]:
        """Everything since the last time."""
        events = tuple(self._events)
        del self._events[: len(events)]  # another thread may have added one meanwhile
        return events
