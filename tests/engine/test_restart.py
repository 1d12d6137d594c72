"""A saved cache is restored by a new engine bit for bit; unusable ones are refused with the reason."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig

from kvchat.cache.disk.disk_store import DiskStore, segment_files
from kvchat.cache.disk.segment import read_segment
from kvchat.cache.fingerprint import WORDS, Fingerprint
from kvchat.cache.kv_cache import ConversationKV
from kvchat.contract import (
    CacheEventKind,
    CacheMode,
    Drop,
    Fork,
    KVPrecision,
    ModelFacts,
    PoolState,
    PromptMessage,
    Refused,
    Report,
    Sampling,
    Spill,
    Tokens,
    Warm,
)
from kvchat.engine import miss_reason
from kvchat.engine.chat_template import ChatTemplate
from kvchat.engine.disk_tier import DiskTier
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.fingerprint import identify
from kvchat.engine.model.loader import LoadedModel, assemble
from tests.support.engine_driver import Chat, Played, assert_equals_cold, sentences, stopping_at
from tests.support.tiny import CHATML, seeded_model, tiny_chat, tiny_config, tiny_loaded

CAP = 1 << 30
SYSTEM = "You answer in one word."
QUESTIONS = ("Which pass is open in May?", "How long is the drive?", "And the train?")
SURE = "Are you sure?"


@dataclass
class Storage:
    """A store on disk, and the engine that uses it now."""

    root: Path
    loaded: LoadedModel
    cap: int = CAP
    reports: list[Report] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        """A new engine."""
        self.disk = DiskTier(DiskStore(self.root, self.cap))
        self.engine = LocalEngine(self.loaded, disk=self.disk, report=self.reports.append)

    def restart(self, *chats: Chat) -> None:
        """Another engine, as in another process; the conversations go on with it."""
        self.engine.close()
        self.open()
        for chat in chats:
            chat.engine = self.engine

    def chat(self, name: str = "chat", *, turns: int = 3, persist: bool = True) -> Chat:
        """A conversation of so many turns."""
        chat = Chat(self.engine, self.loaded, name, system=SYSTEM, persist=persist)
        for question in QUESTIONS[:turns]:
            chat.ask(question)
        return chat

    def folder(self, name: str = "chat") -> Path:
        return self.root / name

    def segments(self, name: str = "chat") -> list[Path]:
        return segment_files(self.folder(name))


@pytest.fixture
def storage(loaded: LoadedModel, tmp_path: Path) -> Iterator[Storage]:
    storage = Storage(tmp_path / "store", loaded)
    yield storage
    storage.engine.close()


def bits(kv: ConversationKV) -> list[torch.Tensor]:
    """Copies of everything stored, as it is stored."""
    return [tensor.clone() for layer in kv.stored for tensor in layer.pack(0).values()]


def assert_bit_equal(played: Played, live: Played) -> None:
    assert played.tokens == live.tokens
    chosen = -len(live.tokens)  # recurrent models answer for every token of the prompt, too
    assert torch.equal(torch.stack(played.logits[chosen:]), torch.stack(live.logits[chosen:]))


def live_turn(loaded: LoadedModel, precision: KVPrecision = KVPrecision.AUTO) -> Played:
    """The turn after three of them, by an engine that was never restarted."""
    chat = Chat(LocalEngine(loaded), loaded, system=SYSTEM)
    chat.precision = precision
    for question in QUESTIONS:
        chat.ask(question)
    return chat.ask(SURE)


def assert_restored(played: Played, cached: int) -> None:
    """Everything that was cached came from disk, and the rest was read."""
    stats = played.finished.stats
    assert stats.restored_tokens == stats.reused_tokens == played.started.restored_tokens == cached
    assert stats.restore_s > 0
    assert (played.started.miss, stats.reuse_note) == (None, "")
    assert played.evaluated == stats.prompt_tokens - cached + stats.generated_tokens - 1
    (event,) = [e for e in played.finished.pool.events if e.kind is CacheEventKind.RESTORE]
    assert event.tokens >= cached


def test_after_a_restart_a_turn_reads_its_new_tokens_and_equals_the_live_one_bit_for_bit(
    storage: Storage, loaded: LoadedModel
) -> None:
    chat = storage.chat()
    cached, before = chat.kv.ids, bits(chat.kv)
    storage.restart(chat)
    (cold,) = storage.engine.pool().caches
    assert (cold.conversation, cold.hot, cold.disk_bytes > 0) == ("chat", False, True)
    played = chat.ask(SURE)
    assert_restored(played, len(cached))
    assert chat.kv.ids[: len(cached)] == cached
    chat.kv.truncate(len(cached))
    for now, then in zip(bits(chat.kv), before, strict=True):
        assert torch.equal(now, then)
    assert_bit_equal(played, live_turn(loaded))
    assert_equals_cold(played, loaded)


def test_turns_after_a_restored_one_restore_nothing(storage: Storage, loaded: LoadedModel) -> None:
    chat = storage.chat()
    storage.restart(chat)
    chat.ask(SURE)
    cached = len(chat.kv)
    following = chat.ask("Why?")
    stats = following.finished.stats
    assert (stats.restored_tokens, stats.restore_s, stats.reused_tokens) == (0, 0.0, cached)
    assert_equals_cold(following, loaded)


def test_a_restart_after_every_turn_costs_nothing(storage: Storage, loaded: LoadedModel) -> None:
    """Each turn is one more segment of the chain."""
    chat = storage.chat(turns=1)
    for number in range(2, 6):
        cached = len(chat.kv)
        storage.restart(chat)
        assert len(storage.segments()) == number - 1
        played = chat.ask(f"And pass {number}?")
        assert_restored(played, cached)
        assert_equals_cold(played, loaded)


@pytest.mark.parametrize(
    "precision", [KVPrecision.FP32, KVPrecision.BF16, KVPrecision.INT8, KVPrecision.INT4]
)
def test_every_precision_is_restored_bit_for_bit(storage: Storage, precision: KVPrecision) -> None:
    chat = Chat(storage.engine, storage.loaded, system=SYSTEM)
    chat.precision = precision
    for question in QUESTIONS:
        chat.ask(question)
    cached = len(chat.kv)
    storage.restart(chat)
    played = chat.ask(SURE)
    assert_restored(played, cached)
    assert played.finished.stats.kv_dtype == precision.value
    assert_bit_equal(played, live_turn(storage.loaded, precision))


@pytest.mark.parametrize("index", [1, 2, 3, 5])
def test_an_edit_after_a_restart_restores_the_common_prefix(
    storage: Storage, loaded: LoadedModel, index: int
) -> None:
    chat = storage.chat()
    live = Chat(LocalEngine(loaded), loaded, system=SYSTEM)
    for question in QUESTIONS:
        live.ask(question)
    storage.restart(chat)
    for each in (chat, live):
        each.messages[index] = PromptMessage(each.messages[index].role, "Nobody knows.")
    played, expected = chat.ask(SURE), live.ask(SURE)
    stats = played.finished.stats
    assert stats.restored_tokens == stats.reused_tokens == expected.started.reused_tokens > 0
    assert_bit_equal(played, expected)
    assert_equals_cold(played, loaded)
    cached = len(chat.kv)
    storage.restart(chat)
    following = chat.ask("Why?")
    assert_restored(following, cached)
    assert_equals_cold(following, loaded)


def test_a_stopped_answer_continues_after_a_restart(storage: Storage, loaded: LoadedModel) -> None:
    whole = Chat(LocalEngine(loaded), loaded, system=SYSTEM, sampling=Sampling(max_tokens=6)).ask(SURE)
    chat = Chat(storage.engine, loaded, system=SYSTEM, sampling=Sampling(max_tokens=6))
    stopped = chat.ask(SURE, stopping_at(storage.engine, Tokens, 2))
    cached = len(chat.kv)
    storage.restart(chat)
    chat.sampling = Sampling(max_tokens=3)
    rest = chat.answer()
    assert_restored(rest, cached)
    assert rest.started.prefilled_tokens == 1
    assert [*stopped.tokens, *rest.tokens] == whole.tokens


def test_an_engine_that_was_killed_loses_no_finished_turn(storage: Storage, loaded: LoadedModel) -> None:
    chat = storage.chat()
    cached = len(chat.kv)
    storage.disk.find(chat.name)  # what is queued is written; then nothing is closed
    storage.open()
    chat.engine = storage.engine
    played = chat.ask(SURE)
    assert_restored(played, cached)
    assert_equals_cold(played, loaded)


def test_a_spilled_conversation_is_restored_by_its_next_turn(storage: Storage, loaded: LoadedModel) -> None:
    chat = storage.chat()
    cached = len(chat.kv)
    storage.engine.command(Spill(chat.name))
    pool = storage.reports[-1]
    assert isinstance(pool, PoolState)
    assert CacheEventKind.SPILL in [e.kind for e in pool.events]
    played = chat.ask(SURE)
    assert_restored(played, cached)
    assert_bit_equal(played, live_turn(loaded))


def test_a_cache_loaded_before_the_turn_is_used(storage: Storage, loaded: LoadedModel) -> None:
    chat = storage.chat()
    cached = len(chat.kv)
    storage.restart(chat)
    storage.engine.command(Warm(chat.name))
    (warm,) = storage.engine.pool().caches
    assert (warm.tokens, warm.hot) == (cached, True)
    played = chat.ask(SURE)
    stats = played.finished.stats
    assert (stats.reused_tokens, stats.restored_tokens, stats.reuse_note) == (cached, 0, "")
    assert_bit_equal(played, live_turn(loaded))


def test_a_fork_is_saved_as_its_own(storage: Storage, loaded: LoadedModel) -> None:
    chat = storage.chat()
    child = Chat(storage.engine, loaded, "child")
    child.messages = chat.messages[:5]
    storage.engine.command(Fork(chat.name, child.name))
    child.ask("And by boat?")
    chat.ask(SURE)
    cached = {each.name: len(each.kv) for each in (chat, child)}
    storage.restart(chat, child)
    for each in (chat, child):
        played = each.ask("Why?")
        assert_restored(played, cached[each.name])
        assert_equals_cold(played, loaded)


def test_a_saved_prefix_is_shared_once_its_conversation_is_restored(
    storage: Storage, loaded: LoadedModel
) -> None:
    chat = storage.chat()
    storage.restart(chat)
    chat.ask(SURE)
    other = Chat(storage.engine, loaded, "other")
    other.messages = chat.messages[:5]
    played = other.ask("And by boat?")
    assert played.started.reused_tokens > 16
    assert_equals_cold(played, loaded)


def mamba() -> LoadedModel:
    """A tiny recurrent model."""
    chat = tiny_chat()
    config = MambaConfig(
        vocab_size=len(chat),
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        eos_token_id=chat.eos_token_id,
        pad_token_id=chat.pad_token_id,
        bos_token_id=chat.bos_token_id,
    )
    return assemble(seeded_model(config), chat, "mamba", context=1000)


def test_recurrent_states_are_restored(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "store", mamba())
    chat = storage.chat()
    cached = len(chat.kv.ids)
    storage.restart(chat)
    played = chat.ask(SURE)
    assert played.finished.stats.restored_tokens == cached
    assert_bit_equal(played, live_turn(storage.loaded))
    assert_equals_cold(played, storage.loaded)
    storage.engine.close()


# What can't be used.


def assert_read_again(chat: Chat, storage: Storage, reason: str) -> None:
    """Nothing is restored, the reason is reported, and later saves are usable."""
    played = chat.ask(SURE)
    stats = played.finished.stats
    assert (stats.reused_tokens, stats.restored_tokens) == (0, 0)
    assert played.started.miss is not None
    assert played.started.miss.cause == stats.reuse_note
    assert reason in stats.reuse_note
    assert_equals_cold(played, storage.loaded)
    cached = len(chat.kv)
    storage.restart(chat)
    following = chat.ask("Why?")
    assert_restored(following, cached)
    assert_equals_cold(following, storage.loaded)


@contextmanager
def identified(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> Iterator[None]:
    """Engines made inside take the model for one that differs in that field."""

    def otherwise(
        facts: ModelFacts, revision: str, template: ChatTemplate, frequencies: Sequence[float]
    ) -> Fingerprint:
        return replace(identify(facts, revision, template, frequencies), **{name: value})

    with monkeypatch.context() as patch:
        patch.setattr("kvchat.engine.engine.identify", otherwise)
        yield


@pytest.mark.parametrize("name", [f.name for f in fields(Fingerprint) if f.name != "kv"])
def test_a_cache_of_another_fingerprint_is_refused_by_the_name_of_the_field(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    chat = storage.chat()
    was = getattr(storage.engine.caches.fingerprint(KVPrecision.FP32), name)
    with identified(monkeypatch, name, "another"):
        storage.restart(chat)
        assert_read_again(chat, storage, f"{WORDS[name]} changed: {was} → another")


def test_a_cache_of_another_kv_precision_is_refused_by_name(storage: Storage) -> None:
    chat = storage.chat()
    storage.restart(chat)
    chat.precision = KVPrecision.BF16
    played = chat.ask(SURE)
    assert played.finished.stats.reuse_note == "KV precision changed: fp32 → bf16"
    assert (played.started.reused_tokens, played.started.restored_tokens) == (0, 0)
    cached = len(chat.kv)
    storage.restart(chat)
    assert_restored(chat.ask("Why?"), cached)


OTHER_MODELS: dict[str, tuple[Callable[[], LoadedModel], str]] = {
    "other weights": (lambda: retrained(), "model weights changed: "),
    "another rope": (lambda: with_rope(5_000.0), "rope settings changed: "),
    "another template": (lambda: tiny_loaded(template=CHATML + "{# #}"), "chat template changed: "),
    "another name": (lambda: replace_name("other"), "model changed: tiny → other"),
}


def retrained() -> LoadedModel:
    chat = tiny_chat()
    return assemble(seeded_model(tiny_config(chat), seed=1), chat, "tiny")


def with_rope(theta: float) -> LoadedModel:
    """The same weights, which turn their keys otherwise."""
    chat = tiny_chat()
    config = tiny_config(chat)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    model = seeded_model(config)
    model.load_state_dict(tiny_loaded().model.state_dict())
    return assemble(model, chat, "tiny")


def replace_name(name: str) -> LoadedModel:
    chat = tiny_chat()
    return assemble(tiny_loaded().model, chat, name)


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_a_cache_of_another_model_is_refused(storage: Storage, other: str) -> None:
    """Identified by the weights, not by the name."""
    chat = storage.chat()
    build, words = OTHER_MODELS[other]
    storage.loaded = chat.loaded = build()
    storage.restart(chat)
    assert_read_again(chat, storage, words)


def test_an_unusable_cache_is_not_loaded_by_command(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = storage.chat()
    with identified(monkeypatch, "revision", "another"):
        storage.restart(chat)
    storage.reports.clear()
    storage.engine.command(Warm(chat.name))
    refused, pool = storage.reports
    assert isinstance(refused, Refused)
    assert "model weights changed" in refused.reason
    assert isinstance(pool, PoolState)
    assert [c.hot for c in pool.caches] == [False]


Damage = Callable[[list[Path]], None]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def data_start(path: Path) -> int:
    return read_segment(path).data_start


def overwrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a bit of the first tensor": (lambda s: flip(s[0], data_start(s[0])), "has a damaged tensor"),
    "a bit of the last tensor": (lambda s: flip(s[-1], -1), "has a damaged tensor"),
    "a bit of the header": (lambda s: flip(s[1], 300), "has a damaged header"),
    "a bit of the length": (lambda s: flip(s[1], 0), ""),
    "cut in the tensors": (lambda s: cut(s[-1], -5), "bytes of tensors instead of"),
    "cut in the header": (lambda s: cut(s[-1], 100), "is cut short or garbage"),
    "empty": (lambda s: cut(s[-1], 0), "is cut short or garbage"),
    "garbage": (lambda s: overwrite(s[-1], b"nothing of ours" * 100), "is cut short or garbage"),
    "the first segment gone": (lambda s: s[0].unlink(), "doesn't continue an empty cache"),
    "a segment in between gone": (lambda s: s[1].unlink(), "doesn't continue 000000"),
    "segments exchanged": (lambda s: exchange(s[0], s[1]), "doesn't continue"),
}


def exchange(a: Path, b: Path) -> None:
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cache_is_refused_with_the_reason_and_read_again(storage: Storage, name: str) -> None:
    chat = storage.chat()
    storage.engine.close()
    assert len(storage.segments()) == 3
    damage, reason = DAMAGES[name]
    damage(storage.segments())
    storage.restart(chat)
    assert_read_again(chat, storage, reason or "can't be used")


def test_a_cache_of_another_conversation_is_refused(storage: Storage) -> None:
    chat = storage.chat()
    storage.engine.close()
    storage.folder().rename(storage.root / "renamed")
    chat.name = "renamed"
    storage.restart(chat)
    assert_read_again(chat, storage, "belongs to conversation chat")


def test_a_refusal_is_an_event(storage: Storage) -> None:
    chat = storage.chat()
    storage.engine.close()
    flip(storage.segments()[-1], -1)
    storage.restart(chat)
    events = chat.ask(SURE).finished.pool.events
    (refused,) = [e for e in events if e.kind is CacheEventKind.REFUSE]
    assert "has a damaged tensor" in refused.note
    assert CacheEventKind.RESTORE not in [e.kind for e in events]


def test_a_cache_that_was_removed_meanwhile_is_read_again(storage: Storage) -> None:
    chat = storage.chat()
    storage.engine.close()
    DiskStore(storage.root, CAP).remove(chat.name)
    storage.restart(chat)
    assert_read_again(chat, storage, miss_reason.NOT_READ_YET)


# What must not be written, and what has to go.


def everything_on(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*.safetensors")) if root.exists() else []


def test_a_private_conversation_writes_nothing(storage: Storage, loaded: LoadedModel) -> None:
    chat = storage.chat(persist=False)
    storage.engine.command(Spill(chat.name))
    chat.ask(SURE)
    storage.restart(chat)
    assert everything_on(storage.root) == []
    assert storage.engine.pool().caches == ()
    following = chat.ask("Why?")
    assert following.finished.stats.reuse_note == miss_reason.NOT_READ_YET
    assert_equals_cold(following, loaded)


def test_a_private_conversation_reads_nothing_from_disk_either(storage: Storage) -> None:
    chat = storage.chat()
    storage.restart(chat)
    chat.persist = False
    played = chat.ask(SURE)
    assert (played.started.reused_tokens, played.started.restored_tokens) == (0, 0)
    assert_equals_cold(played, storage.loaded)


@pytest.mark.parametrize("mode", [CacheMode.OFF, CacheMode.TURN])
def test_modes_without_a_resident_cache_write_nothing(storage: Storage, mode: CacheMode) -> None:
    chat = Chat(storage.engine, storage.loaded, mode=mode)
    chat.ask(sentences(3))
    storage.restart(chat)
    assert everything_on(storage.root) == []


def test_forgetting_removes_the_folder(storage: Storage, loaded: LoadedModel) -> None:
    chat, other = storage.chat(), storage.chat("other")
    storage.engine.forget(chat.name)
    assert not storage.folder().exists()
    assert storage.disk.find("other") is not None
    assert [c.conversation for c in storage.engine.pool().caches] == ["other"]
    storage.restart(chat, other)
    assert not storage.folder().exists()
    played = chat.ask(SURE)
    assert (played.started.restored_tokens, played.started.reuse_note) == (0, miss_reason.NOT_READ_YET)
    assert_equals_cold(played, loaded)


def test_dropping_removes_the_folder_and_the_next_turn_says_so(storage: Storage) -> None:
    chat = storage.chat()
    storage.engine.command(Drop(chat.name))
    assert not storage.folder().exists()
    played = chat.ask(SURE)
    assert played.started.reuse_note == "you dropped it"
    assert storage.disk.find(chat.name) is not None


def test_the_disk_cap_is_never_exceeded(tiny: LoadedModel, tmp_path: Path) -> None:
    """The least recently used conversation is removed, and then read again."""
    storage = Storage(tmp_path / "store", tiny)
    first = storage.chat("first")
    storage.engine.close()
    one = DiskStore(storage.root, CAP).total_bytes()
    storage.cap = int(1.5 * one)
    storage.open()
    first.engine = storage.engine
    second = storage.chat("second")
    storage.restart(first, second)
    pool = storage.engine.pool()
    assert [c.conversation for c in pool.caches] == ["second"]
    assert pool.disk_bytes == DiskStore(storage.root, CAP).total_bytes() <= storage.cap == pool.disk_cap_bytes
    cached = len(second.messages)
    assert second.ask(SURE).started.restored_tokens > cached
    played = first.ask(SURE)
    assert played.started.restored_tokens == 0
    assert_equals_cold(played, tiny)
    storage.engine.close()


@pytest.mark.model
def test_a_real_model_continues_after_a_restart(smollm2: LoadedModel, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "store", smollm2)
    chat = storage.chat()
    cached = len(chat.kv)
    storage.restart(chat)
    played = chat.ask(SURE)
    assert_restored(played, cached)
    assert_bit_equal(played, live_turn(smollm2))
    assert_equals_cold(played, smollm2)
    storage.engine.close()
