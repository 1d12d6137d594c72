"""The reuse of a prompt, decided in integers."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.cache.prefix import Reuse, common_prefix, plan_reuse

ids = st.lists(st.integers(0, 3), max_size=40)


@st.composite
def relatives(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two lists that start alike, mostly further than chance would have it."""
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
def test_common_prefix_takes_lists_and_tuples_alike(pair: tuple[list[int], list[int]]) -> None:
    a, b = pair
    assert common_prefix(tuple(a), b) == common_prefix(a, tuple(b)) == naive_prefix(a, b)


@given(relatives().filter(lambda pair: bool(pair[1])))
def test_a_plan_reads_every_token_once_and_always_at_least_the_last(
    pair: tuple[list[int], list[int]],
) -> None:
    cached, prompt = pair
    reuse = plan_reuse(cached, prompt)
    assert reuse.reused + reuse.prefilled == len(prompt)
    assert reuse.reused + reuse.dropped == len(cached)
    assert reuse.prefilled >= 1
    assert cached[: reuse.reused] == prompt[: reuse.reused]
    assert reuse.reused == min(naive_prefix(cached, prompt), len(prompt) - 1)


@pytest.mark.parametrize(
    ("cached", "prompt", "plan"),
    [
        ([], [1], Reuse(reused=0, prefilled=1, dropped=0)),
        ([1, 2, 3], [1, 2, 3], Reuse(reused=2, prefilled=1, dropped=1)),
        ([1, 2, 3], [1, 2, 3, 4, 5], Reuse(reused=3, prefilled=2, dropped=0)),
        ([1, 2, 3, 4, 5], [1, 2, 3], Reuse(reused=2, prefilled=1, dropped=3)),
        ([1, 2, 3], [1, 9, 3, 4], Reuse(reused=1, prefilled=3, dropped=2)),
        ([1, 2, 3], [9, 2, 3], Reuse(reused=0, prefilled=3, dropped=3)),
    ],
    ids=["nothing cached", "exact repeat", "one more turn", "shorter prompt", "edited", "other start"],
)
def test_plan_of(cached: list[int], prompt: list[int], plan: Reuse) -> None:
    assert plan_reuse(cached, prompt) == plan


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        plan_reuse([1, 2], [])
