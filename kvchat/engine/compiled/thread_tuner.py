"""How many threads compute a token: all, or one where that is faster.

The threads of a token meet a hundred times, so where another process holds one of the cores, all wait for the
thread that waits for that core, and one thread alone is several times faster. Results are the same, bit for
bit, for any number of threads. It knows numbers of threads and seconds; it refuses to know what is computed.
"""

FIRST, SOONEST, LATEST = 8, 32, 1024
"""Tokens before the first trial of the other number, and between two; it costs one token that may be slow."""
BETTER = 0.8
"""A trial has to take at most this share of the time to change anything."""
SUDDEN, IN_A_ROW = 3.0, 3
"""So many tokens in a row that take so many times as long as usual call for a trial at once."""
WEIGHT = 0.25
"""Of the newest token in the mean."""


class ThreadTuner:
    """Chooses between all threads and one, by what tokens took lately."""

    def __init__(self, most: int) -> None:
        self._current, self._other = most, 1
        self._usual = 0.0
        """Seconds a token takes with the current number; 0 before any."""
        self._slow = 0
        self._gap = SOONEST
        self._to_trial = FIRST

    @property
    def settled(self) -> int:
        """For several tokens together, which no trial is made with."""
        return self._current

    @property
    def threads(self) -> int:
        """For the next token."""
        return self._other if self._to_trial <= 0 else self._current

    def note(self, seconds: float) -> None:
        """The next token took so long, with so many `threads`."""
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
