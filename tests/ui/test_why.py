"""F6 explains the last miss; what a full context dropped is said where it happened."""

import pytest
from textual.widgets import Static

from kvchat.contract import Evicted, Miss
from kvchat.ui.formatting import visible
from kvchat.ui.screens.dialogs import Explanation
from tests.support.screen_driver import Chat, running, saved_conversation
from tests.support.scripted_engine import ScriptedEngine
from tests.ui.test_branches import SIZES, held_before
from tests.ui.test_hostile import HOSTILE, WORST, assert_harmless

MISS = Miss("system prompt edited", 1100, 2.26, 3, " You are", "Be brief\n", 0, "system\n")
NOTHING = "Nothing was read again"


async def why(chat: Chat) -> str:
    """F6."""
    await chat.press("f6")
    await chat.dialog(Explanation)
    return str(chat.app.screen.query_one(".text", Static).content)


@pytest.mark.parametrize("size", SIZES)
async def test_f6_tells_the_cause_the_price_and_the_place(size: tuple[int, int]) -> None:
    engine = ScriptedEngine().answers("Fine", reuse_note=MISS.cause, miss=MISS)
    async with running(engine, size=size) as chat:
        await chat.ask("Go")
        explained = await why(chat)
        assert explained.splitlines() == [
            "system prompt edited",
            "",
            "Read again: 1,100 tokens, about 2.3 s.",
            "",
            "First difference: token 3, in the system prompt:",
            "cached  system⏎␣You are",
            "now     system⏎Be brief⏎",
        ]
        for line in explained.splitlines():
            await chat.until_visible(line)
        await chat.press("f6")
        await chat.until(lambda: chat.app.screen is chat.screen, "it is closed")


@pytest.mark.parametrize("size", SIZES)
async def test_f6_without_a_miss_says_so(size: tuple[int, int]) -> None:
    async with running(size=size) as chat:
        assert (await why(chat)).startswith(NOTHING)
        await chat.press("escape")
        await chat.ask("Go")
        assert (await why(chat)).startswith(NOTHING)


async def test_a_miss_without_a_place_and_a_price_tells_neither() -> None:
    engine = ScriptedEngine().answers("Fine", miss=Miss("not read since the engine started", 1, None))
    async with running(engine) as chat:
        await chat.ask("Go")
        assert await why(chat) == "not read since the engine started\n\nRead again: 1 token."


async def test_a_difference_in_a_message_names_the_message() -> None:
    engine = ScriptedEngine().answers("Fine", miss=Miss("message 2 edited", 7, 0.1, 40, "", "x", 2))
    async with running(engine) as chat:
        await chat.ask("Go")
        explained = await why(chat)
        assert "token 40, in message 2:" in explained
        assert "cached  (nothing)" in explained


async def test_the_miss_is_that_of_the_last_turn() -> None:
    engine = ScriptedEngine().answers("Fine", reuse_note=MISS.cause, miss=MISS).answers("Again")
    async with running(engine) as chat:
        await chat.ask("Go")
        await chat.ask("On")
        assert (await why(chat)).startswith(NOTHING)


async def test_of_a_turn_before_the_program_started_its_note_is_told() -> None:
    engine = ScriptedEngine().answers("Fine", reuse_note="system prompt edited", miss=MISS)
    async with running(engine) as chat:
        await chat.ask("Go")
        talk = chat.session.current.id
        await chat.press("ctrl+n")
        assert (await why(chat)).startswith(NOTHING)
        await chat.press("escape")
        chat.session.open(talk)
        await chat.screen.controller.opened()
        assert await why(chat) == "system prompt edited"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_hostile_difference_is_harmless_and_stays_on_its_line(text: str) -> None:
    engine = ScriptedEngine().answers(
        "Fine", reuse_note=text, miss=Miss(text, 7, 0.1, 40, text, text, 1, text)
    )
    async with running(engine) as chat:
        await chat.ask("Go")
        explained = await why(chat)
        assert len(explained.split("\n")) == 7
        await chat.pilot.pause()
        assert_harmless(chat)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        (" a", "␣a"),
        ("a ", "a␣"),
        ("a  b", "a␣␣b"),
        ("a\n\tb", "a⏎⇥b"),
        (" ", "␣"),
        ("", "(nothing)"),
        ("\x1b[31m", "[31m"),
        ("`[/b]`", "`[/b]`"),
    ],
)
def test_spaces_that_matter_can_be_seen(text: str, shown: str) -> None:
    assert visible(text) == shown


