"""How much of a prompt can be reused, in integers."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.prefix import common_prefix, gap_bounds, reusable_prefix

ids = st.lists(st.integers(0, 3), max_size=40)


@st.composite
def relatives(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two lists with a common prefix, mostly longer than by chance."""
    shared = draw(ids)
    return shared + draw(ids), shared + draw(ids)


def naive_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for length, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return length
    return min(len(a), len(b))


@given(relatives())
def test_common_prefix_equals_the_naive_loop(pair: tuple[list[int], list[int]]) -> None:
    assert common_prefix(*pair) == naive_prefix(*pair)


@given(relatives())
def test_common_prefix_accepts_lists_and_tuples(pair: tuple[list[int], list[int]]) -> None:
    a, b = pair
    assert common_prefix(tuple(a), b) == common_prefix(a, tuple(b)) == naive_prefix(a, b)


@given(relatives().filter(lambda pair: bool(pair[1])))
def test_what_is_reused_is_shared_and_leaves_at_least_the_last_token_to_read(
    pair: tuple[list[int], list[int]],
) -> None:
    cached, prompt = pair
    reused = reusable_prefix(cached, prompt)
    assert cached[:reused] == prompt[:reused]
    assert len(prompt) - reused >= 1
    assert reused == min(naive_prefix(cached, prompt), len(prompt) - 1)


@pytest.mark.parametrize(
    ("cached", "prompt", "reused"),
    [
        ([], [1], 0),
        ([1, 2, 3], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2, 3, 4, 5], 3),
        ([1, 2, 3, 4, 5], [1, 2, 3], 2),
        ([1, 2, 3], [1, 9, 3, 4], 1),
        ([1, 2, 3], [9, 2, 3], 0),
    ],
    ids=["nothing cached", "exact repeat", "one more turn", "shorter prompt", "edited", "other start"],
)
def test_reusable_prefix_of(cached: list[int], prompt: list[int], reused: int) -> None:
    assert reusable_prefix(cached, prompt) == reused


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        reusable_prefix([1, 2], [])


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[int], int]:
    """(rows that are still stored, tokens of the history)."""
    tokens = draw(st.integers(0, 30))
    evicted = draw(st.sets(st.integers(0, tokens - 1), max_size=12)) if tokens else set()
    return [token for token in range(tokens) if token not in evicted], tokens


@given(histories())
def test_gaps_begin_before_the_first_evicted_token_and_end_after_the_last(
    history: tuple[list[int], int],
) -> None:
    rows, tokens = history
    evicted = sorted(set(range(tokens)) - set(rows))
    assert gap_bounds(rows, tokens) == ((evicted[0], evicted[-1] + 1) if evicted else (tokens, 0))


@given(histories())
def test_gap_bounds_equal_those_of_a_token_index(history: tuple[list[int], int]) -> None:
    rows, tokens = history
    kv = ConversationKV([])
    with kv.append(range(tokens)):
        pass
    kv.select(rows)
    if rows[-1:] == [tokens - 1]:  # an eviction never drops the last token
        assert gap_bounds(rows, tokens) == (kv.index.first_gap, kv.index.last_gap_end)


@pytest.mark.parametrize(
    ("rows", "tokens", "bounds"),
    [
        ([], 0, (0, 0)),
        ([0, 1, 2], 3, (3, 0)),
        ([0, 1, 4, 5], 6, (2, 4)),
        ([0, 3, 6, 7], 8, (1, 6)),
        ([2, 3], 4, (0, 2)),
        ([0, 1], 4, (2, 4)),
        ([], 4, (0, 4)),
    ],
    ids=["empty", "no gap", "one gap", "two gaps", "start evicted", "end evicted", "all evicted"],
)
def test_gap_bounds_of(rows: list[int], tokens: int, bounds: tuple[int, int]) -> None:
    assert gap_bounds(rows, tokens) == bounds
