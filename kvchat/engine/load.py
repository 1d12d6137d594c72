"""Loads a prepared model folder into memory.

Knows transformers and the processor; refuses remote code and pickled weights. Where the folder comes from is
`prepare`'s business.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from kvchat.cache.kv import ConversationKV
from kvchat.contract import ModelFacts
from kvchat.engine.attention import fold_attention
from kvchat.engine.compiled import CompiledReader, CompiledStep, find_step
from kvchat.engine.forward import CachedReader, Reader
from kvchat.engine.shape import DTYPES, NO_LIMIT, ModelShape, measure, new_kv
from kvchat.errors import KvchatError

NOT_COMPILED = "decode is not compiled: kvchat models prepare makes it several times faster"
UNLIMITED_CONTEXT = 2048
"""Tokens for a model whose positions never end, unless more are asked for: such models learned from that."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, with its tokenizer and what a screen may tell about it."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    chat: TokenizersBackend
    """transformers' tokenizer: it carries the chat template."""
    end_ids: frozenset[int]
    """Generating one of these ends the turn."""
    facts: ModelFacts
    shape: ModelShape
    step: CompiledStep | None = None
    """Decodes single tokens faster than the model itself; None where none was made."""

    def reader(self, kv: ConversationKV) -> Reader:
        """What reads tokens into that cache."""
        return CompiledReader(self.model, kv, self.step) if self.step else CachedReader(self.model, kv)

    def new_kv(self, kv: str = "auto") -> ConversationKV:
        """An empty cache for one conversation: `auto` (as computed), `fp32`, `bf16`, `int8` or `int4`."""
        return new_kv(self.shape, kv, self.model.dtype)

    def rotary_frequencies(self) -> torch.Tensor | None:
        """`[rotary_dims / 2]` radians per position; None where no single rotation turns all the keys."""
        frequencies = self.shape.rotary_frequencies
        return torch.tensor(frequencies) if frequencies else None


def physical_cores() -> int:
    """Physical cores this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def automatic_precision(device: str) -> str:
    """`bf16` where the device computes in it, else `fp32`."""
    if device != "cpu":
        return "bf16"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags else "fp32"


def automatic_device() -> str:
    """The first of CUDA, Apple's MPS and the CPU that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_model(
    folder: Path,
    name: str,
    *,
    precision: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    device: str = "auto",
    compiled: bool = True,
) -> LoadedModel:
    """Loads weights and tokenizer from `folder` (config.json, *.safetensors, tokenizer.json).

    Args:
        precision: `auto`, `fp32` or `bf16`.
        threads: for torch; None takes every physical core.
        context: tokens at most; None takes what the model was made for.
        compiled: whether to decode by the compiled step, where `kvchat models prepare` made one.

    Raises:
        KvchatError: the folder holds no chat model that kvchat can run; the sentence says why.
    """
    device = automatic_device() if device == "auto" else device
    precision = automatic_precision(device) if precision == "auto" else precision
    torch.set_num_threads(threads or physical_cores())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chat = _load_tokenizer(folder, name)
    model = _load_weights(folder, name, DTYPES[precision]).to(device)  # type: ignore[arg-type]
    loaded = assemble(model, chat, name, precision=precision, context=context)
    return with_compiled_step(loaded, folder) if compiled and device == "cpu" else loaded


def with_compiled_step(loaded: LoadedModel, folder: Path) -> LoadedModel:
    """The model with its compiled decode step, if one was made for it; one that is damaged is left alone."""
    try:
        step = find_step(folder, loaded.model.dtype)
    except KvchatError as error:
        notes = (*loaded.facts.notes, f"decode is not compiled: {error}")
        return replace(loaded, facts=replace(loaded.facts, notes=notes))
    if step is None:
        if loaded.model.dtype is not torch.bfloat16:
            return loaded
        notes = (*loaded.facts.notes, NOT_COMPILED)
        return replace(loaded, facts=replace(loaded.facts, notes=notes))
    path = f"compiled {step.description.weights}"
    return replace(loaded, step=step, facts=replace(loaded.facts, path=path))


def assemble(
    model: PreTrainedModel, chat: TokenizersBackend, name: str, *, precision: str, context: int | None = None
) -> LoadedModel:
    """Puts a model and its tokenizer together and reads off the facts.

    Raises:
        KvchatError: there is no chat template, or some layers keep what kvchat can't.
    """
    if not getattr(chat, "chat_template", None):
        raise KvchatError(f"{name} has no chat template, so it can't chat. Take an instruction-tuned model.")
    fold_attention(model)
    shape = measure(model.eval(), name)
    heads = [head for head in shape.heads if head]
    tokenizer = chat.backend_tokenizer
    facts = ModelFacts(
        name=name,
        layers=len(heads),
        kv_heads=heads[0].kv_heads if heads else 0,
        head_dim=heads[0].key_dim if heads else 0,
        kv_dtype=precision,
        kv_dtype_bytes=DTYPES[precision].itemsize,
        weights_dtype=precision,
        weights_bytes=weights_bytes(model),
        context_limit=_context_limit(shape, context),
        threads=torch.get_num_threads(),
        path=f"eager {precision}",
        tokenizer=tokenizer_fingerprint(tokenizer),
        notes=shape.notes,
        gap_refusal=shape.gap_refusal,
    )
    return LoadedModel(model, tokenizer, chat, end_ids(model, chat), facts, shape)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """16 hex digits: two tokenizers with the same ones give the same ids."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of all distinct weight tensors; tied ones count once."""
    storages = (parameter.untyped_storage() for parameter in model.parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def end_ids(model: PreTrainedModel, chat: TokenizersBackend) -> frozenset[int]:
    """The end-of-turn ids of the generation config, with the tokenizer's own."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids: Iterable[int | None] = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, chat.eos_token_id) if i is not None)


def _context_limit(shape: ModelShape, asked: int | None) -> int:
    if shape.position_limit == NO_LIMIT:
        return asked or UNLIMITED_CONTEXT
    return min(shape.position_limit, asked) if asked else shape.position_limit


def _load_tokenizer(folder: Path, name: str) -> TokenizersBackend:
    try:
        chat = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # damaged files raise whatever the libraries under transformers raise
        raise KvchatError(f"{name}: the tokenizer in {folder} can't be read: {_first_line(error)}") from error
    if not isinstance(chat, TokenizersBackend):
        raise KvchatError(f"{name} has no tokenizer.json, and kvchat streams text through that format only.")
    return chat


def _load_weights(folder: Path, name: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
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
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