async def test_why_while_an_answer_streams() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Half", gate, " done", miss=MISS)
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Half")
        assert (await why(chat)).startswith(MISS.cause)
        gate.open()
        await chat.until_idle()
        await chat.press("escape")
        assert chat.answers() == ["Half done"]


# --- a full context --------------------------------------------------------------------------------------


TALK = tuple((role, f"{role} {n}") for n in range(3) for role in ("user", "assistant"))


@pytest.mark.parametrize("size", SIZES)
async def test_what_was_dropped_is_said_above_the_answer_and_dimmed(size: tuple[int, int]) -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Half", Evicted("", 512, "2 turns left out", 4), gate, " done")
    async with running(engine, held_before(*TALK), size=size) as chat:
        assert not any(chat.dimmed())
        await chat.send("Go on")
        await chat.until_noticed("The context was full: 2 turns left out.")
        await chat.until_reached(gate)
        assert chat.dimmed() == [True] * 4 + [False] * 4
        above = [child for child in chat.transcript.children if child.display][-2]
        assert above.has_class("notice")
        gate.open()
        await chat.until_idle()
        assert chat.answers()[-1] == "Half done"
        assert chat.figure("evicted") == "512"
        assert chat.session.current.evicted_messages == 4
        await chat.screen.controller.opened()
        assert chat.dimmed() == [True] * 4 + [False] * 4
        await chat.ask("Next")
        assert engine.requests[-1].evicted_messages == 4


async def test_what_was_dropped_is_there_on_coming_back_to_the_answer() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Half", Evicted("", 512, "2 turns left out", 4), gate, " done")
    async with running(engine, held_before(*TALK)) as chat:
        talk = chat.session.current.id
        await chat.send("Go on")
        await chat.until_reached(gate)
        await chat.press("ctrl+n")
        assert chat.notices() == []
        chat.session.open(talk)
        await chat.screen.controller.opened()
        assert chat.dimmed() == [True] * 4 + [False] * 4
        assert chat.notices() == ["The context was full: 2 turns left out."]
        assert chat.figure("evicted") == "512"
        gate.open()
        await chat.until_idle()


async def test_what_is_dropped_elsewhere_dims_nothing_here() -> None:
    engine = ScriptedEngine()
    before, after = engine.gate(), engine.gate()
    engine.answers("Half", before, Evicted("", 512, "2 turns left out", 4), after, " done")
    session = held_before(*TALK)
    other = saved_conversation(session._store, *TALK, title="Other")
    async with running(engine, session) as chat:
        talk = session.current.id
        await chat.send("Go on")
        await chat.until_reached(before)
        session.open(other.id)
        await chat.screen.controller.opened()
        before.open()
        await chat.until_reached(after)
        after.open()
        await chat.until_idle()
        assert not any(chat.dimmed())
        assert chat.notices() == []
        assert chat.store.load(talk).evicted_messages == 4
        assert chat.store.load(other.id).evicted_messages == 0


async def test_a_hostile_note_of_an_eviction_is_harmless() -> None:
    engine = ScriptedEngine().answers("Half", Evicted("", 512, WORST, 2), " done")
    async with running(engine, held_before(*TALK)) as chat:
        await chat.ask("Go on")
        assert "a[0] = b[i]" in chat.notices()[0]
        assert_harmless(chat)
