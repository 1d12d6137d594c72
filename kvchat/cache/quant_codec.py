"""Quantises blocks of keys or values to 8 or 4 bits, and dequantises them.

Must not depend on where blocks are stored or which tokens they belong to.
"""

from typing import NamedTuple

import torch

BLOCK = 64
"""Rows of a block. 32 would quantise keys slightly better; its scales would take 3 % of bf16 more."""

SCALE = torch.float16
"""dtype of scales and zero points. Codes are computed with the rounded values."""

PER_CHANNEL, PER_TOKEN = -2, -1
"""The dimension of `[slots, kv_heads, BLOCK, head_dim]` whose numbers share a scale."""


class Codes(NamedTuple):
    """Quantised states: `codes * scales + zeros`, broadcast over the dimension that shares a scale."""

    codes: torch.Tensor
    """8 bits: int8 `[slots, kv_heads, BLOCK, head_dim]`. 4 bits: uint8, half as many rows; the low nibbles
    are the first half of the block's rows."""
    scales: torch.Tensor
    zeros: torch.Tensor | None


def quantise(states: torch.Tensor, bits: int, shared: int) -> Codes:
    """Rounds states `[slots, kv_heads, BLOCK, head_dim]` to 8 or 4 bits, computing in fp32.

    4 bits span minimum to maximum of the numbers that share a scale (KIVI, arXiv 2402.02750, section 3).
    8 bits are symmetric: per token around zero, per channel around the middle (some channels of keys have
    an offset).
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
