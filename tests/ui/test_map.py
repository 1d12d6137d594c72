"""F5, the map of a cache: every cell says whose it is, where and how; the cursor says the rest."""

from dataclasses import replace

import pytest

from kvchat.contract import CacheBlock, CacheMap, Inspect, LayerGroup, PromptMessage
from kvchat.ui.screens.cache_map import MapScreen, block_words, size_words, summary
from kvchat.ui.widgets.cache_grid import (
    EIGHT_BITS,
    EXACT,
    FOUR_BITS,
    GONE,
    ON_DISK,
    OUT_OF_SIGHT,
    SAVED,
    SHARED,
    SINK,
    STATE,
    CacheGrid,
    glyph_of,
    legend,
    lines_of,
    mark_of,
    message_names,
)
from tests.support.screen_driver import Chat, running
from tests.support.scripted_engine import ScriptedEngine

FULL = LayerGroup("full", 30, 0, 1_000_000)
SLIDING = LayerGroup("sliding", 4, 512, 1_000)
RECURRENT = LayerGroup("recurrent", 6, 0, 1_000)
BLOCK = CacheBlock(16, 16, 1, "user", "Which pass?", True, True, "bf16", 368_640)
NAMES = ["system", "you · 1", "answer · 1"]


def whole(*blocks: CacheBlock, layers: tuple[LayerGroup, ...] = (FULL,)) -> CacheMap:
    return CacheMap("id", blocks, layers, 31_000_000, 0)


@pytest.mark.parametrize(
    ("changes", "layer", "glyph"),
    [
        ({}, FULL, EXACT),
        ({"precision": "fp32"}, FULL, EXACT),
        ({"precision": "int8"}, FULL, EIGHT_BITS),
        ({"precision": "int4"}, FULL, FOUR_BITS),
        ({"in_memory": False}, FULL, ON_DISK),
        ({"in_memory": False, "on_disk": False}, FULL, GONE),
        ({}, SLIDING, OUT_OF_SIGHT),
        ({"start": 500}, SLIDING, EXACT),
        ({}, RECURRENT, STATE),
        ({"in_memory": False, "on_disk": False}, RECURRENT, GONE),
    ],
)
def test_a_cell_looks_like_what_it_holds(changes: dict[str, object], layer: LayerGroup, glyph: str) -> None:
    assert glyph_of(replace(BLOCK, **changes), layer, 1000) == glyph  # type: ignore[arg-type]


def test_sinks_and_what_is_shared_have_a_mark() -> None:
    assert mark_of(BLOCK) == SAVED
    assert mark_of(replace(BLOCK, on_disk=False)) == mark_of(replace(BLOCK, in_memory=False)) == " "
    assert mark_of(replace(BLOCK, sink=True)) == mark_of(replace(BLOCK, sink=True, shared=True)) == SINK
    assert mark_of(replace(BLOCK, shared=True)) == SHARED


def test_the_legend_explains_what_can_be_seen_and_nothing_else() -> None:
    cell = "a cell is up to 16 tokens"
    assert legend(whole(BLOCK), 99) == f"{cell}   {EXACT} exact   {SAVED} on disk too"
    assert legend(whole(BLOCK), 40) == f"{cell}   {EXACT} exact\n{SAVED} on disk too"
    gone = replace(BLOCK, in_memory=False, on_disk=False)
    sink = whole(replace(BLOCK, sink=True), gone)
    assert legend(sink, 99) == f"{cell}   {EXACT} exact   {GONE} evicted   {SINK} sink"
    many = (BLOCK, replace(BLOCK, start=900, tokens=900))
    assert f"{OUT_OF_SIGHT} out of the window" in legend(whole(*many, layers=(SLIDING,)), 99)


def test_messages_are_named_as_the_transcript_numbers_them() -> None:
    roles = ["system", "user", "assistant", "user"]
    assert message_names([PromptMessage(role, "") for role in roles]) == [
        "system",
        "you · 1",
        "answer · 1",
        "you · 2",
        "answer · 2",
    ]


def test_every_message_begins_a_line_and_a_long_one_goes_on_in_the_next() -> None:
    blocks = [replace(BLOCK, message=message) for message in (0, 1, 1, 1, 2, None)]
    lines = lines_of(blocks, NAMES, 2)
    assert [(line.label, list(line.cells)) for line in lines] == [
        ("system", [0]),
        ("you · 1", [1, 2]),
        ("", [3]),
        ("answer · 1", [4]),
        ("left over", [5]),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["tokens 16–31 (16)", "you · 1", "bf16, 368.6 KB in memory", "on disk"]),
        ({"tokens": 1}, ["token 16 (1)"]),
        ({"in_memory": False}, ["on disk"]),
        ({"in_memory": False, "on_disk": False}, ["evicted"]),
        ({"sink": True}, ["a sink"]),
        ({"shared": True}, ["shared with “Bread”"]),
        ({"message": None}, ["no part of the conversation any more"]),
    ],
)
def test_everything_about_a_cell_is_said(changes: dict[str, object], words: list[str]) -> None:
    said = block_words(replace(BLOCK, **changes), "you · 1", ["Bread"])  # type: ignore[arg-type]
    assert all(word in said for word in words)
    assert ("in memory" in said) is bool(changes.get("in_memory", True))


