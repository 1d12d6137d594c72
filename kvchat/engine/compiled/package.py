"""Where a model's compiled packages lie, and whether there is one that fits. Imports no torch.

A package belongs to one model, one torch, one kind of CPU and one version of the code that makes and feeds
it: its name carries a fingerprint of all of these. Where a model can't be compiled, the reason lies there
instead.
"""

import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

from kvchat.engine.model.dtypes import weights_of
from kvchat.models.resolve import MARKER

FOLDER = "compiled"
"""Beside the weights; one package each."""
SOURCES = ("kernels.cpp", "build.py", "quantized_linear.py")
"""What a package is made by."""
FILES = ("*.json", "*.jinja", "*.safetensors", "*.gguf")
"""Configs, tokenizer and chat template go into a package as well as weights."""
LIBRARIES = ("torch", "transformers")
SAMPLES, SAMPLE_BYTES = 64, 4096
"""What of each weights file goes into the fingerprint."""
REFUSAL = "refused.txt"


def fingerprint(folder: Path, weights: str) -> str:
    """16 hex digits over all that a package depends on: model files, this code, libraries, CPU, precision."""
    digest = hashlib.sha256()
    facts = ([installed_version(name) for name in LIBRARIES], cpu_features(), weights)
    digest.update(repr(facts).encode())
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    files = [path for pattern in FILES for path in folder.glob(pattern)]
    for path in sorted(path for path in files if path.is_file()):  # a link may point to what is gone
        digest.update(f"{path.name}{path.stat().st_size}".encode())
        digest.update(_sampled(path))
    return digest.hexdigest()[:16]


def installed_version(name: str) -> str:
    """The version of an installed distribution, from the name of its folder where there is one.

    The chat asks before its first paint, and `importlib.metadata` brings the parser of mails along.
    """
    for entry in sys.path:
        for info in Path(entry).glob(f"{name}-*.dist-info"):
            return info.name.removeprefix(f"{name}-").removesuffix(".dist-info")
    from importlib.metadata import version

    return version(name)


def package_folder(folder: Path, weights: str) -> Path:
    """Where the package of the model in `folder` lies, if it was made; `weights` is a precision or `gguf`."""
    return folder / FOLDER / f"{weights}-{fingerprint(folder, weights)}"


def is_decided(folder: Path, weights: str) -> bool:
    """Whether a package was made for just this, or can't be."""
    return package_folder(folder, weights).is_dir()


def wants_step(folder: Path, *, fetched: bool = False) -> bool:
    """Whether a compiled step should be made for a model.

    That is one that was fetched or converted just now, or that had a step before something changed.
    """
    wanted = fetched or (folder / MARKER).is_file() or (folder / FOLDER).is_dir()
    return wanted and bool(compiler()) and not is_decided(folder, weights_of(folder, "auto"))


def refusal_of(package: Path) -> str:
    """Why there is no step in this folder; empty where there is one."""
    try:
        return (package / REFUSAL).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def refuse(folder: Path, weights: str, reason: str) -> None:
    """Remembers that a model can't be compiled, so that nobody tries again until something changes."""
    package = package_folder(folder, weights)
    package.mkdir(parents=True, exist_ok=True)
    (package / REFUSAL).write_text(reason, encoding="utf-8")


def remove_stale(folder: Path, weights: str) -> None:
    """Removes what was made for other versions in the same precision."""
    keep = package_folder(folder, weights)
    for path in (folder / FOLDER).glob(f"{weights}-*"):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)


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


def compiler() -> str | None:
    """Where the C++ compiler is that AOTInductor would call."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", default))
