"""Who makes room first, and how."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.cache.memory_budget import Candidate, EvictionAction, eviction_order, next_eviction

helds = st.lists(
    st.builds(
        Candidate,
        conversation=st.uuids().map(str),
        last_used=st.integers(0, 5).map(float),
        pinned=st.booleans(),
        active=st.booleans(),
        can_spill=st.booleans(),
        can_quantise=st.booleans(),
        prefix_only=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda held: held.conversation,
)


def names(held: list[Candidate]) -> list[str]:
    return [each.conversation for each in eviction_order(held)]


@given(helds)
def test_all_but_the_active_cache_are_in_the_eviction_order(held: list[Candidate]) -> None:
    assert sorted(names(held)) == sorted(each.conversation for each in held if not each.active)


@given(helds)
def test_eviction_order_sorts_by_prefix_pin_and_last_use(held: list[Candidate]) -> None:
    for a, b in pairwise(eviction_order(held)):
        if a.prefix_only != b.prefix_only:
            assert b.prefix_only
        elif a.pinned != b.pinned:
            assert b.pinned
        else:
            assert a.last_used <= b.last_used


@given(helds)
def test_the_first_in_eviction_order_is_evicted(held: list[Candidate]) -> None:
    relief = next_eviction(held)
    if not names(held):
        assert relief is None
    else:
        assert relief is not None
        assert relief[0] == names(held)[0]


def test_eviction_order_is_lru_pinned_then_prefix() -> None:
    held = [
        Candidate("prefix", 1.0, prefix_only=True),
        Candidate("pinned", 2.0, pinned=True),
        Candidate("latest", 5.0),
        Candidate("active", 0.0, active=True),
        Candidate("oldest", 3.0),
        Candidate("pinned prefix", 0.5, pinned=True, prefix_only=True),
    ]
    assert names(held) == ["oldest", "latest", "pinned", "prefix", "pinned prefix"]


@pytest.mark.parametrize(
    ("can_spill", "can_quantise", "relief"),
    [
        (True, True, EvictionAction.SPILL),
        (True, False, EvictionAction.SPILL),
        (False, True, EvictionAction.QUANTISE),
        (False, False, EvictionAction.DROP),
    ],
)
def test_spilling_is_preferred_to_quantising_and_that_to_dropping(
    can_spill: bool, can_quantise: bool, relief: EvictionAction
) -> None:
    held = Candidate("a", 1.0, can_spill=can_spill, can_quantise=can_quantise)
    assert next_eviction([held, Candidate("b", 2.0)]) == ("a", relief)


def test_the_active_cache_is_never_evicted() -> None:
    active = Candidate("a", 0.0, active=True, can_spill=True, can_quantise=True)
    assert next_eviction([active]) is None
    assert next_eviction([]) is None
    assert next_eviction([active, replace(active, conversation="b", active=False)]) == (
        "b",
        EvictionAction.SPILL,
    )
