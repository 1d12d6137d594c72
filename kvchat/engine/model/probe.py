"""Finds out what a model's cache looks like.

The kinds of layers come from the config, as transformers reads it. Everything else is measured: two forward
passes over one token, at two positions, show the heads, the states, and how positions get into the keys. It
knows models and layers; it refuses to know conversations, and to guess where a measurement says nothing.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.modeling_layers import GradientCheckpointingLayer

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import HeadShape, StoredLayer
from kvchat.cache.rope_shift import rotated
from kvchat.cache.state_layer import RecurrentLayer, StateShape
from kvchat.engine.model.forward import forward_pass
from kvchat.engine.model.layout import (
    ATTENTION,
    HYBRID,
    NO_LIMIT,
    NOTHING,
    RECURRENT,
    WINDOWED,
    ModelShape,
    new_layer,
)
from kvchat.errors import KvchatError

WINDOWS = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
"""Where a model's config says how far back a layer sees."""
ALIBI = {"bloom", "mpt"}
"""Models that always do; the others say so in their config."""
UNTOLD_LIMIT = 2048
"""Positions of a model whose config doesn't say how many there are."""
PROBED_POSITION = 37
"""Far enough from 0 that every layout of a rotation gives another key, within the context of any model."""
TOLERANCE = 0.02
"""Relative error of a key that was turned in bf16, several times over."""
STATE_TOLERANCE = 0.01
"""Relative error of a state, four times that of two exact ways in bf16; a forgotten one is 0.04 off."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """How positions get into the keys of one layer, or of all."""

    layout: str = "none"
    """`half`: the first half of the turned numbers pairs with the second, as in Llama; `interleaved`:
    neighbours do; `other`: turned in a way that is not known here; `none`: not turned."""
    frequencies: tuple[float, ...] = ()
    """Radians per position of each pair; twice as many numbers of a head are turned, from its first on."""


def measure(model: PreTrainedModel, name: str) -> ModelShape:
    """Finds out a model's shape: reads one token at two positions.

    Raises:
        KvchatError: a layer keeps what kvchat can't, or the model fails.
    """
    kinds, numbers = _layer_kinds(model.config.get_text_config(decoder=True), name)
    try:
        probe = _probed(model, kinds, numbers, 0)
        moved = _probed(model, kinds, numbers, PROBED_POSITION) if probe.stored else probe
    except Exception as error:  # a model of another making fails in whatever way it likes
        special = ", ".join(sorted({*kinds} - ATTENTION)) or "attention"
        raise KvchatError(
            f"{name} can't read a token through its layers of the kind {special}: {error!r:.200}"
        ) from error
    return _described(model, kinds, probe, moved)


def expert_layers(model: PreTrainedModel) -> int:
    """Layers whose feed-forward part is a mixture of experts."""
    return sum(
        any(name.rpartition(".")[2] == "experts" for name, _ in layer.named_modules())
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
    )


def _layer_kinds(config: PreTrainedConfig, name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Per layer its kind, and how many states it has; trailing layers that keep nothing are left out."""
    kinds, arguments = get_layer_types_and_kwargs(config)
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    if shared:  # the last layers use keys and values of layers before them
        kinds = [*kinds[: len(kinds) - shared], *[NOTHING] * shared]
    if unknown := {*kinds} - ATTENTION - RECURRENT - HYBRID - {NOTHING}:
        raise KvchatError(
            f"{name} has layers of the kind {', '.join(sorted(unknown))}. They keep more than keys and "
            "values, and kvchat can't keep that exact. Take a model with other layers."
        )
    while kinds and kinds[-1] == NOTHING:
        kinds = kinds[:-1]
    return tuple(kinds), tuple(a.get("number_of_states", 1) for a in arguments[: len(kinds)])


def _probed(
    model: PreTrainedModel, kinds: Sequence[str], numbers: Sequence[int], position: int
) -> ConversationKV:
    """A cache that holds one token, read at that position.

    One from the middle of the vocabulary: the first ones may be padding, whose embedding is zero.
    """
    token = model.config.get_text_config(decoder=True).vocab_size // 2
    states = [StateShape(number) for number in numbers]
    layers = [new_layer(k, None, s, "auto", model.dtype) for k, s in zip(kinds, states, strict=True)]
    kv = ConversationKV(layers)
    with kv.append([token]) as past:
        forward_pass(model, [token], [position], past)
    return kv


