"""Quantised layers compared with a list of rows, and with an unquantised cache."""

from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import GROWTH_STEP, HeadShape, StoredLayer
from kvchat.cache.packed_rows import pack_rows, unpack_rows
from kvchat.cache.quant_codec import BLOCK, PER_CHANNEL, PER_TOKEN, dequantise, quantise
from kvchat.cache.quantized_layer import QuantizedLayer, convert
from kvchat.engine.model.loader import LoadedModel

SHAPE = HeadShape(2, 16, 12)
SMOLLM2 = HeadShape(3, 64, 64)
ODD_SHAPES = [
    HeadShape(1, 16, 16),
    HeadShape(2, 20, 20),
    HeadShape(3, 64, 64),
    HeadShape(2, 80, 48),
    HeadShape(1, 128, 64),
]
AROUND_EDGES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 149, 150]
Pair = tuple[torch.Tensor, torch.Tensor]
each_precision = pytest.mark.parametrize("bits", [8, 4])


def states(tokens: int, seed: int = 0, shape: HeadShape = SHAPE) -> Pair:
    """Keys with a few large channels, as real ones have, and values."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, shape.kv_heads, tokens, shape.key_dim, generator=generator)
    keys[..., ::5] = keys[..., ::5] * 6 + 9
    return keys, torch.randn(1, shape.kv_heads, tokens, shape.value_dim, generator=generator)


def filled(bits: int, tokens: int, seed: int = 0, shape: HeadShape = SHAPE) -> QuantizedLayer:
    layer = QuantizedLayer(bits)
    layer.update(*states(tokens, seed, shape))
    return layer


def same(a: Pair, b: Pair) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def first_rows(pair: Pair, rows: int) -> Pair:
    return pair[0][:, :, :rows], pair[1][:, :, :rows]


def copied(layer: StoredLayer) -> Pair:
    keys, values = layer.read()
    return keys.clone(), values.clone()


def same_parts(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rounded(block: torch.Tensor, bits: int, over: int) -> torch.Tensor:
    """One block `[kv_heads, rows, head_dim]` as it comes back: the method once more, in plain words."""
    if bits == 8:
        middle = (block.amin(over, keepdim=True) + block.amax(over, keepdim=True)) / 2
        zero = middle.half().float() if over == 1 else torch.zeros(())
        scale = ((block - zero).abs().amax(over, keepdim=True) / 127).half().float()
        return ((block - zero) / scale).round().clamp(-127, 127) * scale + zero
    zero = block.amin(over, keepdim=True).half().float()
    scale = ((block.amax(over, keepdim=True) - zero) / 15).half().float()
    return ((block - zero) / scale).round().clamp(0, 15) * scale + zero


class Reference:
    """A list of rows, of which the first `start` were rounded block by block."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.rows: list[Pair] = []
        """(key, value) of each row, `[kv_heads, 1, head_dim]`."""
        self.start = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.rows += zip(torch.split(keys[0], 1, 1), torch.split(values[0], 1, 1), strict=True)
        while (end := (self.start // BLOCK + 1) * BLOCK) < len(self.rows):
            keys, values = (
                torch.cat(list(part), 1) for part in zip(*self.rows[self.start : end], strict=True)
            )
            keys, values = rounded(keys, self.bits, 1), rounded(values, self.bits, 2)
            self.rows[self.start : end] = zip(torch.split(keys, 1, 1), torch.split(values, 1, 1), strict=True)
            self.start = end

    def truncate(self, length: int) -> None:
        self.rows, self.start = self.rows[:length], min(self.start, length)

    def select(self, kept: list[int]) -> None:
        self.rows = [self.rows[row] for row in kept]
        self.start = sum(1 for row in kept if row < self.start)

    def copy(self) -> "Reference":
        other = Reference(self.bits)
        other.rows, other.start = self.rows[:], self.start
        return other

    def read(self) -> Pair:
        keys, values = zip(*self.rows, strict=True)
        return torch.cat(keys, 1)[None], torch.cat(values, 1)[None]


class Holder:
    """A layer, what it should hold, and what a file of it holds."""

    def __init__(self, layer: QuantizedLayer, reference: Reference) -> None:
        self.layer = layer
        self.reference = reference
        self.file = QuantizedLayer(layer.bits)
        self.saved = 0

    def save(self) -> None:
        start = self.layer.pack_start(self.saved)
        assert start <= self.saved
        self.file.unpack(start, self.layer.pack(start))
        self.saved = self.layer.length


class QuantizedLayers(RuleBasedStateMachine):
    """Whatever is done to a layer and its forks, each holds exactly the rows of its reference."""

    @initialize(bits=st.sampled_from([8, 4]))
    def begin(self, bits: int) -> None:
        self.holders = [Holder(QuantizedLayer(bits), Reference(bits))]
        self.seeds = count()

    def pick(self, data: st.DataObject) -> Holder:
        return data.draw(st.sampled_from(self.holders))

    @rule(data=st.data(), tokens=st.one_of(st.integers(1, 3), st.integers(1, 2 * BLOCK + 5)))
    def append(self, data: st.DataObject, tokens: int) -> None:
        holder, new = self.pick(data), states(tokens, next(self.seeds))
        holder.reference.append(*new)
        assert same(holder.layer.update(*new), holder.reference.read())

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        holder = self.pick(data)
        length = data.draw(st.integers(0, holder.layer.length))
        holder.layer.truncate(length)
        holder.reference.truncate(length)
        holder.saved = min(holder.saved, length)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        holder = self.pick(data)
        blocks = list(pairwise(holder.layer.block_edges()))
        chosen = [block for block in blocks if data.draw(st.booleans())]
        kept = [row for first, end in chosen for row in range(first, end)]
        holder.layer.select(torch.tensor(kept, dtype=torch.int64))
        holder.reference.select(kept)
        holder.saved = 0

    @precondition(lambda self: len(self.holders) < 3)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        holder = self.pick(data)
        self.holders.append(Holder(holder.layer.fork(), holder.reference.copy()))

    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        holder = self.pick(data)
        holder.save()
        assert holder.file.block_edges() == holder.layer.block_edges()
        if holder.reference.rows:
            assert same(holder.file.read(), holder.reference.read())

    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """Continues with the layer from the file."""
        holder = self.pick(data)
        holder.save()
        holder.layer = holder.file.fork()

    @invariant()
    def every_layer_holds_the_rows_of_its_reference(self) -> None:
        for holder in self.holders:
            assert holder.layer.length == len(holder.reference.rows) == holder.layer.get_seq_length()
            if holder.reference.rows:
                assert same(holder.layer.read(), holder.reference.read())


QuantizedLayers.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestQuantizedLayers = QuantizedLayers.TestCase


@each_precision
@pytest.mark.parametrize("shared", [PER_CHANNEL, PER_TOKEN])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-3, 1.0, 1e3])
def test_rounding_error_is_at_most_half_a_step(bits: int, shared: int, size: float) -> None:
    exact = states(2 * BLOCK, 5)[0][0].view(2, 2, BLOCK, 16).transpose(0, 1) * size
    packed = quantise(exact, bits, shared)
    out = torch.empty(exact.shape)
    dequantise(packed, out)
    span = exact.abs().amax(shared, keepdim=True)
    step = (
        span / 127
        if bits == 8
        else (exact.amax(shared, keepdim=True) - exact.amin(shared, keepdim=True)) / 15
    )
    # fp16 scales and zero points add their own rounding: 2^-11 of the largest number, 2^-24 where it is tiny
    assert ((out - exact).abs() <= step / 2 + span * 2**-9 + 128 * 2**-24).all()


