"""Loads a prepared model: its compiled step if there is one, else through transformers."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from tokenizers import Tokenizer

from kvchat.cache.kv_cache import ConversationKV
from kvchat.contract import ModelFacts
from kvchat.engine.chat_template import ChatTemplate
from kvchat.engine.compiled.runner import CompiledReader, CompiledStep, addressed, find_step
from kvchat.engine.model.dtypes import eager_precision, weights_of
from kvchat.engine.model.fingerprint import weights_hash
from kvchat.engine.model.forward import CachedReader, Reader, UncachedReader, stopping_between_layers
from kvchat.engine.model.layout import DTYPES, NO_LIMIT, ModelShape, new_kv
from kvchat.errors import KvchatError
from kvchat.system.cores import physical_cores

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    from kvchat.engine.model.transformers_model import Eager

NOT_COMPILED = "it is not compiled: kvchat models prepare makes it several times faster"
UNLIMITED_CONTEXT = 2048
"""Default context of a model without a position limit; typical training length of such models."""
VECTOR_WIDTH = 8
"""Numbers of a quantised row that the kernels read at once; transformers reads other head dims."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, its tokenizer and the facts that a screen shows."""

    tokenizer: Tokenizer
    template: ChatTemplate
    end_ids: frozenset[int]
    """Generating one of these ends the turn."""
    facts: ModelFacts
    shape: ModelShape
    revision: str
    """16 hex digits: hash of the weights, the same for transformers and the compiled step."""
    vocabulary: int
    open_model: Callable[[], "PreTrainedModel"]
    """Loads the model through transformers, once."""
    step: CompiledStep | None = None
    """Computes faster than transformers; None where it was not built."""

    @property
    def model(self) -> "PreTrainedModel":
        """The model in transformers; with a compiled step it is loaded on first use."""
        return self.open_model()

    def reader(self, kv: ConversationKV) -> Reader:
        """The reader that fills that cache."""
        if self.step and len(addressed(kv)) == len(kv.layers) and self._blocks_fit(kv):
            return CompiledReader(kv, self.step)
        return CachedReader(self.model, kv)

    def uncached_reader(self, evaluated: int = 0) -> Reader:
        """The reader that stores nothing and reads everything again for every token."""
        if self.step:
            return UncachedReader(lambda ids: self.reader(self.new_kv()).read(ids), evaluated)
        return UncachedReader.of_model(self.model, evaluated)

    def _blocks_fit(self, kv: ConversationKV) -> bool:
        dims = [dim for head in self.shape.heads if head for dim in (head.key_dim, head.value_dim)]
        return kv.block == 1 or all(dim % VECTOR_WIDTH == 0 for dim in dims)

    @contextmanager
    def stopping(self, stopped: Callable[[], bool]) -> Iterator[None]:
        """Inside the block, reading raises `Stopped` soon after `stopped()` says so."""
        if self.step is None:
            with stopping_between_layers(self.model, stopped):
                yield
            return
        before, self.step.stopped = self.step.stopped, stopped
        try:
            yield
        finally:
            self.step.stopped = before

    def new_kv(self, kv: str = "auto") -> ConversationKV:
        """An empty cache for one conversation.

        `auto` is 16 bits, or as computed where that is exact; else `fp32`, `bf16`, `int8` or `int4`.
        """
        return new_kv(self.shape, kv, DTYPES[self.facts.kv_dtype])

    def unload(self) -> None:
        """Frees the compiled step's weights until the next turn; those in transformers stay loaded."""
        if self.step:
            self.step.unload()

    def rotary_frequencies(self) -> torch.Tensor | None:
        """`[rotary_dims / 2]` radians per position; None where layers differ or don't rotate keys."""
        frequencies = self.shape.rotary_frequencies
        return torch.tensor(frequencies) if frequencies else None

    def noted(self, note: str) -> Self:
        """A copy with one more note for the screen."""
        return replace(self, facts=replace(self.facts, notes=(*self.facts.notes, note)))


