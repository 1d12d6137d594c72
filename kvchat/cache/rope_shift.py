"""Keys turned to other positions, where the model marks positions by rotation.

A rotary model turns a key by an angle per position before it is stored (RoFormer, arXiv 2104.09864).
Turning it further by the difference moves it to another position. One turn in fp32 of a key in bf16 costs
one rounding; turns on turns add up, so a key is turned once and no further.
"""

import torch

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import DenseLayer


def rotated(
    keys: torch.Tensor, delta: torch.Tensor, frequencies: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Keys `[1, kv_heads, tokens, head_dim]` moved by `delta` `[tokens]` positions.

    Args:
        frequencies: `[rotary_dim / 2]` radians per position; the head's other numbers stay.
        interleaved: whether neighbours form a pair, instead of the first half with the second.
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
    """Whether each key that has to move is still where it was read, and stored unquantised."""
    moved_before = any(
        position != row and position != index
        for index, (row, position) in enumerate(zip(kv.rows, kv.positions, strict=True))
    )
    return not moved_before and all(isinstance(layer, DenseLayer) for layer in kv.stored)


def close_gaps(kv: ConversationKV, frequencies: torch.Tensor, *, interleaved: bool = False) -> None:
    """Moves every key down to the position that is its row, so that positions have no gaps.

    Raises:
        ValueError: `can_close_gaps` says no.
    """
    if not can_close_gaps(kv):
        raise ValueError("keys were turned before, or are quantised")
    positions = range(len(kv))
    delta = torch.tensor(positions) - torch.tensor(kv.positions)
    for layer in kv.stored:
        assert isinstance(layer, DenseLayer)
        layer.change_keys(lambda keys: rotated(keys, delta, frequencies, interleaved=interleaved))
    kv.reposition(positions)