@each_precision
def test_numbers_too_large_for_a_scale_stay_finite(bits: int) -> None:
    out = torch.empty(1, 1, BLOCK, 4)
    dequantise(quantise(torch.full((1, 1, BLOCK, 4), -1e9), bits, PER_TOKEN), out)
    assert out.isfinite().all()


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="8 or 4 bits, not 2"):
        QuantizedLayer(2)


@each_precision
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_every_head_size_is_dequantised_to_its_rounded_blocks(bits: int, shape: HeadShape) -> None:
    layer, reference = QuantizedLayer(bits), Reference(bits)
    for tokens in (70, 1, 90):
        new = states(tokens, tokens, shape)
        reference.append(*new)
        assert same(layer.update(*new), reference.read())
    assert reference.start == 2 * BLOCK


@each_precision
def test_the_newest_block_is_exact_until_a_token_follows_it(bits: int) -> None:
    exact = states(BLOCK + 1)
    layer = QuantizedLayer(bits)
    assert same(layer.update(*first_rows(exact, BLOCK)), first_rows(exact, BLOCK))
    keys, _ = layer.update(exact[0][:, :, BLOCK:], exact[1][:, :, BLOCK:])
    assert not torch.equal(keys[:, :, :BLOCK], exact[0][:, :, :BLOCK])
    assert torch.equal(keys[:, :, BLOCK:], exact[0][:, :, BLOCK:])


