"""The cache map, and the token statuses of a turn, compared with the cache."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, MambaConfig

from kvchat.cache.disk.disk_store import DiskStore
from kvchat.contract import (
    CacheBlock,
    CacheMap,
    CacheMode,
    EvictionPolicy,
    Fork,
    Inspect,
    KVPrecision,
    LayerGroup,
    Report,
    SetPrecision,
    Spill,
    TokenSpan,
    TokenStatus,
)
from kvchat.engine.disk_tier import DiskTier
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel, assemble
from tests.support.engine_driver import Chat, Played, sentences, user
from tests.support.tiny import seeded_model, tiny_chat, tiny_loaded

SYSTEM = "You answer in one word."
QUESTIONS = ("Which pass is open in May?", "How long is the drive?")


def talk(engine: LocalEngine, loaded: LoadedModel, **options: object) -> Chat:
    """A conversation of two turns."""
    chat = Chat(engine, loaded, system=SYSTEM, **options)  # type: ignore[arg-type]
    for question in QUESTIONS:
        chat.ask(question)
    return chat


def reported(loaded: LoadedModel, disk: DiskTier | None = None) -> tuple[LocalEngine, list[Report]]:
    """An engine, and what it reports."""
    reports: list[Report] = []
    return LocalEngine(loaded, disk=disk, report=reports.append), reports


def map_of(chat: Chat, reports: list[Report]) -> CacheMap:
    chat.engine.command(Inspect(chat.request()))
    return next(report for report in reversed(reports) if isinstance(report, CacheMap))


def whose(blocks: tuple[CacheBlock, ...]) -> list[tuple[int | None, str]]:
    """The messages of the blocks, in order."""
    return list(dict.fromkeys((block.message, block.role) for block in blocks))


def statuses(spans: tuple[TokenSpan, ...]) -> dict[int, dict[TokenStatus, int]]:
    result: dict[int, dict[TokenStatus, int]] = {}
    for span in spans:
        result.setdefault(span.message, {})[span.status] = span.tokens
    return result


# --- the map ---------------------------------------------------------------------------------------------


def test_the_blocks_are_the_cache_in_order_and_their_bytes_are_all_of_its_bytes(loaded: LoadedModel) -> None:
    engine, reports = reported(loaded)
    chat = talk(engine, loaded)
    result = map_of(chat, reports)
    blocks = result.blocks
    assert [b.start for b in blocks] == [sum(b.tokens for b in blocks[:i]) for i in range(len(blocks))]
    assert sum(b.tokens for b in blocks) == len(chat.kv)
    assert sum(b.bytes for b in blocks) == pytest.approx(chat.kv.used_bytes, abs=len(blocks))
    assert (result.bytes, result.disk_bytes, result.shared_with) == (chat.kv.storage_bytes, 0, ())
    assert "".join(b.text for b in blocks) == loaded.tokenizer.decode(chat.kv.ids, skip_special_tokens=False)
    assert {(b.in_memory, b.on_disk, b.precision) for b in blocks} == {(True, False, "fp32")}
    assert sum(b.tokens for b in blocks if b.sink) == 4


def test_every_block_names_the_message_that_it_belongs_to(loaded: LoadedModel) -> None:
    engine, reports = reported(loaded)
    chat = talk(engine, loaded)
    result = map_of(chat, reports).blocks
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert whose(result) == list(enumerate(roles))
    for index, message in enumerate(chat.messages[:-1]):
        text = "".join(block.text for block in result if block.message == index)
        assert message.text in text


def test_tokens_that_left_the_conversation_have_no_message(loaded: LoadedModel) -> None:
    engine, reports = reported(loaded)
    chat = talk(engine, loaded)
    del chat.messages[3:]
    assert whose(map_of(chat, reports).blocks)[-1] == (None, "")


def test_evicted_messages_are_counted(loaded: LoadedModel) -> None:
    engine, reports = reported(loaded)
    chat = talk(engine, loaded)
    chat.evicted_messages = 2
    chat.ask("And the train?")
    assert whose(map_of(chat, reports).blocks) == [
        (0, "system"),
        (3, "user"),
        (4, "assistant"),
        (5, "user"),
        (6, "assistant"),
    ]


def test_evicted_tokens_are_a_gap_of_no_bytes(loaded: LoadedModel) -> None:
    engine, reports = reported(tiny_loaded(context=128))
    chat = talk(engine, engine._loaded, policy=EvictionPolicy.SINKS)
    chat.ask(sentences(9))
    assert chat.kv.index.has_gap
    gone = [b for b in map_of(chat, reports).blocks if not b.in_memory]
    assert sum(b.tokens for b in gone) == len(chat.kv.ids) - len(chat.kv)
    assert {(b.bytes, b.precision, b.on_disk) for b in gone} == {(0, "", False)}


def test_a_fork_shares_what_both_have_read(loaded: LoadedModel) -> None:
    engine, reports = reported(loaded)
    chat = talk(engine, loaded)
    engine.command(Fork(chat.name, "child"))
    shared = len(chat.kv)
    chat.ask("And the train?")
    result = map_of(chat, reports)
    assert result.shared_with == ("child",)
    assert sum(b.tokens for b in result.blocks if b.shared) == shared < len(chat.kv)


def test_blocks_have_their_precision_and_the_newest_tokens_stay_exact(loaded: LoadedModel) -> None:
    engine, reports = reported(loaded)
    chat = talk(engine, loaded)
    chat.ask(sentences(9))
    engine.command(SetPrecision(chat.name, KVPrecision.INT8))
    chat.precision = KVPrecision.INT8
    result = map_of(chat, reports)
    start = chat.kv.edges[-2]
    assert {b.precision for b in result.blocks if b.start < start} == {"int8"}
    assert {b.precision for b in result.blocks if b.start >= start} == {"fp32"}
    assert sum(b.bytes for b in result.blocks) == pytest.approx(chat.kv.used_bytes, abs=len(result.blocks))
    by_precision = [
        max(b.bytes / b.tokens for b in result.blocks if b.precision == p) for p in ("int8", "fp32")
    ]
    assert by_precision[0] < by_precision[1] / 2


def test_saved_tokens_are_marked_and_shown_from_disk(loaded: LoadedModel, tmp_path: Path) -> None:
    engine, reports = reported(loaded, DiskTier(DiskStore(tmp_path / "store", 1 << 30)))
    chat = talk(engine, loaded)
    result = map_of(chat, reports)
    assert {(b.in_memory, b.on_disk) for b in result.blocks} == {(True, True)}
    assert result.disk_bytes > 0
    tokens = len(chat.kv)
    engine.command(Spill(chat.name))
    result = map_of(chat, reports)
    assert sum(b.tokens for b in result.blocks) == tokens
    assert {b.on_disk for b in result.blocks} == {True}
    assert {b.precision for b in result.blocks} == {"fp32"}
    # the system prefix may stay in memory
    assert not any(b.in_memory for b in result.blocks if b.message)
    engine.close()


def test_without_a_cache_there_are_layers_and_a_reason_and_no_blocks(loaded: LoadedModel) -> None:
    engine, reports = reported(loaded)
    chat = talk(engine, loaded, mode=CacheMode.OFF)
    result = map_of(chat, reports)
    assert result.blocks == ()
    assert result.bytes == 0
    assert "off" in result.note
    assert result.layers == (LayerGroup("full", loaded.facts.layers, 0, 0),)


def test_layers_of_each_kind_are_a_row_with_their_bytes() -> None:
    chat = tiny_chat()
    torch.manual_seed(0)
    model = seeded_model(MambaConfig(vocab_size=len(chat), hidden_size=64, num_hidden_layers=3, state_size=8))
    loaded = assemble(model, chat, "tiny-mamba")
    engine, reports = reported(loaded)
    talking = talk(engine, loaded)
    (group,) = map_of(talking, reports).layers
    assert (group.kind, group.layers, group.window) == ("recurrent", 3, 0)
    assert group.bytes == sum(layer.state_bytes for layer in talking.kv.states) > 0


def test_layers_with_a_window_say_how_far_they_see_without_opening_the_model() -> None:
    chat = tiny_chat()
    config = Gemma2Config(vocab_size=len(chat), hidden_size=64, num_hidden_layers=4, sliding_window=40)
    loaded = replace(assemble(seeded_model(config), chat, "tiny-gemma"), open_model=pytest.fail)
    engine, reports = reported(loaded)
    talking = Chat(engine, loaded)
    talking.messages.append(user("Which pass is open in May?"))
    layers = [(group.kind, group.layers, group.window) for group in map_of(talking, reports).layers]
    assert layers == [("sliding", 2, 40), ("full", 2, 0)]


# --- what a turn did with every message ------------------------------------------------------------------


def told_at_both_ends(
    played: Played,
) -> tuple[dict[int, dict[TokenStatus, int]], dict[int, dict[TokenStatus, int]]]:
    return statuses(played.started.spans), statuses(played.finished.spans)


def test_a_turn_reports_a_status_for_the_tokens_of_every_message(loaded: LoadedModel) -> None:
    engine, _ = reported(loaded)
    chat = talk(engine, loaded)
    played = chat.ask("And the train?")
    stats = played.finished.stats
    started, finished = told_at_both_ends(played)
    assert list(finished) == [0, 1, 2, 3, 4, 5, 6]
    for message in range(4):
        assert set(finished[message]) == {TokenStatus.REUSED}
    assert set(finished[5]) == {TokenStatus.READ}
    assert finished[6][TokenStatus.WRITTEN] == stats.generated_tokens
    counted = {fate: sum(each.get(fate, 0) for each in finished.values()) for fate in TokenStatus}
    assert counted[TokenStatus.REUSED] == stats.reused_tokens
    assert counted[TokenStatus.READ] == stats.prefilled_tokens
    assert {m: f for m, f in started.items() if m < 6} == {m: f for m, f in finished.items() if m < 6}


def test_without_a_cache_every_message_was_never_cached(loaded: LoadedModel) -> None:
    engine, _ = reported(loaded)
    played = talk(engine, loaded, mode=CacheMode.OFF).ask("And the train?")
    for result in told_at_both_ends(played):
        assert all(set(result[message]) == {TokenStatus.UNCACHED} for message in range(6))


def test_evicted_messages_have_the_status_evicted(loaded: LoadedModel) -> None:
    engine, _ = reported(loaded)
    chat = talk(engine, loaded)
    chat.evicted_messages = 2
    started, finished = told_at_both_ends(chat.ask("And the train?"))
    for result in (started, finished):
        assert result[1] == result[2] == {TokenStatus.EVICTED: 0}
        assert TokenStatus.EVICTED not in result[3]
    assert finished[3][TokenStatus.READ] > finished[3].get(
        TokenStatus.REUSED, 0
    )  # the words before its text are the same


def test_a_gap_made_during_a_turn_is_reported_at_its_end() -> None:
    loaded = tiny_loaded(context=128)
    engine, _ = reported(loaded)
    chat = talk(engine, loaded, policy=EvictionPolicy.SINKS)
    played = chat.ask(sentences(9))
    gone = sum(span.tokens for span in played.finished.spans if span.status is TokenStatus.EVICTED)
    assert gone == len(chat.kv.ids) - len(chat.kv) > 0
    again = chat.ask("And?")
    evicted = [span for span in again.started.spans if span.status is TokenStatus.EVICTED]
    assert sum(span.tokens for span in evicted) >= gone


def test_a_continued_answer_is_one_message(loaded: LoadedModel) -> None:
    engine, _ = reported(loaded)
    chat = talk(engine, loaded)
    finished = statuses(chat.answer().finished.spans)
    assert max(finished) == 4
    assert {TokenStatus.REUSED, TokenStatus.WRITTEN} <= set(finished[4])
