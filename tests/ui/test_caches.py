"""F8: every cache, where it is, what it takes, and what each key does to it."""

from dataclasses import replace

import pytest
from textual.widgets import DataTable, Static

from kvchat.chat.conversation_commands import delete_now
from kvchat.chat.session import Session
from kvchat.contract import CacheCommand, Drop, Pin, PoolState, SetBudget, Spill, Warm, WarmCache
from kvchat.ui.screens.caches import CachesScreen, budget_line
from kvchat.ui.screens.dialogs import AskLine
from tests.support.screen_driver import Chat, running, saved_conversation, session_over
from tests.support.scripted_engine import ScriptedEngine
from tests.ui.test_branches import SIZES
from tests.ui.test_hostile import CONTROLS, HOSTILE, MARKUP, assert_harmless

TITLES = ("Pinned", "Going", "Disk", "Cold")


def several_caches(*titles: str) -> tuple[Session, ScriptedEngine]:
    """Four conversations in this order: pinned in memory, next to go, on disk, cold."""
    session = session_over()
    store = session._store
    talks = [(("user", "Hi"), ("assistant", "Ho"))] * len(TITLES)
    given = titles or TITLES
    names = [
        saved_conversation(store, *talk, title=title).id
        for talk, title in reversed(list(zip(talks, given, strict=True)))
    ][::-1]
    engine = ScriptedEngine().holds(
        WarmCache(names[0], 1347, 31_000_000, kv_dtype="bf16", pinned=True),
        WarmCache(names[1], 20, 1_250_000, 94_000_000, "int8", next_evicted=True),
        WarmCache(names[2], 0, 0, 2_500_000_000),
    )
    return session, engine


async def opened(chat: Chat) -> CachesScreen:
    """F8."""
    await chat.press("f8")
    await chat.dialog(CachesScreen)
    screen = chat.app.screen
    assert isinstance(screen, CachesScreen)
    return screen


def cells(screen: CachesScreen) -> list[list[str]]:
    """The table, as words."""
    table = screen.query_one(DataTable)
    return [[str(cell).strip() for cell in table.get_row_at(row)] for row in range(table.row_count)]


def budget(screen: CachesScreen) -> str:
    return str(screen.query_one("#budget", Static).content)


def named(chat: Chat, title: str) -> str:
    return next(s.id for s in chat.session.conversations() if s.title == title)


@pytest.mark.parametrize("size", SIZES)
async def test_every_conversation_has_a_row_with_where_its_cache_is(size: tuple[int, int]) -> None:
    session, engine = several_caches()
    async with running(engine, session, size=size) as chat:
        screen = await opened(chat)
        assert cells(screen) == [
            ["● in memory", "Pinned", "31.0 MB", "", "pinned", "bf16", "1,347", ""],
            ["● in memory", "Going", "1.2 MB", "94.0 MB", "next to go", "int8", "20", ""],
            ["◐ on disk", "Disk", "", "2.50 GB", "", "", "", ""],
            ["○ cold", "Cold", "", "", "", "", "", ""],
        ]
        assert "32.2 MB of 2.00 GB" in budget(screen)
        assert "2.59 GB of 8.00 GB" in budget(screen)
        for words in ("KV caches", "● in memory", "◐ on disk", "○ cold", "Going", "Esc back"):
            await chat.until_visible(words)


def test_the_budget_names_what_a_draft_model_holds() -> None:
    pool = PoolState((), 43_000_000, 2_000_000_000, 0, 0)
    assert "draft" not in budget_line(pool)
    told = budget_line(replace(pool, draft_bytes=12_000_000))
    assert "memory 43.0 MB of 2.00 GB, the draft model 12.0 MB of it" in told


async def test_the_list_of_conversations_has_the_same_signs() -> None:
    session, engine = several_caches()
    async with running(engine, session) as chat:
        await chat.until(lambda: [line[0] for line in chat.listed()] == [*"●●◐○"], "the signs are there")
        ends = [line[-9:].strip() for line in chat.listed()]
        assert ends == ["31.0 MB", "1.2 MB", "on disk", ""]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("key", "row", "act"),
    [
        ("p", 0, lambda name: Pin(name, False)),
        ("p", 1, lambda name: Pin(name, True)),
        ("e", 1, Spill),
        ("w", 2, Warm),
        ("d", 0, Drop),
        ("delete", 2, Drop),
    ],
    ids=["let go", "pin", "out of memory", "into memory", "drop", "drop with delete"],
)
async def test_each_key_acts_on_the_row_under_the_cursor(
    key: str, row: int, act: type[Drop], size: tuple[int, int]
) -> None:
    session, engine = several_caches()
    async with running(engine, session, size=size) as chat:
        await opened(chat)
        await chat.press(*["down"] * row, key)
        expected: CacheCommand = act(named(chat, TITLES[row]))
        assert engine.acts == [expected]


@pytest.mark.parametrize(
    ("key", "row", "shown"),
    [
        ("p", 1, ["● in memory", "Going", "1.2 MB", "94.0 MB", "pinned, next to go", "int8", "20", ""]),
        ("e", 1, ["◐ on disk", "Going", "", "1.2 MB", "next to go", "int8", "", ""]),
        ("w", 2, ["● in memory", "Disk", "2.50 GB", "2.50 GB", "", "", "", ""]),
        ("d", 0, ["○ cold", "Pinned", "", "", "", "", "", ""]),
    ],
)
async def test_the_table_shows_what_came_of_a_key_and_the_cursor_stays(
    key: str, row: int, shown: list[str]
) -> None:
    session, engine = several_caches()
    async with running(engine, session) as chat:
        screen = await opened(chat)
        await chat.press(*["down"] * row, key)
        await chat.until(lambda: cells(screen)[row] == shown, "the row shows it")
        assert screen.query_one(DataTable).cursor_row == row


