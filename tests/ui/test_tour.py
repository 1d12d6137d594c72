"""The tour: every step is done in the chat, what it tells was measured, and nothing of it stays."""

from dataclasses import replace

import pytest

from kvchat.chat.controller import ChatController
from kvchat.chat.engine_supervisor import EngineSupervisor
from kvchat.chat.port import Port
from kvchat.chat.reducer import Opened, reduce
from kvchat.contract import CacheMode, Drop, KVPrecision, SetBudget, SetPrecision
from kvchat.ui.tour import (
    STEPS,
    Guide,
    after_eviction,
    after_reset,
    after_restart,
    ms,
)
from kvchat.ui.widgets.tour_card import TourCard
from tests.support.screen_driver import Chat, running, session_over
from tests.support.scripted_engine import BUDGET, Fails, ScriptedEngine
from tests.ui.test_panel import stats


def card(chat: Chat) -> str:
    """What stands on the card."""
    cards = chat.screen.query(TourCard)
    parts = [part.content for each in cards for part in each.query("Static")]  # type: ignore[attr-defined]
    return "\n".join(map(str, parts))


async def run_step(chat: Chat, number: int) -> str:
    """Runs a step that is announced; returns what it told."""
    await chat.until(lambda: f"{number + 1} of {len(STEPS)}" in card(chat), f"step {number + 1} is announced")
    assert STEPS[number].before[:40] in card(chat)
    await chat.press("enter")
    await chat.until(lambda: "Enter goes on" in card(chat), "the step is over")
    return card(chat)


async def test_the_tour_does_every_step_tells_its_figures_and_leaves_nothing_behind() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.ask("Bread?")
        own = chat.session.current.id
        before = chat.store.summaries()
        outside = chat.store
        await chat.send("/tour")
        told = []
        for number in range(len(STEPS)):
            told.append(await run_step(chat, number))
            await chat.press("enter")
        await chat.until(lambda: "That was the tour" in card(chat), "the end is announced")
        prefill, decode, toggle, memory, reset, _, precision, restart = told
        asked = engine.requests[1:]
        tour = asked[0].conversation
        assert {request.conversation for request in asked} == {tour} != {own}
        assert "500 tok/s" in prefill
        assert "were reused (▒)" in decode
        assert [request.mode for request in asked].count(CacheMode.OFF) == 1
        assert asked[2].mode is CacheMode.OFF
        assert "A token took 100 ms without the cache, 10 ms with it." in toggle
        assert "× 23,040 bytes =" in memory
        assert Drop(tour) in engine.acts
        assert "again" in reset
        budgets = [act.bytes for act in engine.acts if isinstance(act, SetBudget)]
        assert budgets[0] < BUDGET == budgets[1]
        assert SetPrecision(tour, KVPrecision.INT8) in engine.acts
        assert "63 of the last 64 tokens" in precision
        assert engine.starts == 2
        assert "Nothing came from disk" in restart
        await chat.press("enter")
        await chat.until(lambda: not chat.screen.query(TourCard), "the card is gone")
        assert chat.session.current.id == own
        assert chat.questions() == ["Bread?"]
        assert chat.store is outside
        assert chat.store.summaries() == before
        assert tour in engine.forgotten
        assert chat.prompt.has_focus


async def test_esc_leaves_the_tour_in_mid_step_and_gives_everything_back() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.ask("Bread?")
        await chat.send("/tour")
        await chat.until(lambda: "1 of" in card(chat), "the first step is announced")
        gate = engine.gate()
        engine.answers("The ", gate, "end")
        await chat.press("enter")
        await chat.until_reached(gate)
        await chat.press("enter")
        assert len(engine.requests) == 2
        await chat.press("escape")
        await chat.until(lambda: not chat.screen.query(TourCard), "the card is gone")
        assert engine.stops == [engine.requests[1].turn]
        assert chat.questions() == ["Bread?"]
        assert not chat.screen.answering
        await chat.ask("And rolls?")
        assert chat.questions() == ["Bread?", "And rolls?"]


async def test_whoever_quits_in_mid_tour_finds_the_own_conversation_again() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.ask("Bread?")
        own, outside = chat.session.current.id, chat.store
        await chat.send("/tour")
        await run_step(chat, 0)
        tour = engine.requests[1].conversation
        await chat.press("ctrl+q")
        await chat.until_left()
        chat.screen.leave()
        assert chat.session.current.id == own
        assert chat.store is outside
        assert tour in engine.forgotten


async def test_a_step_that_fails_says_why_and_can_be_tried_again() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.send("/tour")
        await chat.until(lambda: "1 of" in card(chat), "the first step is announced")
        engine.answers(Fails("There is no room."))
        await chat.press("enter")
        await chat.until(lambda: "was not answered" in card(chat), "the failure is told")
        await chat.press("enter")
        await chat.until(lambda: "Enter goes on" in card(chat), "it went well this time")


async def test_the_tour_waits_for_the_end_of_an_answer() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("a", gate)
    async with running(engine) as chat:
        await chat.send("Bread?")
        await chat.until_reached(gate)
        await chat.send("/tour")
        await chat.until_said("still being written")
        assert not chat.screen.query(TourCard)
        gate.open()
        await chat.until_idle()


async def test_there_is_one_tour_at_a_time() -> None:
    async with running() as chat:
        await chat.send("/tour")
        await chat.until(lambda: "1 of" in card(chat), "the first step is announced")
        await chat.screen.run_action("run_command('tour')")
        assert len(chat.screen.query(TourCard)) == 1


# --- words -----------------------------------------------------------------------------------------------


@pytest.fixture
def guide() -> Guide:
    """A guide that measured one long read."""
    supervisor = EngineSupervisor(ScriptedEngine().attach, lambda _event: None)
    chat = ChatController(session_over(), supervisor, Port())
    long = replace(stats(prompt=1000), prefill_tok_s=500.0)
    chat.state = reduce(chat.state, Opened(chat.session.current.id, (long,)))
    guide = Guide(chat)
    guide.measured = [long]
    return guide


def test_an_eviction_is_told_only_where_something_went(guide: Guide) -> None:
    guide.measured.append(stats())
    assert "nothing had to go" in after_eviction(guide)
    guide.measured.append(replace(stats(), evicted_tokens=300, context_limit=512))
    assert "512 tokens fitted, so 300 went" in after_eviction(guide)


def test_what_came_from_disk_is_set_against_what_reading_would_take(guide: Guide) -> None:
    guide.measured.append(replace(stats(reused=90), restored_tokens=500, restore_s=0.03))
    told = after_restart(guide)
    assert "500 tokens came from disk in 0.03 s" in told
    assert "about 1.0 s" in told


def test_the_reason_of_a_reset_is_the_engines_own(guide: Guide) -> None:
    guide.measured.append(replace(stats(), reuse_note="you dropped it"))
    assert "you dropped it" in after_reset(guide)


def test_a_turn_of_one_token_has_no_speed() -> None:
    assert ms(replace(stats(), decode_tok_s=0.0)) == "–"
    assert ms(replace(stats(), decode_tok_s=4.0)) == "250 ms"
