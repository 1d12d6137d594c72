"""How often streaming text is drawn: as often as it costs little; and what it means to keep still.

Drawing Markdown at 20 Hz takes a third of a two-core machine away from the model. So the pause after a draw
follows from what the draw cost.
"""

from typing import Any

from textual.app import App

FASTEST_S = 1 / 5
SLOWEST_S = 1.0
STILL_S = 0.5
"""The pause where nothing is to move without need."""
CPU_SHARE = 0.06
"""Of one core, for the whole screen while an answer streams."""
STILL = "-still"
"""Class of an app in which nothing moves by itself."""


def pause_after(cpu_s: float, *, still: bool = False) -> float:
    """Seconds to wait after a draw that took `cpu_s` seconds of processor time."""
    return min(SLOWEST_S, max(STILL_S if still else FASTEST_S, cpu_s / CPU_SHARE))


def keep_still(app: App[Any], still: bool) -> None:
    """Lets nothing in an app move by itself, or lets it."""
    app.animation_level = "none" if still else "full"
    app.set_class(still, STILL)
