"""Answers with a cache equal those without one, in fp32, logit by logit."""

import random
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer
from transformers import RepetitionPenaltyLogitsProcessor

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.packed_rows import pack_rows, unpack_rows
from kvchat.cache.quant_codec import BLOCK
from kvchat.contract import (
    Fork,
    KVPrecision,
    PrefillProgress,
    PromptMessage,
    Sampling,
    TurnEvent,
    TurnStarted,
)
from kvchat.engine import miss_reason
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel
from tests.support.engine_driver import (
    GREEDY,
    TOLERANCE,
    Chat,
    Played,
    affordable,
    assert_committed,
    assert_equals_cold,
    on_both_models,
    rendered,
    saying,
    sentences,
    uncached_logits,
    user,
)

FIRST, SECOND, THIRD = (
    "Which pass is open in May?",
    "How long is the drive?",
    "And how long does the train take?",
)


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def spelled(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids that decode to `text`, letter by letter: not the ones that encoding it gives."""
    return tuple(i for letter in text for i in tokenizer.encode(letter, add_special_tokens=False).ids)


@on_both_models
def test_the_second_turn_equals_a_cold_pass_for_64_tokens(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = Chat(engine, loaded)
    chat.ask(FIRST)
    cached = len(chat.kv)
    chat.sampling = Sampling(max_tokens=64)
    second = chat.ask("Tell me a long story about the sea, the rivers and the old towns of the north.")
    assert second.started.reused_tokens == cached
    assert len(second.tokens) == 64
    assert_equals_cold(second, loaded)


@on_both_models
def test_prefill_in_any_chunks_gives_the_same_logits_and_lengths(loaded: LoadedModel) -> None:
    question = sentences(affordable(loaded, 12, 4))
    first_logits = []
    for chunk in (1, 7, 64, 100_000):
        chat = Chat(LocalEngine(loaded, prefill_chunk=chunk), loaded, sampling=Sampling(max_tokens=1))
        played = chat.ask(question)
        prompt = rendered(loaded, played.request.messages)
        assert len(prompt) > 64
        assert_committed(chat.kv, prompt)
        progress = [e.done for e in played.events if isinstance(e, PrefillProgress)]
        ends = [*range(chunk, len(prompt), chunk), len(prompt)]
        assert progress == (ends if len(ends) > 1 else [])
        assert len(played.logits) == len(ends)
        first_logits.append(played.logits[-1])
        assert_equals_cold(played, loaded)
    for logits in first_logits:
        torch.testing.assert_close(logits, first_logits[-1], atol=TOLERANCE, rtol=0)


def test_an_exact_repeat_reads_exactly_one_token(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = Chat(engine, loaded)
    first = chat.ask(FIRST)
    again = chat.again()
    assert again.started.prefilled_tokens == 1
    assert again.evaluated == len(again.tokens)
    assert again.tokens == first.tokens
    assert again.started.reuse_note == ""
    prompt = rendered(loaded, again.request.messages)
    assert_committed(chat.kv, [*prompt, *again.tokens[:-1]])
    assert_equals_cold(again, loaded)


def test_a_repeated_prompt_is_no_miss(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = Chat(engine, loaded)
    chat.ask(FIRST)
    second = chat.ask(SECOND)
    again = chat.again()
    assert (again.started.prefilled_tokens, again.started.reuse_note) == (1, "")
    assert again.tokens == second.tokens
    assert_equals_cold(again, loaded)


def test_a_prompt_that_is_the_start_of_the_cache_crops_it(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = Chat(engine, loaded)
    first = chat.ask(FIRST)
    chat.ask(SECOND)
    del chat.messages[1:]
    shorter = chat.answer()
    prompt = rendered(loaded, shorter.request.messages)
    assert shorter.started.reused_tokens == len(prompt) - 1
    assert shorter.tokens == first.tokens
    assert_committed(chat.kv, [*prompt, *shorter.tokens[:-1]])
    assert_equals_cold(shorter, loaded)


def test_a_shorter_different_prompt_crops_to_the_common_prefix(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    chat = Chat(engine, loaded)
    chat.ask(sentences(4))
    cached = chat.kv.ids
    chat.messages[:] = [user(sentences(1))]
    shorter = chat.answer()
    prompt = rendered(loaded, shorter.request.messages)
    assert len(prompt) < len(cached)
    assert shorter.started.reused_tokens == shared_prefix(cached, prompt) < len(prompt) - 1
    assert_committed(chat.kv, [*prompt, *shorter.tokens[:-1]])
    assert_equals_cold(shorter, loaded)


@pytest.mark.parametrize("message", [0, 1, 2, 3, 4], ids=lambda k: f"message {k + 1}")
def test_an_edit_reads_from_the_edited_message_on_and_is_a_named_miss(
    engine: LocalEngine, loaded: LoadedModel, message: int
) -> None:
    chat = Chat(engine, loaded, sampling=Sampling(max_tokens=3))
    chat.ask(FIRST)
    chat.ask(SECOND)
    chat.ask(THIRD)
    cached = chat.kv.ids
    chat.messages[message] = PromptMessage(chat.messages[message].role, "The sea is open.")
    del chat.messages[5:]
    edited = chat.answer()
    prompt = rendered(loaded, edited.request.messages)
    assert edited.started.reused_tokens == shared_prefix(cached, prompt)
    # the last question was not read before, so it counts as new, not as a miss
    assert edited.started.reuse_note == (f"message {message + 1} edited" if message < 4 else "")
    assert_committed(chat.kv, [*prompt, *edited.tokens[:-1]])
    assert_equals_cold(edited, loaded)


def test_an_edit_of_the_last_answer_is_named_by_the_next_turn(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    chat = Chat(engine, loaded)
    chat.ask(FIRST)
    cached = chat.kv.ids
    chat.messages[1] = PromptMessage("assistant", "None of them.")
    second = chat.ask(SECOND)
    prompt = rendered(loaded, second.request.messages)
    assert second.started.reused_tokens == shared_prefix(cached, prompt) < len(cached)
    assert second.started.reuse_note == "message 2 edited"
    assert_equals_cold(second, loaded)


def test_an_edit_of_the_only_question_is_no_miss(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = Chat(engine, loaded)
    chat.ask(FIRST)
    chat.messages[:] = [user(SECOND)]
    edited = chat.answer()
    assert edited.started.reuse_note == ""
    assert_equals_cold(edited, loaded)


def test_a_changed_system_prompt_reads_everything_and_is_a_named_miss(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    chat = Chat(engine, loaded, system="Answer in one word.")
    chat.ask(FIRST)
    cached = chat.kv.ids
    chat.messages[0] = PromptMessage("system", "The answer is a poem.")
    changed = chat.ask(SECOND)
    prompt = rendered(loaded, changed.request.messages)
    header = loaded.tokenizer.encode("<|im_start|>system\n").ids
    assert changed.started.reused_tokens == shared_prefix(cached, prompt) == len(header)
    assert changed.started.reuse_note == "system prompt edited"
    assert_equals_cold(changed, loaded)


@on_both_models
def test_a_reply_that_would_encode_to_other_ids_is_reused_whole(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    reply = spelled(loaded.tokenizer, "The pass over the mountains.")
    encoded_again = loaded.tokenizer.encode(
        loaded.tokenizer.decode(list(reply)), add_special_tokens=False
    ).ids
    assert tuple(encoded_again) != reply
    chat = Chat(engine, loaded, sampling=Sampling(max_tokens=64))
    (end,) = loaded.end_ids
    with saying(loaded.model, [*reply, end]):
        first = chat.ask(FIRST)
    assert first.finished.token_ids == reply
    assert first.finished.stats.finish_reason == "stop"
    assert first.finished.stats.generated_tokens == len(reply) + 1
    assert_committed(chat.kv, [*rendered(loaded, first.request.messages), *reply])
    cached = len(chat.kv)
    chat.sampling = GREEDY
    second = chat.ask(SECOND)
    assert second.started.reused_tokens == cached
    assert second.started.reuse_note == ""
    assert_equals_cold(second, loaded)


@on_both_models
def test_a_reply_cut_inside_a_character_is_reused_whole(engine: LocalEngine, loaded: LoadedModel) -> None:
    emoji = loaded.tokenizer.encode("🦙", add_special_tokens=False).ids
    assert len(emoji) > 1
    chat = Chat(engine, loaded, sampling=Sampling(max_tokens=len(emoji) - 1))
    with saying(loaded.model, emoji):
        first = chat.ask(FIRST)
    assert (first.finished.text, list(first.finished.token_ids)) == ("", emoji[:-1])
    cached = len(chat.kv)
    second = chat.ask(SECOND)
    assert second.started.reused_tokens == cached
    assert_equals_cold(second, loaded)


def test_another_conversation_never_leaks_into_this_one(engine: LocalEngine, loaded: LoadedModel) -> None:
    a, b = Chat(engine, loaded, "a"), Chat(engine, loaded, "b")
    a.ask("The code is 7391.")
    played = [b.ask("What is the code?"), a.ask("What is the code?"), b.ask("Are you sure?")]
    cold_b = Chat(LocalEngine(loaded), loaded, "b")
    for warm, cold in (
        (played[0], cold_b.ask("What is the code?")),
        (played[2], cold_b.ask("Are you sure?")),
    ):
        torch.testing.assert_close(torch.stack(warm.logits), torch.stack(cold.logits), atol=TOLERANCE, rtol=0)
        assert warm.tokens == cold.tokens
        assert "7391" not in warm.finished.text
    for turn in played:
        assert_equals_cold(turn, loaded)


SCRIPTS = {
    "mountains": [FIRST, SECOND, THIRD],
    "code": ["The code is 7391.", "What is the code?"],
    "bread": ["Bread is made from flour.", "What is the code?", SECOND],
}


def interleaved(engine: LocalEngine, loaded: LoadedModel, seed: int) -> dict[tuple[str, int], Played]:
    """Plays all three conversations, a turn of a random one at a time."""
    chats = {name: Chat(engine, loaded, name, sampling=Sampling(max_tokens=3)) for name in SCRIPTS}
    order = [name for name, script in SCRIPTS.items() for _ in script]
    random.Random(seed).shuffle(order)
    left = {name: iter(enumerate(script)) for name, script in SCRIPTS.items()}
    played = {}
    for name in order:
        number, text = next(left[name])
        played[name, number] = chats[name].ask(text)
    return played


@on_both_models
def test_random_interleavings_of_three_conversations_equal_cold_runs(loaded: LoadedModel) -> None:
    proven: dict[tuple[str, int], Played] = {}
    for seed in range(affordable(loaded, 20, 2)):
        for key, played in interleaved(LocalEngine(loaded), loaded, seed).items():
            if key not in proven:
                assert_equals_cold(played, loaded)
            cold = proven.setdefault(key, played)
            assert played.request.messages == cold.request.messages
            assert played.tokens == cold.tokens
            torch.testing.assert_close(
                torch.stack(played.logits), torch.stack(cold.logits), atol=TOLERANCE, rtol=0
            )


def test_a_repeat_penalty_counts_the_prompt_and_the_answer(engine: LocalEngine, loaded: LoadedModel) -> None:
    sampling = Sampling(max_tokens=8, repeat_penalty=50.0)
    played = Chat(engine, loaded, sampling=sampling).ask("Say it again and again and again.")
    prompt = rendered(loaded, played.request.messages)
    cold = uncached_logits(loaded.model, [*prompt, *played.tokens])[len(prompt) - 1 : -1]
    penalty = RepetitionPenaltyLogitsProcessor(sampling.repeat_penalty)
    for done, logits in enumerate(cold):
        seen = torch.LongTensor([[*prompt, *played.tokens[:done]]])
        assert int(penalty(seen, logits[None]).argmax()) == played.tokens[done]


def test_growth_past_several_steps_keeps_equality(tiny: LoadedModel) -> None:
    chat = Chat(LocalEngine(tiny), tiny, sampling=Sampling(max_tokens=40))
    sizes = set()
    for number in (20, 10, 10):
        played = chat.ask(sentences(number))
        sizes.add(chat.kv.storage_bytes)
        assert played.started.reuse_note == ""
        assert_equals_cold(played, tiny)
    assert len(sizes) > 1


def test_history_without_a_cache_is_read_once_and_the_note_says_why(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    before = Chat(LocalEngine(loaded), loaded)
    before.ask(FIRST)
    chat = Chat(engine, loaded)
    chat.messages = before.messages
    resumed = chat.ask(SECOND)
    assert (resumed.started.reused_tokens, resumed.started.reuse_note) == (0, miss_reason.NOT_READ_YET)
    assert_equals_cold(resumed, loaded)
    assert chat.ask(THIRD).started.reuse_note == ""


@pytest.mark.parametrize("kv", [KVPrecision.INT8, KVPrecision.INT4])
@pytest.mark.parametrize("shared_by", ["system prompt", "fork"])
def test_a_quantised_cache_that_shares_a_prefix_answers_as_one_that_shares_none(
    tiny: LoadedModel, kv: KVPrecision, shared_by: str
) -> None:
    """The second conversation finishes a block whose first rows it shares with the first conversation."""
    engine = LocalEngine(tiny)
    system = "You answer in the words of the old towns."
    first, second = Chat(engine, tiny, "first", system=system), Chat(engine, tiny, "second", system=system)
    first.precision = second.precision = kv
    first.ask("Hi!")
    if shared_by == "fork":
        engine.command(Fork("first", "second"))
        second.messages = list(first.messages)
        first.ask("And?")
    alone: list[ConversationKV] = []

    def copy(event: TurnEvent) -> None:
        if isinstance(event, TurnStarted):
            alone.append(tiny.new_kv(kv.value))
            unpack_rows(alone[0], pack_rows(second.kv.fork(len(second.kv))))

    played = second.ask(sentences(9), copy)
    assert 0 < played.started.reused_tokens < BLOCK < played.started.prompt_tokens
    reader = tiny.reader(alone[0])
    logits = reader.read(rendered(tiny, played.request.messages)[played.started.reused_tokens :])
    torch.testing.assert_close(played.logits[0], logits[-1], atol=TOLERANCE, rtol=0)
    for token, found in zip(played.tokens, played.logits[1:], strict=False):
        torch.testing.assert_close(found, reader.read([token])[-1], atol=TOLERANCE, rtol=0)
