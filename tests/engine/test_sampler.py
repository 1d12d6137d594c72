"""Candidates equal those of transformers' processors, and a seed makes samples repeatable."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvchat.contract import Sampling
from kvchat.engine.sampler import CANDIDATES, Sampler, candidates, penalised

LOGITS = torch.tensor([[2.0, 1.5, 1.0, 0.5, -1.0, -3.0]])
DRAWS = 300


def drawn(sampling: Sampling, context: list[int] | None = None) -> set[int]:
    """Every id that comes up."""
    sampler = Sampler(sampling)
    return {sampler.choose(LOGITS, context or []) for _ in range(DRAWS)}


def allowed(processor: LogitsProcessor) -> set[int]:
    """The ids that transformers' processor leaves possible."""
    scores = processor(torch.LongTensor([[]]), LOGITS.clone())
    return {i for i, score in enumerate(scores[0].tolist()) if score != float("-inf")}


def test_greedy_takes_the_most_probable() -> None:
    assert drawn(Sampling(temperature=0)) == {0}


def test_greedy_ignores_what_only_narrows_a_draw() -> None:
    assert drawn(Sampling(temperature=0, top_k=3, top_p=0.1, min_p=0.9, seed=1)) == {0}


@pytest.mark.parametrize(
    ("sampling", "processor", "expected"),
    [
        (Sampling(temperature=1.0, seed=1, top_k=2), TopKLogitsWarper(2), {0, 1}),
        (Sampling(temperature=1.0, seed=1, top_p=0.5), TopPLogitsWarper(0.5), {0, 1}),
        (Sampling(temperature=1.0, seed=1, min_p=0.3), MinPLogitsWarper(0.3), {0, 1, 2}),
    ],
    ids=["top-k", "top-p", "min-p"],
)
def test_only_tokens_that_transformers_allows_are_sampled(
    sampling: Sampling, processor: LogitsProcessor, expected: set[int]
) -> None:
    assert drawn(sampling) == allowed(processor) == expected


def test_without_limits_everything_probable_is_drawn() -> None:
    assert drawn(Sampling(temperature=1.0, seed=1)) >= {0, 1, 2, 3, 4}


def test_a_low_temperature_narrows_and_a_high_one_widens() -> None:
    assert drawn(Sampling(temperature=0.05, seed=1)) == {0}
    assert drawn(Sampling(temperature=50.0, seed=1)) == {0, 1, 2, 3, 4, 5}


def test_a_repeat_penalty_changes_the_greedy_choice() -> None:
    assert drawn(Sampling(temperature=0, repeat_penalty=2.0), context=[0]) == {1}
    assert drawn(Sampling(temperature=0, repeat_penalty=2.0), context=[5]) == {0}


def test_only_a_penalty_needs_the_context() -> None:
    assert Sampler(Sampling(repeat_penalty=1.1)).reads_context
    assert not Sampler(Sampling(temperature=0.8, top_p=0.9, top_k=40, min_p=0.1)).reads_context


def kept_by_transformers(scores: torch.Tensor, sampling: Sampling) -> set[int]:
    """The ids that its processors leave of scores `[vocabulary]`, in its order."""
    processors: list[LogitsProcessor] = []
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    left = scores[None].clone()
    for processor in processors:
        left = processor(torch.LongTensor([[]]), left)
    return {*(left[0] > -torch.inf).nonzero()[:, 0].tolist()}


@given(
    st.integers(0, 10**6),
    st.sampled_from([5, CANDIDATES - 1, CANDIDATES, CANDIDATES + 1, 2000]),
    st.sampled_from([0.1, 1.0, 4.0]),
    st.sampled_from([0, 1, 40, CANDIDATES, 700]),
    st.sampled_from([1.0, 0.05, 0.5, 0.95, 0.999]),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_candidates_equal_those_of_transformers(
    seed: int, vocabulary: int, spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Flat distributions keep more than are looked at first. Weights are the probabilities, in proportion."""
    scores = spread * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, weights = candidates(scores, sampling)
    kept = kept_by_transformers(scores, sampling)
    # where the sum of thousands of probabilities meets the limit, two ways to add them up may part by a token
    assert len(kept ^ {*ids.tolist()}) <= (top_p < 1)
    assert len({*ids.tolist()}) == len(ids)
    expected = scores[ids].double().softmax(-1)
    torch.testing.assert_close(weights.double() / weights.double().sum(), expected, atol=1e-5, rtol=1e-3)


def test_the_whole_vocabulary_is_sorted_where_the_first_candidates_are_not_enough() -> None:
    scores = torch.linspace(0, 1, 4 * CANDIDATES)
    for sampling in (Sampling(top_p=0.9), Sampling(min_p=0.4), Sampling(top_k=3 * CANDIDATES)):
        ids, _ = candidates(scores, sampling)
        assert len(ids) > 2 * CANDIDATES
        assert {*ids.tolist()} == kept_by_transformers(scores, sampling)


@given(st.integers(0, 10**6), st.lists(st.integers(0, 49)), st.sampled_from([0.5, 1.0, 1.3, 5.0]))
def test_a_penalty_is_that_of_transformers(seed: int, context: list[int], penalty: float) -> None:
    scores = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([context], dtype=torch.int64), scores[None]
    )
    assert torch.equal(penalised(scores, context, penalty), expected[0]) if context else True


def test_the_temperature_changes_which_tokens_remain() -> None:
    cold, hot = (Sampling(temperature=t, top_p=0.6, seed=1) for t in (0.2, 5.0))
    for sampling in (cold, hot):
        left = kept_by_transformers(LOGITS[0] / sampling.temperature, sampling)
        assert drawn(sampling) == left


def sequence(seed: int | None) -> list[int]:
    sampler = Sampler(Sampling(temperature=1.0, seed=seed))
    return [sampler.choose(LOGITS, ()) for _ in range(40)]


@given(st.integers(0, 2**63 - 1))
def test_the_same_seed_gives_the_same_tokens(seed: int) -> None:
    assert sequence(seed) == sequence(seed)


def test_other_seeds_and_no_seed_choose_differently() -> None:
    assert sequence(1) != sequence(2)
    assert sequence(None) != sequence(None)


def test_a_seed_does_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    sequence(5)
    assert torch.equal(before, torch.get_rng_state())


def test_choosing_leaves_the_logits_as_they_were() -> None:
    logits = LOGITS.clone()
    Sampler(Sampling(temperature=0.5, top_k=2, top_p=0.5, min_p=0.2, repeat_penalty=1.5, seed=1)).choose(
        logits, [0, 1]
    )
    assert torch.equal(logits, LOGITS)


def test_bf16_logits_are_chosen_from_in_fp32() -> None:
    assert Sampler(Sampling(temperature=1.0, seed=3, top_p=0.9)).choose(LOGITS.bfloat16(), ()) in range(6)
