"""Precisions of weights, and what `auto` means on this machine for this model. Must not import torch."""

from pathlib import Path

from kvchat.errors import KvchatError
from kvchat.models.resolve import GGUF_LINK

QUANTISED_BITS = {"int8": 8, "int4": 4}
GGUF = "gguf"
"""Weights as in the GGUF file, each matrix in its own precision."""


def automatic_precision(device: str) -> str:
    """`bf16` where the device computes in it, else `fp32`."""
    if device != "cpu":
        return "bf16"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags else "fp32"


def gguf_of(folder: Path) -> Path | None:
    """The GGUF file that a prepared model was converted from, if it still exists."""
    file = folder / GGUF_LINK
    return file if file.is_file() else None


def weights_of(folder: Path, precision: str, device: str = "cpu") -> str:
    """The precision of a compiled step's weights; `auto` is never lower than the source."""
    if precision != "auto":
        return precision
    return GGUF if gguf_of(folder) else automatic_precision(device)


def eager_precision(precision: str, device: str) -> str:
    """The precision in which transformers computes.

    Raises:
        KvchatError: transformers can't compute in this precision.
    """
    if precision in QUANTISED_BITS:
        raise KvchatError(
            f"Weights in {precision} need a compiled step, and there is none. `kvchat models prepare MODEL "
            f"--precision {precision}` makes it and measures its quality."
        )
    return automatic_precision(device) if precision == "auto" else precision
