"""Which cache is evicted first, and how."""

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
    unique_by=lambda caches: caches.conversation,
)


def names(caches: list[Candidate]) -> list[str]:
    return [each.conversation for each in eviction_order(caches)]


@given(helds)
def test_all_but_the_active_cache_are_in_the_eviction_order(caches: list[Candidate]) -> None:
    assert sorted(names(caches)) == sorted(each.conversation for each in caches if not each.active)


@given(helds)
def test_eviction_order_sorts_by_prefix_pin_and_last_use(caches: list[Candidate]) -> None:
    for a, b in pairwise(eviction_order(caches)):
        if a.prefix_only != b.prefix_only:
            assert b.prefix_only
        elif a.pinned != b.pinned:
            assert b.pinned
        else:
            assert a.last_used <= b.last_used


@given(helds)
def test_the_first_in_eviction_order_is_evicted(caches: list[Candidate]) -> None:
    chosen = next_eviction(caches)
    if not names(caches):
        assert chosen is None
    else:
        assert chosen is not None
        assert chosen[0] == names(caches)[0]


def test_eviction_order_is_lru_pinned_then_prefix() -> None:
    caches = [
        Candidate("prefix", 1.0, prefix_only=True),
        Candidate("pinned", 2.0, pinned=True),
        Candidate("latest", 5.0),
        Candidate("active", 0.0, active=True),
        Candidate("oldest", 3.0),
        Candidate("pinned prefix", 0.5, pinned=True, prefix_only=True),
    ]
    assert names(caches) == ["oldest", "latest", "pinned", "prefix", "pinned prefix"]


@pytest.mark.parametrize(
    ("can_spill", "can_quantise", "chosen"),
    [
        (True, True, EvictionAction.SPILL),
        (True, False, EvictionAction.SPILL),
        (False, True, EvictionAction.QUANTISE),
        (False, False, EvictionAction.DROP),
    ],
)
def test_spilling_is_preferred_to_quantising_and_that_to_dropping(
    can_spill: bool, can_quantise: bool, chosen: EvictionAction
) -> None:
    caches = Candidate("a", 1.0, can_spill=can_spill, can_quantise=can_quantise)
    assert next_eviction([caches, Candidate("b", 2.0)]) == ("a", chosen)


def test_the_active_cache_is_never_evicted() -> None:
    active = Candidate("a", 0.0, active=True, can_spill=True, can_quantise=True)
    assert next_eviction([active]) is None
    assert next_eviction([]) is None
    assert next_eviction([active, replace(active, conversation="b", active=False)]) == (
        "b",
        EvictionAction.SPILL,
    )
