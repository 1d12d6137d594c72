"""Themes, motion, colours, and layouts that hold in every size."""

from itertools import pairwise
from pathlib import Path

import pytest
from rich.segment import Segment
from textual.color import Color
from textual.command import CommandPalette
from textual.widgets import Input

from kvchat.chat.commands import COMMANDS
from kvchat.chat.state import ChatState
from kvchat.config.file import read_config
from kvchat.errors import KvchatError
from kvchat.ui.preferences import Preferences
from kvchat.ui.redraw_rate import FASTEST_S, SLOWEST_S, STILL, STILL_S, pause_after
from kvchat.ui.screens.dialogs import Help
from kvchat.ui.themes import DARK, LIGHT, NAMES, OWN, checked_theme
from kvchat.ui.widgets.key_hints import KeyLine, fitting
from kvchat.ui.widgets.prompt import Prompt
from kvchat.ui.widgets.status import status_content
from tests.support.screen_driver import Chat, rendered, running, saved_conversation, session_over
from tests.support.scripted_engine import ScriptedEngine

READABLE = 4.5
"""Contrast that WCAG 2 asks of text (level AA)."""
SIZES = [(60, 20), (72, 24), (84, 25), (100, 30), (112, 40), (150, 44), (200, 60), (250, 70)]


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
            for c in Color.parse(colour).normalized
        ]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", OWN, ids=lambda theme: theme.name)
@pytest.mark.parametrize(
    "name",
    ["foreground", "text-muted", "text-primary", "text-accent", "text-success", "text-warning", "text-error"],
)
def test_every_text_of_our_themes_can_be_read_on_every_ground(theme: object, name: str) -> None:
    assert theme in OWN
    colours = next(t for t in OWN if t is theme).to_color_system().generate()
    for ground in ("background", "surface", "panel"):
        assert contrast(colours[name], colours[ground]) >= READABLE, (name, ground)


async def test_our_dark_theme_is_the_default_and_slash_theme_takes_another_and_keeps_it(
    tmp_path: Path,
) -> None:
    file = tmp_path / "config.toml"
    async with running(preferences=Preferences(config_file=file)) as chat:
        assert chat.app.theme == DARK.name
        assert not file.exists()
        await chat.send(f"/theme {LIGHT.name}")
        await chat.until(lambda: chat.app.theme == LIGHT.name, "the colours are others")
        await chat.until(file.exists, "the choice is kept")
    assert read_config(file).values == {"theme": LIGHT.name}
    async with running(preferences=Preferences(theme=LIGHT.name)) as chat:
        assert chat.app.theme == LIGHT.name


async def test_slash_theme_alone_offers_the_themes() -> None:
    async with running() as chat:
        await chat.send("/theme")
        await chat.dialog(CommandPalette)
        chat.app.screen.query_one(Input).value = "nord"
        await chat.until_visible("nord")
        await chat.press("enter")
        await chat.until(lambda: chat.app.theme == "nord", "the theme is taken")


async def test_an_unknown_theme_is_refused_with_the_known_ones() -> None:
    async with running() as chat:
        await chat.send("/theme beige")
        await chat.until_said("There is no theme beige. Themes: kvchat-dark, kvchat-light, ")
        assert chat.app.theme == DARK.name
    with pytest.raises(KvchatError):
        checked_theme("")


async def test_every_theme_that_is_named_can_be_had() -> None:
    async with running() as chat:
        assert set(NAMES) == set(chat.app.available_themes)


@pytest.mark.parametrize("reduced", [True, False])
async def test_reduced_motion_is_asked_for(reduced: bool) -> None:
    async with running(preferences=Preferences(reduced_motion=reduced)) as chat:
        assert chat.app.has_class(STILL) is reduced


def test_answers_are_drawn_less_often_where_nothing_is_to_move() -> None:
    assert pause_after(0.0) == FASTEST_S
    assert pause_after(0.0, still=True) == STILL_S
    assert pause_after(10.0) == pause_after(10.0, still=True) == SLOWEST_S


async def test_the_cursor_does_not_blink() -> None:
    async with running() as chat:
        assert not chat.prompt.cursor_blink


async def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with running() as chat:
        await chat.ask("Hello")
        for strip in rendered(chat.screen):
            for segment in strip.apply_filter(chat.app._filters[-1], Color.parse("#000000")):
                assert is_grey(segment), segment


def is_grey(segment: Segment) -> bool:
    colours = [segment.style.color, segment.style.bgcolor] if segment.style else []
    triplets = [colour.triplet for colour in colours if colour and colour.triplet]
    return all(max(triplet) - min(triplet) <= 1 for triplet in triplets)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
async def test_parts_neither_overlap_nor_leave_the_screen(size: tuple[int, int]) -> None:
    session = session_over()
    saved_conversation(session._store, ("user", "Hi"), ("assistant", "Ho"))
    async with running(session=session, size=size) as chat:
        for keys in ((), ("ctrl+s",), ("f3",), ("f3",), ("ctrl+s",)):
            await chat.press(*keys)
            await chat.pilot.pause()
            assert_laid_out(chat, size)


