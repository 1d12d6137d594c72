"""Settings reach transformers' own processors, in its order, and a seed makes choices repeatable."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvchat.contract import Sampling
from kvchat.engine import sample
from kvchat.engine.sample import Sampler

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
def test_only_what_transformers_leaves_is_ever_drawn(
    sampling: Sampling, processor: LogitsProcessor, expected: set[int]
) -> None:
    assert drawn(sampling) == allowed(processor) == expected


def test_without_limits_everything_probable_is_drawn() -> None:
    assert drawn(Sampling(temperature=1.0, seed=1)) >= {0, 1, 2, 3, 4}


def test_a_low_temperature_narrows_and_a_high_one_widens() -> None:
    assert drawn(Sampling(temperature=0.05, seed=1)) == {0}
    assert drawn(Sampling(temperature=50.0, seed=1)) == {0, 1, 2, 3, 4, 5}


def test_a_repeat_penalty_turns_greedy_away_from_what_was_said() -> None:
    assert drawn(Sampling(temperature=0, repeat_penalty=2.0), context=[0]) == {1}
    assert drawn(Sampling(temperature=0, repeat_penalty=2.0), context=[5]) == {0}


def test_only_a_penalty_needs_the_context() -> None:
    assert Sampler(Sampling(repeat_penalty=1.1)).reads_context
    assert not Sampler(Sampling(temperature=0.8, top_p=0.9, top_k=40, min_p=0.1)).reads_context


PROCESSORS: dict[str, Callable[..., LogitsProcessor]] = {
    kind.__name__: kind
    for kind in (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        MinPLogitsWarper,
    )
}


def test_every_setting_reaches_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []

    def build(name: str, value: float) -> LogitsProcessor:
        seen.append((name, value))
        return PROCESSORS[name](value)

    for name in PROCESSORS:
        monkeypatch.setattr(sample, name, partial(build, name))
    Sampler(Sampling(temperature=0.8, top_p=0.9, top_k=40, min_p=0.1, repeat_penalty=1.2))
    assert seen == [
        ("RepetitionPenaltyLogitsProcessor", 1.2),
        ("TemperatureLogitsWarper", 0.8),
        ("TopKLogitsWarper", 40),
        ("TopPLogitsWarper", 0.9),
        ("MinPLogitsWarper", 0.1),
    ]
    seen.clear()
    Sampler(Sampling(temperature=1.0))
    assert seen == []


def sequence(seed: int | None) -> list[int]:
    sampler = Sampler(Sampling(temperature=1.0, seed=seed))
    return [sampler.choose(LOGITS, ()) for _ in range(40)]


@given(st.integers(0, 2**63 - 1))
def test_the_same_seed_chooses_alike(seed: int) -> None:
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
