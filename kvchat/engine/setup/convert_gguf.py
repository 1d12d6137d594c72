"""Converts a GGUF file to a folder of config, tokenizer and fp32 safetensors.

Uses transformers' GGUF reader and corrects what it gets wrong. Must not depend on where the file came from.
"""

import contextlib
import errno
import functools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf as gguf_library
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as gguf_loader
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from kvchat.errors import KvchatError
from kvchat.models.staging import SPARE_BYTES, Progress, Report, require_space

# per cent of the time after each step
READ, WEIGHTS, TOKENIZER, WRITTEN = 45, 75, 85, 100

DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r")
"""Vocabularies (`tokenizer.ggml.pre`) that split numbers into digits before anything else."""

GgufReader = Any
"""gguf.GGUFReader; the library has no types."""


def convert_gguf(gguf: Path, target: Path, report: Report) -> None:
    """Writes model, generation config and tokenizer of `gguf` into the existing folder `target`.

    Weights are dequantised exactly, to fp32.

    Raises:
        KvchatError: not a GGUF file, damaged, of an unknown type, or there is not enough disk space.
        OSError: the disk filled up meanwhile.
    """
    refuse_other_files(gguf)
    report(Progress("convert", 0, WRITTEN))
    try:
        _convert(gguf, target, report)
    except SafetensorError as error:
        raise _write_error(error) from error
    except (MemoryError, KvchatError):
        raise
    except Exception as error:  # a damaged file can raise anything
        # transformers raises OSErrors of its own, without a number
        if isinstance(error, OSError) and error.errno:
            raise
        reason = " ".join(str(error).split()) or "damaged"
        raise KvchatError(f"{gguf} cannot be converted ({type(error).__name__}: {reason}).") from error


def refuse_other_files(gguf: Path) -> None:
    """Raises `KvchatError` where a file doesn't start as GGUF files do."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise KvchatError(f"{gguf} is not a GGUF file.")


def _convert(gguf: Path, target: Path, report: Report) -> None:
    reader = gguf_library.GGUFReader(gguf)
    require_space(target, _fp32_bytes(reader) + SPARE_BYTES)
    with _quiet(), _read_once(reader), _counted(report), _alone(gguf) as link:
        model = _read_model(link, gguf)
        report(Progress("convert", WEIGHTS, WRITTEN))
        tokenizer = _read_tokenizer(link, _text_field(reader, "tokenizer.ggml.pre"))
        tokenizer.model_max_length = model.config.max_position_embeddings
        report(Progress("convert", TOKENIZER, WRITTEN))
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)
    report(Progress("convert", WRITTEN, WRITTEN))


@contextlib.contextmanager
def _alone(gguf: Path) -> Iterator[Path]:
    """A link to the file in an empty folder, since transformers also reads configs beside the file."""
    with tempfile.TemporaryDirectory(prefix="kvchat-gguf-") as folder:
        link = Path(folder) / "model.gguf"
        link.symlink_to(gguf.resolve())
        yield link


def _read_model(link: Path, gguf: Path) -> PreTrainedModel:
    answer: Any = AutoModelForCausalLM.from_pretrained(
        link.parent,
        gguf_file=link.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    model: PreTrainedModel = answer[0]
    loaded: dict[str, Any] = answer[1]
    # transformers fills missing weights with random numbers
    absent = sorted({*loaded["missing_keys"], *(str(key) for key in loaded["mismatched_keys"])})
    if absent:
        raise KvchatError(f"{gguf} lacks weights of the model it names: {', '.join(absent[:3])}.")
    # a temporary path from the file's metadata
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path
    return model


def _read_tokenizer(link: Path, vocabulary: str) -> TokenizersBackend:
    tokenizer = AutoTokenizer.from_pretrained(
        link.parent, gguf_file=link.name, local_files_only=True, trust_remote_code=False
    )
    assert isinstance(tokenizer, TokenizersBackend), "transformers builds nothing else from a GGUF file"
    # transformers 5.23 splits these as GPT-2 does, which splits "\n\n1." differently than in training
    if vocabulary in DIGIT_BY_DIGIT:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _fp32_bytes(reader: GgufReader) -> int:
    return sum(int(tensor.n_elements) for tensor in reader.tensors) * torch.float32.itemsize


def _text_field(reader: GgufReader, name: str) -> str:
    field = reader.get_field(name)
    return "" if field is None else str(field.contents())


def _write_error(error: SafetensorError) -> OSError | KvchatError:
    if f"os error {errno.ENOSPC}" in str(error):
        return OSError(errno.ENOSPC, "No space left on device")
    return KvchatError(f"The converted weights could not be written: {error}")


# ---- side effects of transformers -----------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or warnings from transformers: they would be drawn over kvchat's own progress."""
    verbosity = transformers.logging.get_verbosity()
    had_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if had_bars:
            transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def _read_once(reader: GgufReader) -> Iterator[None]:
    """Caches what transformers computes repeatedly: parsing the vocabulary, and its table of names.

    Converting the default model takes half the time.
    """
    names = functools.cache(gguf_library.get_tensor_name_map)
    with (
        _swapped(gguf_library, "GGUFReader", lambda _: reader),
        _swapped(gguf_library, "get_tensor_name_map", names),
    ):
        yield


@contextlib.contextmanager
def _counted(report: Report) -> Iterator[None]:
    """Reports each dequantised tensor, in place of transformers' progress bar."""

    def counted(tensors: list[object], **_: object) -> Iterable[object]:
        for done, tensor in enumerate(tensors):
            report(Progress("convert", READ + (WEIGHTS - READ) * done // len(tensors), WRITTEN))
            yield tensor

    with _swapped(gguf_loader, "tqdm", counted):
        yield


@contextlib.contextmanager
def _swapped(module: ModuleType, name: str, value: object) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
