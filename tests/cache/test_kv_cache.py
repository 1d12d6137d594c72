"""The dense layer compared with transformers' own, and the commits of a cache."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import GROWTH_STEP, StoredLayer

HEADS, DIM, LAYERS = 2, 16, 3


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, HEADS, tokens, DIM, generator=generator)


def filled_layer(tokens: int) -> DenseLayer:
    layer = DenseLayer()
    layer.update(states(tokens, 1), states(tokens, 2))
    return layer


def empty_kv() -> ConversationKV:
    return ConversationKV([DenseLayer() for _ in range(LAYERS)])


def unique_storage_bytes(layers: Sequence[StoredLayer]) -> int:
    """What the tensors really hold, each piece of memory counted once."""
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def fill(kv: ConversationKV, ids: list[int], *, layers: int = LAYERS, tokens: int | None = None) -> None:
    """A forward pass over `ids` that reaches the first `layers` layers."""
    new = len(ids) if tokens is None else tokens
    with kv.append(ids) as cache:
        for index in range(layers):
            cache.update(states(new, index), states(new, -index - 1), index)


def fail(kv: ConversationKV, ids: list[int], *, layers: int) -> None:
    """A forward pass that fails after the first `layers` layers."""
    with kv.append(ids) as cache:
        for index in range(layers):
            cache.update(states(len(ids)), states(len(ids)), index)
        raise InterruptedError


@given(st.lists(st.one_of(st.integers(1, 300), st.integers(-300, -1)), max_size=8))
def test_appends_and_crops_equal_a_cache_that_is_concatenated(steps: list[int]) -> None:
    """A positive step appends that many tokens, a negative one removes them."""
    layer, expected = DenseLayer(), torch.empty(1, HEADS, 0, DIM)
    for seed, step in enumerate(steps):
        if step > 0:
            expected = torch.cat([expected, states(step, seed)], dim=-2)
            keys, values = layer.update(states(step, seed), -states(step, seed))
            assert torch.equal(keys, expected)
            assert torch.equal(values, -expected)
        else:
            expected = expected[:, :, : max(0, expected.shape[-2] + step)]
            layer.crop(step)
        assert layer.get_seq_length() == layer.length == expected.shape[-2]


def test_a_layer_answers_like_transformers_own() -> None:
    ours, theirs = filled_layer(5), DynamicLayer()
    theirs.update(states(5, 1), states(5, 2))
    assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3) == (8, 0)
    assert ours.get_seq_length() == theirs.get_seq_length() == 5
    keys, values = ours.update(states(3, 3), states(3, 4))
    their_keys, their_values = theirs.update(states(3, 3), states(3, 4))
    assert torch.equal(keys, their_keys)
    assert torch.equal(values, their_values)
    assert ours.get_max_length() == theirs.get_max_length() == -1


def test_growth_keeps_the_content_and_reallocates_only_a_full_buffer() -> None:
    layer = filled_layer(GROWTH_STEP - 1)
    assert layer.keys is not None
    place, before = layer.keys.data_ptr(), layer.keys[:, :, : GROWTH_STEP - 1].clone()
    layer.update(states(1, 3), states(1, 4))
    assert layer.keys.data_ptr() == place
    assert layer.capacity == GROWTH_STEP
    keys, _ = layer.update(states(1, 5), states(1, 6))
    assert layer.capacity == 2 * GROWTH_STEP
    assert torch.equal(keys, torch.cat([before, states(1, 3), states(1, 5)], dim=-2))


def test_growth_after_a_crop_restores_no_cropped_rows() -> None:
    layer = filled_layer(GROWTH_STEP)
    layer.truncate(10)
    keys, values = layer.update(states(GROWTH_STEP, 7), states(GROWTH_STEP, 8))
    assert torch.equal(keys, torch.cat([states(GROWTH_STEP, 1)[:, :, :10], states(GROWTH_STEP, 7)], dim=-2))
    assert torch.equal(values, torch.cat([states(GROWTH_STEP, 2)[:, :, :10], states(GROWTH_STEP, 8)], dim=-2))


@pytest.mark.parametrize("tokens", [1, GROWTH_STEP, GROWTH_STEP + 1, 3 * GROWTH_STEP])
def test_bytes_are_those_of_the_storage(tokens: int) -> None:
    layer = filled_layer(tokens)
    capacity = -(-tokens // GROWTH_STEP) * GROWTH_STEP
    assert layer.storage_bytes == unique_storage_bytes([layer]) == 2 * HEADS * capacity * DIM * 4
    assert layer.used_bytes == 2 * HEADS * tokens * DIM * 4


def test_a_layer_takes_the_dtype_of_its_states() -> None:
    layer = DenseLayer()
    keys, _ = layer.update(states(3).bfloat16(), states(3).bfloat16())
    assert keys.dtype is torch.bfloat16
    assert layer.used_bytes == 2 * HEADS * 3 * DIM * 2


def test_keys_and_values_may_have_other_head_sizes() -> None:
    layer = DenseLayer()
    keys, values = layer.update(states(3), states(3)[..., :4])
    assert (keys.shape[-1], values.shape[-1]) == (DIM, 4)
    assert layer.used_bytes == HEADS * 3 * (DIM + 4) * 4


@pytest.mark.parametrize("length", [-1, 6])
def test_truncating_to_more_tokens_than_stored_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="of 5 tokens"):
        filled_layer(5).truncate(length)


def test_a_crop_of_more_than_all_empties() -> None:
    layer = filled_layer(5)
    layer.crop(-100)
    assert layer.length == 0


def test_an_empty_layer_holds_nothing() -> None:
    layer = DenseLayer()
    assert (layer.length, layer.capacity, layer.storage_bytes, layer.used_bytes) == (0, 0, 0, 0)


def test_reset_frees_the_memory_and_the_layer_can_be_filled_again() -> None:
    layer = filled_layer(5)
    layer.reset()
    assert (layer.length, layer.storage_bytes) == (0, 0)
    keys, _ = layer.update(states(2, 9), states(2, 9))
    assert torch.equal(keys, states(2, 9))


def test_every_layer_is_croppable_and_none_has_a_sliding_buffer() -> None:
    cache = empty_kv().cache
    assert cache.is_sliding == [False] * LAYERS
    assert all(layer.is_croppable for layer in cache.layers)


def test_an_append_commits_ids_and_layers_together() -> None:
    kv = empty_kv()
    fill(kv, [5, 6, 7])
    fill(kv, [8])
    assert kv.ids == (5, 6, 7, 8)
    assert len(kv) == 4
    assert [layer.length for layer in kv.stored] == [4] * LAYERS


@pytest.mark.parametrize("reached", range(LAYERS + 1))
def test_an_exception_after_any_layer_rolls_all_of_them_back(reached: int) -> None:
    kv = empty_kv()
    fill(kv, [5, 6, 7])
    before = [layer.keys[:, :, :3].clone() for layer in kv.stored if layer.keys is not None]
    with pytest.raises(InterruptedError):
        fail(kv, [8, 9], layers=reached)
    assert kv.ids == (5, 6, 7)
    assert [layer.length for layer in kv.stored] == [3] * LAYERS
    after = [layer.keys[:, :, :3] for layer in kv.stored if layer.keys is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("reached", range(LAYERS))
def test_a_pass_that_misses_a_layer_is_refused_and_rolled_back(reached: int) -> None:
    kv = empty_kv()
    fill(kv, [5])
    with pytest.raises(RuntimeError, match="instead of 3"):
        fill(kv, [6, 7], layers=reached)
    assert kv.ids == (5,)
    assert [layer.length for layer in kv.stored] == [1] * LAYERS


def test_a_pass_over_other_tokens_than_announced_is_refused() -> None:
    kv = empty_kv()
    with pytest.raises(RuntimeError, match="instead of 2"):
        fill(kv, [6, 7], tokens=3)
    assert (kv.ids, [layer.length for layer in kv.stored]) == ((), [0] * LAYERS)


def test_truncate_crops_ids_and_every_layer() -> None:
    kv = empty_kv()
    fill(kv, [5, 6, 7])
    kv.truncate(1)
    assert kv.ids == (5,)
    assert [layer.length for layer in kv.stored] == [1] * LAYERS


def test_bytes_of_a_conversation_are_the_sum_over_its_layers() -> None:
    kv = empty_kv()
    fill(kv, list(range(GROWTH_STEP + 1)))
    assert (
        kv.storage_bytes == unique_storage_bytes(kv.stored) == 2 * LAYERS * HEADS * 2 * GROWTH_STEP * DIM * 4
    )
    assert kv.used_bytes == 2 * LAYERS * HEADS * DIM * 4 * len(kv)


def test_clear_removes_tokens_and_frees_memory() -> None:
    kv = empty_kv()
    fill(kv, [5, 6])
    kv.clear()
    assert (kv.ids, kv.storage_bytes, kv.used_bytes) == ((), 0, 0)
    fill(kv, [7])
    assert kv.ids == (7,)
