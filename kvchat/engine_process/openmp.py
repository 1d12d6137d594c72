"""How torch's threads wait for each other.

By default a thread that is ahead spins for milliseconds. That is right on an idle machine and ruinous on a
shared one: where another process takes one of the cores for a moment, every layer's threads burn the time the
late one needs to come back. Here they spin briefly and then sleep.
"""

import os

SPINS = "20000"
"""A few tenths of a millisecond: longer than the time between two products of a token, and short against the
time for which a core is taken away. Waking a thread that sleeps costs more than a product."""


def wait_politely() -> None:
    """Sets libgomp's spin count, unless the user chose a policy. Call before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
