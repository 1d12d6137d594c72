"""Linear layers in 4 and 8 bits: weights stay what the GGUF file says, or are rounded where the user asks.

A GGUF block of the kinds Q4_0, Q4_1 and Q8_0 is 32 numbers `quant · scale + minimum`. The kernels take
just that, eight rows at a time, so nothing is rounded a second time. It knows blocks and how they are laid
out; it refuses to know what a layer is for.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from torch import nn

from kvchat.engine.compiled.abi import GROUP, TILE

LARGEST = {4: 15, 8: 127}
"""Quants of 4 bits go from 0 on, those of 8 bits from -127 on."""
UNQUANTISED = {"F32", "F16", "BF16"}
FOUR_BITS = {gguf.GGMLQuantizationType.Q4_0: 1, gguf.GGMLQuantizationType.Q4_1: 2}
"""How many 16-bit floats a block starts with: its scale, and its minimum where that is not -8 scales."""
ZERO_4_0 = 8
"""The quant of Q4_0 that stands for zero."""


class Blocks(NamedTuple):
    """A matrix `[out, in]` in groups of 32 along `in`: `quants · scales + minima`."""

    bits: int
    quants: torch.Tensor
    """`[out, in]` int32: 0 to 15, or -127 to 127."""
    scales: torch.Tensor
    """`[out, in / 32]` fp32 with values that fp16 has, as are the minima."""
    minima: torch.Tensor | None
    """None with 8 bits, which are symmetric."""

    def weights(self) -> torch.Tensor:
        """The matrix in fp32, bit for bit as llama.cpp dequantises it."""
        rows = self.quants.shape[0]
        grouped = self.quants.view(rows, -1, GROUP).float() * self.scales[..., None]
        return (grouped if self.minima is None else grouped + self.minima[..., None]).view(rows, -1)

    def rows(self, order: torch.Tensor) -> "Blocks":
        """The rows in another order, `[out]` int64."""
        minima = None if self.minima is None else self.minima[order]
        return Blocks(self.bits, self.quants[order], self.scales[order], minima)


def round_to_blocks(weight: torch.Tensor, bits: int) -> Blocks:
    """Rounds a matrix `[out, in]`: 8 bits around zero, 4 bits from minimum to maximum, per group of 32.

    Q8_0 blocks that were dequantised come back bit for bit: each has a quant of 127.
    """
    grouped = weight.detach().float().view(len(weight), -1, GROUP)
    lowest, highest = grouped.aminmax(dim=-1)
    if bits == 8:
        scales = _half(torch.maximum(highest, -lowest) / LARGEST[8])
        quants = (grouped / _divisor(scales)).round().clamp(-LARGEST[8], LARGEST[8])
        return Blocks(8, quants.int().view(weight.shape), scales, None)
    minima = _half(lowest)
    scales = _half((highest - minima) / LARGEST[4])
    quants = ((grouped - minima[..., None]) / _divisor(scales)).round().clamp(0, LARGEST[4])
    return Blocks(4, quants.int().view(weight.shape), scales, minima)


def _half(exact: torch.Tensor) -> torch.Tensor:
    return exact.half().float()


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    return scales.masked_fill(scales == 0, 1)[..., None]


def pack(blocks: Blocks) -> torch.Tensor:
    """As in `kernels/weights.h`: uint8 `[out / 8, in / 32, bytes]`, rows padded to whole tiles with zeros.

    16-bit lanes, two for each row (even and odd columns); each lane holds two weights of 8 bits or four of 4
    bits, of neighbouring pairs of columns, the first one lowest. Then the tile's scales, and its minima.
    """
    bits, quants, scales, minima = blocks
    if missing := -len(quants) % TILE:
        quants, scales = _padded(quants, missing), _padded(scales, missing)
        minima = None if minima is None else _padded(minima, missing)
    tiles, groups, parts = len(quants) // TILE, quants.shape[1] // GROUP, 16 // bits
    columns = quants.view(tiles, TILE, groups, GROUP // (2 * parts), parts, 2)
    ordered = columns.permute(0, 2, 3, 1, 5, 4)  # tile, group, vector, row, even or odd, part of the lane
    lanes = sum((ordered[..., part] & (2**bits - 1)) << (bits * part) for part in range(parts))
    assert isinstance(lanes, torch.Tensor)
    pieces = [_bytes(torch.where(lanes >= 1 << 15, lanes - (1 << 16), lanes).to(torch.int16), tiles, groups)]
    for numbers in (scales, minima):
        if numbers is not None:
            by_tile = numbers.view(tiles, TILE, groups).transpose(1, 2)
            pieces.append(_bytes(by_tile.half(), tiles, groups))
    return torch.cat(pieces, -1)


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows, tensor.shape[1])])


def _bytes(tensor: torch.Tensor, tiles: int, groups: int) -> torch.Tensor:
    return tensor.contiguous().view(tiles, groups, -1).view(torch.uint8)


class PackedLinear(nn.Module):
    """A linear layer over packed blocks; computes in fp32. It runs where the kernels are loaded."""

    blocks: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, blocks: Blocks, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out = len(blocks.quants)
        self.register_buffer("blocks", pack(blocks))
        self.register_buffer("bias", bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., in]` → `[..., out]`."""
        rows = states.reshape(-1, states.shape[-1])
        product = torch.ops.kvchat.product(rows, self.blocks)
        # cut last: torch.export would tell one token from several where it reshapes what was cut
        result: torch.Tensor = product.reshape(*states.shape[:-1], -1)[..., : self.out]
        return result if self.bias is None else result + self.bias


