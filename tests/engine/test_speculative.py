"""Drafts change no answer and no cache, whether they are right, wrong or hostile."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MambaConfig

from kvchat.cache.layer import GROWTH_STEP
from kvchat.contract import (
    CacheEventKind,
    CacheMode,
    EvictionPolicy,
    FinishReason,
    KVPrecision,
    PoolState,
    Report,
    Sampling,
    SetBudget,
    Tokens,
    TurnEvent,
)
from kvchat.engine.engine import UNBOUNDED, LocalEngine
from kvchat.engine.factory import open_engine
from kvchat.engine.model.loader import LoadedModel, assemble
from kvchat.engine.speculative import (
    LONGEST,
    LONGEST_PAUSE,
    NGRAM,
    SHORTEST,
    Drafter,
    DraftModel,
    DraftPacing,
    PromptLookup,
)
from kvchat.errors import KvchatError
from tests.support.engine_driver import TOLERANCE, Chat, Played, assert_equals_cold, sentences, stopping_at
from tests.support.oracle import Guard, evictions, with_context
from tests.support.tiny import seeded_model, tiny_chat, tiny_config

ANSWER = 32
GREEDY = Sampling(temperature=0, max_tokens=ANSWER)
DRAWN = Sampling(temperature=0.9, top_p=0.95, top_k=50, seed=7, max_tokens=ANSWER)
PENALISED = Sampling(temperature=0, repeat_penalty=1.3, max_tokens=ANSWER)


@pytest.fixture(autouse=True, scope="module")
def no_drafts() -> None:
    """Here there are some."""


# ---- drafters ----------------------------------------------------------------------------------------------


@dataclass
class Guessing:
    """Knows the coming answers, and proposes what `guess` makes of them."""

    guess: Callable[[list[int]], list[int]]
    """The proposal where those tokens are right."""
    answers: list[list[int]] = field(default_factory=list)
    asked: int = 0
    judged: list[tuple[int, int]] = field(default_factory=list)

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        assert most > 0
        self.asked += 1
        return self.guess(self._coming(tokens))[:most]

    def _coming(self, tokens: Sequence[int]) -> list[int]:
        for answer in self.answers:
            for said in range(len(answer), 0, -1):
                if list(tokens[-said:]) == answer[:said]:
                    return answer[said:]
        return []

    def record(self, proposed: int, accepted: int) -> None:
        assert 0 <= accepted <= proposed > 0
        self.judged.append((proposed, accepted))


def right() -> Guessing:
    return Guessing(lambda coming: coming[:15])


def wrong() -> Guessing:
    return Guessing(lambda coming: [(token + 1) % 500 for token in coming[:15]] or [3] * 15)


def half_right() -> Guessing:
    return Guessing(lambda coming: [token if i < 4 else 3 for i, token in enumerate(coming[:9])])


def anything() -> Guessing:
    chance = random.Random(1)

    def guess(coming: list[int]) -> list[int]:
        length = chance.randrange(12)
        return [*coming[: chance.randrange(4)], *(chance.randrange(500) for _ in range(length))]

    return Guessing(guess)


def lookup() -> PromptLookup:
    return PromptLookup()


def small() -> LoadedModel:
    chat = tiny_chat()
    return assemble(seeded_model(tiny_config(chat), seed=1), chat, "small")


def small_model() -> DraftModel:
    return DraftModel(small())


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    drafter.__name__: drafter for drafter in (right, wrong, half_right, anything, lookup, small_model)
}


@pytest.fixture(params=DRAFTERS)
def drafter(request: pytest.FixtureRequest) -> Drafter:
    return DRAFTERS[request.param]()


@pytest.fixture(params=[right, half_right, anything])
def knowing(request: pytest.FixtureRequest) -> Guessing:
    """Drafters with long, often correct drafts: answers end in the middle of them."""
    guessing: Guessing = request.param()
    return guessing


# ---- the same with and without -----------------------------------------------------------------------------


@dataclass
class Told:
    """Two turns, and what was left in the cache after each."""

    turns: list[Played]
    kept: list[tuple[object, ...]]

    @property
    def answers(self) -> list[list[int]]:
        return [played.tokens for played in self.turns]

    def assert_equals(self, other: "Told") -> None:
        assert self.answers == other.answers
        for mine, theirs in zip(self.turns, other.turns, strict=True):
            ours, plain = mine.finished, theirs.finished
            assert (ours.text, ours.evicted_messages) == (plain.text, plain.evicted_messages)
            assert ours.stats.finish_reason == plain.stats.finish_reason
            assert ours.stats.generated_tokens == plain.stats.generated_tokens
            assert [e.tokens for e in evictions(mine)] == [e.tokens for e in evictions(theirs)]
            assert cache_sizes(mine) == cache_sizes(theirs)
        assert self.kept == other.kept

    @property
    def drafted(self) -> int:
        return sum(played.finished.stats.drafted_tokens for played in self.turns)

    @property
    def accepted(self) -> int:
        return sum(played.finished.stats.accepted_tokens for played in self.turns)


def cache_sizes(played: Played) -> list[int]:
    """Cached tokens reported with each token; drafted tokens count once they are accepted."""
    return [event.kv_tokens for event in played.events if isinstance(event, Tokens)]


def tell(
    loaded: LoadedModel,
    drafter: Drafter | None,
    sampling: Sampling = GREEDY,
    *,
    policy: EvictionPolicy = EvictionPolicy.TURNS,
    precision: KVPrecision = KVPrecision.AUTO,
    stop_after: int | None = None,
    texts: Sequence[str] = ("Which pass is open in May?", "How long is the drive over the pass?"),
) -> Told:
    engine = LocalEngine(loaded, new_drafter=lambda: drafter)
    chat = Chat(engine, loaded, sampling=sampling, policy=policy)
    chat.precision = precision
    turns: list[Played] = []
    kept: list[tuple[object, ...]] = []
    for text in texts:
        turns.append(
            chat.ask(text, stopping_at(engine, Tokens, stop_after) if stop_after else lambda _: None)
        )
        Guard(engine)()
        kv = chat.kv
        assert [layer.length for layer in kv.stored] == [len(kv)] * len(kv.stored)
        kept.append((kv.ids, kv.rows, kv.positions, kv.edges))
    return Told(turns, kept)


plain_runs: dict[str, Told] = {}


def without(loaded: LoadedModel, sampling: Sampling, options: Mapping[str, object]) -> Told:
    """The same without drafts, computed once for all drafters."""
    key = repr((loaded.facts.context_limit, sampling, options))
    if key not in plain_runs:
        plain_runs[key] = tell(loaded, None, sampling, **options)  # type: ignore[arg-type]
    return plain_runs[key]


def both(loaded: LoadedModel, drafter: Drafter, sampling: Sampling = GREEDY, **options: object) -> Told:
    """What has to be the same with and without drafts."""
    plain = without(loaded, sampling, options)
    if isinstance(drafter, Guessing):
        drafter.answers = plain.answers
    report = tell(loaded, drafter, sampling, **options)  # type: ignore[arg-type]
    report.assert_equals(plain)
    assert plain.drafted == plain.accepted == 0
    assert 0 <= report.accepted <= report.drafted
    return report


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, PENALISED], ids=["greedy", "drawn", "penalised"])
def test_drafts_change_neither_answers_nor_caches(
    tiny: LoadedModel, drafter: Drafter, sampling: Sampling
) -> None:
    report = both(tiny, drafter, sampling)
    assert [len(answer) for answer in report.answers] == [ANSWER, ANSWER]


def test_answers_with_drafts_equal_a_cold_run(tiny: LoadedModel) -> None:
    plain = tell(tiny, None)
    drafter = half_right()
    drafter.answers = plain.answers
    chat = Chat(LocalEngine(tiny, new_drafter=lambda: drafter), tiny, sampling=replace(GREEDY, max_tokens=12))
    for _ in range(2):
        played = chat.ask("Which pass is open in May?")
        ids = [*chat.kv.ids]
        assert ids[-len(played.tokens) + 1 :] == played.tokens[:-1]
        chat.engine._services = replace(chat.engine._services, new_drafter=lambda: None)
        assert_equals_cold(chat.ask("Why?"), tiny)  # after a cache that was cropped many times


def test_correct_drafts_are_accepted_and_save_passes(tiny: LoadedModel) -> None:
    report = both(tiny, right())
    assert report.accepted == report.drafted >= ANSWER
    assert len(report.turns[0].logits) < ANSWER // 4


def test_wrong_drafts_are_rejected(tiny: LoadedModel) -> None:
    drafter = wrong()
    report = both(tiny, drafter)
    assert (report.accepted, report.drafted > ANSWER) == (0, True)
    assert sum(proposed for proposed, _ in drafter.judged) == report.drafted
    assert not any(accepted for _, accepted in drafter.judged)


def test_drafted_tokens_count_as_evaluated(tiny: LoadedModel) -> None:
    report = both(tiny, half_right())
    for played in report.turns:
        stats = played.finished.stats
        read = stats.prefilled_tokens + stats.generated_tokens - 1
        assert stats.evaluated_tokens == played.evaluated
        assert stats.evaluated_tokens == read + stats.drafted_tokens - stats.accepted_tokens


@pytest.mark.parametrize("most", [1, 2, 17])
def test_an_answer_ends_in_the_middle_of_a_draft(tiny: LoadedModel, knowing: Guessing, most: int) -> None:
    report = both(tiny, knowing, replace(GREEDY, max_tokens=most))
    assert all(p.finished.stats.finish_reason == FinishReason.LENGTH for p in report.turns)


@pytest.mark.parametrize("stop_after", [1, 7])
def test_a_stop_in_the_middle_of_a_draft_crops_the_rest(
    tiny: LoadedModel, knowing: Guessing, stop_after: int
) -> None:
    report = both(tiny, knowing, stop_after=stop_after)
    assert all(p.finished.stats.finish_reason == FinishReason.CANCELLED for p in report.turns)
    assert [len(answer) for answer in report.answers] == [stop_after + 1] * 2


def test_an_end_token_in_the_middle_of_a_draft_ends_the_turn(tiny: LoadedModel, knowing: Guessing) -> None:
    said = tell(tiny, None).answers[0]
    end = next(i for i in range(6, ANSWER) if said[i] not in said[:i])
    loaded = replace(tiny, end_ids=frozenset({said[end]}))
    knowing.answers = [said]
    plain, report = tell(loaded, None), tell(loaded, knowing)
    report.assert_equals(plain)
    assert report.turns[0].finished.stats.finish_reason == FinishReason.STOP
    assert len(report.answers[0]) == end


@pytest.mark.parametrize(
    ("new_drafter", "precision"),
    [(right, KVPrecision.AUTO), (half_right, KVPrecision.INT8)],
)
@pytest.mark.parametrize("policy", EvictionPolicy)
def test_drafts_at_the_end_of_the_context_do_not_change_evictions(
    tiny: LoadedModel, new_drafter: Callable[[], Guessing], policy: EvictionPolicy, precision: KVPrecision
) -> None:
    loaded = with_context(tiny, 300)
    report = both(
        loaded,
        new_drafter(),
        replace(GREEDY, max_tokens=120),
        policy=policy,
        precision=precision,
        texts=[sentences(6), "And the train?"],
    )
    reasons = [played.finished.stats.finish_reason for played in report.turns]
    assert any(evictions(played) for played in report.turns) or FinishReason.CONTEXT in reasons


@pytest.mark.parametrize("precision", [KVPrecision.INT8, KVPrecision.INT4])
def test_a_draft_finishes_no_block(tiny: LoadedModel, knowing: Guessing, precision: KVPrecision) -> None:
    """Quantisation can't be undone, so a rejected token in a block would stay."""
    report = both(tiny, knowing, replace(GREEDY, max_tokens=120), precision=precision)
    assert max(len(ids) for ids, *_ in report.kept) > 192  # type: ignore[arg-type]


