"""Where a turn ends by itself, and what a turn that can't be answered leaves behind."""

import dataclasses

import pytest

from kvchat.contract import (
    EvictionPolicy,
    PrefillProgress,
    Sampling,
    Tokens,
    TurnFailed,
    TurnFinished,
    TurnStarted,
)
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel
from tests.support.engine_driver import (
    GREEDY,
    Chat,
    assert_committed,
    assert_equals_cold,
    rendered,
    saying,
    sentences,
)
from tests.support.tiny import CHATML, END_OF_TEXT, tiny_loaded

QUESTION = "Which pass is open in May?"


def limited(tiny: LoadedModel, context: int) -> LoadedModel:
    """The tiny model, with a smaller context."""
    return dataclasses.replace(tiny, facts=dataclasses.replace(tiny.facts, context_limit=context))


def prompt_of(tiny: LoadedModel, question: str) -> list[int]:
    chat = Chat(LocalEngine(tiny), tiny)
    return rendered(tiny, chat.ask(question).request.messages)


@pytest.mark.parametrize("most", [1, 2, 9])
def test_max_tokens_ends_the_answer(loaded: LoadedModel, engine: LocalEngine, most: int) -> None:
    played = Chat(engine, loaded, sampling=Sampling(max_tokens=most)).ask(QUESTION)
    stats = played.finished.stats
    assert (stats.finish_reason, stats.generated_tokens, len(played.tokens)) == ("length", most, most)
    assert_equals_cold(played, loaded)


def test_the_end_of_turn_token_ends_the_answer_and_stays_out_of_it(
    loaded: LoadedModel, engine: LocalEngine
) -> None:
    (end,) = loaded.end_ids
    reply = loaded.tokenizer.encode("The pass.").ids
    chat = Chat(engine, loaded, sampling=Sampling(max_tokens=50))
    with saying(loaded.model, [*reply, end]):
        played = chat.ask(QUESTION)
    assert played.finished.text == "The pass."
    assert list(played.finished.token_ids) == reply == played.tokens
    assert played.finished.stats.finish_reason == "stop"
    assert played.finished.stats.generated_tokens == len(reply) + 1
    assert_committed(chat.kv, [*rendered(loaded, played.request.messages), *reply])


def test_an_answer_that_ends_at_once_is_empty(tiny: LoadedModel) -> None:
    chat = Chat(LocalEngine(tiny), tiny)
    with saying(tiny.model, [*tiny.end_ids]):
        played = chat.ask(QUESTION)
    assert (played.finished.text, played.finished.token_ids) == ("", ())
    assert [type(event) for event in played.events] == [TurnStarted, TurnFinished]
    assert_equals_cold(chat.ask("And now?"), tiny)


def test_any_of_several_end_tokens_ends_the_answer(tiny: LoadedModel) -> None:
    (other,) = tiny.tokenizer.encode(END_OF_TEXT).ids
    ends = dataclasses.replace(tiny, end_ids=tiny.end_ids | {other})
    chat = Chat(LocalEngine(ends), ends)
    with saying(tiny.model, [other]):
        assert chat.ask(QUESTION).finished.stats.finish_reason == "stop"


def test_the_context_limit_ends_the_answer(tiny: LoadedModel) -> None:
    prompt = prompt_of(tiny, QUESTION)
    small = limited(tiny, len(prompt) + 4)
    chat = Chat(LocalEngine(small), small, sampling=Sampling(max_tokens=50))
    played = chat.ask(QUESTION)
    stats = played.finished.stats
    assert (stats.finish_reason, stats.generated_tokens) == ("context", 4)
    assert stats.context_limit == stats.prompt_tokens + stats.generated_tokens
    assert_equals_cold(played, tiny)


def test_a_prompt_that_leaves_room_for_one_token_is_answered_with_one(tiny: LoadedModel) -> None:
    small = limited(tiny, len(prompt_of(tiny, QUESTION)) + 1)
    played = Chat(LocalEngine(small), small).ask(QUESTION)
    assert (played.finished.stats.finish_reason, len(played.tokens)) == ("context", 1)


def test_a_prompt_that_fills_the_context_is_refused(tiny: LoadedModel) -> None:
    prompt = prompt_of(tiny, QUESTION)
    small = limited(tiny, len(prompt))
    played = Chat(LocalEngine(small), small).ask(QUESTION)
    assert [type(event) for event in played.events] == [TurnFailed]
    assert played.evaluated == 0


@pytest.mark.parametrize(
    ("policy", "stays", "choices"),
    [
        (EvictionPolicy.TURNS, 1, "Start a new conversation, or send a shorter message."),
        (
            EvictionPolicy.NONE,
            3,
            "Choose what may be dropped with /policy (turns is exact, sinks costs nothing), or start a new "
            "conversation.",
        ),
    ],
)
def test_a_prompt_too_long_is_refused_in_a_sentence_and_the_cache_is_unharmed(
    tiny: LoadedModel, policy: EvictionPolicy, stays: int, choices: str
) -> None:
    """Whether the first turn may be dropped for it, or not."""
    small = limited(tiny, 120)
    chat = Chat(LocalEngine(small), small, policy=policy)
    chat.ask(QUESTION)
    held = chat.kv.ids
    refused = chat.ask(sentences(20))
    length = len(rendered(tiny, refused.request.messages[-stays:]))
    assert refused.failed.reason == (
        f"This conversation is {length:,} tokens and the context holds 120, so there is no room for an "
        f"answer. {choices}"
    )
    assert refused.evaluated == 0
    assert_committed(chat.kv, held)
    chat.messages.pop()
    following = chat.ask("And the train?")
    assert (following.started.reused_tokens, following.started.reuse_note) == (len(held), "")
    assert_equals_cold(following, tiny)


def test_a_template_that_refuses_fails_the_turn_in_a_sentence_and_the_cache_is_unharmed() -> None:
    loaded = tiny_loaded(
        template="{% for m in messages %}{% if 'forbidden' in m.content %}"
        "{{ raise_exception('Nothing forbidden, please') }}{% endif %}{% endfor %}" + CHATML
    )
    chat = Chat(LocalEngine(loaded), loaded)
    chat.ask(QUESTION)
    held = chat.kv.ids
    refused = chat.ask("Something forbidden")
    assert refused.failed.reason == (
        "The model's chat template refuses this conversation: Nothing forbidden, please"
    )
    assert_committed(chat.kv, held)
    chat.messages.pop()
    assert chat.ask("Something else").started.reused_tokens == len(held)


def test_events_come_in_order_and_add_up(tiny: LoadedModel) -> None:
    played = Chat(LocalEngine(tiny, prefill_chunk=16), tiny).ask(sentences(4))
    kinds = [type(event).__name__ for event in played.events]
    progress = kinds.count("PrefillProgress")
    assert kinds == [
        "TurnStarted",
        *["PrefillProgress"] * progress,
        *["Tokens"] * GREEDY.max_tokens,
        "TurnFinished",
    ]
    done = [(e.done, e.total) for e in played.events if isinstance(e, PrefillProgress)]
    assert len(done) > 2
    assert done[-1] == (played.started.prefilled_tokens, played.started.prefilled_tokens)
    assert all(event.turn == played.request.turn for event in played.events)
    tokens = [event for event in played.events if isinstance(event, Tokens)]
    assert all(len(event.token_ids) == len(event.step_s) for event in tokens)
    assert {event.tokenizer for event in tokens} == {tiny.facts.tokenizer} == {played.finished.tokenizer}
