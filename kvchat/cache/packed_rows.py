"""The rows of a cache as plain tensors and integers, for the disk, and back: bit for bit."""

from dataclasses import dataclass

import torch

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import StoredLayer
from kvchat.cache.state_layer import RecurrentState


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The rows of a cache from `start` on, and its history from token `first` on."""

    start: int
    first: int
    ids: tuple[int, ...]
    """The history from `first` on."""
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    """`LAYER.NAME` → contiguous tensor."""
    checkpoints: dict[int, list[RecurrentState]]
    """History length → the states of the recurrent layers there."""


def pack_rows(kv: ConversationKV) -> PackedRows:
    """Copies everything that is not saved yet; from now on those rows count as saved.

    Layers with a state are saved as their checkpoints, and the current length becomes one.
    """
    kv.checkpoint()
    index = kv.index
    start = min((layer.pack_start(kv.saved_rows) for layer in kv.stored), default=kv.saved_rows)
    tensors = {
        f"{number}.{name}": tensor
        for number, layer in enumerate(kv.layers)
        if isinstance(layer, StoredLayer)
        for name, tensor in layer.pack(start).items()
    }
    first = index.rows[start] if start < len(kv) else len(index.ids)
    first = 0 if start == 0 else first
    kv.saved_rows = len(kv)
    return PackedRows(
        start,
        first,
        tuple(index.ids[first:]),
        tuple(index.rows[start:]),
        tuple(index.positions[start:]),
        tensors,
        {length: states for length, states in kv.checkpoints.states.items() if length > first},
    )


def unpack_rows(kv: ConversationKV, packed: PackedRows) -> None:
    """Keeps the rows before `packed.start` and appends the packed ones, bit for bit.

    Raises:
        ValueError: they don't continue what is in the cache, or don't fit its layers.
    """
    index = kv.index
    if packed.start > len(kv) or packed.first > len(index.ids):
        raise ValueError(f"rows from {packed.start} on don't continue {len(kv)} rows")
    for number, layer in enumerate(kv.layers):
        if isinstance(layer, StoredLayer):
            names = (name for name in packed.tensors if name.startswith(f"{number}."))
            layer.unpack(packed.start, {name.partition(".")[2]: packed.tensors[name] for name in names})
    index.ids[packed.first :] = packed.ids
    index.rows[packed.start :] = packed.rows
    index.positions[packed.start :] = packed.positions
    kv.checkpoints.drop_after(packed.first)
    kv.checkpoints.states |= packed.checkpoints
    end = len(index.ids)
    if kv.states and end not in {0, *kv.checkpoints.states}:
        raise ValueError(f"there is no state of {end} tokens")
    if kv.states:
        kv.checkpoints.load(end)
    lengths = {layer.length for layer in kv.stored} - {len(kv)}
    if lengths:
        raise ValueError(f"layers hold {sorted(lengths)} rows instead of {len(kv)}")
    kv.saved_rows = len(kv)