# ---- where nothing is guessed ------------------------------------------------------------------------------


def test_without_a_cache_nothing_is_drafted(tiny: LoadedModel) -> None:
    drafter = anything()
    engine = LocalEngine(tiny, new_drafter=lambda: drafter)
    played = Chat(engine, tiny, mode=CacheMode.OFF).ask("Which pass is open?")
    assert (drafter.asked, played.finished.stats.drafted_tokens) == (0, 0)


def test_models_with_recurrent_states_get_no_drafts() -> None:
    chat = tiny_chat()
    config = MambaConfig(vocab_size=len(chat), hidden_size=32, num_hidden_layers=2, state_size=8)
    loaded = assemble(seeded_model(config), chat, "mamba", context=1000)
    drafter = anything()
    played = Chat(LocalEngine(loaded, new_drafter=lambda: drafter), loaded).ask("Which pass is open?")
    assert (drafter.asked, played.finished.stats.drafted_tokens) == (0, 0)


@pytest.mark.parametrize("draft", ["lookup", "off"])
def test_the_user_chooses_the_drafter(tiny: LoadedModel, draft: str) -> None:
    engine = open_engine(tiny, None, None, 0, draft=draft)
    drafter = engine._services.new_drafter()
    assert isinstance(drafter, PromptLookup) if draft == "lookup" else drafter is None


