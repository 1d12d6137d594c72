"""Linear layers in 4 and 8 bits, for reading one token: the weights stay what the GGUF file says.

A GGUF block of the kinds Q4_0 and Q4_1 is 32 numbers `quant · scale + minimum` with quants from 0 to 15. That
is what torch's int4 product takes, so nothing is rounded a second time but the scales, to the precision the
model computes in. It knows blocks and products; it refuses to know what a layer is for.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from torch import nn

GROUP = 32
"""Numbers of a block."""
HALF_RANGE = 8
"""torch's product counts quants from the middle: `(quant - 8) · scale + zero`."""
ROWS_TOGETHER = 16
"""Rows that torch's int4 packing interleaves; other numbers of rows can't be packed."""
LARGEST_INT8 = 127
UNQUANTISED = {"F32", "F16", "BF16"}

SCALES = {gguf.GGMLQuantizationType.Q4_0: 1, gguf.GGMLQuantizationType.Q4_1: 2}
"""How many 16-bit floats a block starts with: its scale, and its minimum where that is not -8 scales."""


class Blocks(NamedTuple):
    """A matrix `[out, in]` in groups of 32 along `in`: `quants · scales + minima`."""

    quants: torch.Tensor
    """`[out, in]` uint8, 0 to 15."""
    scales: torch.Tensor
    """`[out, in / 32]` fp32, as are the minima."""
    minima: torch.Tensor

    def weights(self) -> torch.Tensor:
        """The matrix in fp32, bit for bit as llama.cpp dequantises it."""
        rows = self.quants.shape[0]
        grouped = self.quants.view(rows, -1, GROUP).float()
        return (grouped * self.scales[..., None] + self.minima[..., None]).view(rows, -1)

    def rows(self, order: torch.Tensor) -> "Blocks":
        """The rows in another order, `[out]` int64."""
        return Blocks(self.quants[order], self.scales[order], self.minima[order])


class Int4Linear(nn.Module):
    """A linear layer over `Blocks`."""

    packed: torch.Tensor
    scales: torch.Tensor
    """`[in / 32, out, 2]`: scales and zeros."""
    bias: torch.Tensor | None

    def __init__(self, blocks: Blocks, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        """`dtype` is that of the states, and of the scales.

        Raises:
            ValueError: torch can't pack so many rows.
        """
        super().__init__()
        if not packable(blocks):
            raise ValueError(f"{blocks.quants.shape[0]} rows are not a multiple of {ROWS_TOGETHER}")
        zeros = blocks.minima + HALF_RANGE * blocks.scales
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(blocks.quants.int(), 1)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", torch.stack([blocks.scales.T, zeros.T], -1).to(dtype).contiguous())
        self.register_buffer("bias", bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., in]` → `[..., out]`."""
        rows = states.reshape(-1, states.shape[-1])
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales)
        result: torch.Tensor = product.reshape(*states.shape[:-1], -1)
        return result if self.bias is None else result + self.bias


class Int8Linear(nn.Module):
    """A linear layer with 8 bits per weight and a scale per 32 of them, as in a GGUF block of the kind Q8_0.

    Its result is fp32, whatever the states are: as a head, a result in bf16 would round away more than the
    weights did. It runs where `kernels.cpp` is loaded.
    """

    quants: torch.Tensor
    """`[out, in]` int8."""
    scales: torch.Tensor
    """`[out, in / 32]` fp32."""
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight [out, in]` fp32. Q8_0 blocks are kept bit for bit: each has a quant of 127."""
        super().__init__()
        grouped = weight.detach().float().view(len(weight), -1, GROUP)
        scales = grouped.abs().amax(-1) / LARGEST_INT8
        quants = (grouped / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round()
        self.register_buffer("quants", quants.to(torch.int8).view(weight.shape))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    def weights(self) -> torch.Tensor:
        """The matrix in fp32."""
        grouped = self.quants.view(*self.scales.shape, GROUP).float()
        return (grouped * self.scales[..., None]).view(self.quants.shape)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., in]` → `[..., out]` fp32."""
        rows = states.reshape(-1, states.shape[-1])
        product = torch.ops.kvchat.product8(rows, self.quants, self.scales)
        result: torch.Tensor = product.reshape(*states.shape[:-1], -1)
        return result if self.bias is None else result + self.bias


def head_of(path: Path) -> torch.Tensor | None:
    """The output matrix `[vocabulary, hidden]` in fp32, as a GGUF file has it; None where it has 16 bits."""
    reader: Any = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    head = tensors.get("output.weight", tensors.get("token_embd.weight"))  # tied in many small models
    if head is None or head.tensor_type.name in UNQUANTISED:
        return None
    return torch.tensor(gguf.dequantize(head.data, head.tensor_type))


def packable(blocks: Blocks) -> bool:
    """Whether torch's int4 product takes a matrix of that many rows."""
    return blocks.quants.shape[0] % ROWS_TOGETHER == 0


def read_blocks(tensor: Any) -> Blocks | None:  # noqa: ANN401 - gguf.ReaderTensor; the library has no types
    """The blocks of one matrix of a GGUF file; None where it is stored in another way.

    Source of the layout: `block_q4_0` and `block_q4_1` in llama.cpp's ggml-common.h. The low halves of the 16
    bytes are the first 16 quants, the high halves the others.
    """
    scales = SCALES.get(tensor.tensor_type)
    if scales is None or tensor.data.ndim != 2:
        return None
    raw = torch.tensor(tensor.data).view(len(tensor.data), -1, 2 * scales + GROUP // 2)
    floats = raw[..., : 2 * scales].contiguous().view(torch.float16).float()
    halves = raw[..., 2 * scales :]
    quants = torch.cat([halves & 15, halves >> 4], -1).flatten(1)
    scale = floats[..., 0]
    return Blocks(quants, scale, floats[..., 1] if scales == 2 else -HALF_RANGE * scale)


def blocks_of(model: nn.Module, path: Path) -> dict[str, Blocks]:
    """Name → blocks of every linear layer of `model` that the GGUF file at `path` holds in 4 bits.

    Some models' rows lie in another order in the file (Llama's queries and keys): each row is found by its
    values, and a layer whose rows are not all there is left out.
    """
    reader: Any = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = _names_in_file(reader)
    found: dict[str, Blocks] = {}
    for name, module in model.named_modules():
        tensor = tensors.get(f"{names.get_name(name)}.weight")
        if not isinstance(module, nn.Linear) or tensor is None:
            continue
        blocks = read_blocks(tensor)
        if blocks and packable(blocks) and (arranged := arrange(blocks, module.weight)):
            found[name] = arranged
    return found


def arrange(blocks: Blocks, weight: torch.Tensor) -> Blocks | None:
    """The blocks with their rows in the order of `weight [out, in]`; None where they are others."""
    theirs = blocks.weights().to(weight.dtype)
    if theirs.shape != weight.shape:
        return None
    if torch.equal(theirs, weight):
        return blocks
    places: dict[bytes, list[int]] = defaultdict(list)
    for place, row in enumerate(_row_bytes(theirs)):
        places[row].append(place)
    order = [places[row].pop() if places[row] else -1 for row in _row_bytes(weight)]
    return None if -1 in order else blocks.rows(torch.tensor(order))


def _row_bytes(weight: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in weight.detach().contiguous().view(torch.uint8).numpy()]


def _names_in_file(reader: Any) -> Any:  # noqa: ANN401
    """gguf's table from the names of modules to those of tensors."""
    wanted = reader.get_field("general.architecture").contents()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    layers = reader.get_field(f"{wanted}.block_count").contents()
    return gguf.get_tensor_name_map(architecture, layers)
