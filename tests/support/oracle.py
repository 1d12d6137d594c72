"""What a cache with gaps means, said by plain transformers; and what engines with little memory are made of.

A token that was read after an eviction doesn't see what was evicted; one that was read before does, for ever.
So the exact meaning of a conversation with gaps is one pass over all of its tokens, the evicted ones
included, at their true positions, with a mask that hides from each token what was gone when it was read.

`Journal` notes that while an engine works. The only thing it takes from the cache is which tokens are stored.
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
"""Bytes on disk that no test reaches."""


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model computes attention as transformers writes it down, step by step."""
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
    """Logits `[len(ids), vocabulary]` of one pass in which token `i` sees neither later ones nor `hidden[i]`.

    `positions` are those of the tokens; none says that they count from 0.
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
    """Where each of them was read."""
    hidden: dict[int, frozenset[int]] = field(default_factory=dict)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    """Token → what the model answered after it, `[vocabulary]`; those only after which it was asked."""

    @contextmanager
    def of(self, chat: Chat) -> Iterator[None]:
        """Notes every forward pass inside the block; nothing but that conversation may be read in it."""
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
        """The conversation went back to `length` tokens."""
        del self.ids[length:], self.positions[length:]
        self.hidden = {i: gone for i, gone in self.hidden.items() if i < length}
        self.logits = {i: logits for i, logits in self.logits.items() if i < length}

    def copy(self) -> "Journal":
        """For a fork."""
        return Journal(list(self.ids), list(self.positions), dict(self.hidden), dict(self.logits))

    def assert_agrees(self, model: PreTrainedModel) -> None:
        """Everything the model answered while the conversation came to be is what the oracle answers."""
        assert self.logits
        assert self.positions == list(range(len(self.ids)))
        oracle = masked_logits(model, self.ids, self.hidden)
        asked = sorted(self.logits)
        found = torch.stack([self.logits[i] for i in asked])
        torch.testing.assert_close(found, oracle[asked], atol=TOLERANCE, rtol=0)

    def effect(self, model: PreTrainedModel) -> float:
        """The largest difference that hiding makes: near 0, the comparison above would prove nothing."""
        oracle = masked_logits(model, self.ids, self.hidden)
        return float((oracle - uncached_logits(model, self.ids)).abs().max())


def assert_equals_cold_without(played: Played, loaded: LoadedModel, evicted_messages: int) -> None:
    """What the turn chose from is what a cold run answers without the oldest `evicted_messages` messages.

    Where turns were dropped in the middle of the answer, that holds for the tokens after the last drop.
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
    """Generated tokens that were chosen after the last `Evicted` event; the end-of-turn id counts."""
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
    """What the report after a turn says happened, of one kind."""
    return [event for event in played.finished.pool.events if event.kind is kind]


def tier(folder: Path) -> DiskTier:
    """Caches on disk in `folder`."""
    return DiskTier(DiskStore(folder, ROOMY))


def with_context(loaded: LoadedModel, limit: int) -> LoadedModel:
    """The same model with a smaller context."""
    return replace(loaded, facts=replace(loaded.facts, context_limit=limit))


def with_positions(loaded: LoadedModel, limit: int) -> LoadedModel:
    """The same model, as if it had been made for so many positions."""
    return replace(loaded, shape=replace(loaded.shape, position_limit=limit))


def storage_bytes(engine: LocalEngine) -> int:
    """Bytes of every distinct piece of memory in the caches, found by walking through their tensors."""
    held = (torch_storages(kept.kv.layers) for _, kept in engine.caches.others(""))
    return sum({address: size for found in held for address, size in found.items()}.values())


UNCOUNTED = ("_sharers", "_starts")
"""Not memory that a layer holds; and a few bytes that tell compiled code where its blocks start."""


def torch_storages(holder: object, seen: set[int] | None = None) -> dict[int, int]:
    """Address → bytes of the storage of every tensor that is reachable from an object's attributes."""
    seen = set() if seen is None else seen
    if id(holder) in seen:
        return {}
    seen.add(id(holder))
    if isinstance(holder, torch.Tensor):
        storage = holder.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()} if storage.nbytes() else {}
    if isinstance(holder, Mapping):
        inside: Sequence[object] = list(holder.values())
    elif isinstance(holder, list | tuple):
        inside = holder
    elif type(holder).__module__.startswith("kvchat.cache"):
        inside = [value for name, value in vars(holder).items() if name not in UNCOUNTED]
    else:
        inside = ()
    found: dict[int, int] = {}
    for each in inside:
        found |= torch_storages(each, seen)
    return found


@dataclass
class Guard:
    """Watches an engine's memory: no event may show more than the budget, or other bytes than reported."""

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
    """A conversation with a policy of its own."""
    chat = Chat(engine, loaded, name, system=system, policy=policy)
    chat.sampling = replace(chat.sampling, max_tokens=max_tokens)
    chat.precision = kv
    return chat
