"""Linear layers with weights in 4 and 8 bits, packed as the kernels read them."""

from typing import Any, NamedTuple

import torch
from torch import nn

from kvchat.engine.compiled.abi import GROUP, TILE

LARGEST = {4: 15, 8: 127}
"""Quants of 4 bits are 0 to 15, those of 8 bits -127 to 127."""


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
        """The matrix in fp32, bit-identical to llama.cpp's dequantisation."""
        rows = self.quants.shape[0]
        grouped = self.quants.view(rows, -1, GROUP).float() * self.scales[..., None]
        return (grouped if self.minima is None else grouped + self.minima[..., None]).view(rows, -1)

    def rows(self, order: torch.Tensor) -> "Blocks":
        """The rows in another order, `[out]` int64."""
        minima = None if self.minima is None else self.minima[order]
        return Blocks(self.bits, self.quants[order], self.scales[order], minima)


def round_to_blocks(weight: torch.Tensor, bits: int) -> Blocks:
    """Rounds a matrix `[out, in]`: 8 bits around zero, 4 bits from minimum to maximum, per group of 32.

    Dequantised Q8_0 blocks are reproduced exactly, since each has a quant of 127.
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
    """Packs blocks as in `kernels/weights.h`: uint8 `[out / 8, in / 32, bytes]`, whole tiles of rows.

    16-bit lanes, two for each row (even and odd columns); each lane has two weights of 8 bits or four of 4
    bits, of neighbouring pairs of columns, the first one lowest. Then the tile's scales and its minima.
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
    """A linear layer over packed blocks; computes in fp32 and needs the kernels loaded."""

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
        # sliced last: torch.export would specialise on one token if it reshaped a slice
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
    """Replaces the linear layers in `blocks`, and the head, by packed ones.

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
    """The output matrix in 8 bits: 4 bits would cost much more quality there than in other layers."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return round_to_blocks(head.weight, 8) if packable(head) else None
