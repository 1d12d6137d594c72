"""Loading a folder gives a model, or a sentence that says why not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedConfig

from kvchat.engine.chat_template import ChatTemplate
from kvchat.engine.model.dtypes import automatic_precision
from kvchat.engine.model.loader import assemble, load_model, tokenizer_fingerprint
from kvchat.engine.model.transformers_model import weights_bytes
from kvchat.errors import KvchatError
from tests.support.engine_driver import uncached_logits
from tests.support.tiny import seeded_model, tiny_chat, tiny_config, tiny_loaded, tiny_model

Damage = Callable[[Path], object]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_loaded().model.state_dict(), folder / "pytorch_model.bin")


def test_a_saved_folder_loads_to_the_same_model(tiny_folder: Path) -> None:
    loaded = load_model(tiny_folder, "tiny", precision="fp32", threads=2)
    built = tiny_loaded()
    assert loaded.facts == built.facts
    assert loaded.end_ids == built.end_ids
    ids = loaded.tokenizer.encode("The pass is open.").ids
    assert torch.equal(uncached_logits(loaded.model, ids), uncached_logits(built.model, ids))
    assert not loaded.model.training


def test_facts_are_those_of_the_config(tiny_folder: Path) -> None:
    facts = load_model(tiny_folder, "tiny", precision="bf16", threads=2, context=100).facts
    assert (facts.layers, facts.kv_heads, facts.head_dim, facts.threads) == (4, 2, 16, 2)
    assert (facts.context_limit, facts.kv_dtype, facts.path) == (100, "bf16", "eager bf16")
    assert facts.kv_bytes_per_token == 2 * 4 * 2 * 16 * 2
    unhalved = 2 * facts.weights_bytes - tiny_loaded().facts.weights_bytes
    assert 0 <= unhalved < 200  # the frequencies of the rotation stay in fp32


def test_a_context_larger_than_the_models_own_is_cut_to_it(tiny_folder: Path) -> None:
    assert (
        load_model(tiny_folder, "tiny", precision="fp32", threads=2, context=10**6).facts.context_limit
        == 1024
    )


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
        (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer in .* can't be read"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer in .* can't be read"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer in .* can't be read"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "the tokenizer in .* can't be read"),
        (lambda f: (f / "model.safetensors").unlink(), "the weights in .* can't be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "the weights in .* can't be loaded"),
        (cut_weights, "the weights in .* can't be loaded"),
        (pickle_weights, "the weights in .* can't be loaded"),
        (lambda f: edit_config(f, num_hidden_layers=6), r"lack model\.layers\.4\.\S+ \(18 in all\)"),
        (lambda f: edit_config(f, hidden_size=32), "the weights in .* can't be loaded"),
        (lambda f: edit_config(f, num_hidden_layers="four"), "can't be"),
        (lambda f: edit_config(f, model_type="t5"), "the weights in .* can't be loaded"),
        (lambda f: (f / "config.json").write_text("{"), "can't be read"),
        (shutil.rmtree, "can't be read"),
    ],
    ids=[
        "no template",
        "no tokenizer",
        "broken tokenizer",
        "empty tokenizer",
        "odd tokenizer config",
        "no weights",
        "empty weights",
        "cut weights",
        "pickled weights",
        "missing weights",
        "other sizes",
        "odd config",
        "no causal model",
        "broken config",
        "no folder",
    ],
)
def test_an_incomplete_folder_is_refused_with_a_sentence(
    tiny_folder: Path, tmp_path: Path, damage: Damage, sentence: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    with pytest.raises(KvchatError, match=sentence) as refusal:
        load_model(folder, "damaged", precision="fp32", threads=2)
    assert str(refusal.value).startswith("damaged")
    assert "\n" not in str(refusal.value)


def test_layers_that_cannot_be_cropped_are_refused() -> None:
    chat = tiny_chat()
    model = tiny_model(chat)
    config: PreTrainedConfig = model.config
    config.layer_types = ["full_attention", "linear_attention"] * 2
    with pytest.raises(KvchatError, match="layers of the kind linear_attention"):
        assemble(model, chat, "recurrent")


def test_the_end_ids_are_the_models_and_the_tokenizers() -> None:
    chat = tiny_chat()
    model = tiny_model(chat)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [0, 5]
    assert assemble(model, chat, "several").end_ids == {0, 5, chat.eos_token_id}
    model.generation_config.eos_token_id = None
    assert assemble(model, chat, "its own").end_ids == {chat.eos_token_id}


def test_tied_weights_count_once() -> None:
    chat = tiny_chat()
    config = tiny_config(chat)
    untied = weights_bytes(tiny_model(chat))
    config.tie_word_embeddings = True
    tied = weights_bytes(seeded_model(config))
    assert untied - tied == len(chat) * 64 * 4


def test_a_fingerprint_names_one_tokenizer() -> None:
    chat = tiny_chat()
    same = tokenizer_fingerprint(Tokenizer.from_str(chat.backend_tokenizer.to_str()))
    assert (
        tokenizer_fingerprint(chat.backend_tokenizer)
        == same
        == tokenizer_fingerprint(tiny_chat().backend_tokenizer)
    )
    chat.add_tokens(["<more>"])
    assert tokenizer_fingerprint(chat.backend_tokenizer) != same


def test_automatic_precision_is_one_that_can_be_loaded() -> None:
    assert automatic_precision("cpu") in {"fp32", "bf16"}
    assert automatic_precision("cuda") == "bf16"


# ---- what came with a model is not run --------------------------------------------------------------------


class Opened:
    """A pickle that makes a file when it is opened."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.ran,)


