"""A program in a pseudo-terminal: types keys, reads what it writes."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from threading import Condition, Thread

ENTER, ESCAPE, CTRL_Q, F4 = b"\r", b"\x1b", b"\x11", b"\x1bOS"
CSI, OSC, DCS = rb"\x1b\[[0-?]*[ -/]*[@-~]", rb"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)", rb"\x1bP.*?\x1b\\"
SEQUENCES = re.compile(b"|".join((CSI, OSC, DCS, rb"\x1b[ -/]*[0-~]")))
PATIENCE_S = 120.0
"""A child that imports torch on a busy machine takes a while; nothing takes this long."""


class Terminal:
    """A program that believes it has a terminal."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], *, columns: int = 200, rows: int = 50
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.settings = termios.tcgetattr(slave)
        self._slave = slave
        self._written = b""
        self._grew = Condition()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=dict(env), start_new_session=True
        )
        Thread(target=self._read, daemon=True, name="terminal").start()

    def type(self, keys: bytes) -> None:
        """Types."""
        os.write(self._master, keys)

    @property
    def raw(self) -> bytes:
        """Everything written so far."""
        with self._grew:
            return self._written

    @property
    def settings_now(self) -> list[object]:
        """How the terminal is set."""
        return termios.tcgetattr(self._slave)

    def now(self) -> int:
        """A mark: `until(text, since=mark)` looks at what is written later."""
        return len(self.raw)

    def text(self, since: int = 0) -> str:
        """What was written, without colours and cursor movements."""
        return SEQUENCES.sub(b"", self.raw[since:]).decode(errors="replace")

    def until(self, words: str, *, since: int = 0) -> None:
        """Waits until the program wrote these words."""
        with self._grew:
            found = self._grew.wait_for(lambda: words in self.text(since), PATIENCE_S)
        assert found, f"{words!r} was never written; the last of what was: {self.text(since)[-4000:]}"

    def exit_code(self) -> int:
        """Waits for the end of the program."""
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        """Ends the program if it still runs, and hangs up."""
        self.process.kill()
        self.process.wait()
        os.close(self._slave)

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._master, 65536)
            except OSError:
                piece = b""
            if not piece:
                os.close(self._master)
                return
            with self._grew:
                self._written += piece
                self._grew.notify_all()
