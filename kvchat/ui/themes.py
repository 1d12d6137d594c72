"""kvchat's own colours, in dark and in light; Textual's themes can be had beside them."""

from textual.theme import BUILTIN_THEMES, Theme

from kvchat.errors import KvchatError

DARK = Theme(
    name="kvchat-dark",
    primary="#6fb3c8",
    secondary="#7d879c",
    accent="#e0b878",
    success="#93c48d",
    warning="#e3a869",
    error="#e27d84",
    foreground="#d9dee7",
    background="#12151b",
    surface="#181c24",
    panel="#232935",
    boost="#1b2029",
    dark=True,
    variables={
        "text-muted": "#8b95a7",
        "text-disabled": "#5a6373",
        "block-cursor-background": "#2c3a47",
        "block-cursor-foreground": "#f0f3f8",
        "block-cursor-text-style": "none",
        "block-cursor-blurred-background": "#1f2731",
        "input-cursor-background": "#6fb3c8",
        "input-cursor-foreground": "#12151b",
        "input-selection-background": "#6fb3c8 30%",
        "scrollbar": "#2a313e",
        "scrollbar-hover": "#3a4454",
        "scrollbar-active": "#6fb3c8",
        "scrollbar-background": "#12151b",
        "scrollbar-background-hover": "#12151b",
        "scrollbar-background-active": "#12151b",
        "scrollbar-corner-color": "#12151b",
        "border": "#6fb3c8",
        "border-blurred": "#2a313e",
        "button-color-foreground": "#12151b",
        "markdown-h1-color": "#e0b878",
        "markdown-h2-color": "#e0b878",
        "markdown-h3-color": "#6fb3c8",
    },
)
LIGHT = Theme(
    name="kvchat-light",
    primary="#1c6b83",
    secondary="#727b8c",
    accent="#96611a",
    success="#3c7a3a",
    warning="#a5620f",
    error="#b23c4a",
    foreground="#262b34",
    background="#fbfaf7",
    surface="#f4f2ec",
    panel="#e6e3d9",
    boost="#efede6",
    dark=False,
    variables={
        "text-muted": "#596170",
        "text-disabled": "#a3a7ad",
        "block-cursor-background": "#d5e4e9",
        "block-cursor-foreground": "#14181f",
        "block-cursor-text-style": "none",
        "block-cursor-blurred-background": "#e6eded",
        "input-cursor-background": "#1c6b83",
        "input-cursor-foreground": "#fbfaf7",
        "input-selection-background": "#1c6b83 22%",
        "scrollbar": "#d8d4c8",
        "scrollbar-hover": "#c2bdae",
        "scrollbar-active": "#1c6b83",
        "scrollbar-background": "#fbfaf7",
        "scrollbar-background-hover": "#fbfaf7",
        "scrollbar-background-active": "#fbfaf7",
        "scrollbar-corner-color": "#fbfaf7",
        "border": "#1c6b83",
        "border-blurred": "#d8d4c8",
        "button-color-foreground": "#fbfaf7",
        "markdown-h1-color": "#96611a",
        "markdown-h2-color": "#96611a",
        "markdown-h3-color": "#1c6b83",
    },
)
OWN = (DARK, LIGHT)
NAMES = (*(theme.name for theme in OWN), *BUILTIN_THEMES)


def checked_theme(name: str) -> str:
    """The name of a theme.

    Raises:
        KvchatError: there is no such theme; names them all.
    """
    if name not in NAMES:
        raise KvchatError(f"There is no theme {name}. Themes: {', '.join(NAMES)}.")
    return name
