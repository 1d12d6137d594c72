"""All caches stay within a budget; the eviction order is predicted, and restored caches are exact."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from kvchat.cache.layer import GROWTH_STEP
from kvchat.contract import (
    CacheEventKind,
    EvictionPolicy,
    Fork,
    KVPrecision,
    Pin,
    PoolState,
    Report,
    SetBudget,
    Spill,
    Warm,
)
from kvchat.engine.disk_tier import DiskTier
from kvchat.engine.engine import UNBOUNDED, LocalEngine
from kvchat.engine.model.loader import LoadedModel
from tests.support.engine_driver import Chat, Played, assert_equals_cold, rendered, sentences
from tests.support.oracle import (
    Guard,
    assert_equals_cold_without,
    chat_with,
    evictions,
    storage_bytes,
    tier,
    timeline,
    torch_storages,
)

SYSTEM = "You are a guide to the old towns of the north, the rivers and the sea; answer in a few words."
NONE, TURNS, _, _ = EvictionPolicy
KINDS = (CacheEventKind.SPILL, CacheEventKind.DROP, CacheEventKind.CONVERT)


def budget_for(loaded: LoadedModel, conversations: float, tokens: int = GROWTH_STEP) -> int:
    """Bytes of so many caches of so many tokens."""
    return int(loaded.new_kv("fp32").bytes_at(tokens) * conversations)


def going(played: Played) -> list[tuple[str, str]]:
    """(conversation, what happened to it) of all that made room in a turn, in order."""
    return [(e.conversation, e.kind.value) for e in played.finished.pool.events if e.kind in KINDS]


class Workload:
    """An engine, its conversations by name, and a watch over its memory."""

    def __init__(
        self,
        loaded: LoadedModel,
        budget: int,
        disk: DiskTier | None = None,
        *,
        system: str = "",
        kv: KVPrecision = KVPrecision.AUTO,
        policy: EvictionPolicy = TURNS,
    ) -> None:
        self.loaded, self.system, self.kv, self.policy = loaded, system, kv, policy
        self.reports: list[Report] = []
        self.engine = LocalEngine(loaded, budget_bytes=budget, disk=disk, report=self.reports.append)
        self.guard = Guard(self.engine)
        self.chats: dict[str, Chat] = {}

    def chat(self, name: str) -> Chat:
        if name not in self.chats:
            self.chats[name] = chat_with(
                self.engine, self.loaded, self.policy, name, system=self.system, max_tokens=4, kv=self.kv
            )
        return self.chats[name]

    def ask(self, name: str, text: str = "") -> Played:
        """A guarded turn of one conversation; each starts with other text, so that no prefix is shared."""
        played = self.chat(name).ask(text or f"{name * 9}: which pass is open?", self.guard)
        self.guard()
        return played

    @property
    def pool(self) -> PoolState:
        return self.engine.pool()

    @property
    def hot(self) -> dict[str, int]:
        """Conversation → tokens in memory."""
        return {cache.conversation: cache.tokens for cache in self.pool.caches if cache.hot}


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("kv", [KVPrecision.AUTO, KVPrecision.FP32, KVPrecision.INT8])
def test_memory_in_use_never_exceeds_the_budget(
    tiny: LoadedModel, tmp_path: Path, kv: KVPrecision, on_disk: bool
) -> None:
    """Conversations grow over several steps, leave forks, are spilled and come back."""
    budget = budget_for(tiny, 3.3)
    workload = Workload(tiny, budget, tier(tmp_path) if on_disk else None, kv=kv, system=SYSTEM)
    order = Random(1)
    for number in range(24):
        name = order.choice("abcd")
        workload.ask(name, f"{name}{number}: {sentences(order.choice([1, 5, 9]))}")
        if number % 6 == 5:
            workload.engine.command(Fork(name, f"fork-{number}"))
            workload.guard()
    assert workload.guard.highest > 0.6 * budget
    workload.engine.close()


def test_the_least_recently_used_conversation_is_spilled(tiny: LoadedModel, tmp_path: Path) -> None:
    """A budget for two: the third one evicts the least recently used."""
    workload = Workload(tiny, budget_for(tiny, 2.5), tier(tmp_path))
    order, used = Random(2), list[str]()
    for _ in range(20):
        name = order.choice("abcd")
        leaves = [] if name in used[-2:] or len(used) < 2 else [(used[-2], "spill")]
        played = workload.ask(name)
        assert going(played) == leaves
        used = [*(each for each in used if each != name), name]
        assert set(workload.hot) == set(used[-2:])
        assert [c.conversation for c in workload.pool.caches if c.next_evicted] == used[-2:-1]
    workload.engine.close()


def test_a_pinned_conversation_is_evicted_after_the_others(tiny: LoadedModel, tmp_path: Path) -> None:
    workload = Workload(tiny, budget_for(tiny, 2.5), tier(tmp_path))
    workload.ask("a")
    workload.engine.command(Pin("a", True))
    workload.ask("b")
    assert going(workload.ask("c")) == [("b", "spill")]
    assert going(workload.ask("d")) == [("c", "spill")]
    workload.engine.command(Pin("a", False))
    assert going(workload.ask("e")) == [("a", "spill")]
    workload.engine.close()


def test_the_active_conversation_is_never_evicted(tiny: LoadedModel, tmp_path: Path) -> None:
    workload = Workload(tiny, budget_for(tiny, 2.5), tier(tmp_path))
    workload.ask("b")
    for number in range(8):
        played = workload.ask("a", f"{number}: {sentences(5)}")
        assert "a" not in dict(going(played))
        assert (played.started.miss is None) or evictions(played)
    assert set(workload.hot) == {"a"}
    workload.engine.close()


def test_a_spilled_conversation_leaves_its_system_prefix_for_sharing(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    """System prefixes are evicted last, after every whole conversation, pinned ones included."""
    workload = Workload(tiny, budget_for(tiny, 3.6), tier(tmp_path), system=SYSTEM)
    workload.ask("a", sentences(40))
    assert workload.hot["a"] > GROWTH_STEP
    workload.engine.command(Spill("a"))
    prefix = workload.hot["a"]
    first = workload.chat("a").messages[0]
    assert prefix == workload.engine.caches.get("a").system_end  # type: ignore[union-attr]
    assert (
        workload.chat("a").kv.ids == tuple(rendered(tiny, [first, *workload.chat("b").messages[1:]]))[:prefix]
    )
    played = workload.ask("b")
    assert (played.started.reused_tokens, played.started.miss) == (prefix, None)
    assert [e.note for e in timeline(played, CacheEventKind.SHARE)] == ["from a"]
    assert_equals_cold(played, tiny)
    workload.engine.close()


def test_system_prefixes_are_evicted_after_whole_conversations(tiny: LoadedModel, tmp_path: Path) -> None:
    workload = Workload(tiny, UNBOUNDED, tier(tmp_path), system=SYSTEM)
    workload.ask("a", sentences(40))
    workload.engine.command(Spill("a"))
    workload.system = f"{SYSTEM} Be kind."
    for name in "bc":
        workload.ask(name)
        workload.engine.command(Pin(name, True))
    assert list(workload.hot) == ["a", "b", "c"]
    workload.engine.command(SetBudget(budget_for(tiny, 1)))
    assert list(workload.hot) == ["a"]
    workload.engine.command(SetBudget(0))
    assert workload.hot == {}
    workload.engine.close()


def test_a_prefix_that_would_free_nothing_is_not_kept(tiny: LoadedModel, tmp_path: Path) -> None:
    """A cache grows in steps, and the prefix of a short conversation takes as many bytes as all of it."""
    workload = Workload(tiny, budget_for(tiny, 2.5), tier(tmp_path), system=SYSTEM)
    workload.ask("a")
    workload.chat("b").messages = []
    workload.ask("b")
    workload.chat("c").messages = []
    assert going(workload.ask("c")) == [("a", "spill")]
    assert set(workload.hot) == {"b", "c"}
    workload.engine.close()


def test_without_a_disk_a_cache_of_automatic_precision_is_quantised_first(tiny: LoadedModel) -> None:
    workload = Workload(tiny, budget_for(tiny, 2.5))
    workload.ask("a")
    workload.ask("b")
    played = workload.ask("c")
    assert going(played) == [("a", "convert")]
    (event,) = timeline(played, CacheEventKind.CONVERT)
    assert "int8" in event.note
    assert "no disk" in event.note
    stored = {cache.conversation: cache.kv_dtype for cache in workload.pool.caches}
    assert stored == {"a": "int8", "b": "fp32", "c": "fp32"}
    again = workload.ask("a")
    assert (again.started.miss, again.finished.stats.kv_dtype) == (None, "int8")
    assert again.started.reused_tokens > 20


def test_without_a_disk_an_8_bit_cache_is_dropped(tiny: LoadedModel) -> None:
    workload = Workload(tiny, budget_for(tiny, 2.5))
    happened = [step for name in "abcdefgh" for step in going(workload.ask(name))]
    first = happened.index(("a", "convert"))
    assert ("a", "drop") in happened[first:]
    assert all(kind == "convert" or (name, "convert") in happened for name, kind in happened)


def test_without_a_disk_a_cache_of_fixed_precision_is_dropped_and_read_again(tiny: LoadedModel) -> None:
    workload = Workload(tiny, budget_for(tiny, 2.5), kv=KVPrecision.FP32)
    workload.ask("a")
    workload.ask("b")
    played = workload.ask("c")
    assert going(played) == [("a", "drop")]
    (event,) = timeline(played, CacheEventKind.DROP)
    assert "budget was full" in event.note
    again = workload.ask("a")
    assert again.started.miss is not None
    assert again.started.miss.tokens > 20 > again.started.reused_tokens
    assert "budget was full" in again.started.miss.cause
    assert_equals_cold(again, tiny)


def test_a_spilled_conversation_is_restored_exactly(tiny: LoadedModel, tmp_path: Path) -> None:
    workload = Workload(tiny, budget_for(tiny, 1.5), tier(tmp_path))
    held = {}
    for name in "ab":
        workload.ask(name)
        held[name] = len(workload.chat(name).kv)
    for _ in range(3):
        for name in "ab":
            played = workload.ask(name)
            stats = played.finished.stats
            assert stats.restored_tokens == stats.reused_tokens == held[name]
            assert (played.started.miss, played.started.restored_tokens) == (None, held[name])
            assert_equals_cold(played, tiny)
            held[name] = len(workload.chat(name).kv)
    workload.engine.close()


def test_a_budget_smaller_than_the_active_conversation_is_its_context_limit(tiny: LoadedModel) -> None:
    workload = Workload(tiny, budget_for(tiny, 1), kv=KVPrecision.FP32)
    evicted_messages = 0
    for number in range(9):
        chat = workload.chat("a")
        played = workload.ask("a", f"{number}: {sentences(5)}")
        assert played.finished.stats.context_limit == GROWTH_STEP < tiny.facts.context_limit
        assert_equals_cold_without(played, tiny, chat.evicted_messages)
        assert len(chat.kv) <= GROWTH_STEP
        assert (chat.evicted_messages > evicted_messages) is bool(evictions(played))
        evicted_messages = chat.evicted_messages
    assert evicted_messages > 0


def test_with_the_policy_none_a_full_budget_is_refused_with_a_sentence(tiny: LoadedModel) -> None:
    workload = Workload(tiny, budget_for(tiny, 1), kv=KVPrecision.FP32, policy=NONE)
    workload.ask("a", sentences(10))
    failed = workload.ask("a", sentences(15)).failed
    assert "the KV budget" in failed.reason
    assert "/policy" in failed.reason
    assert f"holds {GROWTH_STEP:,}" in failed.reason


def test_an_answer_ends_where_the_budget_is_full(tiny: LoadedModel) -> None:
    workload = Workload(tiny, budget_for(tiny, 1), kv=KVPrecision.FP32, policy=NONE)
    chat = workload.chat("a")
    chat.sampling = replace(chat.sampling, max_tokens=400)
    played = workload.ask("a", sentences(10))
    assert played.finished.stats.finish_reason == "context"
    assert len(chat.kv) < GROWTH_STEP
    assert_equals_cold(played, tiny)


def test_a_smaller_budget_spills_at_once_and_a_larger_one_allows_restoring(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    workload = Workload(tiny, UNBOUNDED, tier(tmp_path))
    for name in "abcd":
        workload.ask(name)
    workload.reports.clear()
    workload.engine.command(SetBudget(budget_for(tiny, 2)))
    workload.guard()
    (pool,) = workload.reports
    assert isinstance(pool, PoolState)
    assert [(e.conversation, e.kind) for e in pool.events if e.kind in KINDS] == [
        ("a", CacheEventKind.SPILL),
        ("b", CacheEventKind.SPILL),
    ]
    assert pool.used_bytes <= pool.budget_bytes == budget_for(tiny, 2)
    assert set(workload.hot) == {"c", "d"}
    workload.engine.command(SetBudget(UNBOUNDED))
    workload.engine.command(Warm("a"))
    assert set(workload.hot) == {"a", "c", "d"}
    for name in "abcd":
        played = workload.ask(name)
        assert (played.started.miss, going(played)) == (None, [])
        assert_equals_cold(played, tiny)
    workload.engine.close()


def test_reported_bytes_equal_the_allocated_memory(tiny: LoadedModel, tmp_path: Path) -> None:
    workload = Workload(tiny, UNBOUNDED, tier(tmp_path))
    workload.ask("a", sentences(30))
    workload.ask("b")
    workload.chat("c").precision = KVPrecision.INT4
    workload.ask("c", sentences(20))
    pool = workload.pool
    own = {name: sum(torch_storages(workload.chat(name).kv.layers).values()) for name in "abc"}
    assert {cache.conversation: cache.bytes for cache in pool.caches} == own
    assert pool.used_bytes == sum(own.values()) == storage_bytes(workload.engine)
    assert pool.disk_bytes == sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))
    assert pool.disk_bytes == sum(cache.disk_bytes for cache in pool.caches) > 0
    workload.engine.close()


def test_shared_memory_counts_once_until_a_fork_writes(tiny: LoadedModel) -> None:
    """The first one appends to the shared memory, past the end of the others; the second one takes a copy."""
    workload = Workload(tiny, UNBOUNDED)
    workload.ask("a", sentences(20))
    before = workload.pool.used_bytes
    for number in range(5):
        workload.engine.command(Fork("a", f"fork-{number}"))
    assert workload.pool.used_bytes == before == storage_bytes(workload.engine)
    assert [cache.bytes for cache in workload.pool.caches] == [before] * 6
    fork = workload.chat("fork-0")
    fork.messages = list(workload.chat("a").messages)
    played = workload.ask("fork-0", "And?")
    assert_equals_cold(played, tiny)
    assert workload.pool.used_bytes == before
    again = workload.ask("a", "And?")
    assert again.started.reused_tokens == played.started.reused_tokens
    assert_equals_cold(again, tiny)
    assert workload.pool.used_bytes == 2 * before == storage_bytes(workload.engine)


def test_evicting_a_fork_does_not_change_its_parent(tiny: LoadedModel, tmp_path: Path) -> None:
    workload = Workload(tiny, UNBOUNDED, tier(tmp_path))
    workload.ask("a")
    workload.engine.command(Fork("a", "fork"))
    workload.chat("fork").messages = list(workload.chat("a").messages)
    workload.engine.command(Spill("fork"))
    for name in ("a", "fork"):
        played = workload.ask(name, "And?")
        assert played.started.miss is None
        assert_equals_cold(played, tiny)
    workload.engine.close()