def test_the_summary_counts_what_is_held_and_what_is_gone() -> None:
    gone = replace(BLOCK, in_memory=False, on_disk=False, tokens=5)
    assert summary(whole(BLOCK, gone)) == "16 tokens in 31.0 MB of memory · 5 tokens evicted"
    assert "12.0 MB on disk" in summary(replace(whole(BLOCK), disk_bytes=12_000_000))
    assert "Nothing is cached: you dropped it" in summary(replace(whole(), note="you dropped it"))


@pytest.mark.parametrize(("count", "words"), [(0, "0.0 KB"), (23_040, "23.0 KB"), (31_000_000, "31.0 MB")])
def test_small_things_have_small_units(count: int, words: str) -> None:
    assert size_words(count) == words


def cell(chat: Chat) -> str:
    """What is said of the cell under the cursor."""
    return str(chat.app.screen.query_one("#map-cell").content)  # type: ignore[attr-defined]


async def test_f5_shows_the_cache_and_the_cursor_walks_over_it() -> None:
    async with running() as chat:
        await chat.ask("Which pass is open in May?")
        await chat.press("f5")
        await chat.dialog(MapScreen)
        await chat.until_visible("answer · 1")
        assert [type(act) for act in chat.engine.acts] == [Inspect]
        await chat.until(lambda: "answer · 1" in cell(chat), "the cursor starts at the newest cell")
        assert "ok" in cell(chat)
        await chat.press("up")
        await chat.until(lambda: "Which pass is open in May?" in cell(chat), "the cell above is told")
        assert "tokens 0–9 (10) · you · 1 · bf16, 230.4 KB in memory" in cell(chat)
        await chat.press("right")
        await chat.until(lambda: "answer · 1" in cell(chat), "the next cell is told")
        await chat.press("left", "left", "home")
        await chat.until(lambda: "you · 1" in cell(chat), "the first cell is told")
        await chat.press("escape")
        await chat.until(lambda: not isinstance(chat.app.screen, MapScreen), "the map is closed")


async def test_the_mouse_moves_the_cursor() -> None:
    async with running() as chat:
        await chat.ask("Which pass is open in May?")
        await chat.send("/cache map")
        await chat.dialog(MapScreen)
        await chat.until(lambda: "answer · 1" in cell(chat), "the cursor starts at the newest cell")
        await chat.pilot.click(CacheGrid, offset=(13, 0))
        await chat.until(lambda: "you · 1" in cell(chat), "the clicked cell is told")
        await chat.pilot.hover(CacheGrid, offset=(13, 1))
        await chat.until(lambda: "answer · 1" in cell(chat), "the cell under the mouse is told")
        await chat.pilot.hover(CacheGrid, offset=(40, 1))
        assert "answer · 1" in cell(chat)


async def test_layers_of_different_kinds_are_rows() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.ask("Which pass is open in May?")
        block = replace(BLOCK, start=0, message=0)
        newest = replace(BLOCK, start=900, message=1)
        layers = (FULL, SLIDING, RECURRENT)
        engine.map = replace(whole(block, newest, layers=layers), conversation=chat.session.current.id)
        await chat.press("f5")
        await chat.dialog(MapScreen)
        await chat.until_visible("4 sliding layers (the latest 512 tokens)")
        rows = chat.app.screen.query_one(CacheGrid).render().plain.splitlines()
        assert [row.split() for row in rows[:3]] == [
            ["you", "·", "1", EXACT + SAVED],
            ["sliding", EXACT + SAVED],
            ["recurrent", STATE + SAVED],
        ]


async def test_without_a_message_the_map_says_what_to_do() -> None:
    async with running() as chat:
        await chat.press("f5")
        await chat.dialog(MapScreen)
        await chat.until_visible("write a message")
        assert chat.engine.acts == []


async def test_while_an_answer_is_written_the_map_waits_and_a_dead_engine_is_told() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("a", gate, "b")
    async with running(engine) as chat:
        await chat.send("Which pass is open in May?")
        await chat.until_reached(gate)
        await chat.press("f5")
        await chat.dialog(MapScreen)
        await chat.until_visible("waits for its end")
        gate.open()
        await chat.until_visible("you · 1")
        engine.die("The engine was killed (signal 9).")
        await chat.until_visible("The engine ended")


async def test_escape_sequences_in_a_cell_stay_in_it() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.ask("Which pass is open in May?")
        evil = replace(BLOCK, start=0, text="[/b]\x1b]0;x\x07[red]")
        engine.map = replace(whole(evil), conversation=chat.session.current.id)
        await chat.press("f5")
        await chat.dialog(MapScreen)
        await chat.until(lambda: "[/b]" in cell(chat), "the text is shown")
        assert "\x1b" not in cell(chat)