async def test_the_table_follows_what_happens_meanwhile() -> None:
    session, engine = several_caches()
    gate = engine.gate()
    engine.answers("Half", gate)
    async with running(engine, session) as chat:
        session.open(named(chat, "Cold"))
        await chat.screen.controller.opened()
        await chat.send("Go")
        await chat.until_drawn("Half")
        screen = await opened(chat)
        names = [row[1] for row in cells(screen)]
        cold = names.index("Cold")
        assert cells(screen)[cold][0] == "○ cold"
        gate.open()
        await chat.until(lambda: cells(screen)[cold][0] == "● in memory", "the answered one is warm")


async def test_a_report_under_the_budget_dialog_is_shown_after_it() -> None:
    session, engine = several_caches()
    async with running(engine, session) as chat:
        screen = await opened(chat)
        await chat.press("b")
        await chat.dialog(AskLine)
        engine._on_status(replace(engine.pool(), caches=()))
        await chat.until(lambda: {row[0] for row in cells(screen)} == {"○ cold"}, "all are cold")
        await chat.press("escape")
        await chat.until(lambda: chat.app.screen is screen, "the dialog is gone")


@pytest.mark.parametrize("size", SIZES)
async def test_b_asks_for_a_budget_and_the_bar_follows(size: tuple[int, int]) -> None:
    session, engine = several_caches()
    async with running(engine, session, size=size) as chat:
        screen = await opened(chat)
        await chat.press("b")
        await chat.dialog(AskLine)
        await chat.press(*"64.5MB", "enter")
        await chat.until(lambda: "32.2 MB of 64.5 MB" in budget(screen), "the budget is another")
        assert engine.acts == [SetBudget(64_500_000)]
        assert chat.app.screen is screen
        await chat.until_visible("of 64.5 MB")


async def test_bad_input_in_the_budget_dialog_changes_nothing() -> None:
    session, engine = several_caches()
    async with running(engine, session, toasts=True) as chat:
        screen = await opened(chat)
        for text in ("lots [/b]", "0", "-5", "1e999"):
            await chat.press("b")
            await chat.dialog(AskLine)
            await chat.press(*text, "enter")
            await chat.until(lambda: chat.app.screen is screen, "the dialog is gone")
        await chat.until_visible("A budget is a size")
        assert engine.acts == []
        assert_harmless(chat)


@pytest.mark.parametrize("key", ["escape", "f8", "q"])
async def test_it_closes(key: str) -> None:
    async with running() as chat:
        await opened(chat)
        await chat.press(key)
        await chat.until(lambda: chat.app.screen is chat.screen, "the screen is closed")
        assert chat.prompt.has_focus


async def test_without_conversations_no_key_does_anything() -> None:
    async with running() as chat:
        screen = await opened(chat)
        await chat.press("p", "e", "w", "d", "down")
        assert cells(screen) == []
        assert chat.engine.acts == []


async def test_without_an_engine_it_says_so() -> None:
    session, engine = several_caches()
    engine.loading.is_open = False
    async with running(engine, session, ready=False) as chat:
        await chat.until(lambda: "loading scripted" in chat.status(), "the engine is loading")
        screen = await opened(chat)
        assert budget(screen) == "The engine is not ready yet."
        assert [row[0] for row in cells(screen)] == ["○ cold"] * 4
        engine.loading.open()
        await chat.until(lambda: "of 2.00 GB" in budget(screen), "the engine is ready")
        assert [row[0][0] for row in cells(screen)] == [*"●●◐○"]


async def test_the_caches_of_an_engine_that_died_are_not_shown() -> None:
    session, engine = several_caches()
    async with running(engine, session) as chat:
        screen = await opened(chat)
        engine.loading.is_open = False
        engine.die("The engine was killed (signal 9).")
        await chat.until(lambda: budget(screen) == "The engine is not ready yet.", "it says so")
        assert [row[0] for row in cells(screen)] == ["○ cold"] * 4
        engine.loading.open()
        await chat.until(lambda: "of 2.00 GB" in budget(screen), "the engine is there again")


async def test_a_deleted_conversation_leaves_no_cache() -> None:
    session, engine = several_caches()
    async with running(engine, session) as chat:
        gone = named(chat, "Disk")
        await delete_now(chat.screen.controller, gone)
        screen = await opened(chat)
        assert [row[1] for row in cells(screen)] == ["Pinned", "Going", "Cold"]


@pytest.mark.parametrize("size", SIZES)
async def test_hostile_titles_are_harmless_in_the_table(size: tuple[int, int]) -> None:
    titles = (HOSTILE["everything"], CONTROLS, MARKUP, HOSTILE["wide"])
    session, engine = several_caches(*titles)
    async with running(engine, session, size=size) as chat:
        screen = await opened(chat)
        assert len(cells(screen)) == 4
        await chat.press("down", "right", "end")
        assert_harmless(chat)


@pytest.mark.parametrize("command", ["/caches", "/budget"])
async def test_the_screen_opens_while_an_answer_streams(command: str) -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Half", gate, " done")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Half")
        await chat.send(command)
        await chat.until(lambda: chat.app.screen is not chat.screen, "it is open")
        gate.open()
        await chat.until_idle()
        await chat.press("escape")
        await chat.until(lambda: chat.app.screen is chat.screen, "it is closed")
        assert chat.answers() == ["Half done"]


async def test_a_list_that_was_left_is_not_drawn_any_more() -> None:
    async with running() as chat:
        await chat.ask("Hello")
        await opened(chat)
        await chat.press("escape")
        await chat.until(lambda: chat.app.screen is chat.screen, "the list is left")
        await chat.ask("Still there?")
        assert chat.answers() == ["ok", "ok"]
