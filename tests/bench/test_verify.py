"""`kvchat verify`: a correct cache passes, and each defect fails its own checks."""

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from kvchat.bench.verify import QUESTIONS, TOLERANCE, hiding_mask, run_checks
from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.disk import snapshot
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.packed_rows import PackedRows, unpack_rows
from kvchat.cache.token_index import TokenIndex
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.speculative import PromptLookup
from kvchat.errors import KvchatError
from tests.cli import test_cli
from tests.cli.test_cli import FIRST, SECOND, Asking, Done

kvchat = test_cli.kvchat
ask = test_cli.ask

CHECKS = [
    "kept across turns",
    "prefilled in chunks of 7",
    "drafted, and taken back",
    "restored from disk",
    "forked",
    "cropped by an edit",
    "after turns",
    "after sinks",
    "after snapkv",
]
TOKENS, LONG = 8, 60
"""Tokens of an answer; during a long one the context becomes full."""


def table(done: Done) -> dict[str, tuple[int, str, float]]:
    """Check → (tokens compared, first difference, largest gap), as they were printed."""
    found = re.findall(r"^(\S.*?) {2,}(\d+) +(none|token \d+) +(\d+\.\d{6})$", done.out, re.MULTILINE)
    return {name: (int(tokens), difference, float(gap)) for name, tokens, difference, gap in found}


# correct caches


def test_a_correct_cache_passes_all_checks(ask: Asking) -> None:
    done = ask.shell("verify", "-m", ask.folder, "--threads", "1", "--tokens", str(TOKENS))
    checks = table(done)
    assert list(checks) == CHECKS
    assert {difference for _, difference, _ in checks.values()} == {"none"}
    assert all(2 <= tokens <= TOKENS and gap <= TOLERANCE for tokens, _, gap in checks.values())
    assert (done.code, done.out.splitlines()[-1]) == (0, "All equal.")
    assert "greedy" in done.err
    assert ask.shell.files() == []


def test_verify_uses_the_questions_of_a_conversation(ask: Asking) -> None:
    talk = ask.json(FIRST, SECOND).turns[0]["conversation"]
    before = ask.shell.saved(talk)
    done = ask.shell("verify", talk[:6], "--threads", "1", "--tokens", str(TOKENS))
    assert (done.code, list(table(done))) == (0, CHECKS)
    assert ask.shell.saved(talk) == before


def test_too_few_questions_and_unknown_ids_are_one_sentence(ask: Asking) -> None:
    talk = ask.json(FIRST).turn["conversation"]
    assert "fewer than two questions" in ask.shell("verify", talk).complaint
    assert ask.shell("verify", "zzz").complaint.startswith("No conversation starts with 'zzz'")


def test_checks_require_fp32(tiny: LoadedModel) -> None:
    rounded = replace(tiny, facts=replace(tiny.facts, weights_dtype="bf16"))
    with pytest.raises(ValueError, match="fp32 only"):
        next(run_checks(rounded, QUESTIONS, TOKENS))


def test_models_without_gap_support_skip_sinks_and_snapkv(
    tiny: LoadedModel,
) -> None:
    refusing = replace(tiny, facts=replace(tiny.facts, gap_refusal="its mask counts indices."))
    checks = list(run_checks(refusing, QUESTIONS, TOKENS))
    assert [check.name for check in checks] == CHECKS[:-2]
    assert all(check.equal for check in checks)


def repeating(loaded: LoadedModel) -> LoadedModel:
    """A model that repeats its last token: output and input embeddings are equal, and layers add little."""
    model = deepcopy(loaded.model)
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(0.02)
    return replace(loaded, open_model=lambda: model)


