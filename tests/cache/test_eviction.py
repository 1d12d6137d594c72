"""The properties of every eviction policy, and the result of each, in integers."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvchat.cache.eviction import POLICIES, SINKS, ContextLayout, evicted, turns_in
from kvchat.contract import EvictionPolicy

MOST = 24
"""Tokens of a generated conversation."""
LEAVING_GAPS = [name for name, policy in POLICIES.items() if policy.leaves_gap]
every_policy = pytest.mark.parametrize("name", POLICIES)
every_gap_policy = pytest.mark.parametrize("name", LEAVING_GAPS)


@st.composite
def layouts(draw: st.DrawFn) -> ContextLayout:
    """Conversations of a few turns; every second one in blocks."""
    tokens = draw(st.integers(1, MOST))
    system_end = draw(st.integers(0, tokens - 1))
    later = draw(st.none() | st.sets(st.integers(system_end, tokens - 1), max_size=4))
    turns = set() if later is None else {system_end, *later}
    inner = draw(st.none() | st.sets(st.integers(1, tokens), max_size=6))
    edges = () if inner is None else tuple(sorted({0, tokens, *inner}))
    scores = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=tokens, max_size=tokens))
    return ContextLayout(tokens, system_end, tuple(sorted(turns)), edges, scores)


targets = st.integers(0, MOST + 5)


def blocks(layout: ContextLayout) -> list[range]:
    """The blocks that are evicted as a whole."""
    return [range(a, b) for a, b in pairwise(layout.edges or range(layout.tokens + 1))]


def block_of(layout: ContextLayout, token: int) -> range:
    return next(block for block in blocks(layout) if token in block)


def in_blocks(layout: ContextLayout, tokens: set[int]) -> set[int]:
    """Those tokens, with everything that can't be parted from them."""
    return {token for block in blocks(layout) if not tokens.isdisjoint(block) for token in block}


def sinks_of(layout: ContextLayout) -> set[int]:
    return in_blocks(layout, set(range(min(SINKS, layout.tokens))))


def last_turn(layout: ContextLayout) -> set[int]:
    return set(range(layout.turns[-1] if layout.turns else layout.system_end, layout.tokens))


def safe(name: str, layout: ContextLayout) -> set[int]:
    """What a policy never drops."""
    last = in_blocks(layout, {layout.tokens - 1})
    match name:
        case "none":
            return set(range(layout.tokens))
        case "turns":
            return set(range(layout.system_end)) | last_turn(layout)
        case "sinks":
            return sinks_of(layout) | last
        case _:
            turn = in_blocks(layout, last_turn(layout)) if layout.turns else set()
            return sinks_of(layout) | turn | last


def remaining_of(name: str, layout: ContextLayout, target: int) -> set[int]:
    return {token for remaining in POLICIES[name].keep(layout, target) for token in remaining}


def test_every_policy_of_the_contract_exists() -> None:
    assert [policy.name for policy in POLICIES.values()] == list(POLICIES) == list(EvictionPolicy)


@every_policy
@given(layouts(), targets)
def test_remaining_ranges_are_ascending_and_disjoint(name: str, layout: ContextLayout, target: int) -> None:
    remaining = POLICIES[name].keep(layout, target)
    assert all(remaining)
    assert all(a.stop < b.start for a, b in pairwise(remaining))
    assert remaining[0].start >= 0
    assert remaining[-1].stop <= layout.tokens


@every_policy
@given(layouts(), targets)
def test_at_most_the_target_stays_beyond_what_is_never_evicted(
    name: str, layout: ContextLayout, target: int
) -> None:
    remaining = remaining_of(name, layout, target)
    assert remaining >= safe(name, layout)
    assert len(remaining) <= max(target, len(safe(name, layout)))


@every_policy
@given(layouts(), st.integers(MOST, MOST + 5))
def test_nothing_is_evicted_where_everything_fits(name: str, layout: ContextLayout, target: int) -> None:
    assert remaining_of(name, layout, target) == set(range(layout.tokens))


@every_gap_policy
@given(layouts(), targets)
def test_blocks_are_evicted_as_a_whole(name: str, layout: ContextLayout, target: int) -> None:
    remaining = remaining_of(name, layout, target)
    assert remaining == in_blocks(layout, remaining)


@every_gap_policy
@given(layouts(), targets)
def test_the_sinks_and_the_last_token_stay(name: str, layout: ContextLayout, target: int) -> None:
    """The next token's position is counted from the last one's."""
    assert remaining_of(name, layout, target) >= {*range(min(SINKS, layout.tokens)), layout.tokens - 1}