def bring_code(folder: Path, ran: Path) -> None:
    """Python code in every place where transformers would load it if trusted."""
    code = f"open({str(ran)!r}, 'w')\n"
    (folder / "custom_generate").mkdir()
    for name in (
        "modeling_own.py",
        "configuration_own.py",
        "tokenization_own.py",
        "custom_generate/generate.py",
    ):
        (folder / name).write_text(code)
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": str(folder)}))
    models = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    edit_config(folder, auto_map=models)
    path = folder / "tokenizer_config.json"
    tokenizers = {"auto_map": {"AutoTokenizer": ["tokenization_own.T", "tokenization_own.F"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizers))


@pytest.fixture
def hostile(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to which a test adds what it may not run."""
    folder = tmp_path / "hostile"
    shutil.copytree(tiny_folder, folder)
    return folder


@pytest.mark.parametrize("model_type", ["llama", "its_own"])
def test_python_in_a_models_folder_is_not_run(hostile: Path, tmp_path: Path, model_type: str) -> None:
    bring_code(hostile, tmp_path / "ran")
    edit_config(hostile, model_type=model_type)
    if model_type == "llama":  # transformers has code of its own for it
        assert load_model(hostile, "hostile", precision="fp32", threads=1).facts.layers == 4
    else:
        with pytest.raises(KvchatError, match="hostile"):
            load_model(hostile, "hostile", precision="fp32", threads=1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_no_pickle_is_opened_even_where_an_index_names_it(hostile: Path, tmp_path: Path, name: str) -> None:
    ran = tmp_path / "ran"
    (hostile / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Opened(ran)}, hostile / name)
    for index in ("model.safetensors.index.json", "other.safetensors.index.json"):
        content = {"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": name}}
        (hostile / index).write_text(json.dumps(content))
        edit_config(hostile, transformers_weights=index)
        with pytest.raises(KvchatError, match=r"weights in .* can't be loaded: .*pickles"):
            load_model(hostile, "hostile", precision="fp32", threads=1)
    assert not ran.exists()
    torch.load(hostile / name, weights_only=False)
    assert ran.exists()  # it would have run


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "owner/kernels"},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": {"": "sdpa", "text_config": "owner/kernels"}},
        {"experts_implementation": "sonicmoe"},
        {"text_config": {"attn_implementation": "owner/kernels@main:function"}},
    ],
)
def test_native_code_of_the_hub_is_not_fetched_for_a_config(
    hostile: Path, changes: dict[str, object]
) -> None:
    """transformers does so where the library `kernels` is installed, without asking."""
    edit_config(hostile, **changes)
    with pytest.raises(KvchatError, match="names code of the hub to run"):
        load_model(hostile, "hostile", precision="fp32", threads=1)


def test_an_implementation_of_transformers_own_may_be_named(hostile: Path) -> None:
    edit_config(hostile, attn_implementation="sdpa")
    assert load_model(hostile, "hostile", precision="fp32", threads=1).facts.layers == 4


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "cycler.__init__.__globals__.os.popen('touch RAN').read()",
        "lipsum.__globals__['os'].system('touch RAN')",
        "self.__init__.__globals__.__builtins__.open('RAN', 'w')",
        "messages.__class__.__base__.__subclasses__()",
        "strftime_now.__globals__['sys'].modules['os'].system('touch RAN')",
    ],
)
def test_a_chat_template_runs_no_code(tmp_path: Path, expression: str) -> None:
    text = "{{ " + expression.replace("RAN", str(tmp_path / "ran")) + " }}"
    with pytest.raises(TemplateError):
        ChatTemplate(text).render([{"role": "user", "content": "Hi"}], goes_on=False)
    assert not (tmp_path / "ran").exists()


def test_no_process_of_kvchat_imports_a_module_from_the_current_folder(tmp_path: Path) -> None:
    """A model's folder may contain `pickle.py`, and may be the current folder when the engine starts."""
    ran, script = tmp_path / "ran", tmp_path / "apart" / "script.py"
    (tmp_path / "model").mkdir()
    for name in ("pickle", "selectors", "kvchat", "torch"):
        (tmp_path / "model" / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\n")
    script.parent.mkdir()
    script.write_text(
        "import multiprocessing, subprocess, sys\n"
        "from kvchat.system.children import protect_children\n"
        "if __name__ == '__main__':\n"
        "    protect_children()\n"
        "    child = multiprocessing.get_context('spawn').Process(target=print, args=('spawned',))\n"
        "    child.start(); child.join()\n"
        "    subprocess.run([sys.executable, '-m', 'kvchat', '--version'], check=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path / "model",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "spawned" in done.stdout
    assert "kvchat, version" in done.stdout
    assert not ran.exists()
