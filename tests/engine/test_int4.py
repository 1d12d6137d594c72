"""The weights of the compiled step are those of the GGUF file, number for number."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from kvchat.engine.convert import convert_gguf
from kvchat.engine.int4 import Blocks, Int4Linear, Int8Linear, arrange, blocks_of, head_of, read_blocks
from kvchat.engine.load import load_model
from tests.engine.quantised import Q4_0, Q4_1, Q8_0, save_quantised
from tests.test_prepare import write_gguf

ROWS, COLUMNS = 48, 96


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


@pytest.mark.parametrize("kind", [Q4_0, Q4_1])
def test_blocks_are_read_bit_for_bit_as_they_are_dequantised(kind: gguf.GGMLQuantizationType) -> None:
    tensor = quantised(kind)
    blocks = blocks_from(tensor)
    assert torch.equal(blocks.weights(), torch.tensor(gguf.dequantize(tensor.data, kind)))
    assert blocks.quants.min() == 0
    assert blocks.quants.max() == 15


def test_matrices_stored_in_other_ways_are_left_alone() -> None:
    assert read_blocks(quantised(Q8_0)) is None


@pytest.mark.parametrize("kind", [Q4_0, Q4_1])
def test_the_packed_layer_multiplies_with_exactly_those_weights(kind: gguf.GGMLQuantizationType) -> None:
    """Unit vectors read off the weights one by one; in fp32 a zero is rounded once, to 24 bits."""
    blocks = blocks_from(quantised(kind))
    found = Int4Linear(blocks, None, torch.float32)(torch.eye(COLUMNS)).T
    torch.testing.assert_close(found, blocks.weights(), atol=1e-6, rtol=0)


def test_in_bf16_only_the_scales_are_rounded() -> None:
    blocks = blocks_from(quantised(Q4_1))
    found = Int4Linear(blocks, None, torch.bfloat16)(torch.eye(COLUMNS).bfloat16()).T.float()
    bound = (8 * blocks.scales + blocks.minima.abs() + 8 * blocks.scales).repeat_interleave(32, 1) / 2**7
    assert ((found - blocks.weights()).abs() <= bound).all()


def test_a_bias_is_added() -> None:
    blocks, bias = blocks_from(quantised(Q4_1)), torch.arange(ROWS).float()
    states = torch.randn(1, 3, COLUMNS, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.linear(states, blocks.weights(), bias)
    torch.testing.assert_close(Int4Linear(blocks, bias, torch.float32)(states), expected, atol=1e-4, rtol=0)


def test_rows_that_cannot_be_packed_are_refused() -> None:
    blocks = blocks_from(quantised(Q4_1)).rows(torch.arange(ROWS - 1))
    with pytest.raises(ValueError, match="47 rows are not a multiple of 16"):
        Int4Linear(blocks, None, torch.float32)


def test_rows_in_another_order_are_found_by_their_values() -> None:
    blocks = blocks_from(quantised(Q4_1))
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    weight = blocks.weights()[order].bfloat16()
    arranged = arrange(blocks, weight)
    assert arranged is not None
    assert torch.equal(arranged.weights().bfloat16(), weight)


def test_weights_that_are_not_the_files_are_not_taken_for_them() -> None:
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
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert found.keys() == linear.keys()
    for name, module in linear.items():
        assert torch.equal(found[name].weights(), module.weight), name


def test_a_head_of_8_bits_stays_what_it_is(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "tiny")
    head = head_of(folder / "model.gguf")
    assert head is not None
    assert torch.equal(Int8Linear(head, None).weights(), head)


def test_a_head_of_other_origin_is_rounded_by_half_a_step_of_its_group() -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    layer = Int8Linear(weight, None)
    steps = layer.scales.repeat_interleave(32, 1)
    assert ((layer.weights() - weight).abs() <= 0.5001 * steps).all()
    assert torch.equal(Int8Linear(torch.zeros(ROWS, COLUMNS), None).weights(), torch.zeros(ROWS, COLUMNS))
