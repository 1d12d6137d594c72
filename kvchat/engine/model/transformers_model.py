"""Loads a prepared model through transformers, without remote code or pickled weights.

Takes a second to import, so a chat with a compiled step imports it only when needed.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from kvchat.engine.chat_template import ChatTemplate
from kvchat.engine.model.layout import ModelShape
from kvchat.engine.model.probe import measure
from kvchat.engine.model.sdpa import fold_attention
from kvchat.errors import KvchatError

OWN_IMPLEMENTATIONS = {"eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm"}
"""Implementations of attention and experts in transformers; it would download any other."""


@dataclass(frozen=True, slots=True)
class Eager:
    """A model in transformers, with shape, tokenizer and chat template."""

    model: PreTrainedModel
    shape: ModelShape
    tokenizer: Tokenizer
    template: ChatTemplate
    end_ids: frozenset[int]


def load_eager(folder: Path, name: str, dtype: torch.dtype, device: str) -> Eager:
    """Loads weights and tokenizer from `folder` (config.json, *.safetensors, tokenizer.json).

    Raises:
        KvchatError: the folder holds no chat model that kvchat can run; the sentence says why.
    """
    quiet()
    refuse_code(folder, name)
    chat = _load_tokenizer(folder, name)
    return put_together(load_weights(folder, name, dtype, device), chat, name)


def quiet() -> None:
    """Keeps transformers from writing to the terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def put_together(model: PreTrainedModel, chat: TokenizersBackend, name: str) -> Eager:
    """Measures a model and adds its tokenizer and chat template.

    Raises:
        KvchatError: there is no chat template, or some layers store what kvchat does not support.
    """
    if not getattr(chat, "chat_template", None):
        raise KvchatError(f"{name} has no chat template, so it can't chat. Take an instruction-tuned model.")
    fold_attention(model)
    shape = measure(model.eval(), name)
    return Eager(model, shape, chat.backend_tokenizer, template_of(chat), end_ids(model, chat))


def template_of(chat: TokenizersBackend) -> ChatTemplate:
    """The chat template of transformers' tokenizer."""
    controls = tuple(token.content for token in chat.added_tokens_decoder.values() if token.special)
    names = {name: str(text) for name, text in chat.special_tokens_map.items()}
    return ChatTemplate(str(chat.get_chat_template()), names, controls)


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of all distinct weight tensors; tied ones count once."""
    tensors = (*model.parameters(), *model.buffers())
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def end_ids(model: PreTrainedModel, chat: TokenizersBackend) -> frozenset[int]:
    """The end-of-turn ids of the generation config, with the tokenizer's own."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids: Iterable[int | None] = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, chat.eos_token_id) if i is not None)


def refuse_code(folder: Path, name: str) -> None:
    """Refuses a model whose config names native code of the hub.

    Where the library `kernels` is installed, transformers downloads and runs what a config names as
    `attn_implementation` (`owner/repository`, or an alias of one), whatever `trust_remote_code` says.

    Raises:
        KvchatError: the config names such code.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # transformers reports what is wrong with it
    if named := next(_code_names(config), ""):
        raise KvchatError(
            f"{name}: config.json in {folder} names code of the hub to run ({named}). kvchat runs no code "
            "that a model brings. Remove that line if you trust the rest."
        )


def _code_names(config: object, key: str = "") -> Iterator[str]:
    """The implementations that a config names, at any depth, other than those in torch and transformers."""
    match config:
        case dict():
            for inner, value in config.items():
                implements = key.endswith("_implementation") or "_implementation" in inner
                yield from _code_names(value, "_implementation" if implements else inner)
        case list():
            for value in config:
                yield from _code_names(value, key)
        case str() if key.endswith("_implementation") and config not in OWN_IMPLEMENTATIONS:
            yield config


@contextmanager
def no_pickles() -> Iterator[None]:
    """Inside the block torch opens no pickle: an index of safetensors files may name one."""

    def refuse(*_args: object, **_options: object) -> None:
        raise KvchatError("some of its weights are pickles, which can run code, and kvchat opens none")

    before = torch.load
    torch.load = refuse
    try:
        yield
    finally:
        torch.load = before


def _load_tokenizer(folder: Path, name: str) -> TokenizersBackend:
    try:
        chat = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # damaged files raise whatever the libraries under transformers raise
        raise KvchatError(f"{name}: the tokenizer in {folder} can't be read: {_first_line(error)}") from error
    if not isinstance(chat, TokenizersBackend):
        raise KvchatError(f"{name} has no tokenizer.json, and kvchat streams text through that format only.")
    return chat


def load_weights(folder: Path, name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model alone.

    Raises:
        KvchatError: its weights are damaged or missing.
    """
    quiet()
    refuse_code(folder, name)
    try:
        with no_pickles():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # damaged files raise whatever the libraries under transformers raise
        raise KvchatError(f"{name}: the weights in {folder} can't be loaded: {_first_line(error)}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise KvchatError(f"{name}: the weights in {folder} lack {missing[0]} ({len(missing)} in all).")
    assert isinstance(model, PreTrainedModel)
    fold_attention(model)
    placed: PreTrainedModel = model.eval().to(device)
    return placed


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