@each_precision
def test_states_come_back_in_their_dtype(bits: int) -> None:
    keys, values = (tensor.bfloat16() for tensor in states(100))
    layer = QuantizedLayer(bits)
    returned = layer.update(keys, values)
    assert {tensor.dtype for tensor in returned} == {torch.bfloat16}
    assert same(
        (returned[0][:, :, BLOCK:], returned[1][:, :, BLOCK:]), (keys[:, :, BLOCK:], values[:, :, BLOCK:])
    )
    expected = QuantizedLayer(bits).update(keys.float(), values.float())
    for got, want in zip(returned, expected, strict=True):
        assert (got.float() - want).abs().max() <= want.abs().max() * 2**-6


@each_precision
@given(chunks=st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=6))
def test_quantised_bits_are_identical_for_every_chunking(bits: int, chunks: list[int]) -> None:
    keys, values = states(sum(chunks))
    layer = QuantizedLayer(bits)
    for k, v in zip(torch.split(keys, chunks, 2), torch.split(values, chunks, 2), strict=True):
        layer.update(k, v)
    assert same_parts(layer.pack(0), filled(bits, sum(chunks)).pack(0))
    assert layer.storage_bytes == filled(bits, sum(chunks)).storage_bytes


@each_precision
def test_a_block_keeps_its_bits_while_hundreds_of_tokens_follow(bits: int) -> None:
    layer = filled(bits, BLOCK + 1)
    before = layer.pack(0)
    for seed in range(2 * GROWTH_STEP):
        layer.update(*states(1, seed))
    after = layer.pack(0)
    names = [name for name in before if name.startswith(("key_", "value_"))]
    assert len(names) == (6 if bits == 4 else 5)
    assert all(torch.equal(before[name], after[name][:1]) for name in names)


@each_precision
@pytest.mark.parametrize("length", AROUND_EDGES)
def test_a_crop_keeps_the_first_rows_and_can_be_appended_to(bits: int, length: int) -> None:
    layer = filled(bits, 150)
    before = copied(layer)
    layer.truncate(length)
    new = states(1, 9)
    after = layer.update(*new)
    assert same(first_rows(after, length), first_rows(before, length))
    assert same((after[0][:, :, length:], after[1][:, :, length:]), new)
    layer.update(*states(2 * BLOCK, 10))
    kept = min(length, 2 * BLOCK)
    assert same(first_rows(layer.read(), kept), first_rows(before, kept))


@each_precision
def test_repeated_crops_at_one_length_use_no_more_memory(bits: int) -> None:
    layer = filled(bits, 200)
    held: list[dict[int, int]] = []
    for seed in range(40):
        layer.truncate(100)
        layer.update(*states(100, seed))
        held.append(layer.storages())
    assert held == held[:1] * 40


@each_precision
@pytest.mark.parametrize("length", [-1, 101])
def test_truncating_to_more_tokens_than_stored_is_refused(bits: int, length: int) -> None:
    with pytest.raises(ValueError, match="of 100 tokens"):
        filled(bits, 100).truncate(length)


@each_precision
@pytest.mark.parametrize("length", [40, 100, 128, 150, 200])
def test_a_fork_and_its_parent_are_isolated(bits: int, length: int) -> None:
    parent = filled(bits, 200)
    before = copied(parent)
    fork = parent.fork()
    assert fork.storages() == parent.storages()
    fork.truncate(length)
    of_fork = copied(fork)
    for first, second in [(fork, parent), (parent, fork)]:
        first.update(*states(150, 1))
        second.update(*states(150, 2))
    assert same(first_rows(parent.read(), 128), first_rows(before, 128))
    assert same(first_rows(fork.read(), min(length, 128)), first_rows(of_fork, min(length, 128)))
    assert fork.storages().keys().isdisjoint(parent.storages())


@each_precision
def test_a_parent_appends_in_place_after_the_rows_of_its_forks(bits: int) -> None:
    parent = filled(bits, BLOCK + 1)
    fork = parent.fork()
    fork.truncate(BLOCK)
    held = parent.storages()
    parent.update(*states(BLOCK, 3))
    assert parent.storages() == held
    assert fork.storages() == held