def test_a_draft_model_with_another_tokenizer_is_refused(tiny: LoadedModel) -> None:
    other = replace(tiny, facts=replace(tiny.facts, name="small", tokenizer="another"))
    with pytest.raises(KvchatError, match="small has another tokenizer than tiny"):
        open_engine(tiny, None, None, 0, draft=other)
    drafter = open_engine(tiny, None, None, 0, draft=tiny)._services.new_drafter()
    assert isinstance(drafter, DraftModel)


# ---- the draft model's own cache ---------------------------------------------------------------------------


def with_draft_model(tiny: LoadedModel, budget: int) -> tuple[LocalEngine, Callable[[TurnEvent], None]]:
    """An engine with a draft model, and a guard of its budget."""
    engine = open_engine(tiny, budget, None, 0, draft=small())

    def guard(_event: TurnEvent) -> None:
        assert engine.caches.used_bytes <= budget

    return engine, guard


def test_the_draft_models_cache_counts_in_the_budget(tiny: LoadedModel) -> None:
    engine, guard = with_draft_model(tiny, UNBOUNDED)
    Chat(engine, tiny, sampling=GREEDY).ask("Which pass is open?", guard)
    (cache,), pool = engine.pool().caches, engine.pool()
    assert pool.draft_bytes == tiny.new_kv().bytes_at(GROWTH_STEP)
    assert pool.used_bytes == cache.bytes + pool.draft_bytes


