"""The compiled step: close to transformers, and bit-identical however tokens are batched.

Two packages are built once, by the process that users start: a Llama in fp32, which plain transformers says
what is right of, and a model with sliding windows and a softcap in int8.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, get_args

import psutil
import pytest
import torch
from transformers import Gemma2Config

from kvchat.bench.verify import QUESTIONS, can_check_compiled, run_compiled_checks
from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import Memory
from kvchat.cache.packed_rows import pack_rows, unpack_rows
from kvchat.chat.port import EngineEvent
from kvchat.config.paths import find_paths
from kvchat.contract import (
    CacheCommand,
    CacheMap,
    CacheMode,
    CountTokens,
    Died,
    Drop,
    EstimateCost,
    Fork,
    Inspect,
    KVPrecision,
    Pin,
    Ready,
    Refused,
    Report,
    Sampling,
    SetBudget,
    SetPrecision,
    Spill,
    Warm,
)
from kvchat.engine.compiled import build as building
from kvchat.engine.compiled import export
from kvchat.engine.compiled.package import (
    LIBRARIES,
    compiler,
    fingerprint,
    installed_version,
    package_folder,
    record_digests,
)
from kvchat.engine.compiled.runner import (
    CompiledReader,
    CompiledStep,
    Description,
    addressed,
    find_step,
)
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.fingerprint import identify
from kvchat.engine.model.forward import CachedReader
from kvchat.engine.model.loader import LoadedModel, load_model
from kvchat.engine.setup.prepare import prepare
from kvchat.engine.speculative import Drafter, PromptLookup
from kvchat.engine_process.client import LinkedEngine
from kvchat.engine_process.server import EngineOptions
from kvchat.errors import KvchatError
from kvchat.models.resolve import compiled_folder
from kvchat.models.staging import Progress
from tests.engine.conftest import need_compiler
from tests.support.engine_driver import TOLERANCE, Chat, sentences, uncached_logits, user
from tests.support.oracle import tier
from tests.support.tiny import TRAINING_TEXT, seeded_model, tiny_chat, tiny_config

IDS = [(7 * i + i * i) % 400 + 5 for i in range(300)]
CUTS = {
    "one by one": [1] * 300,
    "in two": [170, 130],
    "unevenly": [1, 63, 64, 2, 65, 5, 100],
}
GREEDY = Sampling(temperature=0, max_tokens=40)
CLEAR = 0.25
"""Nats between the two best tokens that no rounding bridges."""
PARTS = ("step.so", "step.json", "kernels.so", "weights.safetensors", "package.json", "tokenizer.json")
"""Files of a package."""
PRECISIONS = [("llama", "auto"), ("gemma", "auto"), ("gemma", "int8"), ("gemma", "int4")]
"""Models, and precisions of their caches: rounding in fp32 may become a step of a quantised number."""
each_precision = pytest.mark.parametrize(("built", "kv"), PRECISIONS, indirect=["built"])


@dataclass(frozen=True)
class Built:
    """A model folder, the folder of compiled code, and what was reported while its package was made."""

    root: Path
    folder: Path
    weights: str
    progress: list[Progress]
    loaded: LoadedModel
    exact: LoadedModel
    """The same model as transformers runs it, in fp32."""

    @property
    def package(self) -> Path:
        return package_folder(self.root, self.folder, self.weights)

    @property
    def step(self) -> CompiledStep:
        assert self.loaded.step is not None
        return self.loaded.step

    def assert_same(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Bit for bit; in fp32 products are torch's, which depend on how many tokens there are."""
        if self.weights == "fp32":
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        else:
            assert torch.equal(found, expected)

    def assert_same_contents(self, one: ConversationKV, other: ConversationKV) -> None:
        assert (one.ids, one.rows, one.edges) == (other.ids, other.rows, other.edges)
        for mine, theirs in zip(one.stored, other.stored, strict=True):
            for a, b in zip(mine.read(), theirs.read(), strict=True):
                self.assert_same(a, b)

    def load(self, root: Path | None = None) -> LoadedModel:
        root = root or self.root
        return load_model(self.folder, "tiny", precision=self.weights, threads=2, compiled=root)

    def copy_packages(self, data: Path) -> tuple[Path, Path]:
        """Another data folder with the same packages: (folder of compiled code, package)."""
        shutil.copytree(self.root, data / "compiled")
        return data / "compiled", data / "compiled" / self.package.relative_to(self.root)

    def read(self, kv: ConversationKV, cuts: Sequence[int], start: int = 0) -> torch.Tensor:
        """Reads `IDS` from `start` on in chunks of those sizes; logits after each token."""
        reader = self.loaded.reader(kv)
        assert isinstance(reader, CompiledReader)
        ends = [start + sum(cuts[:i]) for i in range(len(cuts) + 1)]
        return torch.cat([reader.read(IDS[a:b], keep=b - a) for a, b in pairwise(ends)])


