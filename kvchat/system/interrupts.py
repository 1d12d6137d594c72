"""The signals that end the program: SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal was closed).

`main` makes them raise `Ended`, which unwinds the command; code that has to save something handles them with
`on_signals`. The exit code is 128 plus the signal's number, as in shells.
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
"""Delay until a signal is sent again whose exception was swallowed."""


class Ended(BaseException):
    """A signal ends the program. Not an `Exception`, so that no library catches it as an error of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_code(number: int) -> int:
    """The exit code after a signal."""
    return 128 + number


@contextmanager
def on_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Inside the block, `handler` is called with a signal's number, in the main thread.

    Ignored signals stay ignored (nohup). In other threads this does nothing.
    """
    if current_thread() is not main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        handler(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    replaced = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in replaced:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)


@contextmanager
def ending_on_signals() -> Iterator[list[int]]:
    """Inside the block, a signal raises `Ended`; yields the list of received signal numbers.

    Where Python prints an exception and goes on, as in a destructor, the signal is sent again.
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
    """Restores the default action of Ctrl-C: it ends the process without Python's traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
