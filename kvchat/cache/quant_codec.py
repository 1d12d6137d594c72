"""Blocks of keys or values as numbers of 8 or 4 bits, and back.

It knows bits, scales and the shape of a block; it refuses to know where blocks are kept, and which tokens
they are of.
"""

from typing import NamedTuple

import torch

BLOCK = 64
"""Rows of a block. 32 would quantise keys a little better and cost 3 % of bf16 more in scales."""

SCALE = torch.float16
"""dtype of scales and zero points. Codes are computed with the rounded ones, which costs nothing."""

PER_CHANNEL, PER_TOKEN = -2, -1
"""The dimension of `[slots, kv_heads, BLOCK, head_dim]` whose numbers share a scale."""


class Codes(NamedTuple):
    """Quantised states: `codes * scales + zeros`, broadcast over the dimension that shares them."""

    codes: torch.Tensor
    """8 bits: int8 `[slots, kv_heads, BLOCK, head_dim]`. 4 bits: uint8, half as many rows; the low half-bytes
    are the first half of the block's rows."""
    scales: torch.Tensor
    zeros: torch.Tensor | None


def quantise(states: torch.Tensor, bits: int, shared: int) -> Codes:
    """Rounds states `[slots, kv_heads, BLOCK, head_dim]` to 8 or 4 bits, computing in fp32.

    4 bits go from the minimum to the maximum of what shares a scale (KIVI, arXiv 2402.02750, section 3).
    8 bits are symmetric: per token around zero, per channel around its middle (keys have channels off zero).
    """
    exact = states.float()
    lowest, highest = exact.aminmax(dim=shared, keepdim=True)
    if bits == 8:
        zeros = _rounded((lowest + highest) / 2) if shared == PER_CHANNEL else None
        centred = exact if zeros is None else exact - zeros.float()
        scales = _rounded(centred.abs().amax(shared, keepdim=True) / 127)
        codes = (centred / _divisor(scales)).round_().clamp_(-127, 127)
        return Codes(codes.to(torch.int8), scales, zeros)
    zeros = _rounded(lowest)
    scales = _rounded((highest - zeros.float()) / 15)
    codes = ((exact - zeros.float()) / _divisor(scales)).round_().clamp_(0, 15).to(torch.uint8)
    half = BLOCK // 2
    return Codes(codes[:, :, :half] | codes[:, :, half:] << 4, scales, zeros)


def _rounded(exact: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(SCALE).max
    return exact.clamp(-limit, limit).to(SCALE)


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    return scales.float().masked_fill_(scales == 0, 1)


def dequantise(packed: Codes, out: torch.Tensor) -> None:
    """Writes the states into `out` `[slots, kv_heads, BLOCK, head_dim]`, computing in its dtype."""
    codes, scales = packed.codes, packed.scales.to(out.dtype).expand(out.shape)
    if codes.dtype is torch.int8:
        torch.mul(codes, scales, out=out)
    else:
        half = BLOCK // 2
        torch.mul(codes & 15, scales[:, :, :half], out=out[:, :, :half])
        torch.mul(codes >> 4, scales[:, :, half:], out=out[:, :, half:])
    if packed.zeros is not None:
        out.add_(packed.zeros.to(out.dtype))