def build(folder: Path, weights: str) -> Built:
    need_compiler()
    progress: list[Progress] = []
    root = folder.with_name("data") / "compiled"
    building.prepare_step(root, folder, weights, progress.append)
    exact = load_model(folder, "tiny", precision="fp32", threads=2)
    loaded = load_model(folder, "tiny", precision=weights, threads=2, compiled=root)
    return Built(root, folder, weights, progress, loaded, exact)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Two layers in fp32."""
    folder, chat = tmp_path_factory.mktemp("llama") / "tiny", tiny_chat()
    config = tiny_config(chat)
    config.num_hidden_layers = 2
    seeded_model(config).save_pretrained(folder)
    chat.save_pretrained(folder)
    return build(folder, "fp32")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A layer with a window and one without, both with a softcap, in int8."""
    folder, chat = tmp_path_factory.mktemp("gemma") / "tiny", tiny_chat()
    config = Gemma2Config(
        vocab_size=len(chat),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=40,
        attn_logit_softcapping=20.0,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=chat.bos_token_id,
        eos_token_id=chat.eos_token_id,
        pad_token_id=chat.pad_token_id,
    )
    seeded_model(config).save_pretrained(folder)
    chat.save_pretrained(folder)
    return build(folder, "int8")


@pytest.fixture(scope="module", params=["llama", "gemma"])
def built(request: pytest.FixtureRequest) -> Built:
    found: Built = request.getfixturevalue(request.param)
    return found


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


# ---- the same logits, and the same bits --------------------------------------------------------------------


def test_every_logit_in_fp32_is_that_of_the_model(llama: Built) -> None:
    found = llama.read(llama.loaded.new_kv(), [len(IDS)])
    exact = uncached_logits(llama.exact.model, IDS)
    torch.testing.assert_close(found, exact, atol=TOLERANCE, rtol=0)
    assert_clear_ones_agree(exact, found)


def test_weights_in_8_bits_cost_little(gemma: Built) -> None:
    found = gemma.read(gemma.loaded.new_kv("fp32"), [len(IDS)]).log_softmax(-1)
    exact = uncached_logits(gemma.exact.model, IDS).log_softmax(-1)
    assert float((exact.exp() * (exact - found)).sum(-1).mean()) < 0.01
    assert gemma.step.description.cost.kl < 0.01


def assert_clear_ones_agree(exact: torch.Tensor, found: torch.Tensor) -> None:
    best = exact.log_softmax(-1).topk(2).values
    clear = best[:, 0] - best[:, 1] > CLEAR
    assert clear.any()
    assert torch.equal(found.argmax(-1)[clear], exact.argmax(-1)[clear])


