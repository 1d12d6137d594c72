"""Textual's driver for terminals on Linux and macOS, and what it lacks: bytes that are no UTF-8 are replaced,
and a terminal that is gone ends the program.

Textual decodes strictly, so that one wrong byte ends the program. At the end of input it spins, and a write
to a closed terminal ends the thread that writes, after which the program waits for it for ever.
"""

import os
import select
import signal
import termios
from codecs import getincrementaldecoder
from contextlib import suppress
from typing import IO

from textual._xterm_parser import XTermParser
from textual.drivers.linux_driver import LinuxDriver

from kvchat.system.interrupts import exit_code

READ_BYTES = 4096
LOOK_EVERY_S = 0.1
"""How often the parser is asked for a key that only time ends, such as Esc, as in Textual's own loop."""


RESTORING = (
    b"\x1b[?1000l\x1b[?1003l\x1b[?1015l\x1b[?1006l"  # no mouse reports
    b"\x1b[?2004l\x1b[?1004l\x1b[?7h"  # no bracketed paste, no focus reports; lines wrap
    b"\x1b[<u\x1b[?1049l\x1b[?25h"  # keys as before, the other screen, the cursor
)


class _UntilGone:
    """A terminal's file; once it is gone, what is written is dropped."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, text: str) -> None:
        try:
            self._file.write(text)
        except OSError:
            self._drop()

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """What waits in the buffer would fail again, at the latest when Python ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._file.fileno())
        os.close(nowhere)


class TerminalDriver(LinuxDriver):
    """Reads keys and writes the screen."""

    def start_application_mode(self) -> None:
        """Begins, also after a suspension."""
        if not isinstance(self._file, _UntilGone):
            self._file = _UntilGone(self._file)  # type: ignore[assignment,arg-type]
        super().start_application_mode()  # type: ignore[no-untyped-call]

    def restore_now(self) -> None:
        """Gives the terminal back from any thread, though the loop or the thread that writes may be stuck."""
        with suppress(OSError, termios.error):
            if self._file is not None:
                os.write(self._file.fileno(), RESTORING)
            if self.attrs_before is not None:
                termios.tcsetattr(self.fileno, termios.TCSANOW, self.attrs_before)

    def run_input_thread(self) -> None:
        """Reads until the driver stops or the terminal is gone."""
        parser = XTermParser(self._debug)
        decode = getincrementaldecoder("utf-8")("replace").decode
        while not self.exit_event.is_set():
            if select.select([self.fileno], [], [], LOOK_EVERY_S)[0]:
                if not (given := self._read()):
                    self._gone()
                    return
                for event in parser.feed(decode(given)):
                    self.process_message(event)
            for event in parser.tick():
                self.process_message(event)

    def _read(self) -> bytes:
        """What was typed; nothing where the terminal is gone."""
        try:
            return os.read(self.fileno, READ_BYTES)
        except OSError:
            return b""

    def _gone(self) -> None:
        """Ends the program as SIGHUP does, which comes where the terminal belongs to this process only."""
        self._app.call_later(self._app.exit, return_code=exit_code(signal.SIGHUP))
