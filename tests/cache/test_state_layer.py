"""Layers with a state compared with transformers' own, and the checkpoints of a cache."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import LinearAttentionLayer

from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.packed_rows import PackedRows, pack_rows, unpack_rows
from kvchat.cache.state_checkpoints import CHECKPOINTS
from kvchat.cache.state_layer import PIECES, HybridLayer, RecurrentLayer, RecurrentState, StateShape

CHANNELS, KERNEL = 5, 3
STATE_BYTES = CHANNELS * KERNEL * 4


def inputs(tokens: int, seed: int = 0) -> torch.Tensor:
    """What a convolution reads, `[1, channels, tokens]`."""
    return torch.randn(1, CHANNELS, tokens, generator=torch.Generator().manual_seed(seed))


def convolution(tokens: int = 0, seed: int = 0) -> RecurrentLayer:
    """A layer that read so many tokens and has no recurrent state."""
    layer = RecurrentLayer()
    if tokens:
        layer.update_conv_state(inputs(tokens, seed), conv_kernel_size=KERNEL)
    return layer


def recurrent(tokens: int = 0, seed: int = 0) -> RecurrentLayer:
    """A layer that read so many tokens into a convolution and a recurrent state."""
    layer = convolution(tokens, seed)
    if tokens:
        layer.update_recurrent_state(inputs(tokens, seed).sum(dim=-1))
    return layer


def equal(a: RecurrentState, b: RecurrentState) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items()
    )


def read(kv: ConversationKV, ids: Sequence[int], *, fail: bool = False) -> None:
    """A forward pass of a model of convolutions, recurrent and hybrid layers; a state sums up its ids."""
    values = torch.tensor(list(ids), dtype=torch.float32).expand(1, CHANNELS, -1)
    with kv.append(ids) as cache:
        for index, layer in enumerate(kv.layers):
            if isinstance(layer, RecurrentLayer):
                before = cache.get_recurrent_state(index)
                cache.update_conv_state(values, index, conv_kernel_size=KERNEL)
                if not getattr(layer, "only_convolves", False):
                    total = values.sum(dim=-1) + (0 if before is None else before)
                    cache.update_recurrent_state(total, index)
            if isinstance(layer, DenseLayer):
                cache.update(values.mT[:, None], values.mT[:, None], index)
        if fail:
            raise InterruptedError


class Convolution(RecurrentLayer):
    """A layer that `read` gives no recurrent state."""

    only_convolves = True


def convolving() -> ConversationKV:
    return ConversationKV([Convolution(), DenseLayer()])


def summing() -> ConversationKV:
    return ConversationKV([RecurrentLayer(), HybridLayer()])


def states_of(kv: ConversationKV) -> list[RecurrentState]:
    return [layer.state() for layer in kv.states]


def assert_same(kv: ConversationKV, other: ConversationKV) -> None:
    """Ids, states, and whatever a next token makes of them."""
    assert kv.ids == other.ids
    for _ in range(2):
        assert all(equal(a, b) for a, b in zip(states_of(kv), states_of(other), strict=True))
        for cache in (kv, other):
            read(cache, [77])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_windows_equal_those_of_transformers(chunks: list[int]) -> None:
    ours, theirs = RecurrentLayer(), LinearAttentionLayer()
    for seed, tokens in enumerate(chunks):
        new = inputs(tokens, seed)
        found = ours.update_conv_state(new, conv_kernel_size=KERNEL)
        expected = theirs.update_conv_state(new, conv_kernel_size=KERNEL)
        # at the very start transformers pads a short chunk with zeros; a convolution pads by itself
        seen = min(found.shape[-1], expected.shape[-1])
        assert torch.equal(found[..., -seen:], expected[..., -seen:])
        assert equal(ours.state(), RecurrentState({"conv.0": theirs.conv_states[0]}))  # type: ignore[dict-item]
        assert ours.has_previous_state == theirs.has_previous_state == {0: True}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.data())
def test_a_convolution_rewinds_to_any_recorded_token(chunks: list[int], data: st.DataObject) -> None:
    stream = inputs(sum(chunks))
    layer, settled, at = RecurrentLayer(), 0, 0
    settle_after = data.draw(st.integers(0, len(chunks) - 1))
    for number, tokens in enumerate(chunks):
        layer.update_conv_state(stream[..., at : at + tokens], conv_kernel_size=KERNEL)
        at += tokens
        if number + 1 == settle_after:
            layer.restart_recording()
            settled = at
    back = data.draw(st.integers(max(1, settled), at))
    layer.rewind(back - settled)
    short = RecurrentLayer()
    short.update_conv_state(stream[..., :back], conv_kernel_size=KERNEL)
    assert equal(layer.state(), short.state())
    again = inputs(2, 9)
    assert torch.equal(
        layer.update_conv_state(again, conv_kernel_size=KERNEL),
        short.update_conv_state(again, conv_kernel_size=KERNEL),
    )
    layer.rewind(back - settled)
    assert torch.equal(layer.state().tensors["conv.0"][..., -1:], stream[..., back - 1 : back])


@pytest.mark.parametrize("tokens", [-1, 5])
def test_rewinding_beyond_the_record_is_refused(tokens: int) -> None:
    layer = convolution(4)
    with pytest.raises(ValueError, match=f"{tokens} tokens were not recorded"):
        layer.rewind(tokens)


def test_only_a_convolution_on_its_own_can_rewind() -> None:
    assert not RecurrentLayer().can_rewind  # not known before the first pass
    assert convolution(4).can_rewind
    assert not recurrent(4).can_rewind
    assert (convolution(4).is_croppable, recurrent(4).is_croppable) == (True, False)


def test_a_recurrent_layer_records_nothing() -> None:
    layer = recurrent(50)
    before = layer.state_bytes
    layer.update_conv_state(inputs(50, 1), conv_kernel_size=KERNEL)
    assert layer.state_bytes == before == STATE_BYTES + CHANNELS * 4
    assert layer.recorded_bytes == 0


def test_a_copied_state_is_independent_of_the_layer() -> None:
    layer = recurrent(4)
    copied = layer.state()
    expected = {name: tensor.clone() for name, tensor in copied.tensors.items()}
    layer.update_conv_state(inputs(2, 1), conv_kernel_size=KERNEL)
    layer.update_recurrent_state(inputs(4, 1).sum(dim=-1))
    for states in (layer.conv_states, layer.recurrent_states):  # models write into them, too
        assert states[0] is not None
        states[0].add_(1)
    assert equal(copied, RecurrentState(expected))


@pytest.mark.parametrize("made", [convolution, recurrent])
def test_a_restored_layer_does_not_change_the_copied_state(made: type) -> None:
    copied = made(4).state()
    expected = {name: tensor.clone() for name, tensor in copied.tensors.items()}
    layer = RecurrentLayer()
    layer.restore(copied)
    assert equal(layer.state(), copied)
    assert layer.has_previous_state == {0: True}
    for states in (layer.conv_states, layer.recurrent_states):
        if states[0] is not None:
            states[0].add_(1)
    assert equal(copied, RecurrentState(expected))


@pytest.mark.parametrize("made", [convolution, recurrent])
def test_restoring_none_resets_a_layer(made: type) -> None:
    layer, new = made(4), RecurrentLayer()
    layer.restore(None)
    for name in ("conv_states", "recurrent_states", "has_previous_state", "record_past", "conv_kernel_size"):
        assert getattr(layer, name) == getattr(new, name)
    assert (layer.state_storages(), layer.is_croppable) == ({}, False)
    assert equal(made(3, 1).state(), made(3, 1).state())


def test_a_restored_convolution_records_from_there() -> None:
    layer = RecurrentLayer()
    layer.restore(convolution(4).state())
    layer.update_conv_state(inputs(6, 1), conv_kernel_size=KERNEL)
    layer.rewind(0)
    assert equal(layer.state(), convolution(4).state())


@pytest.mark.parametrize(
    "tensors",
    [
        {"conv.1": torch.zeros(1, CHANNELS, KERNEL)},
        {"keys.0": torch.zeros(1, CHANNELS, KERNEL)},
        {"conv.0": torch.zeros(1, CHANNELS, KERNEL + 1)},
        {},
    ],
    ids=["one too many", "another name", "another size", "nothing"],
)
def test_a_state_of_another_shape_is_refused_without_changes(
    tensors: dict[str, torch.Tensor],
) -> None:
    layer = RecurrentLayer(StateShape(1, STATE_BYTES))
    layer.update_conv_state(inputs(4), conv_kernel_size=KERNEL)
    before = layer.state()
    with pytest.raises(ValueError, match="does not fit"):
        layer.restore(RecurrentState(tensors))
    assert equal(layer.state(), before)


def test_crop_of_transformers_is_refused() -> None:
    for layer in (convolution(4), recurrent(4), HybridLayer()):
        with pytest.raises(RuntimeError, match="can't be cropped"):
            layer.crop(-1)


def test_recorded_inputs_are_counted_and_freed() -> None:
    layer = RecurrentLayer(StateShape(1, STATE_BYTES, CHANNELS * 4))
    assert layer.state_growth(10) == STATE_BYTES + 10 * CHANNELS * 4
    for seed in range(3 * PIECES):
        layer.update_conv_state(inputs(1, seed), conv_kernel_size=KERNEL)
    assert layer.recorded_bytes == 3 * PIECES * CHANNELS * 4
    assert layer.state_growth(10) == 10 * CHANNELS * 4
    assert len(layer.state_storages()) <= PIECES + 2
    layer.restart_recording()
    assert (layer.state_bytes, layer.recorded_bytes) == (STATE_BYTES, 0)


@pytest.mark.parametrize("made", [convolving, summing])
def test_a_failed_pass_returns_to_a_reachable_length(made: type) -> None:
    kv, expected = made(), made()
    read(kv, [1, 2, 3, 4])
    kv.checkpoint()
    read(kv, [5, 6])
    with pytest.raises(InterruptedError):
        read(kv, [7, 8], fail=True)
    read(expected, [1, 2, 3, 4])
    if made is convolving:
        read(expected, [5, 6])
    assert_same(kv, expected)


@pytest.mark.parametrize("made", [convolving, summing])
def test_every_checkpoint_is_reachable_and_before_the_first_only_empty(made: type) -> None:
    kv = made()
    for turn in range(CHECKPOINTS + 3):
        read(kv, [turn, turn + 1])
        kv.checkpoint()
    lengths = range(2 * (CHECKPOINTS + 3), 6, -2)
    for length in lengths:
        branch, expected = kv.fork(length), made()
        read(expected, kv.ids[:length])
        assert kv.reachable(length + 1) == length
        assert_same(branch, expected)
    assert len(lengths) == CHECKPOINTS
    assert kv.reachable(6) == 0


@pytest.mark.parametrize("made", [convolving, summing])
def test_forks_share_checkpoints_only(made: type) -> None:
    kv = made()
    read(kv, [1, 2, 3, 4])
    kv.checkpoint()
    read(kv, [5, 6])
    branch = kv.fork(6)
    assert kv.storages().keys() & branch.storages().keys()
    assert not {a for layer in kv.states for a in layer.state_storages()} & {
        a for layer in branch.states for a in layer.state_storages() if layer.recorded_bytes == 0
    }
    before = states_of(kv)
    read(branch, [9, 9, 9])
    branch.truncate(4)
    assert all(equal(a, b) for a, b in zip(states_of(kv), before, strict=True))
    kv.truncate(4)
    assert_same(kv, branch)


def test_a_convolution_rewinds_in_a_turn_and_to_checkpoints_before_it() -> None:
    kv = convolving()
    read(kv, [1, 2, 3, 4])
    assert [kv.reachable(n) for n in range(6)] == [0, 1, 2, 3, 4, 4]
    kv.checkpoint()
    read(kv, [5, 6, 7])
    assert [kv.reachable(n) for n in range(1, 8)] == [0, 0, 0, 4, 5, 6, 7]
    kv.truncate(5)
    expected = convolving()
    read(expected, [1, 2, 3, 4, 5])
    assert_same(kv, expected)


def test_a_repeated_checkpoint_is_free_and_an_empty_cache_has_none() -> None:
    kv = summing()
    kv.checkpoint()
    assert kv.storage_bytes == 0
    read(kv, [1, 2, 3])
    kv.checkpoint()
    memory = kv.storages()
    kv.checkpoint()
    assert kv.storages() == memory


@pytest.mark.parametrize("made", [convolving, summing, lambda: ConversationKV([RecurrentLayer()])])
def test_segments_contain_only_new_rows_and_checkpoints(made: type) -> None:
    kv, restored = made(), made()
    segments: list[PackedRows] = []
    for turn in range(3):
        read(kv, [turn, 5, turn])
        segments.append(pack_rows(kv))
        unpack_rows(restored, segments[-1])
    assert [(s.start, s.ids, sorted(s.checkpoints)) for s in segments] == [
        (0, (0, 5, 0), [3]),
        (3, (1, 5, 1), [6]),
        (6, (2, 5, 2), [9]),
    ]
    assert [restored.reachable(n) for n in (2, 3, 5, 6, 8, 9)] == [0, 3, 3, 6, 6, 9]
    kv.truncate(6)
    unpack_rows(restored, pack_rows(kv))
    assert_same(restored, kv)


def test_rows_without_a_state_for_them_are_refused() -> None:
    kv = summing()
    read(kv, [1, 2, 3])
    packed = pack_rows(kv)
    torn = PackedRows(0, 0, packed.ids, packed.rows, packed.positions, packed.tensors, {})
    with pytest.raises(ValueError, match="there is no state of 3 tokens"):
        unpack_rows(summing(), torn)
