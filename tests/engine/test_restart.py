"""A cache outlives the engine that made it, bit for bit; what can't be used is refused by name."""

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
class House:
    """A shelf on disk, and the engine that uses it now."""

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
def house(loaded: LoadedModel, tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "shelf", loaded)
    yield house
    house.engine.close()


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


def assert_restored(played: Played, held: int) -> None:
    """Everything that was held came from disk, and the rest was read."""
    stats = played.finished.stats
    assert stats.restored_tokens == stats.reused_tokens == played.started.restored_tokens == held
    assert stats.restore_s > 0
    assert (played.started.miss, stats.reuse_note) == (None, "")
    assert played.evaluated == stats.prompt_tokens - held + stats.generated_tokens - 1
    (event,) = [e for e in played.finished.pool.events if e.kind is CacheEventKind.RESTORE]
    assert event.tokens >= held


def test_after_a_restart_a_turn_reads_its_new_tokens_and_equals_the_live_one_bit_for_bit(
    house: House, loaded: LoadedModel
) -> None:
    chat = house.chat()
    held, before = chat.kv.ids, bits(chat.kv)
    house.restart(chat)
    (cold,) = house.engine.pool().caches
    assert (cold.conversation, cold.hot, cold.disk_bytes > 0) == ("chat", False, True)
    played = chat.ask(SURE)
    assert_restored(played, len(held))
    assert chat.kv.ids[: len(held)] == held
    chat.kv.truncate(len(held))
    for now, then in zip(bits(chat.kv), before, strict=True):
        assert torch.equal(now, then)
    assert_bit_equal(played, live_turn(loaded))
    assert_equals_cold(played, loaded)


def test_turns_after_a_restored_one_restore_nothing(house: House, loaded: LoadedModel) -> None:
    chat = house.chat()
    house.restart(chat)
    chat.ask(SURE)
    held = len(chat.kv)
    following = chat.ask("Why?")
    stats = following.finished.stats
    assert (stats.restored_tokens, stats.restore_s, stats.reused_tokens) == (0, 0.0, held)
    assert_equals_cold(following, loaded)


def test_a_restart_after_every_turn_costs_nothing(house: House, loaded: LoadedModel) -> None:
    """Each turn is one more segment of the chain."""
    chat = house.chat(turns=1)
    for number in range(2, 6):
        held = len(chat.kv)
        house.restart(chat)
        assert len(house.segments()) == number - 1
        played = chat.ask(f"And pass {number}?")
        assert_restored(played, held)
        assert_equals_cold(played, loaded)


@pytest.mark.parametrize(
    "precision", [KVPrecision.FP32, KVPrecision.BF16, KVPrecision.INT8, KVPrecision.INT4]
)
def test_every_precision_is_restored_bit_for_bit(house: House, precision: KVPrecision) -> None:
    chat = Chat(house.engine, house.loaded, system=SYSTEM)
    chat.precision = precision
    for question in QUESTIONS:
        chat.ask(question)
    held = len(chat.kv)
    house.restart(chat)
    played = chat.ask(SURE)
    assert_restored(played, held)
    assert played.finished.stats.kv_dtype == precision.value
    assert_bit_equal(played, live_turn(house.loaded, precision))


@pytest.mark.parametrize("index", [1, 2, 3, 5])
def test_an_edit_after_a_restart_restores_the_common_prefix(
    house: House, loaded: LoadedModel, index: int
) -> None:
    chat = house.chat()
    live = Chat(LocalEngine(loaded), loaded, system=SYSTEM)
    for question in QUESTIONS:
        live.ask(question)
    house.restart(chat)
    for each in (chat, live):
        each.messages[index] = PromptMessage(each.messages[index].role, "Nobody knows.")
    played, expected = chat.ask(SURE), live.ask(SURE)
    stats = played.finished.stats
    assert stats.restored_tokens == stats.reused_tokens == expected.started.reused_tokens > 0
    assert_bit_equal(played, expected)
    assert_equals_cold(played, loaded)
    held = len(chat.kv)
    house.restart(chat)
    following = chat.ask("Why?")
    assert_restored(following, held)
    assert_equals_cold(following, loaded)


def test_a_stopped_answer_continues_after_a_restart(house: House, loaded: LoadedModel) -> None:
    whole = Chat(LocalEngine(loaded), loaded, system=SYSTEM, sampling=Sampling(max_tokens=6)).ask(SURE)
    chat = Chat(house.engine, loaded, system=SYSTEM, sampling=Sampling(max_tokens=6))
    stopped = chat.ask(SURE, stopping_at(house.engine, Tokens, 2))
    held = len(chat.kv)
    house.restart(chat)
    chat.sampling = Sampling(max_tokens=3)
    rest = chat.answer()
    assert_restored(rest, held)
    assert rest.started.prefilled_tokens == 1
    assert [*stopped.tokens, *rest.tokens] == whole.tokens


