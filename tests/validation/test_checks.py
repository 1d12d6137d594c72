"""Validation of untrusted values: valid ones are unchanged, errors name the field."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.chat.conversation import Message
from kvchat.contract import CacheMode, Drop, FinishReason, PromptMessage, Sampling, TurnRequest, TurnStats
from kvchat.engine_process.server import problem_of
from kvchat.validation import bounds
from kvchat.validation.checks import InvalidError, checked, with_defaults
from kvchat.validation.plain_json import read_json, write_json
from tests.support.samples import FIGURES

REQUEST = TurnRequest("t", "c", (PromptMessage("user", "Which?"),), CacheMode.ON, Sampling())


def test_valid_values_are_unchanged() -> None:
    assert checked(TurnRequest, REQUEST) == REQUEST
    assert checked(TurnStats, FIGURES) == FIGURES
    assert with_defaults(Sampling, {"temperature": 1, "unknown": 2}) == (Sampling(temperature=1.0), [])


@pytest.mark.parametrize(
    ("request_", "place"),
    [
        (
            replace(REQUEST, sampling=Sampling(temperature=math.nan)),
            "sampling.temperature must be at least 0",
        ),
        (replace(REQUEST, sampling=Sampling(temperature=math.inf)), "sampling.temperature must be at most 5"),
        (replace(REQUEST, sampling=Sampling(seed=2**64)), "sampling.seed must be at most"),
        (replace(REQUEST, sampling=Sampling(max_tokens=0)), "sampling.max_tokens must be at least 1, not 0"),
        (replace(REQUEST, evicted_messages=10**30), "evicted_messages must be at most"),
        (
            replace(REQUEST, messages=(PromptMessage("user", "\ud800"),)),
            "messages[0].text must be text without",
        ),
        (
            replace(REQUEST, messages=(PromptMessage("tool", "x"),)),
            "messages[0].role must be system, user or",
        ),
        (
            replace(REQUEST, messages=(PromptMessage("user", "x", (-1,)),)),
            "messages[0].token_ids[0] must be at",
        ),
        (Drop(5), "conversation must be text, not 5"),  # type: ignore[arg-type]
    ],
)
def test_an_invalid_request_is_described_with_the_path_of_the_field(
    request_: TurnRequest | Drop, place: str
) -> None:
    assert place in problem_of(request_)


def test_a_valid_request_has_no_problem() -> None:
    assert problem_of(REQUEST) == ""
    assert problem_of(Drop("c")) == ""


def test_with_defaults_raises_for_an_invalid_field_without_default() -> None:
    with pytest.raises(InvalidError, match="text is missing"):
        with_defaults(Message, {"id": 1, "parent_id": None, "role": "user", "created_at": ""})


def test_finish_values_match_the_contract() -> None:
    given = {"id": 1, "parent_id": None, "role": "assistant", "text": "", "created_at": ""}
    for finish in FinishReason:
        assert checked(Message, given | {"finish_reason": finish.value}).finish_reason == finish


def test_bounds_are_finite_and_exclude_nan() -> None:
    found = [each for each in vars(bounds).values() if isinstance(each, bounds.Bounds)]
    assert len(found) > 10
    for each in found:
        assert math.isfinite(each.lowest)
        assert math.isfinite(each.highest)
        assert math.nan not in each
        assert math.inf not in each
        assert each.highest in each
        assert (each.lowest in each) is not each.above


NUMBERS = st.floats() | st.integers() | st.text() | st.none()


@given(st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5))
def test_written_json_has_finite_numbers_only(value: object) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    for readable in (True, False):
        text = write_json(value, readable=readable)
        json.loads(text, parse_constant=refuse)
    assert write_json([math.nan, {"a": (math.inf, 1.5)}]) == '[null, {"a": [null, 1.5]}]'


def test_very_long_integers_are_read_as_floats() -> None:
    assert read_json("[1" + "0" * 5000 + ", 18446744073709551616]") == [math.inf, 2**64]