@each_precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_known_before_the_first_token_and_equal_the_allocation(
    bits: int, dtype: torch.dtype
) -> None:
    told, layer = QuantizedLayer(bits, SHAPE, dtype), QuantizedLayer(bits)
    keys, values = (tensor.to(dtype) for tensor in states(700))
    for length in range(1, 701):
        growth, held = layer.growth(1), layer.storage_bytes
        layer.update(keys[:, :, length - 1 : length], values[:, :, length - 1 : length])
        assert layer.storage_bytes == told.bytes_at(length) == layer.bytes_at(length)
        if length > 1:
            assert layer.storage_bytes == held + growth.allocated - growth.freed
    assert told.bytes_at(0) == 0
    assert told.used_bytes == 0
    parts = layer.pack(0)
    assert layer.used_bytes == sum(tensor.nbytes for name, tensor in parts.items() if name != "counts")


@each_precision
@pytest.mark.parametrize(("length", "tokens"), [(40, 10), (100, 60), (128, 1), (150, 400), (200, 1)])
def test_growth_includes_the_copy_of_a_fork(bits: int, length: int, tokens: int) -> None:
    parent = filled(bits, 200)
    fork = parent.fork()
    fork.truncate(length)
    growth = fork.growth(tokens)
    fork.update(*states(tokens, 1))
    own = {place: size for place, size in fork.storages().items() if place not in parent.storages()}
    assert growth == (sum(own.values()), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "share"), [(8, 0.55), (4, 0.32)])
def test_4096_tokens_take_the_expected_share_of_bf16(bits: int, share: float, dtype: torch.dtype) -> None:
    layer = QuantizedLayer(bits, SMOLLM2, dtype)
    assert layer.bytes_at(4096) <= share * DenseLayer(SMOLLM2, torch.bfloat16).bytes_at(4096)


@each_precision
def test_whole_blocks_can_be_kept_and_keep_their_bits(bits: int) -> None:
    layer = filled(bits, 200)
    before, whole = copied(layer), layer.pack(0)
    assert layer.block_edges() == [0, 64, 128, 192, 200]
    rows = torch.tensor([*range(64), *range(128, 192), 193, 199])
    layer.select(rows)
    assert same(layer.read(), (before[0][:, :, rows], before[1][:, :, rows]))
    assert torch.equal(layer.pack(0)["key_codes"], whole["key_codes"][[0, 2]])
    assert layer.block_edges() == [0, 64, 128, 130]


@each_precision
@pytest.mark.parametrize("kept", [[*range(63), *range(64, 200)], [5], [*range(65)]])
def test_rows_that_cut_a_block_are_refused_without_changes(bits: int, kept: list[int]) -> None:
    layer = filled(bits, 200)
    before = copied(layer)
    with pytest.raises(ValueError, match="cut the block"):
        layer.select(torch.tensor(kept))
    assert same(layer.read(), before)


@each_precision
def test_a_packed_layer_survives_a_file(bits: int, tmp_path: Path) -> None:
    layer = filled(bits, 200)
    save_file(layer.pack(0), tmp_path / "layer.safetensors")
    other = QuantizedLayer(bits)
    other.unpack(0, load_file(tmp_path / "layer.safetensors"))
    assert same(other.read(), layer.read())
    assert same(other.update(*states(100, 1)), layer.update(*states(100, 1)))
    assert other.storage_bytes == layer.storage_bytes


@each_precision
def test_only_what_changed_is_packed_again(bits: int) -> None:
    layer = filled(bits, 200)
    layer.pack(0)
    layer.update(*states(100, 1))
    assert layer.pack_start(200) == 192
    assert layer.pack(192)["counts"].tolist() == [64]
    layer.truncate(150)
    assert layer.pack_start(150) == 128
    with pytest.raises(ValueError, match="no block starts at row 100"):
        layer.pack(100)


