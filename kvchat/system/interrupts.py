"""The signals that ask the program to end: SIGINT (Ctrl-C), SIGTERM, and SIGHUP (the terminal was closed).

`main` makes them raise `Ended`, which unwinds the command; what has something to keep handles them itself
with `on_signals`. The exit code is 128 and the signal's number, as shells have it.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer, current_thread, main_thread
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
AGAIN_S = 0.05
"""A signal whose exception was swallowed comes again after so long."""


class Ended(BaseException):
    """A signal asks the program to end. No `Exception`: no library may take it for an error of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_code(number: int) -> int:
    """The exit code after a signal."""
    return 128 + number


@contextmanager
def on_signals(act: Callable[[int], None]) -> Iterator[None]:
    """Inside the block, `act` is called with a signal's number, in the main thread.

    Signals that the process ignores stay so: it may run under nohup. In other threads nothing changes.
    """
    if current_thread() is not main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        act(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = {number: kept for number, kept in before.items() if kept not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, kept in taken.items():
            signal.signal(number, kept)


@contextmanager
def ending_on_signals() -> Iterator[list[int]]:
    """Inside the block, a signal raises `Ended`; yields the numbers that came.

    Where Python would print an exception and go on, as in a destructor, the signal comes again.
    """
    came: list[int] = []

    def end(number: int) -> None:
        came.append(number)
        raise Ended(number)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        if isinstance(args.exc_value, Ended):
            Timer(AGAIN_S, os.kill, (os.getpid(), args.exc_value.number)).start()
        else:
            hook(args)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        with on_signals(end):
            yield came
    finally:
        sys.unraisablehook = hook


def end_silently() -> None:
    """From here on Ctrl-C ends the process as other signals do, without Python's traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
