"""Runs the compiled decode step, and reads through it.

A package is a folder with `step.so`, the kernels it calls, and what it was made for. It belongs to one model,
one torch and one kind of CPU, and its name says so. It knows how to find, load and feed one; it refuses to
know how one is made: importing the compiler takes seconds (`compile` does that).
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash
from transformers import PreTrainedModel

from kvchat.cache.kv import ConversationKV
from kvchat.cache.layers import GrowableLayer, HeadShape
from kvchat.engine.forward import CachedReader
from kvchat.errors import KvchatError

FORMAT = 1
"""Raised when a package is made or fed in another way."""
LIBRARY, KERNELS, DESCRIPTION = "step.so", "kernels.so", "package.json"
FOLDER = "compiled"
"""Beside the weights; one package each."""
SHORTEST = 2
"""Tokens, with the new one: a dimension of one token would be compiled as fixed."""
SAMPLES, SAMPLE_BYTES = 64, 4096
"""What of each weights file goes into the fingerprint."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a package was made for."""

    fingerprint: str
    weights: str
    """In words, such as `int4, head int8`."""
    dtype: str
    """Of keys, values and logits: `float32` or `bfloat16`."""
    heads: tuple[HeadShape, ...]
    """Per layer."""

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
            heads = tuple(HeadShape(*head) for head in saved.pop("heads"))
            return cls(**saved, heads=heads)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise KvchatError(f"The compiled step in {folder} is damaged: {error}") from error


def load_kernels(folder: Path) -> None:
    """Makes the operators of `kernels.cpp` known to torch; once they are, does nothing.

    Raises:
        KvchatError: they can't be loaded.
    """
    if not hasattr(torch.ops.kvchat, "attend"):
        try:
            torch.ops.load_library(folder / KERNELS)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise KvchatError(f"The compiled step in {folder} can't be loaded: {error}") from error


