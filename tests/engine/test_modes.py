"""The three cache modes, what they cost, and what they hold: seen at the model's door and in the storage."""

import gc
import weakref
from dataclasses import replace

import pytest

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import GROWTH_STEP
from kvchat.contract import CacheMode, Sampling, Tokens
from kvchat.engine import miss_reason
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel
from tests.support.engine_driver import Chat, Played, assert_equals_cold, rendered, sentences

FIRST, SECOND, THIRD = "Which pass is open in May?", "How long is the drive?", "Tell me about the sea."


def storage_bytes(kv: ConversationKV) -> int:
    """What the tensors really hold, each piece of memory counted once."""
    tensors = [t for layer in kv.stored for t in (layer.keys, layer.values) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def two_turns(loaded: LoadedModel, mode: CacheMode, sampling: Sampling) -> list[Played]:
    chat = Chat(LocalEngine(loaded), loaded, mode=mode, sampling=sampling)
    return [chat.ask(FIRST), chat.ask(SECOND)]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.9, top_p=0.95, seed=7),
        Sampling(temperature=0.7, top_k=20, repeat_penalty=1.3, seed=8),
    ],
    ids=["greedy", "sampled", "sampled with penalty"],
)
def test_every_mode_gives_the_same_answer(loaded: LoadedModel, sampling: Sampling) -> None:
    assert_every_mode_says_the_same(loaded, replace(sampling, max_tokens=20))


@pytest.mark.model
def test_every_mode_of_a_real_model_gives_the_same_answer(smollm2: LoadedModel) -> None:
    assert_every_mode_says_the_same(smollm2, Sampling(max_tokens=3))


def assert_every_mode_says_the_same(loaded: LoadedModel, sampling: Sampling) -> None:
    on, turn, off = (two_turns(loaded, mode, sampling) for mode in CacheMode)
    for a, b, c in zip(on, turn, off, strict=True):
        assert a.finished.text == b.finished.text == c.finished.text
        assert a.tokens == b.tokens == c.tokens
        assert_equals_cold(c, loaded)


