"""The compiled step is the model: the same logits, the same cache, and a sentence where it doesn't fit.

It is built once for this file, from a 4-bit GGUF of the tiny Llama, by the process that users start. In fp32
the compiled weights are exactly those of the folder, so that plain transformers says what is right.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch

from kvchat.cache.kv import ConversationKV
from kvchat.cache.layers import GrowableLayer
from kvchat.contract import CacheMode, PromptMessage, Sampling, TurnFinished, TurnRequest
from kvchat.engine import compile as building
from kvchat.engine.compiled import (
    CompiledReader,
    CompiledStep,
    Description,
    find_step,
    fingerprint,
    load_kernels,
    package_folder,
)
from kvchat.engine.engine import LocalEngine
from kvchat.engine.forward import CachedReader
from kvchat.engine.identity import identify
from kvchat.engine.load import LoadedModel, load_model
from kvchat.errors import KvchatError
from kvchat.staging import Progress
from tests.conftest import REQUIRE_MODEL
from tests.engine.driving import TOLERANCE, Tap, rendered, uncached_logits, user
from tests.engine.quantised import save_quantised

IDS = [(7 * i + i * i) % 400 + 5 for i in range(300)]
PROMPT = 40
FP32 = torch.float32


@dataclass(frozen=True)
class Built:
    """A model folder, the model in it, its step, and what was reported while that was made."""

    folder: Path
    loaded: LoadedModel
    step: CompiledStep
    progress: list[Progress]

    def kv(self, tokens: int) -> ConversationKV:
        """A cache that the model itself has read so many tokens into."""
        kv = self.loaded.new_kv()
        CachedReader(self.loaded.model, kv).read(IDS[:tokens])
        return kv

    def reader(self, kv: ConversationKV) -> CompiledReader:
        return CompiledReader(self.loaded.model, kv, self.step)

    def read_on(self, kv: ConversationKV, until: int) -> torch.Tensor:
        """Reads on, token by token; logits `[tokens, vocabulary]`."""
        reader = self.reader(kv)
        return torch.cat([reader.read([token]) for token in IDS[len(kv.ids) : until]])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    if not building.compiler():
        give_up = pytest.fail if os.environ.get(REQUIRE_MODEL) == "1" else pytest.skip
        give_up("a C++ compiler is needed: apt-get install g++")
    folder = save_quantised(tmp_path_factory.mktemp("compiled") / "tiny")
    progress: list[Progress] = []
    building.prepare_step(folder, "fp32", progress.append)
    step = find_step(folder, FP32)
    assert step is not None
    return Built(folder, load_model(folder, "tiny", precision="fp32", threads=2), step, progress)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    yield
    torch.set_num_threads(2)


# ---- the same logits and the same cache ------------------------------------------------------------------


def test_every_compiled_logit_is_that_of_a_cold_pass(built: Built) -> None:
    """Past 256 tokens, where the layers have grown, and at 256, where they are full to the last row."""
    found = built.read_on(built.kv(PROMPT), len(IDS))
    cold = uncached_logits(built.loaded.model, IDS)[PROMPT:]
    torch.testing.assert_close(found.float(), cold, atol=TOLERANCE, rtol=0)
    best = cold.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.25
    assert clear.any()
    assert torch.equal(found.argmax(-1)[clear], cold.argmax(-1)[clear])


def test_the_cache_holds_what_the_model_itself_would_have_left_there(built: Built) -> None:
    compiled, eager = built.kv(PROMPT), built.kv(PROMPT)
    built.read_on(compiled, PROMPT + 20)
    CachedReader(built.loaded.model, eager).read(IDS[PROMPT : PROMPT + 20])
    assert compiled.ids == eager.ids
    for mine, theirs in zip(compiled.stored, eager.stored, strict=True):
        for a, b in zip(mine.read(), theirs.read(), strict=True):
            torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def test_compiled_and_plain_reads_follow_each_other_in_any_order(built: Built) -> None:
    kv = built.kv(10)
    reader = built.reader(kv)
    for start, end in ((10, 11), (11, 30), (30, 31), (31, 32), (32, 50)):
        last = reader.read(IDS[start:end])
    cold = uncached_logits(built.loaded.model, IDS[:50])
    torch.testing.assert_close(last[0].float(), cold[-1], atol=TOLERANCE, rtol=0)
    assert reader.evaluated == 40


def test_tokens_after_a_gap_stand_where_they_are_told_to(built: Built) -> None:
    compiled, eager = built.kv(PROMPT), built.kv(PROMPT)
    for kv in (compiled, eager):
        kv.select([*range(4), *range(20, PROMPT)])
    found = built.reader(compiled).read([17])
    expected = CachedReader(built.loaded.model, eager).read([17])
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert compiled.positions[-1] == PROMPT
    assert len(compiled) == 25


def test_restored_and_forked_caches_go_on_as_the_live_one_bit_for_bit(built: Built) -> None:
    live = built.kv(PROMPT)
    built.read_on(live, 60)
    forked = live.fork(60)
    restored = built.loaded.new_kv()
    restored.unpack(live.pack())
    expected = built.read_on(live, 80)
    assert torch.equal(built.read_on(forked, 80), expected)
    assert torch.equal(built.read_on(restored, 80), expected)


def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been_read(built: Built) -> None:
    kv = built.kv(PROMPT)
    first = built.read_on(kv, 70)
    kv.truncate(50)
    assert torch.equal(built.read_on(kv, 70), first[50 - PROMPT :])


def test_a_fork_never_writes_into_the_memory_that_it_shares(built: Built) -> None:
    live = built.kv(PROMPT)
    built.read_on(live, 60)
    before = [tensor.clone() for layer in live.stored for tensor in layer.read()]
    built.reader(live.fork(50)).read([3])
    after = [tensor for layer in live.stored for tensor in layer.read()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_one_and_two_threads_give_the_same_bits(built: Built) -> None:
    two = built.read_on(built.kv(PROMPT), len(IDS))
    kv = built.kv(PROMPT)
    torch.set_num_threads(1)
    assert torch.equal(built.read_on(kv, len(IDS)), two)


def test_a_step_that_fails_leaves_every_layer_as_it_was(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = built.kv(255)
    with monkeypatch.context() as patch:
        patch.setattr(built.step, "run", lambda *_: [][0])
        for _ in range(2):
            with pytest.raises(IndexError):
                built.reader(kv).read([IDS[255]])
    assert [layer.length for layer in kv.stored] == [255] * len(kv.stored)
    assert kv.ids == tuple(IDS[:255])
    found = built.read_on(kv, 258)
    cold = uncached_logits(built.loaded.model, IDS[:258])[255:]
    torch.testing.assert_close(found.float(), cold, atol=TOLERANCE, rtol=0)


def test_the_first_token_and_quantised_caches_are_read_by_the_model_itself(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(built.step, "run", None)
    built.reader(built.loaded.new_kv()).read([5])
    quantised = built.loaded.new_kv("int8")
    built.reader(quantised).read(IDS[:10])
    built.reader(quantised).read([5])
    narrow = built.loaded.new_kv("bf16")
    built.reader(narrow).read(IDS[:10])
    built.reader(narrow).read([5])
    assert (len(quantised), len(narrow)) == (11, 11)


# ---- what doesn't fit is refused -------------------------------------------------------------------------


def pairs_of(kv: ConversationKV) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [layer.room_for(1) for layer in kv.stored if isinstance(layer, GrowableLayer)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t[:, :1], r"keys and values \[1, 2, 256, 16\], not \[1, 1, 256, 16\]"),
        (lambda t: t[..., :8], r"not \[1, 2, 256, 8\]"),
        (lambda t: t[:, :, :200], r"not \[1, 2, 200, 16\]"),
        (lambda t: t.bfloat16(), "whole tensors of torch.float32"),
        (lambda t: torch.cat([t, t], 2)[:, :, :256], "whole tensors"),
        (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "whole tensors"),
    ],
)
def test_other_tensors_than_those_it_was_compiled_for_are_refused(
    built: Built, change: object, sentence: str
) -> None:
    assert callable(change)
    kv = built.kv(PROMPT)
    pairs = pairs_of(kv)
    pairs[2] = (pairs[2][0], change(pairs[2][1]))
    with pytest.raises(ValueError, match=sentence):
        built.step.run(5, PROMPT, PROMPT, pairs)


def test_other_lengths_and_numbers_of_layers_are_refused(built: Built) -> None:
    pairs = pairs_of(built.kv(PROMPT))
    with pytest.raises(ValueError, match="after 256 others doesn't fit a capacity of 256"):
        built.step.run(5, PROMPT, 256, pairs)
    with pytest.raises(ValueError, match="after 0 others"):
        built.step.run(5, 0, 0, pairs)
    with pytest.raises(ValueError, match="4 layers, not 3"):
        built.step.run(5, PROMPT, PROMPT, pairs[:3])


def test_room_is_never_counted_beyond_what_there_is(built: Built) -> None:
    layer = built.kv(PROMPT).stored[0]
    assert isinstance(layer, GrowableLayer)
    with pytest.raises(ValueError, match="217 tokens after 40 don't fit a capacity of 256"):
        layer.fill(217)


# ---- the package -----------------------------------------------------------------------------------------


def test_building_tells_its_progress_and_leaves_nothing_but_the_package(built: Built) -> None:
    done = [progress.done for progress in built.progress if progress.stage == "compile"]
    assert (done[0], done[-1]) == (0, 100)
    assert done == sorted(done)
    package = package_folder(built.folder, FP32)
    assert {path.name for path in package.parent.iterdir()} <= {package.name, ".lock"}
    assert {path.name for path in package.iterdir()} == {
        *("step.so", "step.json", "kernels.so", "package.json")
    }
    assert built.step.description.weights == "int4, head int8"


def test_a_package_that_is_there_is_not_made_again(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_make", None)
    assert building.prepare_step(built.folder, "fp32", lambda _: None) == package_folder(built.folder, FP32)


def test_a_package_loads_without_the_compiler_and_without_temporary_files(
    built: Built, tmp_path: Path
) -> None:
    """Ended by force, as a kill would: nothing that it wrote could be cleaned up."""
    script = (
        "import os, sys, pathlib, torch; from kvchat.engine.compiled import find_step\n"
        "before = {*sys.modules}\n"
        f"assert find_step(pathlib.Path({str(built.folder)!r}), torch.float32)\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
        "print(sorted(m for m in {*sys.modules} - before if 'inductor' in m), flush=True); os._exit(9)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (9, "[]"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_package_belongs_to_its_weights_precision_and_machine(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(built.folder, tmp_path / "other", ignore=shutil.ignore_patterns("compiled"))
    mine = fingerprint(other, FP32)
    assert mine == fingerprint(built.folder, FP32)
    assert find_step(other, FP32) is None
    assert fingerprint(other, torch.bfloat16) != mine
    with monkeypatch.context() as patch:
        patch.setattr("kvchat.engine.compiled.cpu_features", lambda: "another CPU")
        assert fingerprint(other, FP32) != mine
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99")
        assert fingerprint(other, FP32) != mine
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    assert fingerprint(other, FP32) != mine


def test_a_damaged_package_is_refused_by_a_sentence(built: Built, tmp_path: Path) -> None:
    copied = shutil.copytree(package_folder(built.folder, FP32), tmp_path / "package")
    (copied / "step.so").write_bytes(b"no library")
    with pytest.raises(KvchatError, match="can't be loaded"):
        CompiledStep(copied)
    (copied / "package.json").write_text(json.dumps({"heads": []}))
    with pytest.raises(KvchatError, match="is damaged"):
        CompiledStep(copied)


def test_packages_for_other_versions_of_the_same_precision_are_removed(built: Built, tmp_path: Path) -> None:
    for name, dtype in (("old", "float32"), ("other", "bfloat16")):
        (tmp_path / name).mkdir()
        Description(name, "int4", dtype, ()).save(tmp_path / name)
    building._remove_stale(tmp_path, FP32)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_without_a_compiler_a_sentence_says_what_is_lost(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KvchatError, match=r"no C\+\+ compiler .* decoded by uncompiled code"):
        building.prepare_step(tiny_folder, "fp32", lambda _: None)
    assert not (tiny_folder / "compiled").exists()


def test_what_goes_wrong_in_the_process_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(KvchatError, match=r"can't be compiled: .*tokenizer"):
        building.prepare_step(tmp_path, "fp32", lambda _: None)
    assert {path.name for path in (tmp_path / "compiled").iterdir()} <= {".lock"}


def test_a_build_that_is_broken_off_stops_and_leaves_nothing(built: Built, tmp_path: Path) -> None:
    other = shutil.copytree(built.folder, tmp_path / "other", ignore=shutil.ignore_patterns("compiled"))

    def break_off(progress: Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        building.prepare_step(other, "fp32", break_off)
    assert {path.name for path in (other / "compiled").iterdir()} <= {".lock"}
    commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    assert not [command for command in commands if str(other) in command]


def test_models_with_windows_or_states_are_refused(built: Built) -> None:
    shape = replace(built.loaded.shape, kinds=("full_attention", "sliding_attention"))
    assert "sliding_attention" in building.refusal(shape)
    assert building.refusal(built.loaded.shape) == ""


def test_attention_with_more_than_scores_and_a_mask_is_refused(built: Built) -> None:
    """The kernel would leave out what it doesn't know, and nobody would see it."""
    rows = torch.zeros(1, 2, 3, 16)
    with pytest.raises(KvchatError, match="its attention has softcap"):
        building.step_attention(torch.nn.Module(), rows, rows, rows, rows, softcap=30.0)