@given(layouts(), targets)
def test_turns_keeps_the_longest_run_of_latest_turns_that_fits(layout: ContextLayout, target: int) -> None:
    remaining = remaining_of("turns", layout, target)
    rest = remaining - set(range(layout.system_end))
    start = min(rest)
    assert rest == set(range(start, layout.tokens))
    assert start in {*layout.turns, layout.system_end}
    longer = [turn for turn in layout.turns if turn < start]
    assert all(layout.system_end + layout.tokens - turn > target for turn in longer)


@given(layouts(), targets)
def test_sinks_keeps_the_start_and_a_window_of_the_latest(layout: ContextLayout, target: int) -> None:
    remaining = remaining_of("sinks", layout, target)
    window = remaining - sinks_of(layout)
    assert window == set(range(min(window, default=layout.tokens), layout.tokens))
    removed = set(range(layout.tokens)) - remaining
    if removed:  # one more block would have been too much
        assert len(remaining) + len(block_of(layout, max(removed))) > target


@given(layouts(), targets)
def test_snapkv_keeps_the_highest_scores(layout: ContextLayout, target: int) -> None:
    remaining = remaining_of("snapkv", layout, target)
    free = [block for block in blocks(layout) if safe("snapkv", layout).isdisjoint(block)]
    score = {block: max(layout.scores[token] for token in block) for block in free}
    stays = [block for block in free if block[0] in remaining]
    goes = [block for block in free if block[0] not in remaining]
    assert all(score[a] >= score[b] for a in stays for b in goes)
    if goes:  # one of the best of those that went would have been too much
        best = max(score[block] for block in goes)
        assert any(len(remaining) + len(block) > target for block in goes if score[block] == best)


@dataclass(frozen=True)
class Row:
    """One line of the table: a conversation of 40 tokens, system prompt to 6, turns at 6, 16, 26 and 34."""

    name: str
    target: int
    remaining: list[range]
    edges: tuple[int, ...] = ()


TABLE = [
    Row("none", 10, [range(40)]),
    Row("turns", 40, [range(40)]),
    Row("turns", 39, [range(6), range(16, 40)]),
    Row("turns", 30, [range(6), range(16, 40)]),
    Row("turns", 29, [range(6), range(26, 40)]),
    Row("turns", 1, [range(6), range(34, 40)]),
    Row("sinks", 20, [range(4), range(24, 40)]),
    Row("sinks", 20, [range(8), range(32, 40)], (0, 8, 16, 24, 32, 40)),
    Row("sinks", 0, [range(4), range(39, 40)]),
    Row("snapkv", 20, [range(4), range(8, 18), range(34, 40)]),
    Row("snapkv", 20, [range(8), range(32, 40)], (0, 8, 16, 24, 32, 40)),
    Row("snapkv", 24, [range(16), range(32, 40)], (0, 8, 16, 24, 32, 40)),
    Row("snapkv", 0, [range(4), range(34, 40)]),
]


@pytest.mark.parametrize(
    "row", TABLE, ids=lambda row: f"{row.name} {row.target}" + " blocks" * bool(row.edges)
)
def test_what_stays_of_a_conversation(row: Row) -> None:
    scores = [0.0] * 8 + [9.0 - i * 0.1 for i in range(10)] + [0.5] * 22
    layout = ContextLayout(40, 6, (6, 16, 26, 34), row.edges, scores)
    assert POLICIES[row.name].keep(layout, row.target) == row.remaining


@every_gap_policy
def test_the_last_token_stays_where_the_current_turn_is_not_read_yet(name: str) -> None:
    """As in the middle of reading a prompt that is longer than the context."""
    layout = ContextLayout(40, 0, (0, 40), (), [1.0] * 39 + [0.0])
    assert 39 in remaining_of(name, layout, 10)


@given(layouts(), targets)
@example(ContextLayout(5, 0, (0,), (), [0.0] * 5), 5)
def test_what_is_dropped_is_what_does_not_stay(layout: ContextLayout, target: int) -> None:
    for policy in POLICIES.values():
        remaining = policy.keep(layout, target)
        removed = evicted(layout.tokens, remaining)
        assert sorted(token for r in (*remaining, *removed) for token in r) == list(range(layout.tokens))
        assert all(removed)
        assert all(a.stop < b.start for a, b in pairwise(removed))


def test_a_turn_counts_as_evicted_once_all_of_it_is() -> None:
    layout = ContextLayout(40, 6, (6, 16, 26, 34))
    assert turns_in(layout, []) == 0
    assert turns_in(layout, [range(6, 15)]) == 0
    assert turns_in(layout, [range(6, 16)]) == 1
    assert turns_in(layout, [range(6, 34)]) == 3
    assert turns_in(layout, [range(6, 16), range(20, 40)]) == 3
    assert turns_in(replace(layout, turns=()), [range(40)]) == 0
