"""F7, the race: the same prompt with the cache and without it; the conversation keeps one answer."""

from dataclasses import replace

import pytest

from kvchat.contract import (
    CacheMode,
    FinishReason,
    PromptMessage,
    Sampling,
    Tokens,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    Warm,
    WarmCache,
)
from kvchat.ui.compare import (
    UNCACHED_TOKENS,
    WITH,
    WITHOUT,
    Lane,
    lane_words,
    parted_at,
    plot,
    text_words,
    times,
    verdict,
    without_cache,
)
from kvchat.ui.screens.compare import RaceScreen
from tests.support.screen_driver import Chat, running
from tests.support.scripted_engine import Fails, ScriptedEngine, stats_of

REQUEST = TurnRequest(
    "turn",
    "conversation",
    (PromptMessage("user", "Which pass?"),),
    CacheMode.ON,
    Sampling(max_tokens=512, seed=7),
)


def lane(ids: list[int], text: str, mode: CacheMode = CacheMode.ON, step_s: float = 0.01) -> Lane:
    """A run that is over."""
    request = replace(REQUEST, mode=mode)
    run = Lane(request)
    run.hear(TurnStarted("turn", 10, 8, 2, ""))
    for index, token in enumerate(ids):
        run.hear(Tokens("turn", text[index : index + 1], (token,), (step_s,), "scripted", 1, 1))
    stats = stats_of(request, 8, len(ids), FinishReason.STOP)
    run.hear(TurnFinished("turn", text, tuple(ids), "scripted", stats, ScriptedEngine().pool()))
    return run


# --- values ----------------------------------------------------------------------------------------------


def test_the_run_without_a_cache_is_the_same_prompt_and_leaves_nothing_behind() -> None:
    asked = without_cache(REQUEST, "other", "scratch")
    assert (asked.messages, asked.sampling.seed) == (REQUEST.messages, 7)
    assert (asked.turn, asked.conversation, asked.mode) == ("other", "scratch", CacheMode.OFF)
    assert asked.persist is False
    assert asked.sampling.max_tokens == UNCACHED_TOKENS
    few = replace(REQUEST, sampling=Sampling(max_tokens=4))
    assert without_cache(few, "other", "scratch").sampling.max_tokens == 4


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [([], [], None), ([1, 2], [1, 2, 3], None), ([1, 2], [1, 3], 1), ([5], [6], 0)],
)
def test_texts_part_at_the_first_token_that_differs(
    first: list[int], second: list[int], place: int | None
) -> None:
    assert parted_at(first, second) == place


def test_the_verdict_compares_what_was_measured() -> None:
    said = verdict(lane([1, 2, 3], "abc"), lane([1, 2], "ab", CacheMode.OFF))
    assert "decode 10.0× faster" in said[0]
    assert said[-1] == "Both wrote the same in all 2 tokens that can be compared."
    assert verdict(Lane(REQUEST), Lane(REQUEST)) == []


def test_the_verdict_shows_the_place_where_rounding_parted_the_texts() -> None:
    said = text_words(lane([1, 2, 3], "abc"), lane([1, 9, 3], "axy", CacheMode.OFF))
    assert "at token 2 rounding parted them" in said
    assert "“bc” with, “xy” without" in said


def test_a_run_that_failed_or_wrote_nothing_is_no_comparison() -> None:
    failed = Lane(REQUEST, failure="no room")
    assert verdict(failed, Lane(REQUEST)) == ["There is nothing to compare: no room"]
    assert "nothing" in text_words(lane([], ""), lane([1], "a"))


@pytest.mark.parametrize(
    ("ratio", "words"), [(10.0, "10.0× faster"), (0.5, "2.0× slower"), (1.0, "1.0× faster")]
)
def test_a_ratio_is_told_from_the_side_that_is_above_one(ratio: float, words: str) -> None:
    assert times(ratio, "faster", "slower") == words


def test_a_run_can_be_shown_again_at_its_own_speed() -> None:
    run = lane([1, 2, 3], "abc", step_s=1.0)
    assert [run.text_at(seconds) for seconds in (0.5, 1.0, 2.5, 9.0)] == ["", "a", "ab", "abc"]
    assert [run.steps_at(seconds) for seconds in (0.5, 1.0, 2.5, 9.0)] == [0, 0, 1, 2]
    assert run.ms == [1000.0, 1000.0]


def test_the_figures_of_a_run_say_how_far_it_is() -> None:
    run = Lane(REQUEST)
    assert lane_words(run) == "waiting"
    run.hear(TurnStarted("turn", 10, 8, 2, ""))
    assert lane_words(run) == "reused 8 · read 2"
    run.hear(Tokens("turn", "a", (1, 2), (0.5, 0.1), "scripted", 1, 1))
    assert lane_words(run) == "reused 8 · read 2 · TTFT 0.50 s · token 2"
    assert "tok/s" in lane_words(lane([1], "a"))


def test_the_plot_puts_fast_below_slow_on_one_scale() -> None:
    rows = plot([(WITHOUT, [1000.0, 1000.0]), (WITH, [10.0, 10.0, 10.0])], 30, 5)
    assert len(rows) == 5
    assert all(len(row) == 30 for row in rows)
    assert rows[0].startswith("1,000 ms┤○○")
    assert rows[-1].startswith(" 10.0 ms┤●●●")
    assert not set("".join(rows[1:-1])) & {WITH, WITHOUT}