def test_the_draft_models_cache_is_evicted_before_conversations(tiny: LoadedModel) -> None:
    """A budget for three caches: two conversations and the draft model's, then a third conversation."""
    engine, guard = with_draft_model(tiny, 3 * tiny.new_kv().bytes_at(GROWTH_STEP))
    for name in "ab":
        Chat(engine, tiny, name, sampling=GREEDY).ask(f"{name * 9}: which pass is open?", guard)
    assert engine.pool().draft_bytes > 0
    played = Chat(engine, tiny, "c", sampling=GREEDY).ask("Which pass is open?", guard)
    gone = [e for e in played.finished.pool.events if e.kind is CacheEventKind.DROP]
    assert [(e.conversation, e.note) for e in gone] == [
        ("c", "the draft model's own cache: the KV budget was full")
    ]
    assert {cache.conversation for cache in engine.pool().caches} == {"a", "b", "c"}
    assert (engine.pool().draft_bytes, played.finished.stats.drafted_tokens) == (0, 0)


def test_evicting_the_draft_cache_is_logged_on_the_latest_conversation(tiny: LoadedModel) -> None:
    engine, guard = with_draft_model(tiny, UNBOUNDED)
    for name in "ab":
        Chat(engine, tiny, name, sampling=GREEDY).ask(f"{name * 9}: which pass is open?", guard)
    engine.pool()
    reports: list[Report] = []
    engine._report = reports.append
    engine.command(SetBudget(2 * tiny.new_kv().bytes_at(GROWTH_STEP)))
    (pool,) = [each for each in reports if isinstance(each, PoolState)]
    assert [(e.conversation, e.kind) for e in pool.events] == [("b", CacheEventKind.DROP)]
    assert (pool.draft_bytes, {cache.conversation for cache in pool.caches}) == (0, {"a", "b"})


def test_no_conversation_is_evicted_for_drafts(tiny: LoadedModel) -> None:
    one = tiny.new_kv().bytes_at(GROWTH_STEP)
    answers = []
    for budget in (one, UNBOUNDED):
        engine, guard = with_draft_model(tiny, budget)
        answers.append(Chat(engine, tiny, sampling=GREEDY).ask("Which pass is open?", guard))
    small, large = answers
    assert small.tokens == large.tokens
    assert (small.finished.stats.drafted_tokens, small.finished.pool.draft_bytes) == (0, 0)
    assert large.finished.stats.drafted_tokens > 0