def assert_laid_out(chat: Chat, size: tuple[int, int]) -> None:
    """The parts that are there stand side by side, and there is room to write and to read."""
    names = ("#status", "#side", "#middle", "#panel", "#keys")
    regions = [chat.screen.query_one(name).region for name in names if chat.shows(name)]
    for region in regions:
        assert chat.screen.region.contains_region(region)
    for index, region in enumerate(regions):
        assert not any(region.overlaps(other) for other in regions[index + 1 :])
    assert chat.prompt.region.width >= 24
    assert chat.transcript.region.height >= 3
    assert chat.screen.query_one("#middle").region.contains_region(chat.prompt.region)


@pytest.mark.parametrize("size", [(60, 20), (120, 40)])
async def test_what_is_said_in_passing_covers_nothing_that_is_typed(size: tuple[int, int]) -> None:
    async with running(size=size, toasts=True) as chat:
        await chat.send("/nothing")
        await chat.until_visible("F1 lists")
        said = chat.screen.query("Toast").first().region
        assert not said.overlaps(chat.prompt.region)
        assert not said.overlaps(chat.screen.query_one("#keys").region)
        assert chat.screen.region.contains_region(said)


async def test_beside_narrow_words_there_is_room_for_one_part() -> None:
    async with running(size=(100, 30)) as chat:
        assert chat.shows("#panel")
        await chat.press("ctrl+s")
        assert (chat.shows("#side"), chat.shows("#panel")) == (True, False)
        await chat.press("f3")
        assert (chat.shows("#side"), chat.shows("#panel")) == (False, True)


async def test_resizing_in_mid_stream_loses_nothing() -> None:
    engine = ScriptedEngine()
    gates = [engine.gate() for _ in SIZES]
    steps = [
        step for pair in zip([f"word{n} " for n in range(len(SIZES))], gates, strict=True) for step in pair
    ]
    engine.answers(*steps, "end")
    async with running(engine) as chat:
        await chat.send("Go")
        for size, gate in zip(reversed(SIZES), gates, strict=True):
            await chat.until_reached(gate)
            await chat.pilot.resize_terminal(*size)
            await chat.pilot.pause()
            assert_laid_out(chat, size)
            gate.open()
        await chat.until_idle()
        words = " ".join(f"word{n}" for n in range(len(SIZES)))
        assert chat.answers() == [f"{words} end"]
        await chat.until_visible("end")


def test_the_line_of_keys_keeps_whole_words_only() -> None:
    entries = [(c.name, c.title, f"screen.{c.name}") for c in COMMANDS]
    for narrow, wide in pairwise(range(120)):
        fewer, more = fitting(entries, narrow), fitting(entries, wide)
        assert more[: len(fewer)] == fewer
        assert len("  ".join(f"{key} {word}" for key, word, _ in fewer)) <= narrow
    assert fitting(entries, 10_000) == entries


async def test_a_click_on_the_line_of_keys_does_what_it_says() -> None:
    async with running() as chat:
        await chat.pilot.click(KeyLine, offset=(2, 0))
        await chat.dialog(Help)


async def test_the_mouse_reaches_list_prompt_and_palette() -> None:
    session = session_over()
    saved = saved_conversation(session._store, ("user", "Hi"), ("assistant", "Ho"))
    async with running(session=session) as chat:
        await chat.pilot.click("#conversations", offset=(5, 0))
        await chat.until(lambda: session.current.id == saved.id, "the conversation is open")
        chat.conversations.focus()
        await chat.pilot.click(Prompt)
        await chat.until(lambda: chat.prompt.has_focus, "the prompt has the focus")
        line = str(chat.screen.query_one(KeyLine).render())
        await chat.pilot.click(KeyLine, offset=(line.index("Ctrl+P") + 1, 0))
        await chat.dialog(CommandPalette)


@pytest.mark.parametrize("width", [58, 70, 90, 120, 248])
def test_the_status_fits_and_says_what_is_done(width: int) -> None:
    text = str(
        status_content(ChatState(model_title="A model with a rather long name"), "loading scripted …", width)
    )
    assert len(text) <= width
    assert "loading scripted …" in text
    assert text.startswith("kvchat  cache on")


async def test_an_empty_conversation_and_an_empty_list_teach() -> None:
    engine = ScriptedEngine(loads_at_once=False)
    async with running(engine, ready=False, size=(150, 44)) as chat:
        await chat.until_visible("The model is being loaded. Write already")
        await chat.until_visible("The first message")
        engine.loading.open()
        await chat.until_visible("Write below. A model on this machine answers.")
        await chat.ask("First")
        assert "Write below." not in chat.visible()
        assert "The first message" not in chat.visible()


async def test_nothing_wakes_an_idle_screen() -> None:
    async with running() as chat:
        await chat.ask("Hello")
        await chat.pilot.pause(0.6)
        nodes = [chat.app, *chat.app.screen_stack, *chat.screen.walk_children()]
        # a toast's own timer ends; an interval that is not paused never does
        intervals = [
            timer for node in nodes for timer in node._timers if getattr(timer, "_repeat", 0) is None
        ]
        assert [timer for timer in intervals if timer._active.is_set()] == []
