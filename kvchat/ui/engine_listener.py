"""Screens over the chat that want to hear what the engine tells.

The chat hears everything first and passes it on; a screen that is gone hears nothing.
"""

from collections.abc import Iterable

from textual.screen import Screen

from kvchat.contract import Status, TurnEvent

Heard = Status | TurnEvent


class Listener:
    """Mixed into a screen that hears what the engine tells while it is open."""

    def hear(self, told: Heard) -> None:
        """Something was told; most of it is meant for others."""
        raise NotImplementedError


def tell(screens: Iterable[Screen[object]], told: Heard) -> None:
    """Passes on what the engine told to all screens that listen."""
    for screen in screens:
        if isinstance(screen, Listener) and screen.is_mounted:
            screen.hear(told)