def test_an_engine_that_was_killed_loses_no_finished_turn(house: House, loaded: LoadedModel) -> None:
    chat = house.chat()
    held = len(chat.kv)
    house.disk.find(chat.name)  # what is queued is written; then nothing is closed
    house.open()
    chat.engine = house.engine
    played = chat.ask(SURE)
    assert_restored(played, held)
    assert_equals_cold(played, loaded)


def test_a_spilled_conversation_is_restored_by_its_next_turn(house: House, loaded: LoadedModel) -> None:
    chat = house.chat()
    held = len(chat.kv)
    house.engine.command(Spill(chat.name))
    pool = house.reports[-1]
    assert isinstance(pool, PoolState)
    assert CacheEventKind.SPILL in [e.kind for e in pool.events]
    played = chat.ask(SURE)
    assert_restored(played, held)
    assert_bit_equal(played, live_turn(loaded))


def test_a_cache_loaded_before_the_turn_is_used(house: House, loaded: LoadedModel) -> None:
    chat = house.chat()
    held = len(chat.kv)
    house.restart(chat)
    house.engine.command(Warm(chat.name))
    (warm,) = house.engine.pool().caches
    assert (warm.tokens, warm.hot) == (held, True)
    played = chat.ask(SURE)
    stats = played.finished.stats
    assert (stats.reused_tokens, stats.restored_tokens, stats.reuse_note) == (held, 0, "")
    assert_bit_equal(played, live_turn(loaded))


def test_a_fork_is_saved_as_its_own(house: House, loaded: LoadedModel) -> None:
    chat = house.chat()
    child = Chat(house.engine, loaded, "child")
    child.messages = chat.messages[:5]
    house.engine.command(Fork(chat.name, child.name))
    child.ask("And by boat?")
    chat.ask(SURE)
    held = {each.name: len(each.kv) for each in (chat, child)}
    house.restart(chat, child)
    for each in (chat, child):
        played = each.ask("Why?")
        assert_restored(played, held[each.name])
        assert_equals_cold(played, loaded)


def test_a_saved_prefix_is_shared_once_its_conversation_is_restored(
    house: House, loaded: LoadedModel
) -> None:
    chat = house.chat()
    house.restart(chat)
    chat.ask(SURE)
    other = Chat(house.engine, loaded, "other")
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
    house = House(tmp_path / "shelf", mamba())
    chat = house.chat()
    held = len(chat.kv.ids)
    house.restart(chat)
    played = chat.ask(SURE)
    assert played.finished.stats.restored_tokens == held
    assert_bit_equal(played, live_turn(house.loaded))
    assert_equals_cold(played, house.loaded)
    house.engine.close()


# What can't be used.


def assert_read_again(chat: Chat, house: House, reason: str) -> None:
    """Nothing is restored, and the reason is told; what is saved from then on is good again."""
    played = chat.ask(SURE)
    stats = played.finished.stats
    assert (stats.reused_tokens, stats.restored_tokens) == (0, 0)
    assert played.started.miss is not None
    assert played.started.miss.cause == stats.reuse_note
    assert reason in stats.reuse_note
    assert_equals_cold(played, house.loaded)
    held = len(chat.kv)
    house.restart(chat)
    following = chat.ask("Why?")
    assert_restored(following, held)
    assert_equals_cold(following, house.loaded)


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
    house: House, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    chat = house.chat()
    was = getattr(house.engine.caches.fingerprint(KVPrecision.FP32), name)
    with identified(monkeypatch, name, "another"):
        house.restart(chat)
        assert_read_again(chat, house, f"{WORDS[name]} changed: {was} → another")


def test_a_cache_of_another_kv_precision_is_refused_by_name(house: House) -> None:
    chat = house.chat()
    house.restart(chat)
    chat.precision = KVPrecision.BF16
    played = chat.ask(SURE)
    assert played.finished.stats.reuse_note == "KV precision changed: fp32 → bf16"
    assert (played.started.reused_tokens, played.started.restored_tokens) == (0, 0)
    held = len(chat.kv)
    house.restart(chat)
    assert_restored(chat.ask("Why?"), held)


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
def test_a_cache_of_another_model_is_refused(house: House, other: str) -> None:
    """Identified by what the model is, not by what somebody says."""
    chat = house.chat()
    build, words = OTHER_MODELS[other]
    house.loaded = chat.loaded = build()
    house.restart(chat)
    assert_read_again(chat, house, words)


