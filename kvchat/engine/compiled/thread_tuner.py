"""Chooses how many threads decode a token: all, or one where that is faster.

Decoding a token has about a hundred barriers. If another process uses one of the cores, all threads wait at
each barrier for the one on that core, and a single thread is several times faster. Results are bit-identical
for every number of threads. Must not depend on what is computed.
"""

FIRST, SOONEST, LATEST = 8, 32, 1024
"""Tokens before the first trial of the other number, and between trials; a trial costs one slow token."""
BETTER = 0.8
"""The other number is chosen if its trial takes at most this share of the time."""
SUDDEN, IN_A_ROW = 3.0, 3
"""A trial is made at once after `IN_A_ROW` tokens that each take `SUDDEN` times as long as usual."""
WEIGHT = 0.25
"""Weight of the newest token in the moving average."""


class ThreadTuner:
    """Chooses between all threads and one, by how long recent tokens took."""

    def __init__(self, most: int) -> None:
        self._current, self._other = most, 1
        self._usual = 0.0
        """Moving average of seconds per token with the current number; 0 before any."""
        self._slow = 0
        self._gap = SOONEST
        self._to_trial = FIRST

    @property
    def current(self) -> int:
        """For reading several tokens at once, which is never a trial."""
        return self._current

    @property
    def threads(self) -> int:
        """For the next token."""
        return self._other if self._to_trial <= 0 else self._current

    def note(self, seconds: float) -> None:
        """Records how long a token took with `threads` threads."""
        if self._current == self._other:
            return
        if self._to_trial <= 0:
            self._judge(seconds)
            return
        self._to_trial -= 1
        self._slow = self._slow + 1 if self._usual and seconds > SUDDEN * self._usual else 0
        if self._slow >= IN_A_ROW:
            self._usual, self._to_trial = seconds, 0
        elif not self._slow:
            self._usual += (seconds - self._usual) * (WEIGHT if self._usual else 1)

    def _judge(self, seconds: float) -> None:
        if seconds < BETTER * self._usual:
            self._current, self._other = self._other, self._current
            self._usual, self._gap = seconds, SOONEST
        else:
            self._gap = min(LATEST, 2 * self._gap)
        self._slow, self._to_trial = 0, self._gap