def test_verify_finds_compiled_code_equal_bit_for_bit_and_a_wrong_cache(
    gemma: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = list(run_compiled_checks(gemma.loaded, QUESTIONS, 8))
    assert "drafted, and taken back" in {check.name for check in checks}
    assert [(check.differing, check.gap) for check in checks] == [(None, 0.0)] * 7
    right = ConversationKV.fork

    def fork(self: ConversationKV, length: int) -> ConversationKV:
        other = right(self, length)
        other.unshare(0)
        for layer in other.layers:
            assert isinstance(layer, DenseLayer)
            assert layer.values is not None
            layer.values.mul_(2)
        return other

    monkeypatch.setattr(ConversationKV, "fork", fork)
    checks = list(run_compiled_checks(gemma.loaded, QUESTIONS, 8))
    assert [check.name for check in checks if not check.equal] == ["forked"]


def test_verify_skips_compiled_code_that_depends_on_the_batch_size(
    llama: Built,
) -> None:
    assert not can_check_compiled(llama.loaded)
    with pytest.raises(ValueError, match="packed weights only"):
        next(run_compiled_checks(llama.loaded, QUESTIONS, 8))


@each_precision
@pytest.mark.parametrize("cuts", CUTS)
def test_results_are_bit_identical_for_every_batch_size(built: Built, kv: str, cuts: str) -> None:
    """Cold and chunked and stepped; past 256 tokens, where the layers have grown."""
    whole, cut = built.loaded.new_kv(kv), built.loaded.new_kv(kv)
    expected = built.read(whole, [len(IDS)])
    built.assert_same(built.read(cut, CUTS[cuts]), expected)
    built.assert_same_contents(cut, whole)


@each_precision
def test_restored_and_forked_caches_continue_bit_identically(built: Built, kv: str) -> None:
    live = built.loaded.new_kv(kv)
    built.read(live, [150])
    forked = live.fork(150)
    restored = built.loaded.new_kv(kv)
    unpack_rows(restored, pack_rows(live))
    expected = built.read(live, [100], start=150)
    for other in (forked, restored):
        built.assert_same(built.read(other, [1, 30, 69], start=150), expected)
        built.assert_same_contents(other, live)


def test_a_cropped_cache_continues_bit_identically(built: Built) -> None:
    kv = built.loaded.new_kv()
    first = built.read(kv, [200])
    kv.truncate(120)
    built.assert_same(built.read(kv, [50, 30], start=120), first[120:])


def test_a_fork_never_writes_into_the_memory_that_it_shares(built: Built) -> None:
    live = built.loaded.new_kv()
    built.read(live, [100])
    before = [tensor.clone() for layer in live.stored for tensor in layer.read()]
    built.loaded.reader(live.fork(50)).read([3, 4, 5])
    after = [tensor for layer in live.stored for tensor in layer.read()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@each_precision
def test_results_are_bit_identical_for_one_and_two_threads(built: Built, kv: str) -> None:
    two = built.read(built.loaded.new_kv(kv), [len(IDS)])
    torch.set_num_threads(1)
    built.assert_same(built.read(built.loaded.new_kv(kv), [len(IDS)]), two)


def test_tokens_after_a_gap_have_the_given_positions(llama: Built) -> None:
    compiled, eager = llama.loaded.new_kv(), llama.exact.new_kv()
    llama.read(compiled, [40])
    CachedReader(llama.exact.model, eager).read(IDS[:40])
    for kv in (compiled, eager):
        kv.select([*range(4), *range(20, 40)])
    found = llama.loaded.reader(compiled).read([17])
    expected = CachedReader(llama.exact.model, eager).read([17])
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert (compiled.positions[-1], len(compiled)) == (40, 25)


def test_without_a_cache_everything_is_read_again_and_is_the_same(built: Built) -> None:
    reader = built.loaded.uncached_reader()
    expected = built.read(built.loaded.new_kv(), [40])
    built.assert_same(reader.read(IDS[:39]), expected[38:39])
    built.assert_same(reader.read(IDS[39:40]), expected[39:])
    assert reader.evaluated == 39 + 40
    with pytest.raises(ValueError, match="no drafts to verify"):
        reader.read([1, 2], keep=2)


def test_only_the_logits_that_are_wanted_are_computed(built: Built) -> None:
    expected = built.read(built.loaded.new_kv(), [200])
    for keep in (1, 5, 130, 200):
        found = built.loaded.reader(built.loaded.new_kv()).read(IDS[:200], keep)
        built.assert_same(found, expected[-keep:])


def test_a_failing_step_changes_no_layer(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    kv, other = built.loaded.new_kv(), built.loaded.new_kv()
    built.read(kv, [255])
    expected = built.read(other, [260])[255:]
    with monkeypatch.context() as patch:
        patch.setattr(CompiledStep, "run", lambda *_: [][0])
        for _ in range(2):
            with pytest.raises(IndexError):
                built.loaded.reader(kv).read(IDS[255:258])
    assert [layer.length for layer in kv.stored] == [255] * len(kv.stored)
    built.assert_same(built.read(kv, [5], start=255), expected)


def test_what_was_unloaded_is_loaded_again(built: Built) -> None:
    expected = built.read(built.loaded.new_kv(), [50])
    built.loaded.unload()
    assert built.step._weights == {}
    built.assert_same(built.read(built.loaded.new_kv(), [50]), expected)


# ---- chats -------------------------------------------------------------------------------------------------


def chatted(
    loaded: LoadedModel,
    folder: Path | None = None,
    new_drafter: Callable[[], Drafter | None] = lambda: None,
    sampling: Sampling = GREEDY,
    kv: str = "auto",
    mode: CacheMode = CacheMode.ON,
) -> tuple[list[tuple[int, ...]], Chat]:
    """The answers of three turns, and the chat; with a folder, each turn runs in a new engine."""

    def engine() -> LocalEngine:
        return LocalEngine(loaded, disk=tier(folder) if folder else None, new_drafter=new_drafter)

    chat = Chat(engine(), loaded, sampling=sampling, mode=mode)
    chat.precision = KVPrecision(kv)
    answers: list[tuple[int, ...]] = []
    for text in (sentences(6), "And the train?", "Why?"):
        if folder and answers:
            chat.engine.close()
            chat.engine = engine()
        chat.messages.append(user(text))
        finished = list(chat.engine.turn(chat.request()))[-1]
        chat._add(finished)  # type: ignore[arg-type]
        answers.append(chat.messages[-1].token_ids)
    return answers, chat


@each_precision
def test_cached_restored_and_uncached_chats_give_the_same_answers(
    built: Built, tmp_path: Path, kv: str
) -> None:
    kept, live = chatted(built.loaded, kv=kv)
    restored, other = chatted(built.loaded, folder=tmp_path, kv=kv)
    assert restored == kept
    built.assert_same_contents(other.kv, live.kv)
    cold = built.loaded.new_kv(kv)
    built.loaded.reader(cold).read(live.kv.ids)
    built.assert_same_contents(cold, live.kv)
    if kv == "auto":
        assert chatted(built.loaded, mode=CacheMode.OFF)[0] == kept


def test_a_chat_is_read_by_the_step_alone(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadedModel, "model", None)
    _, chat = chatted(built.load())
    assert chat.engine.facts.path == f"compiled {built.step.description.weights}"


def test_no_cache_command_opens_the_model(
    built: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """transformers takes seconds to import, and the model takes its memory twice."""
    monkeypatch.setattr(LoadedModel, "model", None)
    reports: list[Report] = []
    loaded = built.load()
    chat = Chat(LocalEngine(loaded, disk=tier(tmp_path), report=reports.append), loaded, sampling=GREEDY)
    chat.messages.append(user(sentences(6)))
    chat._add(list(chat.engine.turn(chat.request()))[-1])  # type: ignore[arg-type]
    request, name = chat.request(), chat.name
    commands: list[CacheCommand] = [
        Inspect(request),
        EstimateCost("price", request),
        CountTokens("count", ("Which pass?",)),
        Fork(name, "child"),
        Pin("child", True),
        SetPrecision("child", KVPrecision.INT8),
        Inspect(replace(request, conversation="child")),
        Spill(name),
        Warm(name),
        SetBudget(1 << 30),
        Drop(name),
    ]
    assert {type(command) for command in commands} == {*get_args(CacheCommand)}
    for command in commands:
        chat.engine.command(command)
    chat.engine.close()
    assert [report for report in reports if isinstance(report, Refused)] == []
    first, second = (report for report in reports if isinstance(report, CacheMap))
    windows = {"full": 0} | ({"sliding": 40} if built.weights == "int8" else {})
    for found in (first, second):
        assert {group.kind: group.window for group in found.layers} == windows
        assert sum(block.tokens for block in found.blocks) > 0


class Anything:
    """Drafts that are right, wrong and partly right, in turn."""

    def __init__(self, answers: list[tuple[int, ...]]) -> None:
        self.answers, self.asked = answers, 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        self.asked += 1
        for answer in self.answers:
            for said in range(len(answer), 0, -1):
                if tuple(tokens[-said:]) == answer[:said]:
                    coming = [*answer[said : said + 15]]
                    guesses = (coming, [3] * 7, [*coming[:2], 3, 4, 5])
                    return guesses[self.asked % 3][:most]
        return []

    def record(self, proposed: int, accepted: int) -> None:
        pass


@each_precision
@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0, max_tokens=70), Sampling(temperature=0.9, top_p=0.9, seed=3, max_tokens=70)],
    ids=["greedy", "drawn"],
)
def test_drafts_change_no_answer_and_no_bit(built: Built, sampling: Sampling, kv: str) -> None:
    plain, expected = chatted(built.loaded, sampling=sampling, kv=kv)
    for drafter in (lambda: Anything(plain), PromptLookup):
        answers, chat = chatted(built.loaded, new_drafter=drafter, sampling=sampling, kv=kv)
        assert answers == plain
        built.assert_same_contents(chat.kv, expected.kv)


def test_caches_of_the_model_and_of_its_step_are_not_mixed(llama: Built) -> None:
    ours, theirs = (
        identify(each.facts, each.revision, each.template, each.shape.rotary_frequencies)
        for each in (llama.loaded, llama.exact)
    )
    assert ours.difference(theirs.as_dict()) == "weights precision changed: fp32 → fp32, compiled fp32"


def test_a_package_describes_its_model(built: Built) -> None:
    loaded, exact = built.loaded, built.exact
    for name in ("template", "end_ids", "shape", "revision", "vocabulary"):
        assert getattr(loaded, name) == getattr(exact, name), name
    assert loaded.tokenizer.to_str() == exact.tokenizer.to_str()
    assert replace(exact.facts, notes=()) == replace(
        loaded.facts,
        notes=(),
        **{n: getattr(exact.facts, n) for n in ("path", "weights_dtype", "weights_bytes", "kv_dtype")},
        kv_dtype_bytes=exact.facts.kv_dtype_bytes,
    )


# ---- memory that doesn't fit is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"heads": 1}, {"key_dim": 8}, {"value_dim": 32}],
    ids=["heads", "keys", "values"],
)
def test_memory_of_other_heads_is_refused(built: Built, change: dict[str, int]) -> None:
    memories = memories_of(built)
    memories[1] = memories[1]._replace(**change)
    with pytest.raises(ValueError, match="2 layers with other heads than"):
        built.step.run([5], 0, 0, memories, 1)