def test_an_unusable_cache_is_not_loaded_by_command(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = house.chat()
    with identified(monkeypatch, "revision", "another"):
        house.restart(chat)
    house.reports.clear()
    house.engine.command(Warm(chat.name))
    refused, pool = house.reports
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
def test_a_damaged_cache_is_refused_with_the_reason_and_read_again(house: House, name: str) -> None:
    chat = house.chat()
    house.engine.close()
    assert len(house.segments()) == 3
    damage, reason = DAMAGES[name]
    damage(house.segments())
    house.restart(chat)
    assert_read_again(chat, house, reason or "can't be used")


def test_a_cache_of_another_conversation_is_refused(house: House) -> None:
    chat = house.chat()
    house.engine.close()
    house.folder().rename(house.root / "renamed")
    chat.name = "renamed"
    house.restart(chat)
    assert_read_again(chat, house, "belongs to conversation chat")


def test_a_refusal_is_an_event(house: House) -> None:
    chat = house.chat()
    house.engine.close()
    flip(house.segments()[-1], -1)
    house.restart(chat)
    events = chat.ask(SURE).finished.pool.events
    (refused,) = [e for e in events if e.kind is CacheEventKind.REFUSE]
    assert "has a damaged tensor" in refused.note
    assert CacheEventKind.RESTORE not in [e.kind for e in events]


def test_a_cache_that_was_removed_meanwhile_is_read_again(house: House) -> None:
    chat = house.chat()
    house.engine.close()
    DiskStore(house.root, CAP).remove(chat.name)
    house.restart(chat)
    assert_read_again(chat, house, miss_reason.NOT_READ_YET)


# What must not be written, and what has to go.


def everything_on(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*.safetensors")) if root.exists() else []


def test_a_private_conversation_writes_nothing(house: House, loaded: LoadedModel) -> None:
    chat = house.chat(persist=False)
    house.engine.command(Spill(chat.name))
    chat.ask(SURE)
    house.restart(chat)
    assert everything_on(house.root) == []
    assert house.engine.pool().caches == ()
    following = chat.ask("Why?")
    assert following.finished.stats.reuse_note == miss_reason.NOT_READ_YET
    assert_equals_cold(following, loaded)


def test_a_private_conversation_reads_nothing_from_disk_either(house: House) -> None:
    chat = house.chat()
    house.restart(chat)
    chat.persist = False
    played = chat.ask(SURE)
    assert (played.started.reused_tokens, played.started.restored_tokens) == (0, 0)
    assert_equals_cold(played, house.loaded)


@pytest.mark.parametrize("mode", [CacheMode.OFF, CacheMode.TURN])
def test_modes_without_a_resident_cache_write_nothing(house: House, mode: CacheMode) -> None:
    chat = Chat(house.engine, house.loaded, mode=mode)
    chat.ask(sentences(3))
    house.restart(chat)
    assert everything_on(house.root) == []


def test_forgetting_removes_the_folder(house: House, loaded: LoadedModel) -> None:
    chat, other = house.chat(), house.chat("other")
    house.engine.forget(chat.name)
    assert not house.folder().exists()
    assert house.disk.find("other") is not None
    assert [c.conversation for c in house.engine.pool().caches] == ["other"]
    house.restart(chat, other)
    assert not house.folder().exists()
    played = chat.ask(SURE)
    assert (played.started.restored_tokens, played.started.reuse_note) == (0, miss_reason.NOT_READ_YET)
    assert_equals_cold(played, loaded)


def test_dropping_removes_the_folder_and_the_next_turn_says_so(house: House) -> None:
    chat = house.chat()
    house.engine.command(Drop(chat.name))
    assert not house.folder().exists()
    played = chat.ask(SURE)
    assert played.started.reuse_note == "you dropped it"
    assert house.disk.find(chat.name) is not None


def test_the_disk_cap_is_never_exceeded(tiny: LoadedModel, tmp_path: Path) -> None:
    """The conversation used longest ago is removed, and says so by being read again."""
    house = House(tmp_path / "shelf", tiny)
    first = house.chat("first")
    house.engine.close()
    one = DiskStore(house.root, CAP).total_bytes()
    house.cap = int(1.5 * one)
    house.open()
    first.engine = house.engine
    second = house.chat("second")
    house.restart(first, second)
    pool = house.engine.pool()
    assert [c.conversation for c in pool.caches] == ["second"]
    assert pool.disk_bytes == DiskStore(house.root, CAP).total_bytes() <= house.cap == pool.disk_cap_bytes
    held = len(second.messages)
    assert second.ask(SURE).started.restored_tokens > held
    played = first.ask(SURE)
    assert played.started.restored_tokens == 0
    assert_equals_cold(played, tiny)
    house.engine.close()


@pytest.mark.model
def test_a_real_model_continues_after_a_restart(smollm2: LoadedModel, tmp_path: Path) -> None:
    house = House(tmp_path / "shelf", smollm2)
    chat = house.chat()
    held = len(chat.kv)
    house.restart(chat)
    played = chat.ask(SURE)
    assert_restored(played, held)
    assert_bit_equal(played, live_turn(smollm2))
    assert_equals_cold(played, smollm2)
    house.engine.close()
