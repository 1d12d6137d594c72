"""Keys rotated to other positions, compared with the angles and with a model that reads them there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.rope_shift import can_close_gaps, close_gaps, rotated
from kvchat.engine.model.forward import CachedReader, forward_pass
from kvchat.engine.model.loader import LoadedModel
from tests.support.tiny import CONTEXT

HEADS, TOKENS, DIM = 2, 12, 16
FREQUENCIES = 10_000.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
EXACT = 1e-5
shifts = st.integers(-CONTEXT, CONTEXT)
either_pairing = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])


def some_keys(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, HEADS, TOKENS, DIM, generator=generator).to(dtype)


def by(delta: int) -> torch.Tensor:
    return torch.full((TOKENS,), delta)


def as_complex(keys: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Every pair as one complex number, in fp64."""
    keys = keys.double()
    first, second = (keys[..., 0::2], keys[..., 1::2]) if interleaved else keys.chunk(2, dim=-1)
    return torch.complex(first, second)


@either_pairing
@given(delta=shifts)
def test_a_pair_is_rotated_by_an_angle_per_position(interleaved: bool, delta: int) -> None:
    keys = some_keys()
    moved = as_complex(
        rotated(keys, by(delta), FREQUENCIES, interleaved=interleaved), interleaved=interleaved
    )
    angles = (delta * FREQUENCIES).double()  # rounded as in fp32: only the turn itself is compared
    expected = as_complex(keys, interleaved=interleaved) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(moved, expected, atol=EXACT, rtol=0)


@either_pairing
@given(delta=shifts)
def test_rotating_there_and_back_gives_the_same_keys(interleaved: bool, delta: int) -> None:
    keys = some_keys()
    there = rotated(keys, by(delta), FREQUENCIES, interleaved=interleaved)
    assert delta == 0 or not torch.allclose(there, keys, atol=1e-3)
    torch.testing.assert_close(
        rotated(there, by(-delta), FREQUENCIES, interleaved=interleaved), keys, atol=EXACT, rtol=0
    )