@pytest.mark.parametrize("values", [[], [0.0], [5.0], [5.0, 5.0]])
@pytest.mark.parametrize("size", [(0, 0), (5, 3), (30, 1), (30, 6)])
def test_a_plot_of_little_or_in_little_room_is_no_error(values: list[float], size: tuple[int, int]) -> None:
    rows = plot([(WITH, values)], *size)
    assert len(rows) == size[1]
    assert {len(row) for row in rows} <= {size[0]}


def test_more_tokens_than_columns_are_squeezed_into_them() -> None:
    rows = plot([(WITH, [float(n + 1) for n in range(1000)])], 30, 4)
    assert all(len(row) == 30 for row in rows)
    assert rows[0].endswith(WITH)


# --- the screen ------------------------------------------------------------------------------------------


def text_on(chat: Chat, name: str) -> list[str]:
    return [str(part.content) for part in chat.app.screen.query(name)]  # type: ignore[attr-defined]


async def test_a_race_answers_the_prompt_twice_and_keeps_the_answer_with_the_cache() -> None:
    engine = ScriptedEngine().answers("The ", "Brenner.").answers("The ", "Reschen.")
    async with running(engine) as chat:
        await chat.write("Which pass is open?")
        await chat.press("f7")
        await chat.dialog(RaceScreen)
        await chat.until_visible("The conversation keeps the answer with the cache.")
        kept, scratch = engine.requests
        assert (kept.conversation, kept.mode) == (chat.session.current.id, CacheMode.ON)
        assert (scratch.mode, scratch.persist) == (CacheMode.OFF, False)
        assert scratch.messages == kept.messages
        assert scratch.sampling.seed == kept.sampling.seed is not None
        assert text_on(chat, ".lane .text") == ["The Brenner.", "The Reschen."]
        await chat.until_visible("decode 10.0× faster")
        assert scratch.conversation in engine.forgotten
        await chat.press("escape")
        await chat.until_drawn("The Brenner.")
        assert chat.kept() == [("user", "Which pass is open?", None), ("assistant", "The Brenner.", "stop")]
        assert chat.session.current.sampling.seed is None
        assert chat.prompt.text == ""


async def test_without_a_new_question_the_last_one_races_and_the_conversation_stays_as_it_is() -> None:
    async with running() as chat:
        await chat.ask("Which pass is open?")
        before = chat.kept()
        await chat.press("f7")
        await chat.dialog(RaceScreen)
        await chat.until_visible("The conversation keeps the answer it had.")
        _, cached, uncached = chat.engine.requests
        assert (
            [m.text for m in cached.messages]
            == [m.text for m in uncached.messages]
            == ["Which pass is open?"]
        )
        assert (cached.mode, uncached.mode) == (CacheMode.ON, CacheMode.OFF)
        assert chat.session.current.id not in {cached.conversation, uncached.conversation}
        assert {cached.conversation, uncached.conversation} <= set(chat.engine.forgotten)
        assert cached.persist is uncached.persist is False
        assert chat.kept() == before


async def test_a_cache_on_disk_is_brought_into_memory_first() -> None:
    async with running() as chat:
        await chat.ask("Which pass is open?")
        name = chat.session.current.id
        on_disk = WarmCache(name, 0, 0, disk_bytes=9)
        chat.screen.controller.on_event(replace(chat.engine.pool(), caches=(on_disk,)))
        await chat.press("f7")
        await chat.dialog(RaceScreen)
        await chat.until_visible("keeps the answer it had")
        assert Warm(name) in chat.engine.acts


async def test_it_says_that_the_two_run_one_after_the_other() -> None:
    engine = ScriptedEngine()
    first, second = engine.gate(), engine.gate()
    engine.answers("a", first, "b").answers("a", second, "b")
    async with running(engine) as chat:
        await chat.send("/cache compare Which pass is open?")
        await chat.dialog(RaceScreen)
        await chat.until_reached(first)
        await chat.until_visible("one after the other")
        assert len(engine.requests) == 1
        first.open()
        await chat.until_reached(second)
        await chat.until_visible("on the left the first run again")
        second.open()
        await chat.until_visible("Both wrote the same in all 2 tokens")


async def test_leaving_stops_the_run_that_nobody_keeps_and_not_the_answer_that_is_kept() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("a", gate, "b")
    async with running(engine) as chat:
        await chat.send("/cache compare Which pass is open?")
        await chat.dialog(RaceScreen)
        await chat.until_reached(gate)
        await chat.press("escape")
        await chat.until(lambda: not isinstance(chat.app.screen, RaceScreen), "the race is closed")
        assert engine.stops == []
        gate.open()
        await chat.until_drawn("ab")
        engine.answers("c").answers("a", slow := engine.gate(), "b")
        await chat.press("f7")
        await chat.dialog(RaceScreen)
        await chat.until_reached(slow)
        await chat.press("escape")
        await chat.until(lambda: engine.stops == [engine.requests[-1].turn], "the run is stopped")


async def test_a_failure_is_told_and_ends_the_race() -> None:
    engine = ScriptedEngine().answers(Fails("There is no room."))
    async with running(engine) as chat:
        await chat.send("/cache compare Which pass is open?")
        await chat.dialog(RaceScreen)
        await chat.until_visible("There is nothing to compare: There is no room.")
        assert len(engine.requests) == 1


async def test_a_race_needs_a_question_and_no_answer_under_way() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("a", gate)
    async with running(engine) as chat:
        await chat.press("f7")
        await chat.until_said("Write a question first")
        await chat.send("Which pass is open?")
        await chat.until_reached(gate)
        await chat.write("And now?")
        await chat.press("f7")
        await chat.until_said("still being written")
        assert chat.prompt.text == "And now?"
        gate.open()
        await chat.until_idle()