@each_precision
def test_tensors_that_do_not_fit_are_refused_without_changes(bits: int) -> None:
    good = filled(bits, 200).pack(0)
    longer = {**good, "keys": good["keys"].repeat(9, 1, 1), "values": good["values"].repeat(9, 1, 1)}
    bad = [
        {name: tensor for name, tensor in good.items() if name != "counts"},
        {name: tensor for name, tensor in good.items() if name != "key_scales"},
        good | {"more": good["keys"]},
        good | {"key_codes": good["key_codes"][:2]},
        good | {"key_codes": good["key_codes"].short()},
        good | {"keys": good["keys"][..., :5]},
        good | {"values": good["values"][:1]},
        good | {"keys": good["keys"].double()},
        good | {"counts": torch.tensor([64, 65, 64], dtype=torch.int32)},
        good | {"counts": torch.tensor([64, 0, 64], dtype=torch.int32)},
        good | {"counts": torch.tensor([60, 64, 64], dtype=torch.int32)},
        longer,
        filled(12 - bits, 200).pack(0),
        filled(bits, 200, shape=HeadShape(2, 16, 16)).pack(0),
    ]
    layer = filled(bits, 100)
    before = copied(layer)
    for parts in bad:
        with pytest.raises(ValueError, match=r"fit|missing|match|can't"):
            layer.unpack(0, parts)
        assert same(layer.read(), before)
    with pytest.raises(ValueError, match="can't start at row 70"):
        layer.unpack(70, good)


@each_precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_layer_has_the_bits_of_appended_states(bits: int, dtype: torch.dtype) -> None:
    keys, values = (tensor.to(dtype) for tensor in states(300))
    exact, converted, appended = DenseLayer(), QuantizedLayer(bits), QuantizedLayer(bits)
    exact.update(keys, values)
    appended.update(keys, values)
    convert(exact, converted)
    assert same_parts(converted.pack(0), appended.pack(0))
    back = DenseLayer()
    convert(converted, back)
    assert same(back.read(), converted.read())


def test_converting_into_a_filled_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="100 tokens already"):
        convert(filled(8, 5), filled(4, 100))


@each_precision
def test_an_empty_layer_holds_nothing_and_a_reset_one_can_be_filled_again(bits: int) -> None:
    layer = QuantizedLayer(bits)
    assert (layer.length, layer.storage_bytes, layer.used_bytes, layer.pack(0)) == (0, 0, 0, {})
    convert(layer, other := QuantizedLayer(bits))
    assert other.storage_bytes == 0
    layer.update(*states(100))
    layer.reset()
    assert (layer.length, layer.storage_bytes, layer.block_edges()) == (0, 0, [0, 0])
    shape = HeadShape(1, 20, 20)
    assert same(layer.update(*states(100, 1, shape)), filled(bits, 100, 1, shape).read())


def quantized(model: PreTrainedModel, bits: int) -> ConversationKV:
    return ConversationKV([QuantizedLayer(bits) for _ in range(int(model.config.num_hidden_layers))])


@torch.inference_mode()
def run(model: PreTrainedModel, kv: ConversationKV, ids: list[int], chunk: int) -> torch.Tensor:
    """Reads `ids` in chunks after what the cache holds; log-probabilities `[len(ids), vocabulary]`."""
    answers = []
    for first in range(0, len(ids), chunk):
        new = ids[first : first + chunk]
        places = torch.arange(len(kv), len(kv) + len(new))[None]
        with kv.append(new) as cache:
            output = model(input_ids=torch.tensor([new]), position_ids=places, past_key_values=cache)
        answers.append(output.logits[0].float().log_softmax(-1))
    return torch.cat(answers)


