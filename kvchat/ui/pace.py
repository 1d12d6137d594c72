"""How often streaming text is drawn: as often as it costs little.

Drawing Markdown at 20 Hz takes a third of a two-core machine away from the model. So the pause after a draw
follows from what the draw cost.
"""

FASTEST_S = 1 / 15
SLOWEST_S = 1.0
CPU_SHARE = 0.10
"""Of one core, for the whole screen while an answer streams."""


def pause_after(cpu_s: float) -> float:
    """Seconds to wait after a draw that took `cpu_s` seconds of processor time."""
    return min(SLOWEST_S, max(FASTEST_S, cpu_s / CPU_SHARE))
