"""The engine's process dies, in mid-answer, at rest, or again and again while it loads."""

import pytest

from kvchat.chat import session as conductor
from kvchat.chat.engine_supervisor import RESTARTS
from kvchat.contract import PrefillProgress
from kvchat.ui.screens.settings import SettingsScreen
from tests.support.screen_driver import running
from tests.support.scripted_engine import NOT_RUNNING, ScriptedEngine

KILLED = "The engine was killed (signal 9)."


@pytest.mark.parametrize("saved_every_s", [0.0, 3600.0], ids=["saved", "not saved yet"])
async def test_death_in_mid_answer_is_told_and_the_next_turn_works(
    saved_every_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conductor, "PARTIAL_EVERY_S", saved_every_s)
    engine = ScriptedEngine()
    engine.answers("Half an ", engine.gate(), "answer").answers("A whole answer")
    async with running(engine) as chat:
        await chat.send("Question")
        await chat.until_drawn("Half an ")
        engine.die(KILLED, "loading weights", "oom: 3 GB wanted")
        await chat.until_idle()
        await chat.until_noticed(KILLED)
        await chat.until_noticed("oom: 3 GB wanted")
        await chat.until_noticed("/regen")
        assert chat.questions() == ["Question"]
        assert chat.answers() == ["Half an "]
        assert chat.kept() == [("user", "Question", None), ("assistant", "Half an ", "error")]
        await chat.until(lambda: "ready" in chat.status(), "the engine is there again")
        assert engine.starts == 2
        await chat.send("/regen")
        await chat.until_drawn("A whole answer")
        await chat.until_idle()
        assert [text for _, text, _ in chat.kept()] == ["Question", "A whole answer"]


async def test_the_reason_of_a_death_is_told_once() -> None:
    engine = ScriptedEngine()
    engine.answers("Half", engine.gate())
    async with running(engine) as chat:
        await chat.send("Question")
        await chat.until_drawn("Half")
        engine.die(KILLED)
        await chat.until_idle()
        await chat.until(lambda: "ready" in chat.status(), "the engine is there again")
        assert sum(KILLED in notice for notice in chat.notices()) == 1


@pytest.mark.parametrize("said", [(KILLED, f"{KILLED}\nMore"), (f"{KILLED}\nMore", KILLED)])
async def test_of_two_notices_that_say_the_same_the_longer_one_stays(said: tuple[str, str]) -> None:
    async with running() as chat:
        for text in ("Something else", *said):
            await chat.transcript.notice(text)
        assert chat.notices() == ["Something else", f"{KILLED}\nMore"]


async def test_death_before_the_first_token_keeps_the_question() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers(gate)
    async with running(engine) as chat:
        await chat.send("Question")
        await chat.until_reached(gate)
        engine.die(KILLED)
        await chat.until_idle()
        await chat.until(lambda: "ready" in chat.status(), "the engine is there again")
        assert chat.kept() == [("user", "Question", None)]
        assert chat.answers() == []
        await chat.send("/regen")
        await chat.until_drawn("ok")


async def test_death_while_a_prompt_is_read_keeps_the_question() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers(PrefillProgress("", 256, 1024), gate, "never")
    async with running(engine) as chat:
        await chat.send("A long one")
        await chat.until_reached(gate)
        engine.die("The engine was killed (signal 9).")
        await chat.until_noticed("It starts again; /regen asks")
        await chat.until_idle()
        assert chat.questions() == ["A long one"]
        await chat.send("/regen")
        await chat.until_drawn("ok")


async def test_death_while_a_dialog_is_open_leaves_it_open() -> None:
    async with running() as chat:
        await chat.ask("First")
        await chat.press("f2")
        await chat.dialog(SettingsScreen)
        chat.engine.die("Out of memory.")
        await chat.until_noticed("Out of memory.")
        assert isinstance(chat.app.screen, SettingsScreen)
        await chat.press("escape")
        await chat.until(lambda: "ready" in chat.status(), "the engine is there again")
        await chat.ask("Second")
        assert chat.answers()[-1] == "ok"


async def test_death_at_rest_makes_every_conversation_cold() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.ask("Warm up")
        assert chat.listed()[0].startswith("●")
        engine.loading.is_open = False
        engine.die(KILLED)
        await chat.until(lambda: chat.listed()[0].startswith("○"), "the list shows it cold")
        assert "all KV" not in chat.panel()
        engine.loading.open()
        await chat.until(lambda: "ready" in chat.status(), "the engine is there again")
        await chat.ask("Once more")
        assert chat.answers() == ["ok", "ok"]


async def test_death_elsewhere_leaves_the_open_conversation_alone() -> None:
    engine = ScriptedEngine()
    engine.answers("Half", engine.gate())
    async with running(engine) as chat:
        await chat.send("Question")
        await chat.until_drawn("Half")
        asked = chat.session.current.id
        await chat.press("ctrl+n")
        engine.die(KILLED)
        await chat.until_idle()
        assert chat.questions() == chat.answers() == []
        assert [m.text for m in chat.store.load(asked).messages] == ["Question", "Half"]


async def test_an_engine_that_dies_on_every_load_is_left_alone() -> None:
    engine = ScriptedEngine()
    for _ in range(RESTARTS + 2):
        engine.dies_on_load("The weights are damaged.")
    async with running(engine, ready=False) as chat:
        await chat.until(lambda: "the engine is not running" in chat.status(), "the status says so")
        assert engine.starts == RESTARTS
        assert "The weights are damaged." in chat.notices()[-1]
        assert "not started again" in chat.notices()[-1]
        await chat.ask("Anybody there?")
        await chat.until_noticed(NOT_RUNNING)
        assert chat.kept() == [("user", "Anybody there?", None)]
        assert chat.questions() == ["Anybody there?"]


async def test_an_engine_that_loads_at_the_second_attempt_works() -> None:
    engine = ScriptedEngine()
    engine.dies_on_load("Not this time.", "a line of its log")
    async with running(engine) as chat:
        await chat.until_noticed("a line of its log")
        assert engine.starts == 2
        await chat.ask("Hello")
        assert chat.answers() == ["ok"]


async def test_deaths_are_counted_from_the_last_time_it_was_ready() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        for death in range(RESTARTS + 1):
            engine.die(KILLED)
            await chat.until(lambda n=death: engine.starts == n + 2, "it starts again")  # type: ignore[misc]
            await chat.until(lambda: engine._state == "ready", "it is there again")
        await chat.ask("Hello")
        assert chat.answers() == ["ok"]