def test_other_lengths_and_numbers_of_layers_are_refused(built: Built) -> None:
    memories = memories_of(built)
    with pytest.raises(ValueError, match="no room for rows 255 to 256"):
        built.step.run([5, 6], 255, 255, memories, 1)
    with pytest.raises(ValueError, match="no room for rows 3 to 3"):
        built.step.run([5], 3, 3, [memory._replace(first=4) for memory in memories], 1)
    with pytest.raises(ValueError, match="2 layers with other heads"):
        built.step.run([5], 0, 0, memories[:1], 1)
    for keep in (0, 3):
        with pytest.raises(ValueError, match=f"{keep} logits of 2 tokens"):
            built.step.run([5, 6], 0, 0, memories, keep)


def memories_of(built: Built) -> list[Memory]:
    layers = addressed(built.loaded.new_kv())
    for layer in layers:
        layer.reserve(1)
    return [layer.memory() for layer in layers]


def test_advancing_beyond_the_reserved_rows_is_refused(built: Built) -> None:
    layer = built.loaded.new_kv().stored[0]
    assert isinstance(layer, DenseLayer)
    layer.reserve(1)
    with pytest.raises(ValueError, match="257 tokens after 0 don't fit a capacity of 256"):
        layer.advance(257)


# ---- the package -------------------------------------------------------------------------------------------