def _described(
    model: PreTrainedModel, kinds: tuple[str, ...], probe: ConversationKV, moved: ConversationKV
) -> ModelShape:
    config = model.config.get_text_config(decoder=True)
    heads = tuple(_head(layer) for layer in probe.layers)
    by_steps = _continues_by_steps_only(model, probe)
    states = tuple(_state(layer, by_steps=by_steps) for layer in probe.layers)
    pairs = list(zip(probe.stored, moved.stored, strict=True))
    rotations = [_rotation(model, *pair) for pair in pairs]
    positions = _positions(config, pairs[:1], rotations)
    common = _common(rotations) if positions == "rotary" else Rotation()
    limit = _position_limit(config, positions)
    experts = expert_layers(model)
    return ModelShape(
        kinds=kinds,
        heads=heads,
        states=states,
        windows=tuple(_window(config, kind) for kind in kinds),
        position_limit=limit,
        positions=positions,
        rotary=common.layout,
        rotary_frequencies=common.frequencies,
        is_croppable=probe.cache.is_croppable,
        gap_refusal=_gap_refusal(config, kinds, positions, limit),
        experts=experts > 0,
        notes=tuple(_notes(model, kinds, states, experts)),
    )


def _head(layer: object) -> HeadShape | None:
    if not isinstance(layer, StoredLayer) or layer.keys is None or layer.values is None:
        return None
    return HeadShape(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1])


def _continues_by_steps_only(model: PreTrainedModel, probe: ConversationKV) -> bool:
    """Whether reading several tokens at once leaves another state than reading them one by one.

    transformers 5.23 forgets the state before such a chunk in Mamba-1 (Mamba, Jamba, Falcon-Mamba). Seen in
    the first of the layers, where everything before is equal.
    """
    if not probe.states or all(layer.can_rewind for layer in probe.states):
        return False
    at_once, stepped = probe.fork(1), probe.fork(1)
    token = probe.ids[0]
    for kv, chunks in ((at_once, (2,)), (stepped, (1, 1))):
        for size in chunks:
            ids, first = [token] * size, len(kv)
            with kv.append(ids) as past:
                forward_pass(model, ids, range(first, first + size), past)
    expected = stepped.states[0].state().tensors
    found = at_once.states[0].state().tensors
    return not all(_close(found[name], tensor, STATE_TOLERANCE) for name, tensor in expected.items())


def _state(layer: object, *, by_steps: bool) -> StateShape | None:
    """Measured after one token: what is held besides a copy of the state is that token's record."""
    if not isinstance(layer, RecurrentLayer):
        return None
    size = sum(tensor.nbytes for tensor in layer.state().tensors.values())
    recorded = layer.recorded_bytes if layer.can_rewind else 0
    return StateShape(layer.number_of_states, size, recorded, by_steps)