def automatic_device() -> str:
    """The first available one of CUDA, Apple's MPS and the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def chosen_device(device: str) -> str:
    """The device that computes: `auto` is the best one that is there.

    Raises:
        KvchatError: it is not there.
    """
    if device == "auto":
        return automatic_device()
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if device in available and not available[device]():
        raise KvchatError(
            f"There is no device {device} that torch can use here; --device cpu computes without."
        )
    return device


def load_model(
    folder: Path,
    name: str,
    *,
    precision: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    device: str = "auto",
    compiled: Path | None = None,
) -> LoadedModel:
    """Loads the prepared model in `folder`.

    Args:
        precision: of the weights: `auto`, `fp32`, `bf16`, `int8` or `int4`.
        threads: for torch; None takes every physical core.
        context: tokens at most; None takes the model's limit.
        compiled: kvchat's folder of compiled code, with the step that `kvchat models prepare` built. With
            None, or without a step, transformers computes.

    Raises:
        KvchatError: the folder holds no chat model that kvchat can run; the sentence says why.
    """
    device = chosen_device(device)
    torch.set_num_threads(threads or physical_cores())
    note = ""
    if compiled and device == "cpu":
        try:
            if step := find_step(compiled, folder, weights_of(folder, precision)):
                return _with_step(step, folder, name, precision, context)
            note = NOT_COMPILED
        except KvchatError as error:  # transformers still works
            note = f"it is not compiled: {error}"
    from kvchat.engine.model.transformers_model import load_eager

    loaded = loaded_of(
        load_eager(folder, name, DTYPES[eager_precision(precision, device)], device), name, context
    )
    return loaded.noted(note) if note else loaded


def _with_step(
    step: CompiledStep, folder: Path, name: str, precision: str, context: int | None
) -> LoadedModel:
    made = step.description

    @cache
    def open_model() -> "PreTrainedModel":
        from kvchat.engine.model.transformers_model import load_weights

        exact = precision if precision in DTYPES else "auto"
        return load_weights(folder, name, DTYPES[eager_precision(exact, "cpu")], "cpu")

    tokenizer = step.tokenizer()
    facts = _facts(
        name,
        made.shape,
        kv_dtype=made.kv_dtype,
        weights_dtype=made.weights.partition(",")[0],
        weights_bytes=made.weights_bytes,
        context=context,
        path=f"compiled {made.weights}",
        tokenizer=tokenizer_fingerprint(tokenizer),
    )
    ends = frozenset(made.end_ids)
    return LoadedModel(
        tokenizer, made.template, ends, facts, made.shape, made.revision, made.vocabulary, open_model, step
    )


def loaded_of(eager: "Eager", name: str, context: int | None = None) -> LoadedModel:
    """A loaded model that transformers computes."""
    from kvchat.engine.model.transformers_model import weights_bytes

    model, dtype = eager.model, next(name for name, each in DTYPES.items() if each is eager.model.dtype)
    facts = _facts(
        name,
        eager.shape,
        kv_dtype=dtype,
        weights_dtype=dtype,
        weights_bytes=weights_bytes(model),
        context=context,
        path=f"eager {dtype}",
        tokenizer=tokenizer_fingerprint(eager.tokenizer),
    )
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return LoadedModel(
        eager.tokenizer,
        eager.template,
        eager.end_ids,
        facts,
        eager.shape,
        weights_hash(model),
        vocabulary,
        lambda: model,
    )


def assemble(
    model: "PreTrainedModel", chat: "TokenizersBackend", name: str, *, context: int | None = None
) -> LoadedModel:
    """A loaded model from a model and a tokenizer in memory.

    Raises:
        KvchatError: there is no chat template, or some layers store what kvchat does not support.
    """
    from kvchat.engine.model.transformers_model import put_together

    return loaded_of(put_together(model, chat, name), name, context)


def _facts(
    name: str,
    shape: ModelShape,
    *,
    kv_dtype: str,
    weights_dtype: str,
    weights_bytes: int,
    context: int | None,
    path: str,
    tokenizer: str,
) -> ModelFacts:
    heads = [head for head in shape.heads if head]
    return ModelFacts(
        name=name,
        layers=len(heads),
        kv_heads=heads[0].kv_heads if heads else 0,
        head_dim=heads[0].key_dim if heads else 0,
        kv_dtype=kv_dtype,
        kv_dtype_bytes=DTYPES[kv_dtype].itemsize,
        weights_dtype=weights_dtype,
        weights_bytes=weights_bytes,
        context_limit=_context_limit(shape, context),
        threads=torch.get_num_threads(),
        path=path,
        tokenizer=tokenizer,
        notes=shape.notes,
        gap_refusal=shape.gap_refusal,
    )


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """16 hex digits; tokenizers with the same fingerprint give the same ids."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]


def _context_limit(shape: ModelShape, asked: int | None) -> int:
    if shape.position_limit == NO_LIMIT:
        return asked or UNLIMITED_CONTEXT
    return min(shape.position_limit, asked) if asked else shape.position_limit