# ---- the kernels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "tokens"), [(9, 3, 64, 1000), (4, 4, 128, 256), (4, 2, 24, 5), (2, 1, 16, 2)]
)
def test_the_kernel_computes_attention(
    built: Built, heads: int, kv_heads: int, dim: int, tokens: int, dtype: torch.dtype
) -> None:
    """Rows that a larger tensor goes on after, a mask that hides the first token, and any rest of a chunk."""
    load_kernels(package_folder(built.folder, FP32))
    random = torch.Generator().manual_seed(tokens)
    query = torch.randn(1, heads, 1, dim, generator=random).to(dtype)
    keys, values = torch.randn(2, 1, kv_heads, tokens + 7, dim, generator=random).to(dtype)[:, :, :, :tokens]
    mask = torch.zeros(1, 1, 1, tokens)
    mask[..., 0] = -torch.inf
    found = torch.ops.kvchat.attend(query, keys, values, mask, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(), keys.float(), values.float(), attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    # of bf16 only the result is rounded
    tolerance = 1e-5 if dtype is FP32 else 2**-8
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


def test_a_step_in_bf16_is_as_near_to_fp32_as_the_model_in_bf16(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL in nats against the same weights in fp32, over every token that was read by the step."""
    kernels = package_folder(built.folder, FP32) / "kernels.so"
    monkeypatch.setattr(building, "compile_kernels", lambda target: shutil.copy(kernels, target))
    loaded = load_model(built.folder, "tiny", precision="bf16", threads=2)
    model = copy.deepcopy(loaded.model)
    weights = building.quantise(model, built.folder / "model.gguf")
    package = tmp_path / "package"
    building.make_package(replace(loaded, model=model), package, lambda _: None, weights, "bf16")
    narrow = Built(built.folder, loaded, CompiledStep(package), [])
    exact = uncached_logits(built.loaded.model, IDS).log_softmax(-1)[PROMPT:]
    eager = uncached_logits(loaded.model, IDS).log_softmax(-1)[PROMPT:]
    compiled = narrow.read_on(narrow.kv(PROMPT), len(IDS)).float().log_softmax(-1)
    assert divergence(exact, compiled) < divergence(exact, eager)
    best = exact.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.25
    assert torch.equal(compiled.argmax(-1)[clear], exact.argmax(-1)[clear])


def divergence(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL of log-probabilities `[tokens, vocabulary]`."""
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def loaded_again(built: Built) -> LoadedModel:
    return load_model(built.folder, "tiny", precision="fp32", threads=2)


def test_an_engine_takes_the_step_that_was_made_and_says_what_a_cold_run_says(built: Built) -> None:
    loaded = loaded_again(built)
    assert loaded.facts.path == f"compiled {built.step.description.weights}"
    engine = LocalEngine(loaded)
    messages: list[PromptMessage] = []
    for number, question in enumerate(("Which pass is open in May?", "And the train?")):
        messages.append(user(question))
        tap = Tap()
        with tap.on(loaded.model):
            request = TurnRequest(
                f"t{number}", "chat", tuple(messages), CacheMode.ON, Sampling(max_tokens=24)
            )
            *_, finished = engine.turn(request)
        assert isinstance(finished, TurnFinished)
        prompt = rendered(loaded, messages)
        cold = uncached_logits(loaded.model, [*prompt, *finished.token_ids])[len(prompt) - 1 :]
        assert cold.argmax(dim=-1).tolist()[: len(finished.token_ids)] == list(finished.token_ids)
        assert finished.stats.path == loaded.facts.path
        assert tap.evaluated == finished.stats.prefilled_tokens  # the model itself read the prompt only
        messages.append(PromptMessage("assistant", finished.text, finished.token_ids, finished.tokenizer))


def test_caches_of_the_model_and_of_its_step_are_not_mixed(built: Built) -> None:
    eager = load_model(built.folder, "tiny", precision="fp32", threads=2, compiled=False)
    compiled = loaded_again(built)
    ours, theirs = (identify(each.model, each.chat, each.facts) for each in (compiled, eager))
    assert (
        ours.difference(theirs.as_dict()) == f"weights precision changed: fp32 → fp32, {compiled.facts.path}"
    )


def test_a_damaged_step_is_told_and_the_model_decodes_itself(built: Built, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(built.folder, folder)
    (package_folder(folder, FP32) / "package.json").write_text("{")
    loaded = load_model(folder, "tiny", precision="fp32", threads=2)
    assert loaded.step is None
    assert loaded.facts.path == "eager fp32"
    assert "decode is not compiled: The compiled step in" in loaded.facts.notes[-1]