class CompiledStep:
    """One token through the whole model, over keys and values that lie in the caller's memory."""

    def __init__(self, folder: Path) -> None:
        """Loads the package in `folder`: 0.1 s, and nothing is unpacked anywhere.

        Raises:
            KvchatError: it is damaged.
        """
        self.description = Description.load(folder)
        self.dtype: torch.dtype = getattr(torch, self.description.dtype)
        load_kernels(folder)
        try:
            self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / LIBRARY), 1)
        except RuntimeError as error:
            raise KvchatError(f"The compiled step in {folder} can't be loaded: {error}") from error
        self._mask = torch.zeros(0)

    def run(
        self, token: int, position: int, length: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Writes the token's keys and values into row `length` of every layer; logits `[1, vocabulary]`.

        Args:
            token: the id to read.
            position: where it stands; after an eviction more than `length`.
            length: rows that are filled, at least one.
            pairs: per layer keys and values, `[1, kv_heads, capacity, head_dim]`, contiguous.

        Raises:
            ValueError: the tensors are others than the step was compiled for. The compiled code looks at
                nothing: it would read and write other memory.
        """
        self._check(length, pairs)
        tensors = [tensor for pair in pairs for tensor in pair]
        inputs = [torch.tensor([[token]]), torch.tensor([[position]]), self._mask_of(length + 1), *tensors]
        logits: torch.Tensor = self._runner.run(inputs)[0]
        return logits

    def _check(self, length: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        heads = self.description.heads
        if len(pairs) != len(heads):
            raise ValueError(f"the step has {len(heads)} layers, not {len(pairs)}")
        capacity = pairs[0][0].shape[-2]
        if not SHORTEST <= length + 1 <= capacity:
            raise ValueError(f"a token after {length} others doesn't fit a capacity of {capacity}")
        for (keys, values), head in zip(pairs, heads, strict=True):
            for tensor, dim in ((keys, head.key_dim), (values, head.value_dim)):
                if tensor.shape != (1, head.kv_heads, capacity, dim):
                    expected = f"[1, {head.kv_heads}, {capacity}, {dim}]"
                    raise ValueError(f"the step takes keys and values {expected}, not {list(tensor.shape)}")
                if tensor.dtype is not self.dtype or not tensor.is_contiguous() or not tensor.is_cpu:
                    raise ValueError(f"the step takes whole tensors of {self.dtype} in the CPU's memory")

    def _mask_of(self, tokens: int) -> torch.Tensor:
        """`[1, 1, 1, tokens]`: everything that is filled is in sight."""
        if self._mask.shape[0] < tokens:
            self._mask = torch.zeros(2 * tokens)
        return self._mask[:tokens].view(1, 1, 1, tokens)


class CompiledReader:
    """Reads single tokens through the compiled step, and everything else through the model itself.

    Satisfies `forward.Reader`. Both leave their keys and values in the same layers, so that a token counts
    the same whichever way it came.
    """

    def __init__(self, model: PreTrainedModel, kv: ConversationKV, step: CompiledStep) -> None:
        self._eager = CachedReader(model, kv)
        self._kv = kv
        self._step = step
        self._stepped = 0

    @property
    def evaluated(self) -> int:
        """Tokens run through the model so far, either way."""
        return self._eager.evaluated + self._stepped

    @evaluated.setter
    def evaluated(self, tokens: int) -> None:
        self._eager.evaluated = tokens - self._stepped

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """Reads `ids` and commits them in every layer, or in none; logits `[1, vocabulary]`."""
        layers = self._plain_layers()
        if len(ids) != 1 or not layers or len(self._kv) + 1 < SHORTEST:
            return self._eager.read(ids)
        with self._kv.append(ids):
            pairs = [layer.room_for(1) for layer in layers]
            logits = self._step.run(ids[0], self._kv.next_position, len(self._kv), pairs)
            for layer in layers:
                layer.fill(1)
        self._stepped += 1
        return logits

    def _plain_layers(self) -> list[GrowableLayer]:
        """The layers, if all of them keep keys and values as the step takes them; else none."""
        dtype = self._step.dtype
        plain = [layer for layer in self._kv.layers if isinstance(layer, GrowableLayer)]
        fitting = [layer for layer in plain if layer.keys is None or layer.keys.dtype is dtype]
        return fitting if len(fitting) == len(self._kv.layers) else []


def fingerprint(folder: Path, dtype: torch.dtype) -> str:
    """16 hex digits over all that a package depends on: model files, libraries, CPU and precision."""
    digest = hashlib.sha256()
    facts = (FORMAT, torch.__version__, version("transformers"), cpu_features(), str(dtype))
    digest.update(repr(facts).encode())
    files = [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    for path in sorted(path for path in files if path.is_file()):  # a link may point to what is gone
        digest.update(f"{path.name}{path.stat().st_size}".encode())
        digest.update(_sampled(path))
    return digest.hexdigest()[:16]


def package_folder(folder: Path, dtype: torch.dtype) -> Path:
    """Where the package of the model in `folder` lies, if it was made."""
    return folder / FOLDER / fingerprint(folder, dtype)


def find_step(folder: Path, dtype: torch.dtype) -> CompiledStep | None:
    """The compiled step of the model in `folder`; None where none was made, or for other versions.

    Raises:
        KvchatError: it is damaged.
    """
    package = package_folder(folder, dtype)
    return CompiledStep(package) if package.is_dir() else None


def cpu_features() -> str:
    """What the compiler may use of this CPU: code for more instructions than there are would crash."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            names = ("flags", "Features", "model name")
            return "".join(_first_of_each(lines, names))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _first_of_each(lines: Iterator[str], names: tuple[str, ...]) -> list[str]:
    return sorted({line for line in lines if line.startswith(names)})


def _sampled(path: Path) -> bytes:
    """A checksum over pieces of a file, from its first to its last bytes."""
    size, digest = path.stat().st_size, xxhash.xxh3_128()
    with path.open("rb") as file:
        for start in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()
