"""An answer on its way to the screen: complete, in order, and stopped where the user stops it."""

import pytest

from kvchat.chat import session as conductor
from kvchat.contract import FinishReason, PrefillProgress
from kvchat.errors import KvchatError
from kvchat.ui.widgets.markdown import MarkdownText
from tests.support.screen_driver import Chat, running
from tests.support.scripted_engine import Fails, ScriptedEngine

PART = (
    "## Part {n}\n\nThe **word** number {n} has `code[{n}]`.\n\n"
    "```python\nfor i in range({n}):\n    print(a[i])\n```\n\n- one\n  - two\n- three\n\n"
    "| a | b |\n|---|---|\n| {n} | 2 |\n\n"
)
PARTS = [PART.replace("{n}", str(n)) for n in range(4)]
LONG = "".join(PARTS)


def blocks(chat: Chat) -> list[str]:
    """What the last answer is drawn as, line by line."""
    text = chat.transcript.query(MarkdownText).last()
    return [strip.text.rstrip() for strip in text.lines(text.size.width)]


async def test_the_engine_is_asked_and_its_answer_stands_on_the_screen() -> None:
    engine = ScriptedEngine().answers("The **Brenner** ", "is open ", "all year.")
    async with running(engine) as chat:
        await chat.ask("Which pass is open?")
        assert [m.text for m in engine.requests[0].messages] == ["Which pass is open?"]
        assert chat.questions() == ["Which pass is open?"]
        assert chat.answers() == ["The **Brenner** is open all year."]
        await chat.until_visible("The Brenner is open all year.")
        assert chat.kept() == [
            ("user", "Which pass is open?", None),
            ("assistant", "The **Brenner** is open all year.", "stop"),
        ]
        assert chat.prompt.text == ""


async def test_a_second_turn_reads_the_first_one_with_its_token_ids() -> None:
    engine = ScriptedEngine().answers("One", " two")
    async with running(engine) as chat:
        await chat.ask("First")
        await chat.ask("Second")
        assert [(m.role, m.text) for m in engine.requests[1].messages] == [
            ("user", "First"),
            ("assistant", "One two"),
            ("user", "Second"),
        ]
        assert engine.requests[1].messages[1].token_ids == (1, 2)
        assert chat.questions() == ["First", "Second"]
        assert chat.answers() == ["One two", "ok"]


@pytest.mark.parametrize("length", [1, 17, 1000])
async def test_nothing_is_lost_however_small_the_pieces_are(length: int) -> None:
    engine = ScriptedEngine().answers(
        *[LONG[start : start + length] for start in range(0, len(LONG), length)]
    )
    async with running(engine) as chat:
        await chat.ask("Write")
        assert chat.answers() == [LONG]
        await chat.until_visible("number 3 has")
        assert chat.kept()[-1][1] == LONG


@pytest.mark.parametrize(
    "parts",
    [
        PARTS,
        ["One\u2028two\u2028three\u2028four\n\nfive", " more\n\nfo", "ur\u2029five\n\nsix\n\n", "se", "ven"],
        ["```\ncode", " goes on\r\n\r\nand on", "\nand never ends"],
    ],
    ids=["markdown", "unusual line ends", "open fence"],
)
async def test_an_answer_drawn_piece_by_piece_looks_as_one_drawn_at_once(parts: list[str]) -> None:
    engine = ScriptedEngine()
    gates = [engine.gate() for _ in parts]
    engine.answers(*[step for pair in zip(parts, gates, strict=True) for step in pair])
    async with running(engine) as chat:
        await chat.send("Write")
        for gate in gates:
            await chat.until_reached(gate)
            await chat.until(lambda: nothing_undrawn(chat), "everything that came is drawn")
            gate.open()
        await chat.until_idle()
        streamed = blocks(chat)
        await chat.screen.controller.opened()
        await chat.until(lambda: chat.transcript.query(MarkdownText).last().size.width, "it is laid out")
        assert len(streamed) > 1 or "```" in parts[0]
        assert blocks(chat) == streamed


def nothing_undrawn(chat: Chat) -> bool:
    """Whether the answer under way is drawn as far as it came."""
    pending, streaming = chat.session.pending, chat.transcript.streaming
    assert pending is not None
    return bool(pending.text) and streaming is not None and not streaming._undrawn


async def test_text_is_on_the_screen_while_the_rest_is_still_being_written() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers(*"Half of ", gate, "it.")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Half of ")
        await chat.until_visible("Half of")
        assert chat.screen.answering
        assert "Esc stops" in chat.status()
        gate.open()
        await chat.until_idle()
        assert chat.answers() == ["Half of it."]
        assert "ready" in chat.status()


async def test_a_long_prefill_says_how_far_it_is() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers(PrefillProgress("", 1, 1_000_000_000), gate, "done")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_reached(gate)
        await chat.until(lambda: "reading 1 of 1,000,000,000" in chat.panel(), "the panel shows progress")
        gate.open()
        await chat.until_idle()
        assert "reading 1" not in chat.panel()


async def test_escape_stops_in_mid_answer_and_what_there_is_stays() -> None:
    engine = ScriptedEngine()
    engine.answers("This much", engine.gate(), " and no more")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("This much")
        await chat.press("escape")
        await chat.until_idle()
        assert engine.stops == [engine.requests[0].turn]
        assert chat.answers() == ["This much"]
        assert "stopped" in chat.notes()[0]
        await chat.until_visible("This much")
        assert chat.kept() == [("user", "Go", None), ("assistant", "This much", "cancelled")]