# ---- draft lengths ----------------------------------------------------------------------------------------


def test_drafts_get_longer_while_they_are_accepted() -> None:
    pace, widths = DraftPacing(), []
    for _ in range(5):
        widths.append(pace.most(100))
        pace.record(widths[-1], widths[-1])
    assert widths == [SHORTEST, 7, LONGEST, LONGEST, LONGEST]
    assert pace.most(4) == 4


def test_pauses_get_longer_each_time_a_draft_is_rejected() -> None:
    pace, rests = DraftPacing(), []
    for _ in range(9):
        rest = 0
        while not (width := pace.most(100)):
            rest += 1
        rests.append(rest)
        assert width == SHORTEST
        pace.record(width, 0)
    assert rests == [0, 2, 4, 8, 16, 32, 64, LONGEST_PAUSE, LONGEST_PAUSE]


def test_a_partly_accepted_draft_shortens_the_next_pause() -> None:
    pace = DraftPacing(failures=3)
    pace.record(3, 2)
    pace.record(3, 0)
    assert pace.pause == 8
    pace.pause = 0
    pace.record(3, 3)
    assert (pace.failures, pace.pause) == (0, 0)


@pytest.mark.parametrize(("accepted", "rest"), [(14, 0), (6, 0), (5, 2), (0, 2)])
def test_a_partly_rejected_long_draft_makes_the_next_one_short(accepted: int, rest: int) -> None:
    pace = DraftPacing(width=LONGEST)
    pace.record(LONGEST, accepted)
    assert (pace.width, pace.pause) == (SHORTEST, rest)


def test_lookup_proposes_what_followed_the_last_occurrence() -> None:
    text = [1, 2, 3, 4, 5, 1, 2, 3, 7, 8, 9, 1, 2, 3]
    assert PromptLookup().propose(text, 10) == [7, 8, 9]
    assert PromptLookup().propose(text, 2) == [7, 8]
    assert PromptLookup().propose(text[:-1], 10) == []
    assert PromptLookup().propose([1, 2], 10) == []
    assert PromptLookup().propose([5, 5, 5, 5], 10) == [5]


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 9))
def test_lookup_equals_a_search_for_the_last_occurrence(tokens: list[int], most: int) -> None:
    """Token by token, as a turn asks, and at once: the same."""
    growing = PromptLookup()
    for end in range(len(tokens) + 1):
        found = growing.propose(tokens[:end], most)
        growing.record(1, 1)
        growing._pacing = DraftPacing()
        last = tokens[:end][-NGRAM:]
        places = [i for i in range(NGRAM, end) if tokens[i - NGRAM : i] == last] if end >= NGRAM else []
        expected = tokens[places[-1] : end][: min(SHORTEST, most)] if places else []
        assert found == expected
    assert PromptLookup().propose(tokens, most) == (found if tokens else [])


def test_a_draft_model_proposes_its_greedy_tokens_and_reads_nothing_twice(tiny: LoadedModel) -> None:
    drafter = DraftModel(tiny)
    prompt = tiny.tokenizer.encode(sentences(3)).ids
    first = drafter.propose(prompt, 3)
    said = [*prompt]
    for token in first:
        with torch.inference_mode():
            logits = tiny.model(input_ids=torch.tensor([said])).logits[0, -1]
        best = logits.topk(2)
        assert token == int(best.indices[0]) or float(best.values[0] - best.values[1]) < TOLERANCE
        said.append(token)
    drafter.record(3, 2)
    assert drafter._kv.ids == (*prompt, *first[:2])
    # the second token was rejected: it crops to there and continues
    other = [*prompt, first[0], (first[1] + 1) % 500]
    drafter.propose(other, 3)
    assert drafter._kv.ids[: len(other)] == tuple(other)


def test_a_draft_model_stops_at_its_context_limit(tiny: LoadedModel) -> None:
    drafter = DraftModel(with_context(tiny, 50))
    prompt = tiny.tokenizer.encode(sentences(9)).ids
    assert len(drafter.propose(prompt[:47], 3)) == 2
    assert drafter.propose(prompt[:49], 3) == drafter.propose(prompt[:80], 3) == []
