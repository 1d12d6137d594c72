"""The log of cache events between two reports. Any thread may log; one takes."""

import time

from kvchat.contract import CacheEvent, CacheEventKind


class EventLog:
    """Collects cache events."""

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
        """Logs an event with the current time; `size` in bytes."""
        self._events.append(CacheEvent(conversation, kind, tokens, size, seconds, note, time.time()))

    def take(self) -> tuple[CacheEvent, ...]:
        """Removes and returns all events."""
        events = tuple(self._events)
        del self._events[: len(events)]  # another thread may have added one meanwhile
        return events