async def test_stopping_before_the_first_token_leaves_an_empty_answer() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers(gate, "never said")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_reached(gate)
        await chat.press("escape")
        await chat.until_idle()
        assert chat.answers() == [""]
        assert "stopped" in chat.notes()[0]
        await chat.ask("Again")
        assert chat.answers()[-1] == "ok"


async def test_an_empty_answer_is_an_answer() -> None:
    engine = ScriptedEngine().answers()
    async with running(engine) as chat:
        await chat.ask("Say nothing")
        assert chat.answers() == [""]
        assert "wrote 0" in chat.notes()[0]
        assert chat.kept()[-1] == ("assistant", "", "stop")


@pytest.mark.parametrize(
    ("finish", "words"),
    [(FinishReason.LENGTH, "--max-tokens"), (FinishReason.CONTEXT, "context is full")],
)
async def test_an_answer_that_was_cut_says_why(finish: FinishReason, words: str) -> None:
    engine = ScriptedEngine().answers("Cut", finish=finish)
    async with running(engine) as chat:
        await chat.ask("Go")
        assert words in chat.notes()[0]
        await chat.until_visible(words)


async def test_why_less_was_reused_stands_under_the_answer_and_in_the_panel() -> None:
    engine = ScriptedEngine().answers("Cold", reuse_note="another tokenizer")
    async with running(engine) as chat:
        await chat.ask("Go")
        assert "another tokenizer" in chat.notes()[0]
        assert "another tokenizer" in chat.panel()


async def test_a_turn_that_fails_keeps_the_question_and_says_why() -> None:
    engine = ScriptedEngine().answers(Fails("The prompt is longer than the context."))
    async with running(engine) as chat:
        await chat.ask("Far too long")
        assert chat.notices() == ["The prompt is longer than the context."]
        assert chat.questions() == ["Far too long"]
        assert chat.answers() == []
        assert chat.kept() == [("user", "Far too long", None)]


async def test_a_turn_that_fails_in_mid_answer_keeps_what_there_is() -> None:
    engine = ScriptedEngine().answers("So far", Fails("Out of memory."))
    async with running(engine) as chat:
        await chat.ask("Go")
        assert chat.answers() == ["So far"]
        assert "error" in chat.notes()[0]
        assert chat.kept()[-1] == ("assistant", "So far", "error")


async def test_a_partial_answer_is_in_the_store_before_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conductor, "PARTIAL_EVERY_S", 0.0)
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Half", gate, " done")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Half")
        assert chat.kept()[-1] == ("assistant", "Half", None)
        gate.open()
        await chat.until_idle()
        assert chat.kept() == [("user", "Go", None), ("assistant", "Half done", "stop")]


async def test_sending_while_an_answer_is_written_keeps_the_typed_text() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Long", gate)
    async with running(engine) as chat:
        await chat.send("First")
        await chat.until_drawn("Long")
        await chat.send("Too early")
        await chat.until_said("Esc stops it")
        assert chat.prompt.text == "Too early"
        assert len(engine.requests) == 1
        gate.open()
        await chat.until_idle()
        await chat.press("enter")
        await chat.until(lambda: len(engine.requests) == 2, "the kept text is sent")
        assert engine.requests[1].messages[-1].text == "Too early"


async def test_a_message_sent_before_the_engine_is_ready_is_answered_once_it_is() -> None:
    engine = ScriptedEngine(loads_at_once=False)
    async with running(engine, ready=False) as chat:
        await chat.until(lambda: "loading scripted" in chat.status(), "the engine is loading")
        await chat.send("Early")
        await chat.until(lambda: engine.requests, "the engine is asked")
        assert chat.questions() == ["Early"]
        assert "ready" not in chat.status()
        engine.loading.open()
        await chat.until_drawn("ok")
        await chat.until_idle()
        assert "ready" in chat.status()


async def test_regenerating_writes_the_answer_again_on_a_new_branch() -> None:
    engine = ScriptedEngine().answers("First try").answers("Second try")
    async with running(engine) as chat:
        await chat.ask("Question")
        await chat.press("ctrl+r")
        await chat.until(lambda: chat.answers() == ["Second try"], "the answer is written again")
        await chat.until_idle()
        assert [m.text for m in engine.requests[1].messages] == ["Question"]
        assert [text for _, text, _ in chat.kept()] == ["Question", "Second try"]
        assert {m.text for m in chat.store._messages(chat.session.current.id)} >= {"First try"}


async def test_regenerating_nothing_says_so() -> None:
    async with running() as chat:
        await chat.press("ctrl+r")
        await chat.until_said("no answer to write again")


FULL = "The conversations can't be saved: the disk is full."


def full(*_given: object, **_named: object) -> None:
    raise KvchatError(FULL)


async def test_a_message_that_cannot_be_saved_goes_back_into_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running() as chat:
        with monkeypatch.context() as broken:
            broken.setattr(chat.store, "add_message", full)
            await chat.send("Important")
            await chat.until_said(FULL)
            assert chat.prompt.text == "Important"
            assert chat.questions() == []
            assert chat.engine.requests == []
        await chat.press("enter")
        await chat.until_drawn("ok")


async def test_an_answer_that_cannot_be_saved_can_still_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conductor, "PARTIAL_EVERY_S", 0.0)
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Read ", gate, "all ", "of it")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Read ")
        monkeypatch.setattr(chat.store, "update_message", full)
        gate.open()
        await chat.until_idle()
        await chat.until_said(FULL)
        assert chat.answers() == ["Read all of it"]
        assert "wrote 3" in chat.notes()[0]
        assert "ready" in chat.status()
        await chat.ask("Again")
        assert chat.questions() == ["Go", "Again"]
