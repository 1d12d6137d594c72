"""A turn's cost: estimated before the turn and explained by it, with the same result.

Every cause of a miss, with the first token that differs, the message it stands in, and what it costs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise

import pytest
from transformers import MambaConfig
from transformers.utils import chat_template_utils

from kvchat.cache.prefix import common_prefix
from kvchat.contract import (
    CacheEventKind,
    CacheMode,
    CostEstimate,
    CountTokens,
    Drop,
    EstimateCost,
    EvictionPolicy,
    Fork,
    KVPrecision,
    Miss,
    PoolState,
    PromptMessage,
    Report,
    Sampling,
    SetBudget,
    Spill,
    TokenCounts,
)
from kvchat.engine import cache_commands, miss_reason
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel, assemble
from kvchat.engine.prefill_rate import PrefillRate
from kvchat.engine.prompt import Renderer
from tests.support.engine_driver import Chat, Played, assert_equals_cold, saying, sentences, user
from tests.support.tiny import CHATML, seeded_model, tiny_chat, tiny_loaded

SYSTEM = "You answer in one word. " + sentences(5)
QUESTIONS = ("Which pass is open in May?", "How long is the drive?", "And the train?")
DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}" + CHATML
REWRITING = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'] + '.')"
)
"""Puts a full stop after every message but the last."""
Change = Callable[[Chat], None]


@dataclass
class Desk:
    """An engine, and everything it reported."""

    engine: LocalEngine
    reports: list[Report]

    def quote(self, chat: Chat) -> CostEstimate:
        """The cost estimate of the next turn of `chat`."""
        self.reports.clear()
        self.engine.command(EstimateCost("key", chat.request()))
        quote, pool = self.reports
        assert isinstance(quote, CostEstimate)
        assert isinstance(pool, PoolState)
        assert pool.events == ()
        assert quote.key == "key"
        return quote


def desk(loaded: LoadedModel) -> Desk:
    reports: list[Report] = []
    return Desk(LocalEngine(loaded, report=reports.append), reports)


def talked(loaded: LoadedModel, system: str = SYSTEM, **options: object) -> tuple[Chat, Desk]:
    """A conversation of three turns."""
    at = desk(loaded)
    chat = Chat(at.engine, loaded, system=system, **options)  # type: ignore[arg-type]
    for question in QUESTIONS:
        chat.ask(question)
    return chat, at


def assert_paid_as_quoted(chat: Chat, at: Desk) -> Played:
    """The estimate equals what the turn then reports and does, and changed nothing."""
    kept = at.engine.caches.get(chat.name)
    cached, rate = kept and kept.kv.ids, at.engine.planner.rate.tokens_per_s
    quote = at.quote(chat)
    assert at.quote(chat) == quote
    assert (kept and kept.kv.ids) == cached
    played = chat.answer()
    stats = played.finished.stats
    assert (quote.prompt_tokens, quote.reused_tokens, quote.prefilled_tokens) == (
        stats.prompt_tokens,
        stats.reused_tokens,
        stats.prefilled_tokens,
    )
    assert quote.seconds == (rate and stats.prefilled_tokens / rate)
    assert quote.miss == played.started.miss
    assert quote.refusal == ""
    return played


def miss_of(played: Played) -> Miss:
    """The turn's miss, the same in every report."""
    miss = played.started.miss
    assert miss is not None
    assert miss.cause == played.started.reuse_note == played.finished.stats.reuse_note != ""
    (event,) = [e for e in played.finished.pool.events if e.kind is CacheEventKind.MISS]
    assert (event.tokens, event.note) == (miss.tokens, miss_reason.sentence(miss))
    return miss


def tokens_read_again(played: Played, loaded: LoadedModel) -> int:
    """Up to the last message, without what was reused and the one token that was chosen and never read."""
    renderer = Renderer(loaded.tokenizer, loaded.template, loaded.facts.tokenizer)
    rendered = renderer.render(played.request.messages, played.request.today)
    return rendered.ends[-2] - played.started.reused_tokens - 1


