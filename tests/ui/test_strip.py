"""The strip beside the messages: what it shows of a turn, and that it stands where the messages stand."""

from pathlib import Path

import pytest

from kvchat.chat.conversation import Conversation, Message
from kvchat.chat.store import Store
from kvchat.chat.token_status import ANSWER
from kvchat.contract import TokenStatus
from kvchat.ui.formatting import FATES, fate_words
from kvchat.ui.widgets.strip import ReuseStrip, beside, column
from tests.support.screen_driver import Chat, running, session_over
from tests.support.scripted_engine import ScriptedEngine


def test_each_message_on_the_screen_gets_what_was_done_to_it_and_the_answer_to_come_too() -> None:
    read, written = {TokenStatus.READ: 2}, {TokenStatus.WRITTEN: 7}
    messages = tuple(Message(n, None, "user", "text", "") for n in (5, 7))
    assert beside(Conversation("id", messages=messages), {7: read, 6: written}) == [{}, read, {}]
    assert beside(Conversation("id"), {7: read, ANSWER: written}) == [written]


@pytest.mark.parametrize(
    ("counts", "lines", "drawn"),
    [
        ({}, 3, ""),
        ({TokenStatus.REUSED: 5}, 3, "▒▒▒"),
        ({TokenStatus.REUSED: 1000, TokenStatus.READ: 1}, 3, "▒▒█"),
        ({TokenStatus.REUSED: 3, TokenStatus.READ: 3}, 4, "▒▒██"),
        ({TokenStatus.READ: 1, TokenStatus.WRITTEN: 9}, 1, "▓"),
        ({TokenStatus.EVICTED: 0}, 2, "××"),
        ({TokenStatus.UNCACHED: 4}, 0, ""),
    ],
)
def test_a_column_has_a_line_for_everything_that_was_done(
    counts: dict[TokenStatus, int], lines: int, drawn: str
) -> None:
    assert "".join(FATES[fate][0] for fate in column(counts, lines)) == drawn


def test_no_two_fates_share_a_glyph_or_a_colour() -> None:
    assert len({glyph for glyph, _ in FATES.values()}) == len(FATES) == len(TokenStatus)
    assert len({colour for _, colour in FATES.values()}) == len(FATES)


def test_words_name_the_fate_and_count_where_it_was_counted() -> None:
    assert fate_words({TokenStatus.REUSED: 1204, TokenStatus.READ: 4}) == "reused 1,204 · read 4"
    assert fate_words({TokenStatus.EVICTED: 0}) == "evicted"
    assert fate_words({}) == ""


def drawn(chat: Chat) -> dict[int, str]:
    """Glyphs beside each message, by its place."""
    strip = chat.screen.query_one(ReuseStrip)
    lines = str(strip.render()).split("\n")
    top = chat.transcript.region.y
    found = {}
    for message in chat.transcript.query(".message"):
        rows = range(message.region.y - top, message.region.bottom - top)
        place = message.place  # type: ignore[attr-defined]
        found[place] = "".join(lines[row] for row in rows if 0 <= row < len(lines))
    return found


async def test_the_strip_shows_the_last_turn_beside_each_message() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.ask("Which pass is open?")
        await chat.until(lambda: drawn(chat).get(1), "the strip is drawn")
        await chat.until(lambda: "█" in drawn(chat)[0] and "▓" in drawn(chat)[1], "read, and written")
        await chat.ask("And in winter?")
        await chat.until(lambda: set(drawn(chat).get(0, "")) == {"▒"}, "the first question is reused")
        await chat.until(
            # the script counts more tokens for an answer than it wrote: a part of it was never read
            lambda: [set(drawn(chat)[n]) for n in (1, 2, 3)] == [{"▒", "█"}, {"█"}, {"▓"}],
            "answer reused and read, question read, answer written",
        )


async def test_another_conversation_has_a_strip_of_its_own() -> None:
    async with running() as chat:
        await chat.ask("Which pass is open?")
        await chat.until(lambda: drawn(chat).get(1, "").strip(), "the strip is drawn")
        first = chat.session.current.id
        await chat.press("ctrl+n")
        await chat.until(lambda: drawn(chat) == {}, "nothing stands beside the welcome")
        chat.session.open(first)
        await chat.screen.controller.opened()
        await chat.until(lambda: "▓" in drawn(chat).get(1, ""), "the strip is there again")


async def test_after_a_restart_the_strip_shows_what_the_last_turn_did(tmp_path: Path) -> None:
    path = tmp_path / "kvchat.db"
    async with running(session=session_over(Store(path))) as chat:
        await chat.ask("Which pass is open?")
        await chat.ask("And in winter?")
        await chat.until(lambda: set(drawn(chat).get(0, "")) == {"▒"}, "the first question is reused")
        before = drawn(chat)
    again = session_over(Store(path))
    again.open_latest()
    async with running(session=again) as chat:
        await chat.until(lambda: drawn(chat) == before, "the strip is as it was")


async def test_on_another_branch_nothing_stands_beside_what_the_last_turn_did_not_see() -> None:
    engine = ScriptedEngine().answers("A pass.").answers("Another.")
    async with running(engine) as chat:
        await chat.ask("Which pass is open?")
        await chat.ask("And in winter?")
        await chat.until(lambda: "▓" in drawn(chat).get(3, ""), "the strip is drawn")
        reading = engine.gate()
        engine.answers(reading, "Later.")
        await chat.send("/regen")
        await chat.until(lambda: reading.reached, "it is under way")
        await chat.until(lambda: drawn(chat)[3].isspace(), "nothing of the old answer stands beside the new")
        reading.open()
        await chat.until_idle()
        await chat.until(lambda: "▓" in drawn(chat)[3], "the new answer has its own")
        await chat.send("/undo")
        await chat.until(lambda: list(drawn(chat)) == [0, 1], "two messages stay")
        await chat.until(lambda: drawn(chat)[1].strip(" ") != "", "with what was done to them")
        await chat.screen.run_action("run_command('system', 'Be brief.')")
        await chat.until(lambda: chat.session.current.system_prompt, "the places in the prompt are others")
        await chat.until(lambda: "▒" in drawn(chat)[0], "the messages are the same")


async def test_the_strip_scrolls_with_the_messages() -> None:
    engine = ScriptedEngine().answers("\n\n".join(f"line {n}" for n in range(60)))
    async with running(engine) as chat:
        await chat.ask("Count.")
        await chat.until(lambda: "▓" in drawn(chat).get(1, ""), "the answer's strip is drawn")
        assert "█" not in drawn(chat)[0]
        chat.transcript.scroll_home(animate=False)
        await chat.until(lambda: "█" in drawn(chat)[0], "the question came into view")


@pytest.mark.parametrize("size", [(60, 20), (116, 30), (220, 50)])
async def test_the_strip_stands_right_beside_the_messages(size: tuple[int, int]) -> None:
    async with running(size=size) as chat:
        await chat.ask("Which pass is open?")
        strip = chat.screen.query_one(ReuseStrip)
        messages = chat.transcript.query(".message")
        await chat.until(
            lambda: {message.region.x - 1 for message in messages} == {strip.region.x},
            "it stands beside them",
        )
        await chat.until(lambda: "▓" in drawn(chat).get(1, ""), "the strip is drawn")
