"""Packed weights equal those of the GGUF file, or differ by at most the rounding error."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kvchat.engine.compiled.abi import GROUP, TILE
from kvchat.engine.compiled.gguf_weights import arrange, blocks_of, head_of, read_blocks
from kvchat.engine.compiled.quantized_linear import (
    Blocks,
    PackedEmbedding,
    PackedLinear,
    pack,
    quantise,
    round_to_blocks,
    rounded_blocks,
    rounded_head,
)
from kvchat.engine.model.loader import load_model
from kvchat.engine.setup.convert_gguf import convert_gguf
from tests.engine.test_prepare import write_gguf
from tests.support.quantised import Q4_0, Q4_1, Q8_0, save_quantised
from tests.support.tiny import seeded_model, tiny_chat, tiny_config, tiny_model

ROWS, COLUMNS = 43, 96
each_kind = pytest.mark.parametrize("kind", [Q4_0, Q4_1, Q8_0], ids=["Q4_0", "Q4_1", "Q8_0"])
each_precision = pytest.mark.parametrize("bits", [4, 8])


@dataclass(frozen=True)
class Tensor:
    """A matrix as a GGUF reader gives it."""

    data: Any
    tensor_type: Any


def quantised(kind: Any, seed: int = 0) -> Tensor:  # noqa: ANN401 - gguf has no types
    values = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return Tensor(gguf.quantize(values, kind), kind)


def blocks_from(tensor: Tensor) -> Blocks:
    blocks = read_blocks(tensor)
    assert blocks is not None
    return blocks


def weights(rows: int = ROWS, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))


def read_slowly(packed: torch.Tensor, row: int, column: int) -> tuple[int, float, float]:
    """(quant, scale, minimum) of one weight, by the layout documented at `pack`."""
    bits = 8 if packed.shape[2] == TILE * GROUP + 2 * TILE else 4
    block = bytes(packed[row // TILE, column // GROUP].tolist())
    in_lane, lanes = 16 // bits, bits * 16
    pair, odd = divmod(column % GROUP, 2)
    vector, part = divmod(pair, in_lane)
    lane = vector * 16 + row % TILE * 2 + odd
    quant = struct.unpack(f"<{lanes}H", block[: 2 * lanes])[lane] >> bits * part & (1 << bits) - 1
    if bits == 8 and quant > 127:
        quant -= 256
    floats = struct.unpack(f"<{len(block) // 2 - lanes}e", block[2 * lanes :])
    return quant, floats[row % TILE], floats[TILE + row % TILE] if bits == 4 else 0.0


@each_precision
def test_packed_weights_have_the_documented_layout(bits: int) -> None:
    blocks = round_to_blocks(weights(), bits)
    packed = pack(blocks)
    assert packed.shape[:2] == (-(-ROWS // TILE), COLUMNS // GROUP)
    for row in range(ROWS):
        for column in range(COLUMNS):
            minimum = 0.0 if blocks.minima is None else float(blocks.minima[row, column // GROUP])
            expected = (int(blocks.quants[row, column]), float(blocks.scales[row, column // GROUP]), minimum)
            assert read_slowly(packed, row, column) == expected
    for row in range(ROWS, len(packed) * TILE):
        assert read_slowly(packed, row, 0) == (0, 0.0, 0.0)


@each_kind
def test_blocks_are_read_bit_for_bit_as_gguf_dequantises_them(kind: Any) -> None:  # noqa: ANN401
    tensor = quantised(kind)
    blocks = blocks_from(tensor)
    assert blocks.bits == (8 if kind == Q8_0 else 4)
    assert torch.equal(blocks.weights(), torch.tensor(gguf.dequantize(tensor.data, kind)))


def test_matrices_that_are_not_quantised_are_skipped() -> None:
    values = np.ones((ROWS, COLUMNS), dtype=np.float32)
    for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        assert read_blocks(Tensor(gguf.quantize(values, kind), kind)) is None
    assert read_blocks(Tensor(gguf.quantize(values[0], Q8_0), Q8_0)) is None


@given(
    st.sampled_from([4, 8]), st.integers(0, 99), st.floats(-3, 3), st.floats(-3, 3), st.integers(0, COLUMNS)
)
def test_rounding_error_of_weights_is_at_most_half_a_step(
    bits: int, seed: int, size: float, middle: float, zeros: int
) -> None:
    """Scales and minima have 11 bits themselves."""
    exact = weights(9, seed) * 10**size + middle
    exact[:, :zeros] = 0
    blocks = round_to_blocks(exact, bits)
    steps = blocks.scales
    bound = 0.5 * steps + 2**-11 * (15 if bits == 4 else 127) * steps
    if blocks.minima is not None:
        bound = bound + 2**-11 * blocks.minima.abs()
    error = (blocks.weights() - exact).abs()
    assert (error <= bound.repeat_interleave(GROUP, 1) + 1e-6).all()
    lowest, highest = (0, 15) if bits == 4 else (-127, 127)
    assert lowest <= int(blocks.quants.min()) <= int(blocks.quants.max()) <= highest


@each_precision
def test_rounding_is_idempotent(bits: int) -> None:
    blocks = round_to_blocks(weights(), bits)
    again = round_to_blocks(blocks.weights(), bits)
    assert torch.equal(again.weights(), blocks.weights()) or bits == 4
    torch.testing.assert_close(again.weights(), blocks.weights(), atol=1e-2, rtol=0)


# ---- layers ------------------------------------------------------------------------------------------------


@each_precision
@pytest.mark.usefixtures("kernels")
def test_a_packed_layer_multiplies_and_adds_its_bias(bits: int) -> None:
    blocks, bias = round_to_blocks(weights(), bits), torch.arange(ROWS).float()
    states = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(0))
    for given_bias in (None, bias):
        expected = torch.nn.functional.linear(states, blocks.weights(), given_bias)
        torch.testing.assert_close(PackedLinear(blocks, given_bias)(states), expected, atol=2e-3, rtol=0)


@pytest.mark.usefixtures("kernels")
def test_an_embedding_that_is_tied_to_the_head_shares_its_blocks() -> None:
    config = tiny_config(tiny_chat())
    config.tie_word_embeddings = True
    model = seeded_model(config)
    head = rounded_head(model)
    assert head is not None
    quantise(model, rounded_blocks(model, 4), head)
    embedding: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert embedding.blocks is output.blocks
    assert torch.equal(embedding(torch.tensor([[3, 0]]))[0], head.weights()[[3, 0]])
    assert not [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_an_untied_embedding_is_not_replaced() -> None:
    model = tiny_model(tiny_chat())
    quantise(model, {}, rounded_head(model))
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert isinstance(model.get_output_embeddings(), PackedLinear)


def test_layers_without_whole_groups_are_not_replaced() -> None:
    odd = nn.Linear(33, 8)
    model = nn.ModuleDict({"odd": odd, "even": nn.Linear(64, 8)})
    model.get_output_embeddings = lambda: odd  # type: ignore[assignment]
    assert rounded_blocks(model, 8).keys() == {"even"}
    assert rounded_head(model) is None


# ---- from a GGUF file --------------------------------------------------------------------------------------


def test_rows_in_another_order_are_found_by_their_values() -> None:
    blocks = blocks_from(quantised(Q4_1))
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    weight = blocks.weights()[order].bfloat16()
    arranged = arrange(blocks, weight)
    assert arranged is not None
    assert torch.equal(arranged.weights().bfloat16(), weight)


def test_weights_that_differ_from_the_file_are_not_matched() -> None:
    blocks = blocks_from(quantised(Q4_1))
    weight = blocks.weights()
    weight[5, 7] += 0.01
    assert arrange(blocks, weight) is None
    assert arrange(blocks, weight[:, :64]) is None


def test_every_linear_layer_of_a_converted_model_finds_its_blocks(tmp_path: Path) -> None:
    """Llama's queries and keys lie in another order in the file; transformers turns them round."""
    file, folder = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "folder"
    folder.mkdir()
    convert_gguf(file, folder, lambda _progress: None)
    model = load_model(folder, "tiny", precision="fp32", threads=2).model
    found = blocks_of(model, file)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert linear.keys() <= found.keys()
    for name, module in linear.items():
        assert torch.equal(found[name].weights(), module.weight), name


def test_a_head_of_8_bits_is_not_rounded_again(tmp_path: Path) -> None:
    file = save_quantised(tmp_path / "tiny") / "model.gguf"
    reader: Any = gguf.GGUFReader(file)
    stored = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    head = head_of(file)
    assert head is not None
    assert torch.equal(head.weights(), torch.tensor(gguf.dequantize(stored.data, stored.tensor_type)))
