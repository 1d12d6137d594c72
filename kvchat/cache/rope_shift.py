"""Moves cached keys to other positions, for models with rotary position embeddings (RoPE).

RoPE rotates a key by an angle per position before it is stored (RoFormer, arXiv 2104.09864). Rotating it by
the difference moves it to another position. One rotation in fp32 of a key in bf16 costs one rounding;
errors of repeated rotations add up, so a key is rotated only once.
"""

import torch

from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.token_index import TokenIndex


def rotated(
    keys: torch.Tensor, delta: torch.Tensor, frequencies: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Keys `[1, kv_heads, tokens, head_dim]` moved by `delta` `[tokens]` positions.

    Args:
        frequencies: `[rotary_dim / 2]` radians per position; the rest of the head is unchanged.
        interleaved: whether neighbouring numbers form a pair, instead of first and second half.
    """
    angle = delta.float()[:, None] * frequencies.float()
    cos, sin = angle.cos(), angle.sin()
    rotary = 2 * frequencies.shape[-1]
    part = keys[..., :rotary].float()
    first, second = (part[..., 0::2], part[..., 1::2]) if interleaved else part.chunk(2, dim=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    moved = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([moved.to(keys.dtype), keys[..., rotary:]], dim=-1)


def can_close_gaps(kv: ConversationKV) -> bool:
    """Whether no key that has to move was moved before, and all are unquantised."""
    moved_before = any(
        position != row and position != index
        for index, (row, position) in enumerate(zip(kv.rows, kv.positions, strict=True))
    )
    return not moved_before and all(isinstance(layer, DenseLayer) for layer in kv.stored)


def close_gaps(kv: ConversationKV, frequencies: torch.Tensor, *, interleaved: bool = False) -> None:
    """Moves every key to the position that equals its row, so that positions have no gaps.

    Raises:
        ValueError: `can_close_gaps` is False.
    """
    if not can_close_gaps(kv):
        raise ValueError("keys were rotated before, or are quantised")
    positions = range(len(kv))
    delta = torch.tensor(positions) - torch.tensor(kv.positions)
    for layer in kv.stored:
        assert isinstance(layer, DenseLayer)
        layer.change_keys(lambda keys: rotated(keys, delta, frequencies, interleaved=interleaved))
    kv.reindex(TokenIndex(kv.ids, kv.rows, positions))