def test_building_reports_progress_and_leaves_only_the_package(built: Built) -> None:
    done = [progress.done for progress in built.progress if progress.stage == "compile"]
    assert (done[0], done[-1]) == (0, building.DONE)
    assert done == sorted(done)
    beside = {".lock", "model.txt", "files.json"}
    assert {path.name for path in built.package.parent.iterdir()} <= {built.package.name, *beside}
    assert {path.name for path in built.package.iterdir()} == {*PARTS, "digests.json"}
    assert not (built.folder / "compiled").exists()
    assert built.step.description.weights == built.weights


def test_an_existing_package_is_not_built_again(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_make", None)
    assert building.prepare_step(built.root, built.folder, built.weights, lambda _: None) == built.package


def test_a_package_loads_without_compiler_model_code_and_temporary_files(
    llama: Built, tmp_path: Path
) -> None:
    """Ended by force, as a kill would: nothing that it wrote could be cleaned up."""
    script = (
        "import os, sys, pathlib; from kvchat.engine.model.loader import load_model\n"
        f"root, folder = pathlib.Path({str(llama.root)!r}), pathlib.Path({str(llama.folder)!r})\n"
        "loaded = load_model(folder, 'tiny', precision='fp32', threads=1, compiled=root)\n"
        "loaded.reader(loaded.new_kv()).read([5, 6, 7]); assert loaded.step\n"
        "from kvchat.engine.engine import LocalEngine; from kvchat.contract import *; reports = []\n"
        "request = TurnRequest('t', 'c', (PromptMessage('user', 'Bread?'),), CacheMode.ON, Sampling())\n"
        "LocalEngine(loaded, report=reports.append).command(Inspect(request))\n"
        "assert isinstance(reports[0], CacheMap), reports\n"
        "unwanted = ('torch._inductor', 'torch._dynamo', 'transformers.modeling_utils')\n"
        "print([name for name in unwanted if name in sys.modules], flush=True); os._exit(9)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (9, "[]"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_package_belongs_to_its_model_precision_and_machine(
    llama: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, root = tmp_path / "other", llama.root
    shutil.copytree(llama.folder, other)
    mine = fingerprint(root, other, "fp32")
    assert mine == fingerprint(root, llama.folder, "fp32")
    assert find_step(root, other, "fp32") is None
    assert fingerprint(root, other, "bf16") != mine
    for name in ("cpu_features", "installed_version"):
        with monkeypatch.context() as patch:
            patch.setattr(f"kvchat.engine.compiled.package.{name}", lambda *_: "another")
            assert fingerprint(root, other, "fp32") != mine
    seen = {mine}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        with (other / name).open("r+b") as file:
            file.seek(100)
            file.write(b"x")
        seen.add(fingerprint(root, other, "fp32"))
    assert len(seen) == 5


def test_kernels_of_another_layout_are_refused(llama: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("abi.ABI", 2), ("abi.TILE", 16), ("abi.GROUP", 64), ("runner.BLOCK", 32)):
        with monkeypatch.context() as patch:
            patch.setattr(f"kvchat.engine.compiled.{name}", value)
            with pytest.raises(KvchatError, match="lay out memory in another way"):
                CompiledStep(llama.package)
    swapped = (Memory._fields[1], Memory._fields[0], *Memory._fields[2:])
    monkeypatch.setattr(Memory, "_fields", swapped)
    with pytest.raises(KvchatError, match="lay out memory in another way"):
        CompiledStep(llama.package)


# ---- only code of the user's own is loaded -----------------------------------------------------------------


def native_code(folder: Path, ran: Path) -> Path:
    """A shared library that makes the file `ran` when it is loaded."""
    source, library = folder / "hostile.c", folder / "hostile.so"
    source.write_text(
        "#include <stdio.h>\n"
        f'__attribute__((constructor)) static void run(void) {{ fclose(fopen("{ran}", "w")); }}\n'
    )
    subprocess.run([compiler() or "g++", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


def test_native_code_in_a_models_folder_is_never_loaded(llama: Built, tmp_path: Path) -> None:
    """Under the names of this version and of earlier ones, in a process that has no kernels yet."""
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(llama.folder, model)
    library = native_code(tmp_path, ran)
    name = llama.package.name
    for place in (name, name.rpartition("-")[0], f"{llama.package.parent.name}/{name}"):
        package = model / "compiled" / place
        shutil.copytree(llama.package, package)
        for code in ("kernels.so", "step.so"):
            shutil.copy(library, package / code)
        record_digests(package)
    script = (
        "import pathlib, sys; from kvchat.engine.model.loader import load_model\n"
        "folder, root = map(pathlib.Path, sys.argv[1:])\n"
        "loaded = load_model(folder, 'tiny', precision='fp32', threads=1, compiled=root)\n"
        "print(loaded.step, loaded.facts.notes[-1])"
    )
    command = [sys.executable, "-c", script, str(model), str(tmp_path / "data" / "compiled")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("None it is not compiled: kvchat models prepare"), done.stdout
    assert not ran.exists()
    ctypes.CDLL(str(library))
    assert ran.exists()  # it would have run


def test_native_code_that_was_put_into_a_package_is_not_loaded(llama: Built, tmp_path: Path) -> None:
    root, package = llama.copy_packages(tmp_path / "data")
    ran = tmp_path / "ran"
    shutil.copy(native_code(tmp_path, ran), package / "step.so")
    loaded = llama.load(root)
    assert loaded.step is None
    assert "step.so is not what was built" in loaded.facts.notes[-1]
    step = CompiledStep(llama.package)
    step.unload()
    step.folder = package  # as if it had been swapped while the weights were not in memory
    with pytest.raises(KvchatError, match=r"step\.so is not what was built"):
        step.run([5], 0, 0, memories_of(llama), 1)
    assert not ran.exists()


def test_the_engine_in_a_child_process_loads_the_step_of_its_data_folder(
    llama: Built, tmp_path: Path
) -> None:
    statuses = SimpleQueue[EngineEvent]()
    options = EngineOptions(llama.folder, "tiny", tmp_path / "log", "fp32", 1, compiled=llama.root)
    engine = LinkedEngine(options, statuses.put)
    engine.start()
    try:
        found = next(each for each in iter(statuses.get, None) if isinstance(each, Ready | Died))
    finally:
        engine.close()
    assert isinstance(found, Ready), found
    assert found.model.path == "compiled fp32"


@pytest.mark.skipif(os.name == "nt", reason="access lists in place of modes")
def test_a_package_that_others_can_write_is_not_loaded(llama: Built, tmp_path: Path) -> None:
    root, package = llama.copy_packages(tmp_path / "data")
    assert llama.load(root).step
    places = [*package.iterdir(), package, package.parent, root, root.parent]
    for place, mode in zip(places, cycle([0o020, 0o002]), strict=False):
        before = place.stat().st_mode
        place.chmod(before | mode)
        loaded = llama.load(root)
        assert loaded.step is None, place
        assert f"{place} can be written by other users" in loaded.facts.notes[-1]
        place.chmod(before)
    assert llama.load(root).step


@pytest.mark.skipif(os.name == "nt", reason="no user ids")
def test_a_package_of_another_user_is_not_loaded(llama: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: llama.package.stat().st_uid + 1)
    loaded = llama.load()
    assert loaded.step is None
    assert "belongs to another user" in loaded.facts.notes[-1]


@pytest.mark.parametrize("what", ["step.so", "package", "model", "root"])
def test_links_to_code_are_not_followed(llama: Built, tmp_path: Path, what: str) -> None:
    root, package = llama.copy_packages(tmp_path / "data")
    places = {"package": package, "model": package.parent, "root": root}
    place = places.get(what, package / what)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    loaded = llama.load(root)
    assert loaded.step is None
    assert "neither a file nor a folder" in loaded.facts.notes[-1]


@pytest.mark.parametrize("text", [None, "", "[]", "{}"], ids=["gone", "empty", "list", "nothing"])
def test_without_its_digests_a_package_is_not_loaded(llama: Built, tmp_path: Path, text: str | None) -> None:
    root, package = llama.copy_packages(tmp_path / "data")
    (package / "digests.json").unlink()
    if text is not None:
        (package / "digests.json").write_text(text)
    loaded = llama.load(root)
    assert loaded.step is None
    assert "is damaged" in loaded.facts.notes[-1]
    record_digests(package)
    (package / "more.so").touch()
    assert "more.so is not what was built" in llama.load(root).facts.notes[-1]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("damage", [b"", b"{}", None], ids=["empty", "other", "gone"])
def test_a_damaged_package_is_reported_and_transformers_computes(
    llama: Built, tmp_path: Path, name: str, damage: bytes | None
) -> None:
    root, package = llama.copy_packages(tmp_path / "data")
    damaged = package / name
    damaged.unlink()
    if damage is not None:
        damaged.write_bytes(damage)
    loaded = llama.load(root)
    assert loaded.step is None
    assert loaded.facts.path == "eager fp32"
    assert "it is not compiled: The compiled step in" in loaded.facts.notes[-1]
    assert f"is damaged: {name} is not what was built" in loaded.facts.notes[-1]


def test_a_damaged_description_is_refused_by_a_sentence(llama: Built, tmp_path: Path) -> None:
    saved = json.loads((llama.package / "package.json").read_text())
    assert Description.load(llama.package) == llama.step.description
    changes: list[dict[str, object]] = [{"shape": {}}, {"cost": None}, {"more": 1}]
    for change in changes:
        (tmp_path / "package.json").write_text(json.dumps(saved | change))
        with pytest.raises(KvchatError, match="is damaged"):
            Description.load(tmp_path)


def test_versions_equal_those_of_the_installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIBRARIES:
        assert installed_version(name) == version(name)
    (tmp_path / "torch-0.0.1.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_version("torch") == "0.0.1"
    with pytest.raises(PackageNotFoundError):
        installed_version("no-such-package")


def test_without_a_compiler_a_sentence_says_so(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KvchatError, match=r"no C\+\+ compiler .* several times slower"):
        building.prepare_step(tmp_path / "compiled", tiny_folder, "fp32", lambda _: None)
    assert not (tmp_path / "compiled").exists()


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "broken off"])
def test_an_interrupted_build_leaves_nothing(tiny_folder: Path, tmp_path: Path, killed: bool) -> None:
    other, root = tmp_path / "other", tmp_path / "data" / "compiled"
    shutil.copytree(tiny_folder, other)

    def builds(process: psutil.Process) -> bool:
        try:
            return str(other) in " ".join(process.cmdline())
        except psutil.NoSuchProcess:  # it was killed, and waits to be noticed
            return False

    def builders() -> list[psutil.Process]:
        return [process for process in psutil.Process().children(recursive=True) if builds(process)]

    def end(_progress: Progress) -> None:
        if not killed:
            raise KeyboardInterrupt
        for process in builders():
            process.kill()

    with pytest.raises(KvchatError if killed else KeyboardInterrupt, match="SIGKILL" if killed else None):
        building.prepare_step(root, other, "fp32", end)
    left = {path.name for path in compiled_folder(root, other).iterdir()}
    assert left <= {".lock", "model.txt", "files.json"}
    assert builders() == []
    assert find_step(root, other, "fp32") is None


def test_models_with_states_are_refused(llama: Built) -> None:
    shape = replace(llama.loaded.shape, kinds=("full_attention", "linear_attention"))
    assert "linear_attention" in building.refusal(shape)
    assert building.refusal(llama.loaded.shape) == ""


def test_attention_with_unsupported_arguments_is_refused() -> None:
    """Ignoring them would give wrong results without an error."""
    rows = torch.zeros(1, 2, 3, 16)
    with pytest.raises(KvchatError, match="its attention has position_bias"):
        export.step_attention(torch.nn.Module(), rows, rows, rows, rows, position_bias=rows)


def test_caches_that_the_kernels_can_not_read_use_transformers(llama: Built) -> None:
    """Quantised rows whose dims are no whole vectors."""
    heads = tuple(replace_dim(head, 12) for head in llama.loaded.shape.heads)
    odd = replace(llama.loaded, shape=replace(llama.loaded.shape, heads=heads))
    assert not isinstance(odd.reader(odd.new_kv("int8")), CompiledReader)
    assert isinstance(odd.reader(odd.new_kv()), CompiledReader)


def replace_dim(head: Any, dim: int) -> Any:  # noqa: ANN401
    return head._replace(key_dim=dim)


# ---- a real model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(smollm2: LoadedModel) -> LoadedModel:
    """SmolLM2 as a chat loads it: by the step that was made when it was prepared."""
    paths = find_paths()
    folder = prepare("smollm2-135m-instruct", paths.models, lambda _progress: None, paths.compiled)
    loaded = load_model(folder, smollm2.facts.name, threads=2, compiled=paths.compiled)
    assert loaded.step, loaded.facts.notes
    return loaded


@pytest.mark.model
@pytest.mark.parametrize("text", [building.TEXT.read_text()[:2000], TRAINING_TEXT], ids=["prose", "other"])
def test_the_step_of_a_real_model_predicts_what_the_model_predicts(
    smollm2: LoadedModel, real: LoadedModel, text: str
) -> None:
    ids = smollm2.tokenizer.encode(text).ids
    exact = uncached_logits(smollm2.model, ids)
    found = real.reader(real.new_kv()).read(ids, keep=len(ids))
    expected = exact.log_softmax(-1)
    divergence = (expected.exp() * (expected - found.log_softmax(-1))).sum(-1).mean()
    assert float(divergence) <= 0.0015
    assert_clear_ones_agree(exact, found)


@pytest.mark.model
@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_a_real_chat_is_the_same_cached_restored_forked_and_cold(
    real: LoadedModel, tmp_path: Path, kv: str
) -> None:
    built = Built(Path(), Path(), "gguf", [], real, real)
    kept, live = chatted(real, kv=kv)
    restored, other = chatted(real, folder=tmp_path, kv=kv)
    assert restored == kept == chatted(real, kv=kv, new_drafter=PromptLookup)[0]
    built.assert_same_contents(other.kv, live.kv)
    cold = real.new_kv(kv)
    expected = real.reader(cold).read(live.kv.ids)
    built.assert_same_contents(cold, live.kv)
    if kv == "auto":  # a block that is cut stays quantised, and its rows would have been exact
        half = live.kv.fork(len(live.kv) // 2)
        assert torch.equal(real.reader(half).read(live.kv.ids[len(half) :]), expected)
        built.assert_same_contents(half, live.kv)
