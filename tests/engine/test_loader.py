"""A folder becomes a model, or a sentence that says why it can't."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedConfig

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
    loaded = load_model(tiny_folder, "tiny", precision="fp32", threads=2, compiled=False)
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
def test_a_folder_that_is_not_whole_is_refused_in_a_sentence(
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
