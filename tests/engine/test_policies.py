"""What happens when the context is full, by policy; every answer is compared with plain transformers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from kvchat.cache.eviction import SINKS
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.quant_codec import BLOCK
from kvchat.cache.rope_shift import close_gaps
from kvchat.contract import (
    CacheEventKind,
    CacheMode,
    Evicted,
    EvictionPolicy,
    Fork,
    KVPrecision,
    PromptMessage,
    Tokens,
)
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.forward import CachedReader, forward_pass
from kvchat.engine.model.loader import LoadedModel, assemble
from tests.support.engine_driver import (
    TOLERANCE,
    Chat,
    assert_equals_cold,
    rendered,
    sentences,
    uncached_logits,
    user,
)
from tests.support.oracle import (
    Journal,
    assert_equals_cold_without,
    chat_with,
    evictions,
    masked_logits,
    tier,
    timeline,
    with_context,
    with_positions,
)
from tests.support.tiny import seeded_model, tiny_chat

LIMIT = 150
FULL = 4
"""Questions that fill the context; the one after them evicts."""
GAPS = pytest.mark.parametrize("policy", [EvictionPolicy.SINKS, EvictionPolicy.SNAPKV])
NONE, TURNS, SINKS_POLICY, SNAPKV = EvictionPolicy


ESSAY = (
    "Bread is made from flour, water, salt and yeast. The dough rises for some hours before it is baked in a "
    "hot oven, and the crust gets brown.",
    "The sea covers most of the planet, and its water is salty because rivers carry minerals from the rocks "
    "on land into it over a very long time.",
    "Trains run on rails made of steel. The first public railway with steam engines opened in England in the "
    "year 1825, and it carried coal and people.",
    "Mountains rise where plates of the crust push against each other. The highest one above the sea is "
    "Mount Everest, with 8,849 metres of height.",
)
TOPICS = ("bread", "the sea", "trains", "mountains")


def sized(kind: Callable[..., PreTrainedConfig], chat: TokenizersBackend, **own: object) -> PreTrainedConfig:
    """A config of tiny sizes under the usual names."""
    return kind(
        vocab_size=len(chat),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=chat.eos_token_id,
        **own,
    )


def gpt2(chat: TokenizersBackend) -> PreTrainedConfig:
    return GPT2Config(vocab_size=len(chat), n_embd=32, n_layer=2, n_head=2, eos_token_id=chat.eos_token_id)


def bloom(chat: TokenizersBackend) -> PreTrainedConfig:
    return BloomConfig(
        vocab_size=len(chat), hidden_size=32, n_layer=2, n_head=2, eos_token_id=chat.eos_token_id
    )


def mamba(chat: TokenizersBackend) -> PreTrainedConfig:
    return MambaConfig(vocab_size=len(chat), hidden_size=32, state_size=8, num_hidden_layers=2)


def question(number: int) -> str:
    return f"{number} How long is the drive over the pass?"


@pytest.fixture(scope="module")
def small(tiny: LoadedModel) -> LoadedModel:
    """The tiny model with room for four turns."""
    return with_context(tiny, LIMIT)


def filled(engine: LocalEngine, loaded: LoadedModel, policy: EvictionPolicy, journal: Journal) -> Chat:
    """A conversation that fills the context, and was not evicted from yet."""
    chat = chat_with(engine, loaded, policy)
    with journal.of(chat):
        for number in range(FULL):
            assert chat.ask(question(number)).finished.stats.evicted_tokens == 0
    return chat


@GAPS
@pytest.mark.parametrize("chunk", [7, 512])
def test_answers_after_several_evictions_equal_a_masked_pass(
    small: LoadedModel, policy: EvictionPolicy, chunk: int
) -> None:
    journal = Journal()
    chat = filled(LocalEngine(small, prefill_chunk=chunk), small, policy, journal)
    with journal.of(chat):
        evicted = [len(evictions(chat.ask(question(number)))) for number in range(FULL, 10)]
    assert sum(evicted) >= 2
    assert list(chat.kv.ids) == journal.ids
    assert journal.effect(small.model) > 1
    journal.assert_agrees(small.model)


def test_sinks_keep_the_first_four_tokens_and_a_window(small: LoadedModel) -> None:
    chat = filled(LocalEngine(small), small, SINKS_POLICY, Journal())
    held = len(chat.kv.ids)
    played = chat.ask(question(FULL))
    (event,) = evictions(played)
    tail = range(SINKS + event.tokens, len(chat.kv.ids))
    assert chat.kv.rows == (*range(SINKS), *tail)
    assert len(chat.kv.positions) == len(chat.kv)
    assert chat.kv.positions == chat.kv.rows
    assert held < tail.stop


@GAPS
def test_an_eviction_in_mid_prefill_equals_a_masked_pass(tiny: LoadedModel, policy: EvictionPolicy) -> None:
    """The history alone is longer than the context: a conversation that comes from elsewhere."""
    loaded = with_context(tiny, LIMIT)
    chat, journal = chat_with(LocalEngine(loaded), loaded, policy), Journal()
    for number in range(9):
        chat.messages += [user(question(number)), PromptMessage("assistant", "The drive takes three hours.")]
    with journal.of(chat):
        played = chat.ask("And the train?")
    assert played.started.prompt_tokens > LIMIT
    assert len(evictions(played)) >= 2
    assert len(chat.kv) <= LIMIT
    assert journal.effect(loaded.model) > 1
    journal.assert_agrees(loaded.model)


def test_one_message_longer_than_the_context_is_read_with_sinks_in_between(small: LoadedModel) -> None:
    chat, journal = chat_with(LocalEngine(small), small, SINKS_POLICY), Journal()
    with journal.of(chat):
        played = chat.ask(sentences(30))
    assert played.started.prompt_tokens > 2 * LIMIT
    assert len(chat.kv) <= LIMIT
    journal.assert_agrees(small.model)


def test_snapkv_refuses_one_message_longer_than_the_context(small: LoadedModel) -> None:
    """The last turn is never dropped, so there is nothing that could go."""
    chat = chat_with(LocalEngine(small), small, SNAPKV)
    failed = chat.ask(sentences(30))
    assert "send a shorter message" in failed.failed.reason
    assert failed.evaluated == 0
    chat.messages.pop()
    assert_equals_cold(chat.ask("Which pass is open?"), small)


@GAPS
def test_an_eviction_in_mid_answer_equals_a_masked_pass(small: LoadedModel, policy: EvictionPolicy) -> None:
    journal = Journal()
    chat = filled(LocalEngine(small), small, policy, journal)
    chat.messages = chat.messages[:4]
    chat.sampling = replace(chat.sampling, max_tokens=60)
    with journal.of(chat):
        played = chat.ask("And?")
    positions = [type(event) for event in played.events]
    assert Tokens in positions[: positions.index(Evicted)]
    assert played.finished.stats.finish_reason == "length"
    assert journal.effect(small.model) > 1
    journal.assert_agrees(small.model)


def test_sinks_evict_several_times_in_one_endless_answer(small: LoadedModel) -> None:
    chat, journal = chat_with(LocalEngine(small), small, SINKS_POLICY, max_tokens=400), Journal()
    with journal.of(chat):
        played = chat.ask("Hi")
    assert len(evictions(played)) >= 3
    assert len(chat.kv) <= LIMIT < len(chat.kv.ids)
    journal.assert_agrees(small.model)


def test_snapkv_ends_an_answer_that_is_longer_than_the_context(small: LoadedModel) -> None:
    chat, journal = chat_with(LocalEngine(small), small, SNAPKV, max_tokens=400), Journal()
    with journal.of(chat):
        played = chat.ask("Hi")
    assert (played.finished.stats.finish_reason, evictions(played)) == ("context", [])
    assert len(chat.kv) <= LIMIT
    journal.assert_agrees(small.model)


@GAPS
def test_a_cache_with_gaps_that_comes_back_from_disk_equals_a_masked_pass(
    small: LoadedModel, policy: EvictionPolicy, tmp_path: Path
) -> None:
    journal = Journal()
    chat = filled(LocalEngine(small, disk=tier(tmp_path)), small, policy, journal)
    with journal.of(chat):
        assert evictions(chat.ask(question(FULL)))
    rows, ids = chat.kv.rows, chat.kv.ids
    for number in range(FULL + 1, FULL + 4):
        chat.engine.close()
        chat.engine = LocalEngine(small, disk=tier(tmp_path))
        with journal.of(chat):
            played = chat.ask(question(number))
        assert played.finished.stats.restored_tokens == len(rows)
        assert played.started.reused_tokens == len(rows)
        rows, ids = chat.kv.rows, chat.kv.ids
    assert list(ids) == journal.ids
    journal.assert_agrees(small.model)


@GAPS
def test_both_branches_of_a_fork_with_gaps_equal_masked_passes(
    small: LoadedModel, policy: EvictionPolicy
) -> None:
    journal = Journal()
    chat = filled(LocalEngine(small), small, policy, journal)
    with journal.of(chat):
        assert evictions(chat.ask(question(FULL)))
    chat.engine.command(Fork("chat", "fork"))
    fork, branch = chat_with(chat.engine, small, policy, "fork"), journal.copy()
    fork.messages = list(chat.messages)
    for number in range(FULL + 1, FULL + 5):
        with journal.of(chat):
            mine = chat.ask(question(number))
        with branch.of(fork):
            other = fork.ask(f"{number} Tell me about the sea.")
        assert mine.started.reused_tokens > 0 < other.started.reused_tokens
    assert journal.ids != branch.ids
    journal.assert_agrees(small.model)
    branch.assert_agrees(small.model)


@GAPS
def test_a_change_after_a_gap_keeps_it_and_one_before_it_reads_again(
    small: LoadedModel, policy: EvictionPolicy
) -> None:
    journal = Journal()
    chat = filled(LocalEngine(small), small, policy, journal)
    with journal.of(chat):
        assert evictions(chat.ask(question(FULL)))
        last = chat.messages[-2:]
        chat.messages[-2:] = [user("Is it far?")]
        late = chat.answer()
    assert late.started.reuse_note == ""
    journal.assert_agrees(small.model)
    first_gap = chat.kv.index.first_gap
    chat.messages = [user("Something else?"), *last[1:], user("And?")]
    early = chat.answer()
    assert early.started.reused_tokens <= first_gap
    assert early.started.miss is not None
    assert early.started.miss.cause
    assert not chat.kv.index.has_gap
    assert_equals_cold(early, small)


@GAPS
def test_switching_to_an_exact_policy_reads_the_tokens_after_the_gap_again(
    small: LoadedModel, policy: EvictionPolicy
) -> None:
    chat = filled(LocalEngine(small), small, policy, Journal())
    assert evictions(chat.ask(question(FULL)))
    gap = chat.kv.index.first_gap
    chat.policy = TURNS
    played = chat.ask("And?")
    assert played.started.reused_tokens <= gap
    assert played.started.miss is not None
    assert_equals_cold_without(played, small, chat.evicted_messages)


def test_turns_are_evicted_between_answers_and_stay_evicted(small: LoadedModel) -> None:
    chat = filled(LocalEngine(small), small, TURNS, Journal())
    played = chat.ask(question(FULL))
    (event,) = evictions(played)
    assert chat.evicted_messages == event.evicted_messages == played.finished.evicted_messages >= 2
    before = rendered(small, played.request.messages)
    after = rendered(small, played.request.messages[event.evicted_messages :])
    assert played.finished.stats.evicted_tokens == event.tokens == len(before) - len(after)
    assert_equals_cold_without(played, small, chat.evicted_messages)
    again = chat.ask("And?")
    assert (evictions(again), again.finished.stats.evicted_tokens) == ([], 0)
    assert (again.finished.evicted_messages, again.started.reuse_note) == (event.evicted_messages, "")
    assert_equals_cold_without(again, small, chat.evicted_messages)


def test_the_system_prompt_is_never_evicted(small: LoadedModel) -> None:
    chat = chat_with(LocalEngine(small), small, TURNS, system="Answer in the words of the old towns.")
    for number in range(9):
        assert_equals_cold_without(chat.ask(question(number)), small, chat.evicted_messages)
    assert chat.evicted_messages >= 4
    assert chat.kv.ids[:20] == tuple(rendered(small, chat.messages))[:20]


def test_turns_are_evicted_during_an_answer(small: LoadedModel) -> None:
    chat = filled(LocalEngine(small), small, TURNS, Journal())
    chat.messages = chat.messages[:6]
    chat.sampling = replace(chat.sampling, max_tokens=60)
    played = chat.ask("And?")
    assert played.finished.stats.finish_reason == "length"
    (event,) = evictions(played)
    assert 0 < played.events.index(event) < len(played.events) - 1
    assert Tokens in [type(each) for each in played.events[: played.events.index(event)]]
    assert (event.evicted_messages, chat.evicted_messages) == (
        played.finished.evicted_messages,
        event.evicted_messages,
    )
    assert_equals_cold_without(played, small, event.evicted_messages)
    chat.sampling = replace(chat.sampling, max_tokens=4)
    again = chat.ask("Why?")
    assert (evictions(again), again.started.reuse_note) == ([], "")
    assert_equals_cold_without(again, small, event.evicted_messages)


def test_turns_end_an_answer_that_is_longer_than_the_context(small: LoadedModel) -> None:
    chat = chat_with(LocalEngine(small), small, TURNS, max_tokens=400)
    played = chat.ask("Hi")
    assert played.finished.stats.finish_reason == "context"
    assert len(chat.kv) < LIMIT
    assert_equals_cold(played, small)


def test_none_refuses_in_words_that_name_choices_and_ends_an_answer_at_the_limit(small: LoadedModel) -> None:
    chat = filled(LocalEngine(small), small, NONE, Journal())
    held = chat.kv.ids
    reason = chat.ask(question(FULL)).failed.reason
    assert "turns" in reason
    assert "sinks" in reason
    assert "/policy" in reason
    assert f"holds {LIMIT}" in reason
    assert chat.kv.ids == held
    chat.messages = chat.messages[:6]
    chat.sampling = replace(chat.sampling, max_tokens=400)
    ended = chat.ask("And?")
    assert (ended.finished.stats.finish_reason, ended.finished.evicted_messages) == ("context", 0)
    assert len(chat.kv.ids) == LIMIT - 1
    assert evictions(ended) == []
    assert_equals_cold(ended, small)


@pytest.mark.parametrize("policy", [TURNS, SINKS_POLICY, SNAPKV])
def test_events_stats_and_timeline_say_the_same(small: LoadedModel, policy: EvictionPolicy) -> None:
    chat = filled(LocalEngine(small), small, policy, Journal())
    played = chat.ask(question(FULL))
    (event,) = evictions(played)
    (line,) = timeline(played, CacheEventKind.EVICT)
    assert event.tokens == line.tokens == played.finished.stats.evicted_tokens > 0
    assert (event.note, line.conversation) == (line.note, "chat")
    assert ("approximate" if policy is not TURNS else "exact") in event.note
    assert event.evicted_messages == played.finished.evicted_messages
    quiet = chat.ask("And?")
    assert not evictions(quiet)
    assert not timeline(quiet, CacheEventKind.EVICT)
    assert quiet.finished.stats.evicted_tokens == 0
    assert quiet.finished.evicted_messages == played.finished.evicted_messages


@GAPS
def test_turn_mode_evicts_as_a_resident_cache_does(small: LoadedModel, policy: EvictionPolicy) -> None:
    chat = chat_with(LocalEngine(small), small, policy)
    chat.mode = CacheMode.TURN
    for number in range(FULL + 2):
        journal = Journal()
        with journal.of(chat):
            played = chat.ask(question(number))
        assert played.started.reused_tokens == 0
        journal.assert_agrees(small.model)
    assert played.finished.stats.evicted_tokens > 0


@pytest.mark.parametrize("policy", [TURNS, SINKS_POLICY, SNAPKV])
def test_without_a_cache_every_policy_evicts_whole_turns(small: LoadedModel, policy: EvictionPolicy) -> None:
    chat = chat_with(LocalEngine(small), small, policy)
    chat.mode = CacheMode.OFF
    for number in range(FULL + 2):
        played = chat.ask(question(number))
        assert_equals_cold_without(played, small, chat.evicted_messages)
    assert chat.evicted_messages > 0


@pytest.mark.parametrize("policy", [TURNS, SINKS_POLICY, SNAPKV])
def test_without_a_cache_turns_are_evicted_during_an_answer(
    small: LoadedModel, policy: EvictionPolicy
) -> None:
    chat = chat_with(LocalEngine(small), small, policy)
    chat.mode = CacheMode.OFF
    for number in range(FULL - 1):
        chat.ask(question(number))
    chat.sampling = replace(chat.sampling, max_tokens=60)
    played = chat.ask("And?")
    assert played.finished.stats.finish_reason == ("length" if policy is TURNS else "context")
    assert bool(evictions(played)) is (policy is TURNS)
    assert_equals_cold_without(played, small, chat.evicted_messages)


@pytest.mark.parametrize("mode", [CacheMode.OFF, CacheMode.TURN])
def test_none_refuses_in_every_cache_mode(small: LoadedModel, mode: CacheMode) -> None:
    chat = chat_with(LocalEngine(small), small, NONE)
    chat.mode = mode
    for number in range(FULL):
        assert_equals_cold(chat.ask(question(number)), small)
    assert "/policy" in chat.ask(question(FULL)).failed.reason


@GAPS
@pytest.mark.parametrize("kv", [KVPrecision.INT8, KVPrecision.INT4])
def test_quantised_blocks_are_evicted_as_a_whole_and_never_requantised(
    tiny: LoadedModel, policy: EvictionPolicy, kv: KVPrecision
) -> None:
    loaded = with_context(tiny, 6 * BLOCK)
    chat = chat_with(LocalEngine(loaded), loaded, policy, kv=kv, max_tokens=30)
    before: tuple[tuple[int, ...], torch.Tensor] | None = None
    evicted = 0
    for number in range(12):
        played = chat.ask(question(number))
        rows = chat.kv.rows
        states = torch.cat([torch.cat(layer.read()) for layer in chat.kv.stored])[:, :, :]
        if before and evictions(played):
            evicted += 1
            gone = sorted({*before[0]} - {*rows})
            assert {g // BLOCK for g in gone} == {g // BLOCK for g in gone if g // BLOCK * BLOCK in gone}
            assert all(len([g for g in gone if g // BLOCK == b]) == BLOCK for b in {g // BLOCK for g in gone})
        if before:
            assert_quantised_rows_are_the_same(before, (rows, states))
        before = rows, states
    assert evicted >= 2
    assert len(chat.kv) <= 6 * BLOCK


def assert_quantised_rows_are_the_same(
    before: tuple[Sequence[int], torch.Tensor], now: tuple[Sequence[int], torch.Tensor]
) -> None:
    """Rows of blocks that were finished before read the same, bit for bit."""
    finished = (len(before[0]) - 1) // BLOCK * BLOCK
    common = [row for row in before[0][:finished] if row in {*now[0]}]
    assert common or not finished
    old = before[1][..., [before[0].index(row) for row in common], :]
    new = now[1][..., [now[0].index(row) for row in common], :]
    assert torch.equal(old, new)


def until_positions_move(chat: Chat, journal: Journal) -> int:
    """Asks until keys are rotated; returns the first token that was read at another position."""
    with journal.of(chat):
        for number in range(FULL, 20):
            played = chat.ask(question(number))
            if journal.positions != list(range(len(journal.ids))):
                assert any("rotated once" in e.note for e in timeline(played, CacheEventKind.EVICT))
                return next(i for i, position in enumerate(journal.positions) if position != i)
    raise AssertionError("positions never ended")


@pytest.mark.parametrize("limit", [200, 220])
def test_positions_that_end_are_closed_up_by_turning_each_key_once(small: LoadedModel, limit: int) -> None:
    loaded, journal = with_positions(small, limit), Journal()
    chat = filled(LocalEngine(loaded), loaded, SINKS_POLICY, journal)
    since = until_positions_move(chat, journal)
    assert max(journal.positions) < limit
    assert chat.kv.positions == tuple(range(len(chat.kv)))
    moved = with_sinks_moved(loaded.model, journal, since)
    asked = sorted(journal.logits)
    assert asked[-1] > since
    found = torch.stack([journal.logits[i] for i in asked])
    torch.testing.assert_close(found, moved[asked], atol=TOLERANCE, rtol=0)


def with_sinks_moved(model: PreTrainedModel, journal: Journal, since: int) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` where from token `since` on the sinks stand right before the window.

    Only distances count, so instead of the window and all that follows, the sinks move the other way: copies
    of them, `gap` positions further, see nothing but each other, as the sinks did, and are seen instead.
    """
    gap = since - journal.positions[since]
    copies, originals = frozenset(range(SINKS)), frozenset(range(SINKS, 2 * SINKS))
    hidden = {
        SINKS + token: frozenset(SINKS + i for i in gone) | (copies if token < since else originals)
        for token, gone in journal.hidden.items()
    }
    ids = [*journal.ids[:SINKS], *journal.ids]
    positions = [*range(gap, gap + SINKS), *range(len(journal.ids))]
    return masked_logits(model, ids, hidden, positions)[SINKS:]