class PackedEmbedding(nn.Module):
    """An embedding that shares the blocks of an output matrix in 8 bits."""

    blocks: torch.Tensor

    def __init__(self, blocks: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("blocks", blocks)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[..., tokens]` → `[..., tokens, hidden]` in fp32."""
        rows: torch.Tensor = torch.ops.kvchat.lookup(ids.reshape(-1), self.blocks)
        return rows.reshape(*ids.shape, -1)


def packable(module: nn.Module | None) -> bool:
    """Whether a layer can be stored in blocks."""
    return isinstance(module, nn.Linear) and module.in_features % GROUP == 0


def quantise(model: nn.Module, blocks: dict[str, Blocks], head: Blocks | None) -> None:
    """Replaces linear layers by packed ones: those named in `blocks`, and the head.

    An embedding that is tied to the head shares its blocks.
    """
    for name, found in blocks.items():
        linear: Any = model.get_submodule(name)
        model.set_submodule(name, PackedLinear(found, linear.bias))
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or not packable(output):
        return
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    packed = PackedLinear(head, output.bias)
    plain = type(embedding) is nn.Embedding  # some models scale theirs
    if head.bits == 8 and plain and embedding.weight is output.weight:
        model.set_input_embeddings(PackedEmbedding(packed.blocks))  # type: ignore[operator]
    model.set_output_embeddings(packed)  # type: ignore[operator]


def rounded_blocks(model: nn.Module, bits: int) -> dict[str, Blocks]:
    """Name → blocks of every linear layer but the head, rounded to so many bits."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: round_to_blocks(module.weight, bits)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and packable(module) and module is not head
    }


def rounded_head(model: nn.Module) -> Blocks | None:
    """The output matrix in 8 bits: in 4 it costs quality that the other layers don't."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return round_to_blocks(head.weight, 8) if packable(head) else None


# ---- from a GGUF file -------------------------------------------------------------------------------------


def head_of(path: Path) -> Blocks | None:
    """The output matrix `[vocabulary, hidden]` of a GGUF file in 8 bits; None where the file has 16."""
    reader: Any = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    head = tensors.get("output.weight", tensors.get("token_embd.weight"))  # tied in many small models
    if head is None or head.tensor_type.name in UNQUANTISED:
        return None
    return round_to_blocks(torch.tensor(gguf.dequantize(head.data, head.tensor_type)), 8)


def read_blocks(tensor: Any) -> Blocks | None:  # noqa: ANN401 - gguf.ReaderTensor; the library has no types
    """The blocks of one matrix of a GGUF file; None where it is not quantised.

    Kinds other than Q4_0 and Q4_1 are rounded to 8 bits, finer than any of them. Source of the layout:
    `block_q4_0` and `block_q4_1` in llama.cpp's ggml-common.h. The low halves of the 16 bytes are the first
    16 quants, the high halves the others.
    """
    if tensor.data.ndim != 2 or tensor.tensor_type.name in UNQUANTISED:
        return None
    floats_before = FOUR_BITS.get(tensor.tensor_type)
    if floats_before is None:
        return round_to_blocks(torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)), 8)
    raw = torch.tensor(tensor.data).view(len(tensor.data), -1, 2 * floats_before + GROUP // 2)
    floats = raw[..., : 2 * floats_before].contiguous().view(torch.float16).float()
    halves = raw[..., 2 * floats_before :]
    quants = torch.cat([halves & 15, halves >> 4], -1).flatten(1).int()
    scale = floats[..., 0]
    return Blocks(4, quants, scale, floats[..., 1] if floats_before == 2 else -ZERO_4_0 * scale)


def blocks_of(model: nn.Module, path: Path) -> dict[str, Blocks]:
    """Name → blocks of every linear layer of `model` that the GGUF file at `path` holds quantised.

    Some models' rows lie in another order in the file (Llama's queries and keys): each row is found by its
    values, and a layer whose rows are not all there is left out.
    """
    reader: Any = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = _names_in_file(reader)
    found: dict[str, Blocks] = {}
    for name, module in model.named_modules():
        tensor = tensors.get(f"{names.get_name(name)}.weight")
        if not isinstance(module, nn.Linear) or not packable(module) or tensor is None:
            continue
        blocks = read_blocks(tensor)
        if blocks and (arranged := arrange(blocks, module.weight)):
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
