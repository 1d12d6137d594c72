"""The OpenMP wait policy of torch's threads. Must be set before torch is imported.

By default threads spin at a barrier for milliseconds. On a shared machine that wastes CPU time: whenever
another process preempts one thread, all others spin until it returns. Here they spin briefly and then sleep.
"""

import os

SPINS = "20000"
"""A few tenths of a millisecond: longer than the time between two matrix products of a decode step, because
waking a sleeping thread costs more than a product, and much shorter than a scheduler's time slice."""


def limit_spinning() -> None:
    """Sets libgomp's spin count, unless the user set OMP_WAIT_POLICY. Call before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