def test_positions_that_end_a_second_time_are_closed_up_by_reading_again(small: LoadedModel) -> None:
    """A key that was rotated once is not rotated again: the remaining tokens are read again."""
    loaded, journal = with_positions(small, 200), Journal()
    chat = filled(LocalEngine(loaded), loaded, SINKS_POLICY, journal)
    until_positions_move(chat, journal)
    for number in range(30):
        played = chat.ask(question(number))
        notes = [event.note for event in timeline(played, CacheEventKind.EVICT)]
        if again := [note for note in notes if "were read again: exact" in note]:
            break
    assert len(again) == 1
    ids, rows = chat.kv.ids, chat.kv.rows
    assert chat.kv.positions == tuple(range(len(rows)))
    cold = uncached_logits(loaded.model, [ids[row] for row in rows])
    generated = played.finished.stats.generated_tokens - 1
    found = torch.stack(played.logits[-generated:])
    torch.testing.assert_close(found, cold[-generated:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kv", [KVPrecision.INT8, KVPrecision.INT4])
def test_quantised_keys_are_never_rotated(tiny: LoadedModel, kv: KVPrecision) -> None:
    loaded = with_positions(with_context(tiny, 6 * BLOCK), 7 * BLOCK)
    chat = chat_with(LocalEngine(loaded), loaded, SINKS_POLICY, kv=kv, max_tokens=30)
    notes = [
        event.note
        for number in range(12)
        for event in timeline(chat.ask(question(number)), CacheEventKind.EVICT)
    ]
    assert any("were read again: exact" in note for note in notes)
    assert not any("rotated" in note for note in notes)
    assert max(chat.kv.positions) < 7 * BLOCK


@pytest.mark.parametrize(
    "architecture",
    [
        ("sliding window", lambda chat: sized(MistralConfig, chat, head_dim=16, sliding_window=8)),
        ("sliding window", lambda chat: sized(Gemma3TextConfig, chat, head_dim=16, sliding_window=8)),
        ("learned", gpt2),
        ("ALiBi", bloom),
        ("recurrent", mamba),
    ],
    ids=["mistral", "gemma3", "gpt2", "bloom", "mamba"],
)
@GAPS
def test_a_model_that_can_not_have_gaps_refuses_them_in_words(
    architecture: tuple[str, object], policy: EvictionPolicy
) -> None:
    why, build = architecture
    tokenizer = tiny_chat()
    assert callable(build)
    made = build(tokenizer)
    assert isinstance(made, PreTrainedConfig)
    loaded = assemble(seeded_model(made), tokenizer, why, context=200)
    assert why in loaded.facts.gap_refusal
    chat = chat_with(LocalEngine(loaded), loaded, policy)
    reason = chat.ask("Hi").failed.reason
    assert why in reason
    assert policy in reason
    chat.policy = TURNS
    assert_equals_cold(chat.answer(), loaded)


def conversation_with_a_needle(loaded: LoadedModel, policy: EvictionPolicy, word: str, before: int) -> Chat:
    """Four topics, and a code word after `before` of them."""
    chat = chat_with(LocalEngine(loaded, prefill_chunk=64), loaded, policy, max_tokens=16)
    for number, (topic, text) in enumerate(zip(TOPICS, ESSAY, strict=True)):
        if number == before:
            chat.messages += [
                user(f"The secret code word is {word}. Please remember it."),
                PromptMessage("assistant", f"I will remember it: the secret code word is {word}."),
            ]
        chat.messages += [user(f"Tell me one fact about {topic}."), PromptMessage("assistant", text)]
    return chat


EARLY, LATE = 0, 3


@pytest.mark.model
@pytest.mark.parametrize(
    ("policy", "limit", "word", "before", "found"),
    [
        (TURNS, 1024, "ZEBRA", EARLY, True),
        (SINKS_POLICY, 256, "ZEBRA", EARLY, False),
        (SINKS_POLICY, 256, "ZEBRA", LATE, True),
        (TURNS, 256, "ZEBRA", EARLY, False),
        (TURNS, 256, "ZEBRA", LATE, True),
        (SNAPKV, 284, "London", EARLY, True),
        (SINKS_POLICY, 284, "London", EARLY, False),
    ],
    ids=[
        "all of it is there",
        "before the window of sinks",
        "inside the window of sinks",
        "in a turn that is left out",
        "in a turn that stays",
        "asked for, so that snapkv keeps it",
        "asked for, and sinks don't care",
    ],
)
def test_a_code_word_is_retrieved_where_it_was_not_evicted(
    smollm2: LoadedModel, policy: EvictionPolicy, limit: int, word: str, before: int, found: bool
) -> None:
    loaded = with_context(smollm2, limit)
    chat = conversation_with_a_needle(loaded, policy, word, before)
    played = chat.ask("What is the secret code word?")
    assert (word in played.finished.text) is found
    assert bool(evictions(played)) is (limit < 1024)
    if policy is SNAPKV:
        assert played.finished.stats.evicted_tokens >= 0.45 * played.started.prompt_tokens


@pytest.mark.model
def test_sinks_keep_the_loss_low_and_a_window_alone_does_not(smollm2: LoadedModel) -> None:
    """StreamingLLM, section 3.1: without its first tokens the model is lost."""
    ids = smollm2.tokenizer.encode(" ".join(ESSAY)).ids
    read, window = len(ids) - 50, 40
    tail = range(read - window, read)
    reference = loss_after(smollm2, ids, read, range(read))
    assert loss_after(smollm2, ids, read, [*range(SINKS), *tail]) <= 1.05 * reference
    assert loss_after(smollm2, ids, read, tail) >= reference + 0.3


def loss_after(loaded: LoadedModel, ids: Sequence[int], read: int, rows: Sequence[int]) -> float:
    """Mean negative log likelihood (nats) of the tokens after the first `read`, of which `rows` stay."""
    logits = answers_along(loaded, gapped(loaded, ids[:read], rows), ids[read:-1])
    return float(cross_entropy(logits.float(), torch.tensor(ids[read + 1 :])))


def gapped(loaded: LoadedModel, ids: Sequence[int], rows: Sequence[int]) -> ConversationKV:
    """A cache that read `ids` and evicted all but `rows`."""
    kv = loaded.new_kv()
    CachedReader(loaded.model, kv).read(ids)
    kv.select(rows)
    return kv


@pytest.mark.model
def test_closing_a_gap_changes_next_to_nothing(smollm2: LoadedModel) -> None:
    """StreamingLLM counts positions inside the cache; here they have a gap until they end."""
    ids = smollm2.tokenizer.encode(" ".join(ESSAY)).ids
    read = len(ids) - 30
    rows = [*range(SINKS), *range(read - 60, read)]
    frequencies = smollm2.rotary_frequencies()
    assert frequencies is not None
    with_gap, closed = (gapped(smollm2, ids[:read], rows) for _ in range(2))
    close_gaps(closed, frequencies)
    assert (with_gap.index.next_position, closed.index.next_position) == (read, len(rows))
    told, moved = (answers_along(smollm2, kv, ids[read:]) for kv in (with_gap, closed))
    assert 0 < divergence(told, moved) < 0.05


def answers_along(loaded: LoadedModel, kv: ConversationKV, ids: Sequence[int]) -> torch.Tensor:
    """Logits `[len(ids), vocabulary]` after each of the ids."""
    first = kv.index.next_position
    with kv.append(ids) as past:
        return forward_pass(loaded.model, ids, range(first, first + len(ids)), past, keep=len(ids))


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL divergence (nats) of the distributions that two sets of logits `[n, vocabulary]` stand for."""
    p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