@either_pairing
def test_numbers_without_a_frequency_stay(interleaved: bool) -> None:
    """Some models turn the first part of a head only."""
    keys, half = some_keys(), FREQUENCIES[: DIM // 4]
    moved = rotated(keys, by(5), half, interleaved=interleaved)
    assert torch.equal(moved[..., DIM // 2 :], keys[..., DIM // 2 :])
    part = rotated(keys[..., : DIM // 2], by(5), half, interleaved=interleaved)
    assert torch.equal(moved[..., : DIM // 2], part)


def test_every_token_moves_by_its_own_delta() -> None:
    keys, delta = some_keys(), torch.arange(TOKENS) * 3 - 7
    moved = rotated(keys, delta, FREQUENCIES)
    for token in range(TOKENS):
        one = slice(token, token + 1)
        assert torch.equal(moved[:, :, one], rotated(keys[:, :, one], delta[one], FREQUENCIES))


def test_a_rotation_by_zero_changes_no_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        keys = some_keys(dtype=dtype)
        moved = rotated(keys, by(0), FREQUENCIES)
        assert moved.dtype is dtype
        assert torch.equal(moved, keys)


def error(keys: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, over all numbers."""
    return float((keys.double() - exact).norm() / exact.norm())


def exactly(keys: torch.Tensor, delta: int) -> torch.Tensor:
    """The turn in fp64."""
    angles = (delta * FREQUENCIES).double()
    pairs = as_complex(keys, interleaved=False) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def test_keys_rotated_from_their_original_position_do_not_drift() -> None:
    """100 shifts of bf16 keys: each as exact as the first. Repeated rotations are far worse."""
    base = some_keys(dtype=torch.bfloat16)
    chained = base
    one_rounding = 2.0**-8
    for shift in range(1, 101):
        assert error(rotated(base, by(-shift), FREQUENCIES), exactly(base, -shift)) < one_rounding
        chained = rotated(chained, by(-1), FREQUENCIES)
    assert error(chained, exactly(base, -100)) > 2 * one_rounding


def read_at(loaded: LoadedModel, ids: list[int], first: int) -> ConversationKV:
    """A cache that the model filled at positions from `first` on."""
    kv = loaded.new_kv()
    with kv.append(ids) as past:
        forward_pass(loaded.model, ids, range(first, first + len(ids)), past)
    return kv


def frequencies_of(loaded: LoadedModel) -> torch.Tensor:
    frequencies = loaded.rotary_frequencies()
    assert frequencies is not None
    return frequencies


@pytest.mark.parametrize("delta", [1, 7, 300, 900])
def test_rotated_keys_equal_those_computed_at_the_new_position(tiny: LoadedModel, delta: int) -> None:
    """In the first layer the keys of a token depend on nothing else; in the others all moved together."""
    ids = tiny.tokenizer.encode("The pass over the mountains is open all year.").ids
    here, there = read_at(tiny, ids, 0), read_at(tiny, ids, delta)
    frequencies = frequencies_of(tiny)
    for low, high in zip(here.stored, there.stored, strict=True):
        (keys, values), (expected, same) = low.read(), high.read()
        moved = rotated(keys, torch.full((len(ids),), delta), frequencies)
        torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, same, atol=1e-4, rtol=1e-4)


def with_gap(loaded: LoadedModel, keep: list[int]) -> ConversationKV:
    """A cache of which some rows were evicted."""
    ids = loaded.tokenizer.encode("How long is the drive? The drive over the pass takes three hours.").ids
    kv = loaded.new_kv()
    CachedReader(loaded.model, kv).read(ids)
    kv.select([row for row in keep if row < len(ids)])
    return kv


KEPT = [0, 1, 2, 3, *range(9, 99)]


def test_closing_gaps_moves_every_key_to_the_position_of_its_row(tiny: LoadedModel) -> None:
    kv = with_gap(tiny, KEPT)
    rows, ids, positions = kv.rows, kv.ids, kv.positions
    before = [tuple(t.clone() for t in layer.read()) for layer in kv.stored]
    delta = torch.arange(len(kv)) - torch.tensor(positions)
    close_gaps(kv, frequencies_of(tiny))
    assert kv.positions == tuple(range(len(kv)))
    assert (kv.rows, kv.ids, kv.index.next_position) == (rows, ids, len(kv))
    for layer, (keys, values) in zip(kv.stored, before, strict=True):
        now, same = layer.read()
        assert torch.equal(now, rotated(keys, delta, frequencies_of(tiny)))
        assert torch.equal(now[:, :, :4], keys[:, :, :4])
        assert torch.equal(same, values)


def test_closing_gaps_does_not_change_a_fork(tiny: LoadedModel) -> None:
    kv = with_gap(tiny, KEPT)
    fork = kv.fork(len(kv.ids))
    before = [layer.read()[0].clone() for layer in kv.stored]
    close_gaps(fork, frequencies_of(tiny))
    for layer, turned_layer, keys in zip(kv.stored, fork.stored, before, strict=True):
        assert torch.equal(layer.read()[0], keys)
        assert not torch.equal(turned_layer.read()[0], keys)


def test_a_key_is_rotated_only_once(tiny: LoadedModel) -> None:
    kv = with_gap(tiny, KEPT)
    assert can_close_gaps(kv)
    close_gaps(kv, frequencies_of(tiny))
    kv.select([0, 1, 2, 3, *range(6, len(kv))])
    assert not can_close_gaps(kv)
    with pytest.raises(ValueError, match="rotated before"):
        close_gaps(kv, frequencies_of(tiny))


def test_quantised_keys_are_not_rotated(tiny: LoadedModel) -> None:
    kv = tiny.new_kv("int8")
    CachedReader(tiny.model, kv).read(list(range(5, 25)))
    assert not any(isinstance(layer, DenseLayer) for layer in kv.stored)
    assert not can_close_gaps(kv)
    with pytest.raises(ValueError, match="quantised"):
        close_gaps(kv, frequencies_of(tiny))