@torch.inference_mode()
def uncached(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


@torch.inference_mode()
def stop(kv: ConversationKV, tokens: int, reached: int) -> None:
    """A pass of the tiny model that is stopped after so many layers."""
    with kv.append(list(range(tokens))) as cache:
        for index in range(reached):
            cache.update(*states(tokens, index, HeadShape(2, 16, 16)), index)
        raise InterruptedError


def divergence(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL of each place in nats."""
    return (exact.exp() * (exact - other)).sum(-1)


def ids_of(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer.encode(text, add_special_tokens=False).ids)


@each_precision
@pytest.mark.parametrize("chunk", [1, 7, BLOCK, 100, 300])
def test_a_model_reads_in_chunks_of_any_size(tiny: LoadedModel, bits: int, chunk: int) -> None:
    """The bound is on the mean of 300 places; with zeros in place of the quantised rows it is over 1."""
    ids = [(7 * place * place + 3 * place) % 470 for place in range(300)]
    kv = quantized(tiny.model, bits)
    off = divergence(uncached(tiny.model, ids), run(tiny.model, kv, ids, chunk))
    assert float(off.mean()) < (1e-3 if bits == 8 else 0.3)
    assert kv.ids == tuple(ids)
    assert kv.storage_bytes == kv.bytes_at(300) == sum(layer.storage_bytes for layer in kv.stored)


@each_precision
@pytest.mark.parametrize("reached", [1, 2, 4])
def test_after_a_stopped_pass_all_layers_have_the_same_blocks(
    tiny: LoadedModel, bits: int, reached: int
) -> None:
    """Layers that were reached have quantised what the others hold exactly; they go on together."""
    kv = quantized(tiny.model, bits)
    run(tiny.model, kv, list(range(100)), 100)
    pack_rows(kv)
    with pytest.raises(InterruptedError):
        stop(kv, 90, reached)
    assert {layer.length for layer in kv.stored} == {100}
    run(tiny.model, kv, list(range(200)), 50)
    assert {tuple(layer.block_edges()) for layer in kv.stored} == {(0, 64, 128, 192, 256, 300)}
    kv.saved_rows = 0
    other = quantized(tiny.model, bits)
    unpack_rows(other, pack_rows(kv))
    assert torch.equal(run(tiny.model, other, [5, 6, 7], 1), run(tiny.model, kv, [5, 6, 7], 1))


@each_precision
def test_restored_and_forked_caches_answer_bit_identically(tiny: LoadedModel, bits: int) -> None:
    live, restored = quantized(tiny.model, bits), quantized(tiny.model, bits)
    for turn, (length, tokens) in enumerate([(0, 150), (130, 90), (200, 10), (190, 200)]):
        live.truncate(length)
        run(tiny.model, live, [(turn + 3 * place) % 470 for place in range(tokens)], 33)
        unpack_rows(restored, pack_rows(live))
        answers = [
            run(tiny.model, kv, [9, 8, 7], 1) for kv in (live.fork(len(live)), restored.fork(len(live)))
        ]
        assert torch.equal(*answers)
    assert torch.equal(run(tiny.model, restored, [9] * 70, 7), run(tiny.model, live, [9] * 70, 7))


GOLDEN = {
    "prose": """\
The harbour of the old town lies below the hill, and on most mornings the fog comes up from the water before
the first boats leave. Marta had worked in the office of the harbour master for eleven years. She knew which
captains paid late, which of them sang, and which of them would rather wait for a day than ask for a pilot.
In the spring of that year a letter arrived from the ministry. It said that the lighthouse on the northern
rock would be switched off at the end of June, because ships had other means of finding their way, and
because nobody could be found who was willing to live there. Marta read the letter twice, put it into a
drawer, and went out to look at the rock. The tide was low, and the path of stones that leads to the
lighthouse was dry. She walked slowly, because the stones were covered with weed, and because she wanted to
think. Her grandfather had kept the light during the war, when it was not allowed to burn, and he had told
her that the hardest part of the work was to sit beside a lamp in the dark and to listen to the engines of
ships that did not know where they were. When she reached the door it was open. Inside, on the table, stood
a cup of coffee that was still warm. She called, but nobody answered. On the wall hung a chart on which
somebody had drawn, in red pencil, a line that led from the harbour around the rock and out to the sea, and
at the end of the line there was a small cross and a date. It was the date of the next day. Marta sat down
on the only chair, looked at the chart for a long time, and then she did something that she had not done
since she was a child: she climbed the hundred and twelve steps to the top, opened the iron window, and
looked for a ship. There was one. It lay at anchor behind the rock, where it could not be seen from the
town, and on its deck a man was standing who waved at her as if he had been waiting.""",
    "code": '''\
import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Account:
    """One account of the bank, with everything that was ever paid in or out."""

    owner: str
    balance: int = 0
    history: list[tuple[str, int]] = field(default_factory=list)

    def deposit(self, amount: int) -> None:
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))

    def withdraw(self, amount: int) -> None:
        if amount <= 0:
            raise ValueError("the amount must be positive")
        if amount > self.balance:
            raise ValueError("the balance is too small")
        self.balance -= amount
        self.history.append(("withdraw", amount))


class Bank:
    """All accounts by the name of their owner."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.accounts: dict[str, Account] = {}

    def open(self, owner: str) -> Account:
        if owner in self.accounts:
            raise KeyError(f"{owner} has an account already")
        account = Account(owner)
        self.accounts[owner] = account
        return account

    def transfer(self, source: str, target: str, amount: int) -> None:
        self.accounts[source].withdraw(amount)
        self.accounts[target].deposit(amount)

    def save(self) -> None:
        data = {
            name: {"balance": account.balance, "history": account.history}
            for name, account in self.accounts.items()
        }
        self.path.write_text(json.dumps(data, indent=2))

    def load(self) -> None:
        data = json.loads(self.path.read_text())
        for name, values in data.items():
            account = Account(name, values["balance"])
            account.history = [(kind, amount) for kind, amount in values["history"]]
            self.accounts[name] = account''',
    "dialogue": """\
<|im_start|>system
You are a helpful assistant who answers briefly.<|im_end|>
<|im_start|>user
I want to bake bread tomorrow. What do I need?<|im_end|>
<|im_start|>assistant
You need flour, water, salt and yeast. A simple loaf takes 500 grams of flour, 350 grams of water, 10 grams
of salt and
7 grams of dry yeast.<|im_end|>
<|im_start|>user
And how do I make it? I have never done this before.<|im_end|>
<|im_start|>assistant
1. Mix the flour, the salt and the yeast in a large bowl.
2. Add the water and stir until there is no dry flour left.
3. Knead the dough for ten minutes, until it is smooth.
4. Cover the bowl and let the dough rise for an hour, until it is twice as large.
5. Shape a loaf, put it on a baking tray, and let it rise for another half an hour.
6. Bake it at 230 degrees for 35 minutes. It is done when it sounds hollow.<|im_end|>
<|im_start|>user
My oven only goes up to 200 degrees. Is that a problem?<|im_end|>
<|im_start|>assistant
No. Bake it for about ten minutes longer, and put a small bowl of hot water into the oven, so that the crust
stays soft
while the bread rises.<|im_end|>
<|im_start|>user
How many grams of salt did you say, and when do I add it?<|im_end|>
<|im_start|>assistant
You need 10 grams of salt. Add it to the flour together with the yeast, before you add the water.<|im_end|>
<|im_start|>user
Thank you! My sister is allergic to wheat. Could I use something else?<|im_end|>
<|im_start|>assistant
Yes. You can use rice flour, buckwheat flour or a mix that is sold for people who can't eat wheat. Such a
dough does not
rise as well, so add a spoon of ground flax seed, which helps to hold it together.<|im_end|>""",
}
READ = 160
"""Tokens of a golden text that are read before the scored ones: two blocks and a residual."""
SCORED = 321
"""Tokens up to which they are scored: five blocks, and the first token that makes the fifth one rounded."""


@pytest.mark.model
@pytest.mark.parametrize("text", GOLDEN.values(), ids=GOLDEN)
def test_perplexity_of_golden_texts_is_close_to_unquantised(smollm2: LoadedModel, text: str) -> None:
    ids = ids_of(smollm2, text)[:SCORED]
    assert len(ids) == SCORED
    exact = uncached(smollm2.model, ids)[READ:]
    off, choices = {}, {}
    for bits in (8, 4):
        kv = quantized(smollm2.model, bits)
        run(smollm2.model, kv, ids[:READ], BLOCK)
        scored = run(smollm2.model, kv, ids[READ:], 16)
        off[bits], choices[bits] = divergence(exact, scored), scored.argmax(-1)
    assert float(off[8].max()) < 1e-3
    assert torch.equal(choices[8], exact.argmax(-1))
    assert float(off[4].mean()) < 0.02


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 40, 60, 2 * BLOCK])
def test_unsharing_beforehand_changes_neither_fork_nor_parent(bits: int, tokens: int) -> None:
    layer = filled(bits, 3 * BLOCK + 10)
    fork = layer.fork()
    layer.update(*states(1, 9))
    before = [t.clone() for t in layer.read()]
    assert fork.unshare(tokens) > 0
    assert all(torch.equal(a, b[:, :, : fork.length]) for a, b in zip(fork.read(), before, strict=True))
    assert fork.unshare(tokens) == 0
    if 10 + tokens <= BLOCK:  # else the finished blocks need memory besides
        assert fork.growth(tokens) == (0, 0)
    fork.update(*states(tokens, 10))
    assert all(torch.equal(a, b) for a, b in zip(layer.read(), before, strict=True))
    alone = filled(bits, 3 * BLOCK + 10)
    alone.update(*states(tokens, 10))
    assert all(torch.equal(a, b) for a, b in zip(fork.read(), alone.read(), strict=True))
