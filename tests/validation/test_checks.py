"""Values from outside: what fits comes through as it is, what doesn't is named with its place."""

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
from kvchat.validation.checks import InvalidError, checked, mended
from kvchat.validation.plain_json import read_json, write_json
from tests.support.samples import FIGURES

REQUEST = TurnRequest("t", "c", (PromptMessage("user", "Which?"),), CacheMode.ON, Sampling())


def test_what_fits_comes_through_as_it_is() -> None:
    assert checked(TurnRequest, REQUEST) == REQUEST
    assert checked(TurnStats, FIGURES) == FIGURES
    assert mended(Sampling, {"temperature": 1, "unknown": 2}) == (Sampling(temperature=1.0), [])


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
def test_a_request_with_a_wrong_value_is_named_before_the_engine_reads_it(
    request_: TurnRequest | Drop, place: str
) -> None:
    assert place in problem_of(request_)


def test_a_good_request_has_no_problem() -> None:
    assert problem_of(REQUEST) == ""
    assert problem_of(Drop("c")) == ""


def test_a_wrong_field_without_a_default_can_not_be_mended() -> None:
    with pytest.raises(InvalidError, match="text is missing"):
        mended(Message, {"id": 1, "parent_id": None, "role": "user", "created_at": ""})


def test_the_words_of_a_finish_reason_are_those_of_the_contract() -> None:
    given = {"id": 1, "parent_id": None, "role": "assistant", "text": "", "created_at": ""}
    for finish in FinishReason:
        assert checked(Message, given | {"finish_reason": finish.value}).finish_reason == finish


def test_all_bounds_are_finite_and_nan_is_in_none() -> None:
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
def test_json_never_has_a_number_that_is_not_finite(value: object) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    for readable in (True, False):
        text = write_json(value, readable=readable)
        json.loads(text, parse_constant=refuse)
    assert write_json([math.nan, {"a": (math.inf, 1.5)}]) == '[null, {"a": [null, 1.5]}]'


def test_a_number_of_thousands_of_digits_is_read() -> None:
    assert read_json("[1" + "0" * 5000 + ", 18446744073709551616]") == [math.inf, 2**64]
