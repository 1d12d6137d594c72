"""The three modes of the cache, felt and compared; and the panel that shows them."""

import pytest

from kvchat.contract import CacheMode
from kvchat.ui.widgets.panel import MEANING, big_letters
from tests.support.screen_driver import Chat, running, session_over
from tests.support.scripted_engine import ScriptedEngine


def shows_mode(chat: Chat, mode: CacheMode) -> bool:
    return all(line in chat.panel() for line in (*big_letters(mode.value), MEANING[mode]))


async def test_f4_takes_the_next_mode_and_the_next_turn_carries_it() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        for mode in (CacheMode.ON, CacheMode.TURN, CacheMode.OFF, CacheMode.ON):
            assert shows_mode(chat, mode)
            await chat.ask(f"In mode {mode.value}")
            assert engine.requests[-1].mode is mode
            assert f"cache {mode.value}" in chat.notes()[-1]
            await chat.press("f4")


async def test_f4_in_mid_answer_holds_from_the_next_turn_on() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Slow", gate)
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Slow")
        await chat.press("f4")
        gate.open()
        await chat.until_idle()
        await chat.ask("Next")
        assert [request.mode for request in engine.requests] == [CacheMode.ON, CacheMode.TURN]


async def test_the_mode_belongs_to_the_conversation_and_is_saved_with_it() -> None:
    session = session_over()
    async with running(session=session) as chat:
        await chat.ask("Mine")
        await chat.press("f4")
        first = session.current.id
        assert chat.store.load(first).mode is CacheMode.TURN
        await chat.press("ctrl+n")
        assert shows_mode(chat, CacheMode.ON)
        session.open(first)
        await chat.screen.controller.opened()
        assert shows_mode(chat, CacheMode.TURN)


async def test_the_panel_compares_the_last_turn_of_each_mode() -> None:
    async with running() as chat:
        await chat.ask("One")
        assert chat.compared() == {
            "on": ["0.01", "100", "6"],
            "turn": ["–", "–", "–"],
            "off": ["–", "–", "–"],
        }
        assert "faster than" not in chat.panel()
        await chat.press("f4")
        await chat.ask("Two")
        await chat.press("f4")
        await chat.ask("Three")
        # every question has five tokens and every answer five in the next prompt
        assert chat.compared() == {
            "on": ["0.01", "100", "6"],
            "turn": ["0.03", "80.0", "16"],
            "off": ["0.05", "10.0", "26"],
        }
        assert "TTFT 3.0× sooner than turn" in chat.panel()
        assert "decode 10.0× faster than off" in chat.panel()


async def test_the_panel_counts_what_was_reused_read_and_written() -> None:
    engine = ScriptedEngine().answers("a", "b", "c").answers("d", "e")
    async with running(engine) as chat:
        await chat.ask("One two three")
        await chat.ask("Four")
        # the second prompt: (3 + 4) + (1 + 4) + (1 + 4) words and marks, of which 7 + 3 were kept
        assert [chat.figure(name) for name in ("reused", "read", "written")] == ["10", "7", "2"]


async def test_the_panel_counts_along_while_an_answer_is_written() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("a", "b", "c", gate)
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_reached(gate)
        await chat.until(lambda: chat.figure("written") == "3", "the panel counts three tokens")
        gate.open()
        await chat.until_idle()


async def test_f3_hides_and_shows_the_panel() -> None:
    async with running() as chat:
        assert chat.shows("#panel")
        await chat.press("f3")
        assert not chat.shows("#panel")
        await chat.until(lambda: "this turn" not in chat.visible(), "the panel is painted over")
        await chat.press("f3")
        assert chat.shows("#panel")
        await chat.until_visible("this turn")


async def test_f3_shows_the_panel_where_the_terminal_is_narrow() -> None:
    async with running(size=(60, 20)) as chat:
        assert not chat.shows("#panel")
        assert not chat.shows("#side")
        await chat.press("f3")
        assert chat.shows("#panel")
        await chat.until_visible("kept across turns")


@pytest.mark.parametrize("columns", [150, 111, 83, 60, 40, 20, 5, 1])
async def test_the_program_runs_in_a_terminal_of_any_width(columns: int) -> None:
    async with running(size=(columns, 12)) as chat:
        await chat.ask("Is this narrow?")
        await chat.press("f3", "f3", "ctrl+s", "ctrl+s")
        await chat.pilot.resize_terminal(120, 30)
        await chat.until_visible("Is this narrow?")
        assert chat.answers() == ["ok"]
