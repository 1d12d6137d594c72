"""How many processor cores this process may use."""

import os

import psutil


def physical_cores() -> int:
    """Physical cores this process may use: those of the machine, or fewer where it is bound to some."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))
