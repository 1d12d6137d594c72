"""Loads and runs the compiled step of a model.

A package is a folder with the step, its kernels, the tokenizer and a description of the model, so that a chat
need not import transformers' models. Must not import the compiler (`build` does), which takes seconds.
"""

import ctypes
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import AddressedLayer, HeadShape, Memory
from kvchat.cache.quant_codec import BLOCK
from kvchat.engine.chat_template import ChatTemplate
from kvchat.engine.compiled.abi import layout
from kvchat.engine.compiled.package import DESCRIPTION, require_intact, trusted_package
from kvchat.engine.compiled.thread_tuner import ThreadTuner
from kvchat.engine.model.forward import Stopped
from kvchat.engine.model.layout import ModelShape
from kvchat.errors import KvchatError

LIBRARY, KERNELS, WEIGHTS = "step.so", "kernels.so", "weights.safetensors"
TOKENIZER = "tokenizer.json"
LINE, LARGE_PAGE, MADV_HUGEPAGE = 64, 2 << 20, 14
"""Bytes of a cache line and of a huge page; Linux's constant for `madvise`."""
READ_TOGETHER = 128
"""Tokens between two checks for a stop: 0.1 to 0.2 s."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The quality of the step's weights, compared with fp32 on a text of so many tokens."""

    tokens: int
    kl: float
    """Mean Kullback-Leibler divergence in nats."""
    agreeing: float
    """Share of the tokens after which both predict the same next token."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a package was built from, and what a chat needs to know about the model."""

    fingerprint: str
    revision: str
    """Hash of the original weights, as in a cache's fingerprint."""
    weights: str
    """Precision, such as `int4, head int8`."""
    weights_bytes: int
    kv_dtype: str
    """Default precision of keys and values: `fp32` or `bf16`."""
    vocabulary: int
    end_ids: tuple[int, ...]
    shape: ModelShape
    template: ChatTemplate
    cost: Cost

    def save(self, folder: Path) -> None:
        """Writes it into the package."""
        (folder / DESCRIPTION).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Description":
        """Reads it from the package.

        Raises:
            KvchatError: it is damaged.
        """
        try:
            saved = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            shape, template, cost = saved.pop("shape"), saved.pop("template"), saved.pop("cost")
            shape["heads"] = tuple(HeadShape(*head) if head else None for head in shape["heads"])
            for each in (saved, shape, template):
                each |= {name: tuple(value) for name, value in each.items() if isinstance(value, list)}
            return cls(
                **saved, shape=ModelShape(**shape), template=ChatTemplate(**template), cost=Cost(**cost)
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise KvchatError(f"The compiled step in {folder} is damaged: {error}") from error


def load_kernels(folder: Path) -> None:
    """Registers the operators of `kernels/ops.cpp` with torch, once.

    Raises:
        KvchatError: they can't be loaded, or have another memory layout than this code.
    """
    if not hasattr(torch.ops.kvchat, "attend"):
        try:
            torch.ops.load_library(folder / KERNELS)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise KvchatError(f"The compiled step in {folder} can't be loaded: {error}") from error
    expected = layout(Memory._fields, BLOCK)
    found = torch.ops.kvchat.layout() if hasattr(torch.ops.kvchat, "layout") else "none"
    if found != expected:
        raise KvchatError(
            f"The kernels in {folder} lay out memory in another way ({found}) than kvchat ({expected}). "
            "`kvchat models prepare MODEL --force` builds them again."
        )


def load_weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file in one allocation of huge pages.

    A step reads all weights; with 4 kB pages, TLB misses take about as long as reading.
    """
    with safe_open(file, framework="pt") as stored:
        mapped = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        sizes = {name: -(-tensor.nbytes // LINE) * LINE for name, tensor in mapped.items()}
        whole = _large_pages(sum(sizes.values()))
        tensors, start = {}, 0
        for name, tensor in mapped.items():
            piece = whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            tensors[name] = piece.copy_(tensor)
            start += sizes[name]
    return tensors


def _large_pages(size: int) -> torch.Tensor:
    """Memory of so many bytes, in huge pages where the operating system allows."""
    memory = torch.empty(size + LARGE_PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % LARGE_PAGE
    with suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(memory.data_ptr() + start), ctypes.c_size_t(size), MADV_HUGEPAGE
        )
    return memory[start : start + size]


class CompiledStep:
    """The compiled model: reads tokens with keys and values in the caller's memory."""

    def __init__(self, folder: Path) -> None:
        """Loads the package in `folder` in some tenths of a second.

        The caller has to check who can write to the folder; `find_step` does.

        Raises:
            KvchatError: it is damaged.
        """
        self.folder = folder
        require_intact(folder)  # before loading anything
        self.description = Description.load(folder)
        load_kernels(folder)
        self._runner: Any = None
        self._weights: dict[str, torch.Tensor] = {}
        self._load()
        self.stopped: Callable[[], bool] = lambda: False
        """Checked between chunks of tokens."""
        self._tuner = ThreadTuner(torch.get_num_threads())
        self._memories: list[Memory] = []
        self._table = torch.zeros(0)

    def _load(self) -> None:
        try:
            self._weights = load_weights(self.folder / WEIGHTS)
            self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(self.folder / LIBRARY), 1)
            self._runner.update_constant_buffer(self._weights, False, True, True)  # without copying
        except (RuntimeError, OSError, ValueError, SafetensorError) as error:
            raise KvchatError(f"The compiled step in {self.folder} can't be loaded: {error}") from error

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            KvchatError: it is damaged.
        """
        try:
            return Tokenizer.from_file(str(self.folder / TOKENIZER))
        except Exception as error:  # the library raises no narrower type
            raise KvchatError(f"The compiled step in {self.folder} is damaged: {error}") from error

    def unload(self) -> None:
        """Frees the weights; the next run loads them again."""
        self._runner, self._weights = None, {}

    def run(
        self, ids: Sequence[int], position: int, row: int, memories: list[Memory], keep: int
    ) -> torch.Tensor:
        """Logits `[keep, vocabulary]` after the last `keep` ids, fp32.

        Writes keys and values of the ids into every layer, from row `row` on.

        Args:
            ids: at least one.
            position: of the first id; after an eviction more than `row`.
            row: rows that are filled.
            memories: the addresses of each layer, with reserved rows for the ids.

        Raises:
            ValueError: the memory does not fit the step. Compiled code has no bounds checks: it would read
                and write other memory.
        """
        if self._runner is None:
            require_intact(self.folder)
            self._load()
        if memories != self._memories:
            self._check(memories)
            self._memories, self._table = memories, torch.tensor(memories, dtype=torch.int64)
        count = len(ids)
        if not 0 < keep <= count:
            raise ValueError(f"{keep} logits of {count} tokens")
        for memory in memories:
            if not memory.first <= row or row + count > memory.first + memory.room:
                raise ValueError(f"there is no room for rows {row} to {row + count - 1}")
        inputs = [
            torch.tensor([ids]),
            torch.arange(position, position + count).view(1, count),
            torch.arange(row, row + count).view(1, 1, 1, count),
            self._table,
            torch.arange(count - keep, count),
        ]
        started = time.perf_counter()
        torch.set_num_threads(self._tuner.threads if count == 1 else self._tuner.current)
        logits: torch.Tensor = self._runner.run(inputs)[0]
        if count == 1:
            self._tuner.note(time.perf_counter() - started)
        return logits

    def _check(self, memories: list[Memory]) -> None:
        heads = [head for head in self.description.shape.heads if head]
        found = [HeadShape(m.heads, m.key_dim, m.value_dim) for m in memories]
        if found != heads:
            raise ValueError(f"the step has {len(heads)} layers with other heads than {found}")


class CompiledReader:
    """Reads tokens through the compiled step; implements `forward.Reader`.

    With quantised weights, results are bit-identical for every batch size. Products in fp32 and bf16 are
    computed by torch, whose order of summation depends on the number of tokens.
    """

    def __init__(self, kv: ConversationKV, step: CompiledStep, evaluated: int = 0) -> None:
        self._kv = kv
        self._step = step
        self.evaluated = evaluated

    def read(self, ids: Sequence[int], keep: int = 1) -> torch.Tensor:
        """Reads `ids` in chunks, each committed in every layer or in none; logits `[keep, vocabulary]`."""
        rows: list[torch.Tensor] = []
        done = 0
        while done < len(ids):
            if self._step.stopped():
                raise Stopped
            chunk = ids[done : done + self._most()]
            done += len(chunk)
            wanted = min(len(chunk), keep - (len(ids) - done))
            logits = self._read_chunk(chunk, max(1, wanted))
            if wanted > 0:
                rows.append(logits)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _most(self) -> int:
        """Tokens per pass: none may finish a quantised block that a later one of the same pass reads."""
        block = self._kv.block
        return READ_TOGETHER if block == 1 else block - len(self._kv) % block

    def _read_chunk(self, ids: Sequence[int], keep: int) -> torch.Tensor:
        layers = addressed(self._kv)
        with self._kv.append(ids):
            for layer in layers:
                layer.reserve(len(ids))
            memories = [layer.memory() for layer in layers]
            row, position = len(self._kv), self._kv.index.next_position
            logits = self._step.run(ids, position, row, memories, keep)
            for layer in layers:
                layer.advance(len(ids))
        self.evaluated += len(ids)
        return logits


def addressed(kv: ConversationKV) -> list[AddressedLayer]:
    """The layers that compiled code can read and write."""
    return [layer for layer in kv.layers if isinstance(layer, AddressedLayer)]


def find_step(root: Path, folder: Path, weights: str) -> CompiledStep | None:
    """The compiled step of the model in `folder`; None where there is none for these versions.

    Args:
        root: kvchat's folder of compiled code; nothing is loaded from anywhere else.
        folder: of the model.
        weights: a precision or `gguf`.

    Raises:
        KvchatError: it is damaged, others can write to it, or the model can't be compiled; the sentence
            says why.
    """
    package = trusted_package(root, folder, weights)
    return CompiledStep(package) if package else None