def test_on_reads_each_token_once(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = Chat(engine, loaded)
    first, second = chat.ask(FIRST), chat.ask(SECOND)
    for played in (first, second):
        stats = played.finished.stats
        assert (
            played.evaluated == stats.evaluated_tokens == stats.prefilled_tokens + stats.generated_tokens - 1
        )
        assert stats.cache_mode == "on"
    # of the last answer, the last token was chosen and not read
    held = first.started.prompt_tokens + len(first.tokens) - 1
    assert second.started.reused_tokens == held


def test_turn_mode_reads_the_history_once_per_turn_and_leaves_no_cache(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    chat = Chat(engine, loaded, mode=CacheMode.TURN)
    for question, note in ((FIRST, ""), (SECOND, miss_reason.CACHE_PER_TURN)):
        played = chat.ask(question)
        stats = played.finished.stats
        assert (stats.reused_tokens, stats.reuse_note, stats.cache_mode) == (0, note, "turn")
        assert played.evaluated == stats.evaluated_tokens == stats.prompt_tokens + stats.generated_tokens - 1
        assert stats.kv_tokens == stats.prompt_tokens + stats.generated_tokens - 1
        assert stats.kv_bytes > 0
        assert played.finished.pool.caches == engine.pool().caches == ()


def test_off_reads_everything_for_every_token_and_holds_nothing(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    chat = Chat(engine, loaded, mode=CacheMode.OFF)
    for question, note in ((FIRST, ""), (SECOND, miss_reason.CACHE_IS_OFF)):
        played = chat.ask(question)
        stats = played.finished.stats
        price = sum(stats.prompt_tokens + done for done in range(stats.generated_tokens))
        assert played.evaluated == stats.evaluated_tokens == price
        assert (stats.reused_tokens, stats.reuse_note, stats.cache_mode) == (0, note, "off")
        assert (stats.kv_tokens, stats.kv_bytes, stats.kv_used_bytes) == (0, 0, 0)
        assert {(e.kv_tokens, e.kv_bytes) for e in played.events if isinstance(e, Tokens)} == {(0, 0)}
        assert played.finished.pool.caches == engine.pool().caches == ()


@pytest.mark.parametrize(
    ("mode", "note"),
    [(CacheMode.OFF, miss_reason.CACHE_WAS_OFF), (CacheMode.TURN, miss_reason.CACHE_WAS_PER_TURN)],
)
def test_after_switching_the_cache_on_one_turn_misses_and_the_next_reuses(
    engine: LocalEngine, loaded: LoadedModel, mode: CacheMode, note: str
) -> None:
    chat = Chat(engine, loaded)
    chat.ask(FIRST)
    chat.mode = mode
    chat.ask(SECOND)
    chat.mode = CacheMode.ON
    back = chat.ask(THIRD)
    assert (back.started.reused_tokens, back.started.reuse_note) == (0, note)
    assert back.finished.stats.reuse_note == note
    assert_equals_cold(back, loaded)
    held = len(chat.kv)
    following = chat.ask(FIRST)
    assert (following.started.reused_tokens, following.started.reuse_note) == (held, "")
    assert_equals_cold(following, loaded)


def first_keys(chat: Chat) -> "weakref.ref[object]":
    """Watches a piece of the cache without keeping it alive."""
    return weakref.ref(chat.kv.stored[0].keys)


@pytest.mark.parametrize("mode", [CacheMode.OFF, CacheMode.TURN])
def test_switching_off_frees_the_resident_cache(tiny: LoadedModel, mode: CacheMode) -> None:
    engine = LocalEngine(tiny)
    chat, other = Chat(engine, tiny), Chat(engine, tiny, "other")
    chat.ask(FIRST)
    other.ask(FIRST)
    keys = first_keys(chat)
    assert keys() is not None
    chat.mode = mode
    chat.ask(SECOND)
    gc.collect()
    assert keys() is None
    assert [warm.conversation for warm in engine.pool().caches] == ["other"]


def test_forget_frees_one_conversation_and_close_frees_all(tiny: LoadedModel) -> None:
    engine = LocalEngine(tiny)
    a, b = Chat(engine, tiny, "a"), Chat(engine, tiny, "b")
    a.ask(FIRST)
    b.ask(THIRD)  # another one, of which nothing can be lent
    keys = [first_keys(a), first_keys(b)]
    engine.forget("a")
    engine.forget("never heard of")
    gc.collect()
    assert (keys[0]() is None, keys[1]() is None) == (True, False)
    assert a.ask(SECOND).started.reuse_note == miss_reason.NOT_READ_YET
    engine.close()
    gc.collect()
    assert keys[1]() is None
    assert engine.pool().caches == ()


def test_reported_bytes_are_those_of_the_storage_and_of_the_formula(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    facts = loaded.facts
    assert facts.kv_bytes_per_token == 2 * facts.layers * facts.kv_heads * facts.head_dim * 4
    chat = Chat(engine, loaded)
    for question in (FIRST, SECOND):
        played = chat.ask(question)
        stats, kv = played.finished.stats, chat.kv
        assert (
            stats.kv_bytes == kv.storage_bytes == storage_bytes(kv) == GROWTH_STEP * facts.kv_bytes_per_token
        )
        assert stats.kv_tokens == len(kv)
        assert stats.kv_used_bytes == len(kv) * facts.kv_bytes_per_token
        assert played.finished.pool.used_bytes == kv.storage_bytes
        (warm,) = played.finished.pool.caches
        assert (warm.conversation, warm.tokens, warm.bytes) == ("chat", len(kv), kv.storage_bytes)
        assert (warm.disk_bytes, warm.kv_dtype, warm.hot) == (0, facts.kv_dtype, True)


def test_bytes_while_the_answer_grows_past_a_step(tiny: LoadedModel) -> None:
    chat = Chat(LocalEngine(tiny), tiny, sampling=Sampling(max_tokens=100))
    played = chat.ask(sentences(14))
    prompt = played.started.prompt_tokens
    assert prompt < GROWTH_STEP < prompt + 99
    for read, event in enumerate(e for e in played.events if isinstance(e, Tokens)):
        assert event.kv_tokens == prompt + read
        steps = -(-event.kv_tokens // GROWTH_STEP)
        assert event.kv_bytes == steps * GROWTH_STEP * tiny.facts.kv_bytes_per_token
    assert played.finished.stats.kv_bytes == storage_bytes(chat.kv)
    assert_equals_cold(played, tiny)


def test_every_prompt_token_is_either_reused_or_read(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = Chat(engine, loaded)
    for question in (FIRST, SECOND, THIRD):
        played = chat.ask(question)
        stats = played.finished.stats
        assert stats.prompt_tokens == len(rendered(loaded, played.request.messages))
        assert stats.reused_tokens + played.evaluated == stats.prompt_tokens + stats.generated_tokens - 1
        assert stats.kv_tokens == stats.prompt_tokens + stats.generated_tokens - 1