def edit(index: int) -> Change:
    def change(chat: Chat) -> None:
        chat.messages[index] = PromptMessage(chat.messages[index].role, "Nobody knows.")

    return change


def change_system(chat: Chat) -> None:
    chat.messages[0] = PromptMessage("system", "You answer in verse.")


def add_a_turn_of_elsewhere(chat: Chat) -> None:
    """As if another process had answered the same conversation."""
    chat.messages += [user("And by boat?"), PromptMessage("assistant", "Two hours.")]


@dataclass(frozen=True)
class Cause:
    """A change, and the expected cause of the miss."""

    change: Change
    words: str
    message: int
    """The message of the first difference."""


DIFFERENCES = {
    **{f"message {i}": Cause(edit(i), f"message {i} edited", i) for i in range(1, 7)},
    "system": Cause(change_system, "system prompt edited", 0),
    "elsewhere": Cause(add_a_turn_of_elsewhere, miss_reason.NOT_CACHED, 6),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_miss_has_its_place_and_its_cost(loaded: LoadedModel, name: str) -> None:
    chat, at = talked(loaded)
    cached = chat.kv.ids
    rate = at.engine.planner.rate.tokens_per_s
    assert rate is not None
    cause = DIFFERENCES[name]
    cause.change(chat)
    chat.messages.append(user("Are you sure?"))
    played = assert_paid_as_quoted(chat, at)
    miss = miss_of(played)
    assert (miss.cause, miss.message) == (cause.words, cause.message)
    assert (miss.tokens, miss.seconds) == (tokens_read_again(played, loaded), miss.tokens / rate)
    assert_shows_the_difference(miss, cached, played, loaded)
    assert_equals_cold(played, loaded)


def assert_shows_the_difference(
    miss: Miss, cached: tuple[int, ...], played: Played, loaded: LoadedModel
) -> None:
    renderer = Renderer(loaded.tokenizer, loaded.template, loaded.facts.tokenizer)
    prompt = renderer.render(played.request.messages, played.request.today).ids
    token = common_prefix(cached, prompt)
    assert miss.token == token == played.started.reused_tokens
    shown = miss_reason.SHOWN_TOKENS
    assert miss.was == renderer.decode(cached[token : token + shown])
    assert miss.now == renderer.decode(prompt[token : token + shown])
    assert miss.before == renderer.decode(prompt[max(0, token - miss_reason.SHOWN_BEFORE) : token])
    assert miss.was != miss.now or token == len(cached)


def test_the_sentence_of_a_miss_has_cause_cost_and_difference() -> None:
    miss = Miss("message 2 edited", 1200, 2.4, 40, "was this", "is that", 2)
    assert miss_reason.sentence(miss) == (
        "message 2 edited (1,200 tokens to read again, about 2.4 s at your measured 500 tok/s; "
        "first difference: 'was this' → 'is that')"
    )
    assert miss_reason.sentence(Miss("no cache", 7, None)) == "no cache (7 tokens to read again)"


def test_without_a_system_prompt_messages_count_from_one(loaded: LoadedModel) -> None:
    chat, at = talked(loaded, system="")
    edit(1)(chat)
    chat.messages.append(user("Are you sure?"))
    miss = miss_of(assert_paid_as_quoted(chat, at))
    assert (miss.cause, miss.message) == ("message 2 edited", 2)


def test_a_continued_answer_that_is_edited_is_one_message(loaded: LoadedModel) -> None:
    chat, at = talked(loaded)
    chat.answer()
    chat.ask("Why?")
    edit(7)(chat)
    chat.messages.append(user("Are you sure?"))
    assert len(chat.messages) == 10
    assert miss_of(assert_paid_as_quoted(chat, at)).cause == "message 7 edited"


def test_ids_of_another_tokenizer_are_named(loaded: LoadedModel) -> None:
    at = desk(loaded)
    chat = Chat(at.engine, loaded, system=SYSTEM, sampling=Sampling(max_tokens=6))
    letters = [loaded.tokenizer.encode(letter, add_special_tokens=False).ids[0] for letter in "passes"]
    with saying(loaded.model, letters):
        chat.ask(QUESTIONS[0])
    cached = chat.kv.ids
    chat.messages[2] = replace(chat.messages[2], tokenizer="of another model")
    chat.messages.append(user("Are you sure?"))
    played = assert_paid_as_quoted(chat, at)
    miss = miss_of(played)
    assert (miss.cause, miss.message) == (miss_reason.ANOTHER_TOKENIZER, 2)
    assert_shows_the_difference(miss, cached, played, loaded)


def test_a_template_that_rewrites_earlier_messages_is_named() -> None:
    loaded = tiny_loaded(template=REWRITING)
    at = desk(loaded)
    chat = Chat(at.engine, loaded, system=SYSTEM)
    chat.ask(QUESTIONS[0])
    cached = chat.kv.ids
    chat.messages.append(user(QUESTIONS[1]))
    played = assert_paid_as_quoted(chat, at)
    miss = miss_of(played)
    # the full stop comes after the first message's text, and so belongs to what follows it
    assert (miss.cause, miss.message) == (miss_reason.TEMPLATE_REWROTE, 2)
    assert_shows_the_difference(miss, cached, played, loaded)
    assert_equals_cold(played, loaded)


# Misses without a cache: no difference to show, and the cost of everything.


def dropped(chat: Chat, at: Desk) -> None:
    at.engine.command(Drop(chat.name))


def spilled_nowhere(chat: Chat, at: Desk) -> None:
    at.engine.command(Spill(chat.name))
    at.engine.forget("prefix")


def forgotten(chat: Chat, at: Desk) -> None:
    at.engine.forget(chat.name)


def squeezed_out(chat: Chat, at: Desk) -> None:
    at.engine.command(SetBudget(1))
    at.engine.command(SetBudget(1 << 40))


def off_for_a_turn(chat: Chat, at: Desk) -> None:
    for_a_turn(chat, CacheMode.OFF)


def per_turn_for_a_turn(chat: Chat, at: Desk) -> None:
    for_a_turn(chat, CacheMode.TURN)


def for_a_turn(chat: Chat, mode: CacheMode) -> None:
    chat.mode = mode
    chat.ask("And by boat?")
    chat.mode = CacheMode.ON


def in_more_bits(chat: Chat, at: Desk) -> None:
    chat.precision = KVPrecision.FP32


def in_fewer_bits(chat: Chat, at: Desk) -> None:
    chat.precision = KVPrecision.INT8


GONE: dict[str, tuple[Callable[[Chat, Desk], None], str]] = {
    "dropped": (dropped, cache_commands.DROPPED_BY_YOU),
    "moved, and no disk": (spilled_nowhere, cache_commands.SPILLED_BY_YOU),
    "forgotten": (forgotten, miss_reason.NOT_READ_YET),
    "squeezed out": (squeezed_out, "dropped from memory because the KV budget was full"),
    "off for a turn": (off_for_a_turn, miss_reason.CACHE_WAS_OFF),
    "per turn for a turn": (per_turn_for_a_turn, miss_reason.CACHE_WAS_PER_TURN),
    "more bits": (in_more_bits, "KV precision changed: bf16 → fp32"),
    "fewer bits": (in_fewer_bits, "KV precision changed: bf16 → int8"),
}


@pytest.mark.parametrize("name", GONE)
def test_the_drop_reason_of_a_cache_explains_the_miss(tiny: LoadedModel, name: str) -> None:
    at = desk(tiny)
    chat = Chat(at.engine, tiny, system=SYSTEM)
    chat.precision = KVPrecision.BF16  # never lowered to make room
    chat.ask(QUESTIONS[0])
    lose, words = GONE[name]
    lose(chat, at)
    rate = at.engine.planner.rate.tokens_per_s
    assert rate is not None
    chat.messages.append(user("Are you sure?"))
    played = assert_paid_as_quoted(chat, at)
    miss = miss_of(played)
    assert miss.cause == words
    assert (miss.tokens, miss.seconds) == (tokens_read_again(played, tiny), miss.tokens / rate)
    assert (miss.token, miss.was, miss.now, miss.message) == (None, "", "", None)


def test_without_a_measured_rate_a_miss_has_no_seconds(loaded: LoadedModel) -> None:
    before, _ = talked(loaded)
    at = desk(loaded)
    chat = Chat(at.engine, loaded)
    chat.messages = [*before.messages, user("Are you sure?")]
    miss = miss_of(assert_paid_as_quoted(chat, at))
    assert (miss.cause, miss.seconds) == (miss_reason.NOT_READ_YET, None)
    assert at.engine.planner.rate.tokens_per_s is not None
    assert "tok/s" not in miss_reason.sentence(miss)


def test_without_history_there_is_no_miss(loaded: LoadedModel) -> None:
    at = desk(loaded)
    chat = Chat(at.engine, loaded, system=SYSTEM)
    chat.messages.append(user(QUESTIONS[0]))
    played = assert_paid_as_quoted(chat, at)
    assert (played.started.miss, played.started.reuse_note) == (None, "")


@pytest.mark.parametrize("mode", list(CacheMode))
def test_an_estimate_is_right_in_every_mode(loaded: LoadedModel, mode: CacheMode) -> None:
    chat, at = talked(loaded, mode=mode)
    chat.messages.append(user("Are you sure?"))
    played = assert_paid_as_quoted(chat, at)
    assert played.started.miss is None
    assert played.started.reuse_note == miss_reason.NEVER_CACHED.get(mode, "")


def lent(chat: Chat, at: Desk) -> Chat:
    other = Chat(at.engine, chat.loaded, "other", system=SYSTEM)
    other.messages.append(user("What is the code?"))
    return other


def forked(chat: Chat, at: Desk) -> Chat:
    other = Chat(at.engine, chat.loaded, "other")
    other.messages = [*chat.messages[:5], user("What is the code?")]
    at.engine.command(Fork(chat.name, other.name))
    return other


def again(chat: Chat, at: Desk) -> Chat:
    chat.messages.pop()
    return chat


def going_on(chat: Chat, at: Desk) -> Chat:
    return chat


@pytest.mark.parametrize("other", [lent, forked, again, going_on])
def test_an_estimate_is_right_for_small_costs(
    loaded: LoadedModel, other: Callable[[Chat, Desk], Chat]
) -> None:
    chat, at = talked(loaded)
    following = other(chat, at)
    played = assert_paid_as_quoted(following, at)
    assert played.started.reused_tokens > 60
    assert played.started.miss is None
    assert_equals_cold(played, loaded)


def small(context: int) -> LoadedModel:
    """The tiny model with a small context."""
    return tiny_loaded(context=context)


def filled(policy: EvictionPolicy) -> tuple[Chat, Desk]:
    """A conversation that evicted something in its last turn."""
    at = desk(small(200))
    chat = Chat(at.engine, at.engine._loaded, policy=policy, sampling=Sampling(max_tokens=10))
    while not chat.ask(sentences(3)).finished.stats.evicted_tokens:
        pass
    return chat, at


@pytest.mark.parametrize("policy", [EvictionPolicy.SINKS, EvictionPolicy.SNAPKV])
def test_an_estimate_after_a_gap_counts_visible_tokens(policy: EvictionPolicy) -> None:
    chat, at = filled(policy)
    assert chat.kv.index.has_gap
    chat.messages.append(user("Are you sure?"))
    played = assert_paid_as_quoted(chat, at)
    assert played.started.miss is None
    assert played.started.prompt_tokens < len(chat.kv.ids)


@pytest.mark.parametrize("policy", [EvictionPolicy.SINKS, EvictionPolicy.SNAPKV])
def test_an_edit_around_a_gap_is_named(policy: EvictionPolicy) -> None:
    chat, at = filled(policy)
    cached, first_gap = chat.kv.ids, chat.kv.index.first_gap
    chat.messages[0] = user("Nobody knows." + chat.messages[0].text)
    chat.messages.append(user("Are you sure?"))
    played = assert_paid_as_quoted(chat, at)
    miss = miss_of(played)
    assert miss.cause == miss_reason.BEFORE_A_GAP
    assert played.started.reused_tokens <= min(first_gap, common_prefix(cached, chat.kv.ids))


def test_a_gap_is_no_use_to_a_policy_without_gaps() -> None:
    chat, at = filled(EvictionPolicy.SINKS)
    chat.policy = EvictionPolicy.NONE
    chat.messages = chat.messages[-2:]
    chat.messages.append(user("Are you sure?"))
    played = assert_paid_as_quoted(chat, at)
    assert played.started.reused_tokens <= 4 + 10
    assert_equals_cold(played, chat.loaded)


def test_evicted_turns_are_a_cause_of_a_miss() -> None:
    chat, at = filled(EvictionPolicy.TURNS)
    evicted_messages = chat.evicted_messages
    assert evicted_messages > 0
    while chat.evicted_messages == evicted_messages:
        chat.messages.append(user(sentences(3)))
        played = assert_paid_as_quoted(chat, at)
    miss = miss_of(played)
    assert miss.cause == miss_reason.TURNS_EVICTED
    assert miss.tokens > 0


def test_evicted_messages_count_in_the_number_of_an_edited_one() -> None:
    chat, at = filled(EvictionPolicy.TURNS)
    chat.ask("Why?")
    evicted_messages = chat.evicted_messages
    assert len(chat.messages) > evicted_messages + 3
    edit(evicted_messages + 1)(chat)
    chat.messages.append(user("Are you sure?"))
    played = assert_paid_as_quoted(chat, at)
    assert chat.evicted_messages == evicted_messages
    miss = miss_of(played)
    assert (miss.cause, miss.message) == (f"message {evicted_messages + 2} edited", evicted_messages + 2)


def test_the_estimate_of_an_unanswerable_conversation_is_a_refusal() -> None:
    at = desk(small(100))
    chat = Chat(at.engine, at.engine._loaded, policy=EvictionPolicy.NONE)
    chat.messages.append(user(sentences(20)))
    quote = at.quote(chat)
    assert (quote.prompt_tokens, quote.reused_tokens, quote.seconds, quote.miss) == (0, 0, None, None)
    assert quote.refusal == chat.answer().failed.reason


@pytest.mark.parametrize("policy", list(EvictionPolicy))
def test_an_estimate_previews_the_eviction(tiny: LoadedModel, policy: EvictionPolicy) -> None:
    chat, at = talked(tiny, policy=policy)
    chat.messages.append(user("Are you sure?"))
    preview = at.quote(chat).preview
    words = {
        EvictionPolicy.NONE: "nothing is dropped",
        EvictionPolicy.TURNS: "oldest turn",
        EvictionPolicy.SINKS: "tokens 4-",
        EvictionPolicy.SNAPKV: "32 tokens are read again",
    }
    assert words[policy] in preview


@pytest.fixture(scope="module")
def recurrent() -> LoadedModel:
    """A tiny Mamba: it can return to checkpoints only."""
    chat = tiny_chat()
    config = MambaConfig(
        vocab_size=len(chat),
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        eos_token_id=chat.eos_token_id,
        pad_token_id=chat.pad_token_id,
        bos_token_id=chat.bos_token_id,
    )
    return assemble(seeded_model(config), chat, "mamba", context=1000)


def test_an_edit_before_a_checkpoint_is_named(recurrent: LoadedModel) -> None:
    chat, at = talked(recurrent)
    cached = chat.kv.ids
    del chat.messages[5:]
    chat.messages[4] = PromptMessage("assistant", chat.messages[4].text + " Yes.")
    chat.messages.append(user("Are you sure?"))
    played = assert_paid_as_quoted(chat, at)
    assert played.started.reused_tokens < common_prefix(cached, chat.kv.ids)
    assert miss_of(played).cause == "message 4 edited"
    assert_equals_cold(played, recurrent)


def test_a_frozen_date_costs_no_cache_at_midnight(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded(template=DATED)
    at = desk(loaded)
    chat = Chat(at.engine, loaded, today="2026-02-03")
    chat.ask(QUESTIONS[0])
    assert "Today is 03 February 2026" in loaded.tokenizer.decode(list(chat.kv.ids))
    clock_of(monkeypatch, 2031)
    for question in QUESTIONS[1:]:
        cached = chat.kv.ids
        chat.messages.append(user(question))
        played = assert_paid_as_quoted(chat, at)
        assert (played.started.reused_tokens, played.started.miss) == (len(cached), None)
        assert_equals_cold(played, loaded)


def clock_of(monkeypatch: pytest.MonkeyPatch, year: int) -> None:
    """The clock that templates see, where nothing freezes the date."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Clock":
            return cls(year, 5, 6)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def test_another_date_is_a_miss_that_shows_both(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded(template=DATED)
    at = desk(loaded)
    clock_of(monkeypatch, 2031)
    chat = Chat(at.engine, loaded)
    chat.ask(QUESTIONS[0])
    assert "Today is 06 May 2031" in loaded.tokenizer.decode(list(chat.kv.ids))
    cached = chat.kv.ids
    clock_of(monkeypatch, 2032)
    chat.messages.append(user(QUESTIONS[1]))
    played = assert_paid_as_quoted(chat, at)
    miss = miss_of(played)
    assert miss.cause == miss_reason.TEMPLATE_REWROTE
    assert_shows_the_difference(miss, cached, played, loaded)
    assert (miss.was[0], miss.now[0]) == ("1", "2")


def test_texts_are_counted_as_a_prompt_has_them_and_nothing_else_is_reported(loaded: LoadedModel) -> None:
    at = desk(loaded)
    typed = sentences(7)
    at.engine.command(CountTokens("key", ("", typed, "<|im_end|>")))
    ids = loaded.tokenizer.encode(typed, add_special_tokens=False).ids
    (counted,) = at.reports
    assert isinstance(counted, TokenCounts)
    assert (counted.key, counted.tokens[:2]) == ("key", (0, len(ids)))
    assert counted.tokens[2] > 1  # typed, it is text and no control token


def test_a_rate_is_that_of_the_largest_of_the_latest_reads() -> None:
    rate = PrefillRate()
    assert rate.seconds(100) is None
    rate.note(63, 1.0)
    assert rate.seconds(100) is None
    rate.note(1000, 2.0)
    assert rate.seconds(100) == pytest.approx(0.2)
    rate.note(249, 100.0)  # too small to say anything
    assert rate.seconds(100) == pytest.approx(0.2)
    rate.note(250, 1.0)
    assert rate.seconds(100) == pytest.approx(0.4)
    rate.note(1000, 0.0)
    assert rate.seconds(100) == pytest.approx(0.4)


def test_a_turn_measures_the_prefill_rate(loaded: LoadedModel) -> None:
    chat, at = talked(loaded)
    rates = [at.engine.planner.rate.tokens_per_s]
    played = chat.ask(sentences(12))
    rates.append(at.engine.planner.rate.tokens_per_s)
    stats = played.finished.stats
    assert rates[1] == stats.prefilled_tokens / stats.prefill_s
    assert all(a != b for a, b in pairwise(rates))
