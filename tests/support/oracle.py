"""The reference for caches with gaps, computed by plain transformers; helpers for engines with little memory.

A token read after an eviction doesn't attend to the evicted tokens; one that was read before did. So the
reference for a conversation with gaps is one pass over all of its tokens, the evicted ones included, at their
original positions, with a mask that hides from each token those that were evicted when it was read.

`Journal` records that mask while an engine works. It only reads from the cache which tokens are stored.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvchat.cache.disk.disk_store import DiskStore
from kvchat.cache.kv_cache import ConversationKV
from kvchat.contract import CacheEvent, CacheEventKind, Evicted, EvictionPolicy, KVPrecision, TurnEvent
from kvchat.engine.disk_tier import DiskTier
from kvchat.engine.engine import LocalEngine
from kvchat.engine.eviction import without_oldest
from kvchat.engine.model.loader import LoadedModel
from tests.support.engine_driver import TOLERANCE, Chat, Played, rendered, uncached_logits

ROOMY = 10**9
"""A disk cap that no test reaches."""


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model uses transformers' eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def masked_logits(
    model: PreTrainedModel,
    ids: Sequence[int],
    hidden: Mapping[int, frozenset[int]],
    positions: Sequence[int] | None = None,
) -> torch.Tensor:
    """Logits `[len(ids), vocabulary]` of one pass; token `i` attends neither to later ones nor `hidden[i]`.

    `positions` default to 0, 1, 2, …
    """
    mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min).triu(1)
    for token in range(len(ids)):
        mask[token, list(hidden.get(token, ()))] = torch.finfo(torch.float32).min
    where = torch.tensor([list(positions or range(len(ids)))])
    with plain_attention(model):
        output = model(
            input_ids=torch.tensor([list(ids)]),
            attention_mask=mask[None, None],
            position_ids=where,
            use_cache=False,
        )
    logits: torch.Tensor = output.logits[0]
    return logits.float()


@dataclass
class Journal:
    """For every token of one conversation, what was hidden from it when it was read."""

    ids: list[int] = field(default_factory=list)
    """Every token that was read, in order."""
    positions: list[int] = field(default_factory=list)
    """The position of each."""
    hidden: dict[int, frozenset[int]] = field(default_factory=dict)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    """Token → the logits after it, `[vocabulary]`, where they were computed."""

    @contextmanager
    def of(self, chat: Chat) -> Iterator[None]:
        """Records every forward pass inside the block; only that conversation may be read in it."""
        model = chat.loaded.model
        hooks = (
            model.register_forward_pre_hook(
                lambda _, __, given: self._enter(chat.kv, given), with_kwargs=True
            ),
            model.register_forward_hook(lambda _, __, output: self._leave(output)),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, kv: ConversationKV, given: Mapping[str, Any]) -> None:
        start = len(kv.ids)
        self._cut(start)
        self.ids += given["input_ids"][0].tolist()
        self.positions += given["position_ids"][0].tolist()
        gone = frozenset(range(start)) - frozenset(kv.rows)
        self.hidden |= dict.fromkeys(range(start, len(self.ids)), gone)

    def _leave(self, output: CausalLMOutputWithPast) -> None:
        assert output.logits is not None
        self.logits[len(self.ids) - 1] = output.logits[0, -1].float().clone()

    def _cut(self, length: int) -> None:
        """Removes what was recorded after `length` tokens."""
        del self.ids[length:], self.positions[length:]
        self.hidden = {i: gone for i, gone in self.hidden.items() if i < length}
        self.logits = {i: logits for i, logits in self.logits.items() if i < length}

    def copy(self) -> "Journal":
        """For a fork."""
        return Journal(list(self.ids), list(self.positions), dict(self.hidden), dict(self.logits))

    def assert_agrees(self, model: PreTrainedModel) -> None:
        """All recorded logits equal the reference."""
        assert self.logits
        assert self.positions == list(range(len(self.ids)))
        expected = masked_logits(model, self.ids, self.hidden)
        tokens = sorted(self.logits)
        found = torch.stack([self.logits[i] for i in tokens])
        torch.testing.assert_close(found, expected[tokens], atol=TOLERANCE, rtol=0)

    def effect(self, model: PreTrainedModel) -> float:
        """The largest difference that the mask makes: near 0, `assert_agrees` would prove nothing."""
        expected = masked_logits(model, self.ids, self.hidden)
        return float((expected - uncached_logits(model, self.ids)).abs().max())


def assert_equals_cold_without(played: Played, loaded: LoadedModel, evicted_messages: int) -> None:
    """The turn's logits equal those of a run without a cache and without the oldest `evicted_messages`.

    Where turns were evicted during the answer, compares the tokens after the last eviction.
    """
    prompt = rendered(loaded, without_oldest(played.request.messages, evicted_messages), played.request.today)
    whole = uncached_logits(loaded.model, [*prompt, *played.tokens])[len(prompt) - 1 :]
    after = tokens_after_last_eviction(played)
    found = torch.stack(played.logits[-after:]) if after else torch.empty(0)
    generated = played.finished.stats.generated_tokens
    torch.testing.assert_close(found, whole[generated - after : generated], atol=TOLERANCE, rtol=0)
    assert (
        whole.argmax(dim=-1).tolist()[generated - after : len(played.tokens)]
        == (played.tokens[generated - after :])
    )


def tokens_after_last_eviction(played: Played) -> int:
    """Generated tokens after the last `Evicted` event; the end-of-turn id counts."""
    chosen = played.finished.stats.generated_tokens
    before = 0
    for index, event in enumerate(played.events):
        if isinstance(event, Evicted):
            before = sum(len(getattr(e, "token_ids", ())) for e in played.events[:index])
    return chosen - before


def evictions(played: Played) -> list[Evicted]:
    """The `Evicted` events of a turn."""
    return [event for event in played.events if isinstance(event, Evicted)]


def timeline(played: Played, kind: CacheEventKind) -> list[CacheEvent]:
    """The cache events of one kind that were reported with a turn."""
    return [event for event in played.finished.pool.events if event.kind is kind]


def tier(folder: Path) -> DiskTier:
    """Caches on disk in `folder`."""
    return DiskTier(DiskStore(folder, ROOMY))


def with_context(loaded: LoadedModel, limit: int) -> LoadedModel:
    """The same model with a smaller context."""
    return replace(loaded, facts=replace(loaded.facts, context_limit=limit))


def with_positions(loaded: LoadedModel, limit: int) -> LoadedModel:
    """The same model with another position limit."""
    return replace(loaded, shape=replace(loaded.shape, position_limit=limit))


def storage_bytes(engine: LocalEngine) -> int:
    """Bytes of every distinct piece of memory in the caches, found by walking through their tensors."""
    layers = (torch_storages(cache.kv.layers) for _, cache in engine.caches.others(""))
    return sum({address: size for found in layers for address, size in found.items()}.values())


UNCOUNTED = ("_sharers", "_starts")
"""Attributes that are not counted: other layers, and a few bytes of block starts for compiled code."""


def torch_storages(value: object, seen: set[int] | None = None) -> dict[int, int]:
    """Address → bytes of the storage of every tensor that is reachable from an object's attributes."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return {}
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()} if storage.nbytes() else {}
    if isinstance(value, Mapping):
        inside: Sequence[object] = list(value.values())
    elif isinstance(value, list | tuple):
        inside = value
    elif type(value).__module__.startswith("kvchat.cache"):
        inside = [each for name, each in vars(value).items() if name not in UNCOUNTED]
    else:
        inside = ()
    found: dict[int, int] = {}
    for each in inside:
        found |= torch_storages(each, seen)
    return found


@dataclass
class Guard:
    """Checks at every event that an engine's memory is within the budget and reported correctly."""

    engine: LocalEngine
    highest: int = 0

    def __call__(self, _event: TurnEvent | None = None) -> None:
        used = storage_bytes(self.engine)
        assert used == self.engine.caches.used_bytes
        assert used <= self.engine.caches.budget_bytes
        self.highest = max(self.highest, used)


def chat_with(
    engine: LocalEngine,
    loaded: LoadedModel,
    policy: EvictionPolicy,
    name: str = "chat",
    *,
    system: str = "",
    max_tokens: int = 12,
    kv: KVPrecision = KVPrecision.AUTO,
) -> Chat:
    """A conversation with the given policy."""
    chat = Chat(engine, loaded, name, system=system, policy=policy)
    chat.sampling = replace(chat.sampling, max_tokens=max_tokens)
    chat.precision = kv
    return chat
