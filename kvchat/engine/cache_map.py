"""What a conversation's cache holds, token by token: the map that a screen draws.

It looks at layers, rows and what lies on disk, and puts the messages of the conversation over them. It
changes nothing.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

from kvchat.cache.disk.segment import SnapshotRefused
from kvchat.cache.eviction import SINKS
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import StoredLayer
from kvchat.cache.prefix import common_prefix
from kvchat.cache.state_layer import StateLayer
from kvchat.contract import CacheBlock, CacheMap, Inspect, KVPrecision, LayerGroup, TurnRequest
from kvchat.engine.cache_manager import Caches, ResidentCache
from kvchat.engine.disk_tier import DiskTier, SavedCache
from kvchat.engine.model.layout import DTYPES
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.planner import Planner
from kvchat.engine.prompt import Rendered
from kvchat.engine.token_spans import message_of

BLOCK_TOKENS = 16
"""Most tokens of one block of the map."""
TEMPLATE = "template"
KINDS = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "recurrent",
    "conv": "convolution",
    "hybrid": "hybrid",
    "hybrid_sliding": "hybrid",
}


@dataclass(frozen=True, slots=True)
class Alike:
    """What all tokens of a block have in common."""

    message: int | None
    role: str
    held: bool
    saved: bool
    precision: str
    sink: bool
    shared: bool
    piece: int
    """Blocks end at multiples of `BLOCK_TOKENS`."""


def cache_map(
    asked: Inspect, caches: Caches, planner: Planner, loaded: LoadedModel, disk: DiskTier | None
) -> CacheMap:
    """The cache of the request's conversation, in memory and on disk.

    Raises:
        KvchatError: the conversation can't be rendered.
    """
    request = asked.request
    conversation = request.conversation
    kept, saved = caches.get(conversation), _saved(request, disk)
    kv = kept.kv if kept else caches.empty(request.kv).kv
    ids = saved.chain.ids if saved and (not kv or (kept and kept.prefix_only)) else kv.ids
    _, rendered = planner.rendered(request, request.evicted_messages)
    tokens = _Tokens(request, rendered, ids, kept, saved, _sharers(conversation, kv, caches))
    return CacheMap(
        conversation,
        tuple(_blocks(tokens, loaded)),
        tuple(_layers(kv, loaded)),
        kv.storage_bytes,
        (disk.sizes() if disk else {}).get(conversation, 0),
        tuple(sorted(tokens.sharers)),
        "" if ids else caches.drop_reasons.get(conversation, ""),
    )


class _Tokens:
    """Answers for every token whose it is and where its keys and values are."""

    def __init__(
        self,
        request: TurnRequest,
        rendered: Rendered,
        ids: Sequence[int],
        kept: ResidentCache | None,
        saved: SavedCache | None,
        sharers: dict[str, int],
    ) -> None:
        self.ids = ids
        self.kept = kept
        self.sharers = sharers
        self._request = request
        self._ends = rendered.ends
        self._known = common_prefix(ids, rendered.ids)
        """Tokens that are still part of the conversation."""
        rows = kept.kv.rows if kept else ()
        self.rows = {token: row for row, token in enumerate(rows)}
        on_disk = common_prefix(saved.chain.ids, ids) if saved else 0
        self._saved = {t for t in saved.chain.rows if t < on_disk} if saved else set[int]()
        self._saved_as = saved.fingerprint.get("kv", "") if saved else ""
        self._shared = max(sharers.values(), default=0)
        edges = kept.kv.edges if kept else ()
        self.exact_from = edges[-2] if len(edges) > 1 else 0
        """Row from which on nothing is quantised."""

    def alike(self, token: int, exact: str) -> Alike:
        """What there is to say about a token; `exact` is the precision of what is not quantised."""
        message, role = self._message(token)
        row = self.rows.get(token)
        precision = self._saved_as if token in self._saved else ""
        if row is not None and self.kept:
            precision = self.kept.precision.value if row < self.exact_from else exact
        return Alike(
            message,
            role,
            row is not None,
            token in self._saved,
            precision,
            token < SINKS,
            row is not None and token < self._shared,
            token // BLOCK_TOKENS,
        )

    def _message(self, token: int) -> tuple[int | None, str]:
        if token >= self._known:
            return None, ""
        place = bisect_right(self._ends, token)
        message = message_of(place, self._request, self._request.evicted_messages)
        if place == len(self._ends):
            return message, TEMPLATE
        return message, self._request.messages[message].role


def _blocks(tokens: _Tokens, loaded: LoadedModel) -> Iterator[CacheBlock]:
    kept = tokens.kept
    quantised = kept is not None and kept.precision in (KVPrecision.INT8, KVPrecision.INT4)
    exact = loaded.facts.kv_dtype if quantised or kept is None else kept.precision.value
    sizes = _row_bytes(tokens, loaded, exact)
    for alike, group in groupby(range(len(tokens.ids)), lambda token: tokens.alike(token, exact)):
        run = list(group)
        rows = [tokens.rows[token] for token in run if token in tokens.rows]
        yield CacheBlock(
            run[0],
            len(run),
            alike.message,
            alike.role,
            str(loaded.tokenizer.decode([tokens.ids[t] for t in run], skip_special_tokens=False)),
            alike.held,
            alike.saved,
            alike.precision,
            round(sum(sizes[row >= tokens.exact_from] for row in rows)),
            alike.sink,
            alike.shared,
        )


def _row_bytes(tokens: _Tokens, loaded: LoadedModel, exact: str) -> tuple[float, float]:
    """Bytes of one row in all layers: (quantised, exact)."""
    kv = tokens.kept.kv if tokens.kept else None
    if not kv:
        return 0.0, 0.0
    if not tokens.exact_from:
        return 0.0, kv.used_bytes / len(kv)
    size = loaded.shape.kv_bytes_per_token(DTYPES[exact])
    rest = kv.used_bytes - size * (len(kv) - tokens.exact_from)
    return rest / tokens.exact_from, float(size)


def _layers(kv: ConversationKV, loaded: LoadedModel) -> Iterator[LayerGroup]:
    """Groups of layers of a kind, in the order in which the kinds appear."""
    shape = loaded.shape
    sizes: dict[tuple[str, int], list[int]] = {}
    for kind, window, layer in zip(shape.kinds, shape.windows, kv.layers, strict=True):
        if kind not in KINDS:
            continue  # keeps nothing
        held: dict[int, int] = layer.storages() if isinstance(layer, StoredLayer) else {}
        if isinstance(layer, StateLayer):
            held = held | layer.state_storages()
        sizes.setdefault((KINDS[kind], window), []).append(sum(held.values()))
    for (name, window), held_bytes in sizes.items():
        yield LayerGroup(name, len(held_bytes), window, sum(held_bytes))


def _sharers(conversation: str, kv: ConversationKV, caches: Caches) -> dict[str, int]:
    """Conversation → tokens of ours that lie in memory which it uses too."""
    mine = kv.storages().keys()
    others = ((name, other.kv) for name, other in caches.others(conversation))
    return {
        name: common_prefix(kv.ids, other.ids) for name, other in others if mine & other.storages().keys()
    }


def _saved(request: TurnRequest, disk: DiskTier | None) -> SavedCache | None:
    """What lies on disk; what is damaged counts as nothing: the next turn says why it was refused."""
    if disk is None or not request.persist:
        return None
    with suppress(SnapshotRefused):
        return disk.find(request.conversation)
    return None
