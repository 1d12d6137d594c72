"""The map of a conversation's cache, token by token, as a screen draws it.

Combines layers, rows and the saved cache with the messages of the conversation, and changes nothing.
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
from kvchat.contract import CacheBlock, CacheMap, KVPrecision, LayerGroup, TurnRequest
from kvchat.engine.cache_manager import Caches, ResidentCache
from kvchat.engine.disk_tier import DiskTier, SavedCache
from kvchat.engine.model.layout import DTYPES
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.prompt import Rendered
from kvchat.engine.prompt_fitting import PromptFitter
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
class BlockKey:
    """What all tokens of a block have in common."""

    message: int | None
    role: str
    resident: bool
    saved: bool
    precision: str
    sink: bool
    shared: bool
    number: int
    """Blocks end at multiples of `BLOCK_TOKENS`."""


def cache_map(
    request: TurnRequest, caches: Caches, prompts: PromptFitter, loaded: LoadedModel, disk: DiskTier | None
) -> CacheMap:
    """The cache of the request's conversation, in memory and on disk.

    Raises:
        KvchatError: the conversation can't be rendered.
    """
    conversation = request.conversation
    cache, saved = caches.get(conversation), _saved(request, disk)
    kv = cache.kv if cache else caches.empty(request.kv).kv
    ids = saved.chain.ids if saved and (not kv or (cache and cache.prefix_only)) else kv.ids
    _, rendered = prompts.render(request, request.evicted_messages)
    tokens = _TokenTable(request, rendered, ids, cache, saved, _sharers(conversation, kv, caches))
    return CacheMap(
        conversation,
        tuple(_blocks(tokens, loaded)),
        tuple(_layers(kv, loaded)),
        kv.storage_bytes,
        (disk.sizes() if disk else {}).get(conversation, 0),
        tuple(sorted(tokens.sharers)),
        "" if ids else caches.drop_reasons.get(conversation, ""),
    )


class _TokenTable:
    """For every token its message, and where its keys and values are."""

    def __init__(
        self,
        request: TurnRequest,
        rendered: Rendered,
        ids: Sequence[int],
        cache: ResidentCache | None,
        saved: SavedCache | None,
        sharers: dict[str, int],
    ) -> None:
        self.ids = ids
        self.cache = cache
        self.sharers = sharers
        self._request = request
        self._ends = rendered.ends
        self._known = common_prefix(ids, rendered.ids)
        """Leading tokens that are still part of the conversation."""
        rows = cache.kv.rows if cache else ()
        self.rows = {token: row for row, token in enumerate(rows)}
        on_disk = common_prefix(saved.chain.ids, ids) if saved else 0
        self._saved = {t for t in saved.chain.rows if t < on_disk} if saved else set[int]()
        self._saved_as = saved.fingerprint.get("kv", "") if saved else ""
        self._shared = max(sharers.values(), default=0)
        edges = cache.kv.edges if cache else ()
        self.exact_from = edges[-2] if len(edges) > 1 else 0
        """The first unquantised row."""

    def key(self, token: int, exact: str) -> BlockKey:
        """The block key of a token; `exact` is the precision of unquantised rows."""
        message, role = self._message(token)
        row = self.rows.get(token)
        precision = self._saved_as if token in self._saved else ""
        if row is not None and self.cache:
            precision = self.cache.precision.value if row < self.exact_from else exact
        return BlockKey(
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


def _blocks(tokens: _TokenTable, loaded: LoadedModel) -> Iterator[CacheBlock]:
    cache = tokens.cache
    quantised = cache is not None and cache.precision in (KVPrecision.INT8, KVPrecision.INT4)
    exact = loaded.facts.kv_dtype if quantised or cache is None else cache.precision.value
    sizes = _row_bytes(tokens, loaded, exact)
    for key, group in groupby(range(len(tokens.ids)), lambda token: tokens.key(token, exact)):
        run = list(group)
        rows = [tokens.rows[token] for token in run if token in tokens.rows]
        yield CacheBlock(
            run[0],
            len(run),
            key.message,
            key.role,
            str(loaded.tokenizer.decode([tokens.ids[t] for t in run], skip_special_tokens=False)),
            key.resident,
            key.saved,
            key.precision,
            round(sum(sizes[row >= tokens.exact_from] for row in rows)),
            key.sink,
            key.shared,
        )


def _row_bytes(tokens: _TokenTable, loaded: LoadedModel, exact: str) -> tuple[float, float]:
    """Bytes of one row in all layers: (quantised, exact)."""
    kv = tokens.cache.kv if tokens.cache else None
    if not kv:
        return 0.0, 0.0
    if not tokens.exact_from:
        return 0.0, kv.used_bytes / len(kv)
    size = loaded.shape.kv_bytes_per_token(DTYPES[exact])
    rest = kv.used_bytes - size * (len(kv) - tokens.exact_from)
    return rest / tokens.exact_from, float(size)


def _layers(kv: ConversationKV, loaded: LoadedModel) -> Iterator[LayerGroup]:
    """Groups of layers of the same kind, in the order in which the kinds first appear."""
    shape = loaded.shape
    sizes: dict[tuple[str, int], list[int]] = {}
    for kind, window, layer in zip(shape.kinds, shape.windows, kv.layers, strict=True):
        if kind not in KINDS:
            continue  # stores nothing
        memory: dict[int, int] = layer.storages() if isinstance(layer, StoredLayer) else {}
        if isinstance(layer, StateLayer):
            memory = memory | layer.state_storages()
        sizes.setdefault((KINDS[kind], window), []).append(sum(memory.values()))
    for (name, window), layer_bytes in sizes.items():
        yield LayerGroup(name, len(layer_bytes), window, sum(layer_bytes))


def _sharers(conversation: str, kv: ConversationKV, caches: Caches) -> dict[str, int]:
    """Other conversation → tokens of this one in memory that both use."""
    own = kv.storages().keys()
    others = ((name, other.kv) for name, other in caches.others(conversation))
    return {name: common_prefix(kv.ids, other.ids) for name, other in others if own & other.storages().keys()}


def _saved(request: TurnRequest, disk: DiskTier | None) -> SavedCache | None:
    """The saved cache; None also where it is damaged, which the next turn reports."""
    if disk is None or not request.persist:
        return None
    with suppress(SnapshotRefused):
        return disk.find(request.conversation)
    return None
