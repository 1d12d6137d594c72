"""Measures the layout of a model's cache.

Layer types come from the config, as transformers reads it. Everything else is measured with two forward
passes over one token, at two positions: heads, states, and how positions enter the keys. Must not assume
what was not measured.
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
"""Models that always use ALiBi; others say so in their config."""
DEFAULT_LIMIT = 2048
"""Position limit of a model whose config has none."""
PROBED_POSITION = 37
"""Far enough from 0 that every rotation layout gives a different key, and within any model's context."""
TOLERANCE = 0.02
"""Relative error allowed for a rotated key: several times the rounding in bf16."""
STATE_TOLERANCE = 0.01
"""Relative error allowed for a state: four times that of two exact ways in bf16; a lost state is 0.04 off."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotary position embedding of one layer, or of all."""

    layout: str = "none"
    """`half`: the first half of the rotated numbers pairs with the second, as in Llama; `interleaved`:
    neighbours do; `other`: an unknown rotation; `none`: not rotated."""
    frequencies: tuple[float, ...] = ()
    """Radians per position of each pair; twice as many numbers of a head are rotated, from its first on."""


def measure(model: PreTrainedModel, name: str) -> ModelShape:
    """Measures a model's shape by reading one token at two positions.

    Raises:
        KvchatError: a layer stores what kvchat does not support, or the model fails.
    """
    kinds, numbers = _layer_kinds(model.config.get_text_config(decoder=True), name)
    try:
        probe = _probed(model, kinds, numbers, 0)
        moved = _probed(model, kinds, numbers, PROBED_POSITION) if probe.stored else probe
    except Exception as error:  # an unknown model may raise anything
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
    """(type, number of states) of each layer, without trailing layers that store nothing."""
    kinds, arguments = get_layer_types_and_kwargs(config)
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    if shared:  # the last layers use keys and values of layers before them
        kinds = [*kinds[: len(kinds) - shared], *[NOTHING] * shared]
    if unknown := {*kinds} - ATTENTION - RECURRENT - HYBRID - {NOTHING}:
        raise KvchatError(
            f"{name} has layers of the kind {', '.join(sorted(unknown))}. They store more than keys and "
            "values, which kvchat does not support. Take a model with other layers."
        )
    while kinds and kinds[-1] == NOTHING:
        kinds = kinds[:-1]
    return tuple(kinds), tuple(a.get("number_of_states", 1) for a in arguments[: len(kinds)])


def _probed(
    model: PreTrainedModel, kinds: Sequence[str], numbers: Sequence[int], position: int
) -> ConversationKV:
    """A cache with one token, read at that position.

    The token is from the middle of the vocabulary: the first ones may be padding with a zero embedding.
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
    """Whether reading several tokens at once gives another state than reading them one by one.

    transformers 5.23 loses the state before such a chunk in Mamba-1 (Mamba, Jamba, Falcon-Mamba). Compares
    the first layer with a state, whose inputs are equal.
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
    """The state shape, measured after one token, whose recorded inputs are the rest of the memory."""
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
    """How the model encodes positions: `learned`, `rotary`, `alibi` or `none`.

    In the first layer with attention a single token has the same value (or key) at every position, unless
    position embeddings were added to its input. A rotation changes only one of them.
    """
    for here, there in first:
        if not any(_close(*pair) for pair in zip(_only_token(here), _only_token(there), strict=True)):
            return "learned"
    if any(rotation.layout != "none" for rotation in rotations):
        return "rotary"
    return "alibi" if getattr(config, "alibi", False) or config.model_type in ALIBI else "none"


def _rotation(model: PreTrainedModel, here: StoredLayer, there: StoredLayer) -> Rotation:
    """The rotation from a key at position 0 to the one at `PROBED_POSITION`.

    A layer with latent attention may store the rotated part as values (DeepSeek-V2, arXiv 2405.04434).
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
    """The rotation of all layers; where they differ, at least the layout they share."""
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
        # beyond this length all positions are rotated by other angles, and cached keys become wrong
        own = min(own, rope["original_max_position_embeddings"])
    return own or DEFAULT_LIMIT


def _gap_refusal(config: PreTrainedConfig, kinds: Sequence[str], positions: str, limit: int) -> str:
    if {*kinds} & (HYBRID | RECURRENT - {"conv"}):
        return "a recurrent state can't forget tokens"
    if "conv" in kinds:
        return "a convolution mixes neighbouring tokens, and a gap would change which are neighbours"
    if {*kinds} & WINDOWED:
        return "the mask of a sliding window counts the tokens that are stored, not their positions"
    if positions == "learned":
        return f"its positions are learned and end at {limit:,}: cached keys can't move to lower ones"
    if positions == "alibi":
        return "ALiBi computes distances from the number of stored tokens, not from positions"
    if "mrope_section" in str(getattr(config, "rope_parameters", None)):
        return "M-RoPE counts positions along several axes"
    return "" if positions == "rotary" else "its keys don't encode positions"


def _notes(
    model: PreTrainedModel, kinds: Sequence[str], states: Sequence[StateShape | None], experts: int
) -> Iterator[str]:
    config = model.config.get_text_config(decoder=True)
    if experts:
        yield f"{experts} expert layers: experts store no keys and values; only attention does"
    recorded = [state.recorded_bytes > 0 for state in states if state]
    if recorded and all(recorded):
        yield f"{len(recorded)} convolution layers: a crop into an earlier turn returns to a turn end"
    elif recorded:
        yield f"{len(recorded)} recurrent layers: a crop returns to the last turn end"
    if any(state.by_steps for state in states if state):
        yield "recurrent layers that read one token at a time: after its first chunk a prompt is read slowly"
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
    return f"{what} in {count} of {of} layers: all tokens are stored, the mask hides those outside"