def _only_token(layer: StoredLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value `[1, kv_heads, 1, head_dim]` of a layer that holds one token."""
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys[:, :, :1], layer.values[:, :, :1]


def _positions(
    config: PreTrainedConfig,
    first: Sequence[tuple[StoredLayer, StoredLayer]],
    rotations: Sequence[Rotation],
) -> str:
    """How the model knows the order of its tokens.

    A token on its own has the same key and value at every position, in the first layer with attention, up to
    a rotation of one of them. Both differ where something was added to the token before.
    """
    for here, there in first:
        if not any(_close(*pair) for pair in zip(_only_token(here), _only_token(there), strict=True)):
            return "learned"
    if any(rotation.layout != "none" for rotation in rotations):
        return "rotary"
    return "alibi" if getattr(config, "alibi", False) or config.model_type in ALIBI else "none"


def _rotation(model: PreTrainedModel, here: StoredLayer, there: StoredLayer) -> Rotation:
    """The rotation that makes of a key at position 0 the one at `PROBED_POSITION`.

    A compressed layer may keep what is turned in the place of the values (DeepSeek-V2, arXiv 2405.04434).
    """
    (key, value), (moved, moved_value) = _only_token(here), _only_token(there)
    if _close(key, moved) and key.any():
        return Rotation() if _close(value, moved_value) else Rotation("other")
    delta = torch.tensor([PROBED_POSITION], device=key.device)
    for frequencies in _rotary_frequencies(model):
        for interleaved in (False, True):
            fits = 2 * len(frequencies) <= key.shape[-1]
            if fits and _close(rotated(key, delta, frequencies, interleaved=interleaved), moved):
                return Rotation("interleaved" if interleaved else "half", tuple(frequencies.tolist()))
    return Rotation("other")


def _rotary_frequencies(model: PreTrainedModel) -> list[torch.Tensor]:
    """Every set of frequencies `[pairs]` in the model, in radians per position."""
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    distinct = {tuple(buffer.tolist()): buffer.float() for buffer in buffers}
    return list(distinct.values())


def _common(rotations: Sequence[Rotation]) -> Rotation:
    """The rotation of all layers; of those that turn at all, at least the layout."""
    if len({*rotations}) == 1:
        return rotations[0]
    layouts = {rotation.layout for rotation in rotations} - {"none"}
    return Rotation(layouts.pop() if len(layouts) == 1 else "other")


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((a.float() - b.float()).norm() <= tolerance * b.float().norm())


def _position_limit(config: PreTrainedConfig, positions: str) -> int:
    own: int = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 0
    if positions in ("alibi", "none"):
        return NO_LIMIT
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # past this length it turns every position by another angle, and the keys cached so far are wrong
        own = min(own, rope["original_max_position_embeddings"])
    return own or UNTOLD_LIMIT


def _gap_refusal(config: PreTrainedConfig, kinds: Sequence[str], positions: str, limit: int) -> str:
    if {*kinds} & (HYBRID | RECURRENT - {"conv"}):
        return "a recurrent state can't forget tokens"
    if "conv" in kinds:
        return "a convolution mixes neighbours, and a gap would make others of them"
    if {*kinds} & WINDOWED:
        return "the mask of a sliding window counts the tokens that are stored, not their positions"
    if positions == "learned":
        return f"its positions are learned and end at {limit:,}: what is kept can't move to lower ones"
    if positions == "alibi":
        return "ALiBi takes distances from the number of stored tokens, not from positions"
    if "mrope_section" in str(getattr(config, "rope_parameters", None)):
        return "M-RoPE counts positions along several axes"
    return "" if positions == "rotary" else "nothing in its keys says where a token stood"


def _notes(
    model: PreTrainedModel, kinds: Sequence[str], states: Sequence[StateShape | None], experts: int
) -> Iterator[str]:
    config = model.config.get_text_config(decoder=True)
    if experts:
        yield f"{experts} expert layers: experts hold no KV; the cache belongs to attention"
    recorded = [state.recorded_bytes > 0 for state in states if state]
    if recorded and all(recorded):
        yield f"{len(recorded)} convolution layers: a crop past the last turn end goes back to a turn end"
    elif recorded:
        yield f"{len(recorded)} recurrent layers: a crop goes back to the last turn end"
    if any(state.by_steps for state in states if state):
        yield "recurrent layers that go on one token at a time: after its first chunk a prompt is read slowly"
    for kind, count in Counter(kinds).items():
        if kind in WINDOWED:
            yield _window_note(config, kind, count, len(kinds))
    if shared := config.num_hidden_layers - len(kinds) + list(kinds).count(NOTHING):
        yield f"{shared} of {config.num_hidden_layers} layers store no keys and values of their own"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        yield "attention sinks are in the model"


def _window(config: PreTrainedConfig, kind: str) -> int:
    """Tokens that a layer of this kind sees; 0 where it sees all of them."""
    return getattr(config, WINDOWS.get(kind, ""), 0) or 0


def _window_note(config: PreTrainedConfig, kind: str, count: int, of: int) -> str:
    width = _window(config, kind)
    what = f"chunks of {width:,}" if kind == "chunked_attention" else f"sliding window of {width:,}"
    return f"{what} in {count} of {of} layers: everything is kept, the mask hides what is out of sight"