def test_drafted_answers_are_compared_row_by_row(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass gives several rows of logits, and the context becomes full during an answer."""
    accepted: list[int] = []
    record = PromptLookup.record

    def counting(self: PromptLookup, proposed: int, right: int) -> None:
        record(self, proposed, right)
        accepted.append(right)

    monkeypatch.setattr(PromptLookup, "record", counting)
    checks = list(run_checks(repeating(tiny), QUESTIONS[1:], LONG))
    assert sum(accepted) > LONG, "the model does not repeat itself"
    assert [check.name for check in checks] == CHECKS
    assert all(check.equal for check in checks), checks
    compared = {check.name: check.compared for check in checks}
    assert compared["kept across turns"] == LONG
    assert 0 < compared["after turns"] < LONG, "what was said before the oldest turns went is not compared"


# defects: each must fail exactly the checks that depend on it


@torch.inference_mode()
def exchange_heads(layers: Sequence[object]) -> None:
    """Swaps the values of the KV heads."""
    for layer in layers:
        assert isinstance(layer, DenseLayer)
        assert layer.values is not None
        layer.values.copy_(layer.values.flip(1))


def spoiling_restores(patch: pytest.MonkeyPatch) -> None:
    right = unpack_rows

    def unpack(kv: ConversationKV, packed: PackedRows) -> None:
        right(kv, packed)
        exchange_heads(kv.layers)

    patch.setattr(snapshot, "unpack_rows", unpack)


def spoiling_forks(patch: pytest.MonkeyPatch) -> None:
    right = ConversationKV.fork

    def fork(self: ConversationKV, length: int) -> ConversationKV:
        other = right(self, length)
        exchange_heads(other.layers)
        return other

    patch.setattr(ConversationKV, "fork", fork)


def keeping_what_was_replaced(patch: pytest.MonkeyPatch) -> None:
    """A truncated cache has the right length, but its last row is that of the next token."""
    right = ConversationKV.truncate

    @torch.inference_mode()
    def truncate(self: ConversationKV, length: int) -> None:
        cropped = 0 < length < len(self)
        right(self, length)
        for layer in self.stored:
            if cropped and isinstance(layer, DenseLayer) and layer.values is not None:
                layer.values[:, :, length - 1] = layer.values[:, :, length]

    patch.setattr(ConversationKV, "truncate", truncate)


def forgetting_positions(patch: pytest.MonkeyPatch) -> None:
    """After an eviction the next token gets the position that ignores the gap."""
    patch.setattr(TokenIndex, "next_position", property(lambda index: len(index.rows)))


SPOILED: list[tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = [
    (spoiling_restores, {"restored from disk"}),
    (spoiling_forks, {"forked"}),
    (
        keeping_what_was_replaced,
        {"drafted, and taken back", "cropped by an edit", "after turns", "after snapkv"},
    ),
    (forgetting_positions, {"after sinks", "after snapkv"}),
]


@pytest.mark.parametrize(("spoil", "wrong"), SPOILED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_defect_fails_exactly_its_checks(
    tiny: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pytest.MonkeyPatch], None],
    wrong: set[str],
) -> None:
    spoil(monkeypatch)
    checks = list(run_checks(tiny, QUESTIONS, TOKENS))
    assert {check.name for check in checks if not check.equal} == wrong
    assert all(check.gap > TOLERANCE for check in checks if check.name in wrong)


def test_a_changed_answer_exits_with_1_and_names_the_token(
    ask: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiling_restores(monkeypatch)
    done = ask.shell("verify", "-m", ask.folder, "--threads", "1", "--tokens", str(TOKENS))
    checks = table(done)
    assert done.code == 1
    assert done.out.splitlines()[-1] == "The cache changed an answer."
    assert list(checks) == CHECKS
    differing = {name: difference for name, (_, difference, _) in checks.items() if difference != "none"}
    assert list(differing) == ["restored from disk"]
    assert re.fullmatch(rf"token [1-{TOKENS}]", differing["restored from disk"])


def test_a_refused_restore_is_an_error(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("nothing fits")

    monkeypatch.setattr(snapshot, "unpack_rows", refuse)
    with pytest.raises(KvchatError, match=r"Nothing was restored: .*nothing fits"):
        list(run_checks(tiny, QUESTIONS, TOKENS))


# the expected logits


def test_the_mask_hides_evicted_tokens_from_later_ones() -> None:
    visible = hiding_mask(5, [(3, frozenset({0, 2}))])[0, 0] == 0
    assert visible.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 1, 1, 1],
    ]
    assert torch.equal(hiding_mask(4, [])[0, 0] == 0, torch.ones(4, 4, dtype=torch.bool).tril())
