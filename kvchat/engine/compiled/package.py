"""Finds the compiled package of a model. Must not import torch.

Packages are code, so they are in kvchat's data folder, never in the model's. The name of a package has a
fingerprint of everything it depends on: the model's files, torch, the CPU and the sources that build and run
it, and one of the C++ compiler. Where a model can't be compiled, the reason is there instead.

    <data>/compiled/<model's folder>-<12 hex of its path>/
        model.txt       path of the model's folder
        files.json      digests of the model's files, with their `stat`
        <weights>-<fingerprint>-<compiler>/
            digests.json and the files whose SHA-256 it lists, or refused.txt
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from kvchat.config.paths import find_paths
from kvchat.engine.model.dtypes import weights_of
from kvchat.errors import KvchatError
from kvchat.errors import reason as reason_of
from kvchat.models.resolve import MARKER, MODEL_PATH, compiled_folder
from kvchat.system.ownership import close_to_others, digest_of, files_in, make_private, require_own

OLD_FOLDER = "compiled"
"""In a model's folder: earlier versions stored packages there. Nothing is loaded from it."""
SOURCES = (
    *(
        "kvchat.engine.compiled.build",
        "kvchat.engine.compiled.export",
        "kvchat.engine.compiled.gguf_weights",
        "kvchat.engine.compiled.quantized_linear",
        "kvchat.engine.compiled.abi",
    ),  # build a package
    *(
        "kvchat.engine.compiled.runner",
        "kvchat.engine.model.layout",
        "kvchat.engine.chat_template",
    ),  # describe it
    *(
        "kvchat.cache.layer",
        "kvchat.cache.dense_layer",
        "kvchat.cache.quantized_layer",
        "kvchat.cache.quant_codec",
    ),  # define the memory layout that it reads
)
"""Modules that a package depends on, in addition to the kernels."""
KERNELS_FOLDER = Path(__file__).with_name("kernels")
FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.safetensors", "*.gguf")
"""Files of a model that a package depends on: weights, configs, tokenizer and chat template."""
LIBRARIES = ("torch", "transformers")
DESCRIPTION = "package.json"
REFUSAL, DIGESTS, MODEL_DIGESTS = "refused.txt", "digests.json", "files.json"

logger = logging.getLogger(__name__)


# ---- what a package depends on --------------------------------------------------------------------------


def fingerprint(root: Path, folder: Path, weights: str) -> str:
    """16 hex digits over all that a package depends on: model files, this code, libraries, CPU, precision.

    Files count by content, which is read again only if their `stat` changed.
    """
    digest = hashlib.sha256()
    facts = ([installed_version(name) for name in LIBRARIES], cpu_features(), weights)
    digest.update(repr(facts).encode())
    for source in (*kernel_sources(), *module_sources()):
        digest.update(source.read_bytes())
    digest.update(repr(sorted(model_digests(root, folder).items())).encode())
    return digest.hexdigest()[:16]


def kernel_sources() -> list[Path]:
    """The C++ files of the kernels: `ops.cpp`, which is compiled, then the headers that it includes."""
    return [KERNELS_FOLDER / "ops.cpp", *sorted(KERNELS_FOLDER.glob("*.h"))]


def module_sources() -> list[Path]:
    """The files of `SOURCES`; the modules are not imported."""
    specs = [find_spec(name) for name in SOURCES]
    return [Path(spec.origin) for spec in specs if spec and spec.origin]


def model_digests(root: Path, folder: Path) -> dict[str, str]:
    """Name → SHA-256 of each file in a model's folder that a package depends on.

    Digests are stored with the `stat` of their files in the model's folder of packages, where there is one.
    """
    memory = compiled_folder(root, folder) / MODEL_DIGESTS
    known = _read_json(memory)
    paths = {path for pattern in FILES for path in folder.glob(pattern)}
    found: dict[str, list[str]] = {}
    for path in sorted(path for path in paths if path.is_file()):  # not broken links
        seen = _identity(path)
        before, digest = known.get(path.name, ("", ""))
        found[path.name] = [seen, digest if before == seen else _digest_if_readable(path)]
    if found != known:
        with suppress(OSError):  # then they are computed again next time
            _write_json(memory, found)
    return {name: digest for name, (_, digest) in found.items()}


def _digest_if_readable(path: Path) -> str:
    """The digest, or the error: loading the model reports it."""
    try:
        return digest_of(path)
    except OSError as error:
        return str(error)


def _identity(path: Path) -> str:
    """Changes with every write to the file, since no program can set its ctime."""
    facts = path.stat()
    return f"{facts.st_dev} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"


def _read_json(file: Path) -> dict[str, list[str]]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    pairs = read.items() if isinstance(read, dict) else ()
    return {name: pair for name, pair in pairs if isinstance(pair, list) and len(pair) == 2}


def _write_json(file: Path, content: object) -> None:
    """Writes atomically, since other processes read the file. Fails where there is no folder."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as half:
            json.dump(content, half)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def installed_version(name: str) -> str:
    """The version of an installed distribution, from the name of its folder if possible.

    The chat needs it before it draws anything, and importing `importlib.metadata` is slow.
    """
    for entry in sys.path:
        for info in Path(entry).glob(f"{name}-*.dist-info"):
            return info.name.removeprefix(f"{name}-").removesuffix(".dist-info")
    from importlib.metadata import version

    return version(name)


def cpu_features() -> str:
    """The CPU's model and instruction sets: code compiled for others could crash."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            names = ("flags", "Features", "model name")
            return "".join(_first_of_each(lines, names))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _first_of_each(lines: Iterator[str], names: tuple[str, ...]) -> list[str]:
    return sorted({line for line in lines if line.startswith(names)})


def compiler_name() -> str:
    """The C++ compiler that AOTInductor would call."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def compiler() -> str | None:
    """Where that compiler is; None where it is not."""
    return shutil.which(compiler_name())


def compiler_version() -> str:
    """The first line of the C++ compiler's `--version`; empty where there is none."""
    path = compiler()
    return _version_of(path) if path else ""


@lru_cache
def _version_of(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0]


# ---- finding a package ----------------------------------------------------------------------------------


def package_folder(root: Path, folder: Path, weights: str) -> Path:
    """The folder of the package that this machine's compiler builds of a model; it need not exist.

    Args:
        root: kvchat's folder of compiled code.
        folder: of the model.
        weights: a precision or `gguf`.
    """
    key = fingerprint(root, folder, weights)
    return compiled_folder(root, folder) / f"{weights}-{key}-{_compiler_key()}"


def _compiler_key() -> str:
    return hashlib.sha256(compiler_version().encode()).hexdigest()[:8]


def find_package(root: Path, folder: Path, weights: str) -> Path | None:
    """The package for the model in `folder`, or None.

    Prefers one of this machine's compiler; one of another compiler works too. The compiler's version is only
    asked for, in a process, where there are several packages.
    """
    place = compiled_folder(root, folder)
    if not place.is_dir():
        return None
    fitting = sorted(place.glob(f"{weights}-{fingerprint(root, folder, weights)}-*"))
    made = [path for path in fitting if path.is_dir() and not _reason_in(path)]
    if len(made) < 2:
        return next(iter(made), None)
    return next((path for path in made if path.name.endswith(f"-{_compiler_key()}")), made[0])


def refusal_of(root: Path, folder: Path, weights: str) -> str:
    """The stored reason why the model in `folder` can't be compiled; empty where there is none."""
    if not any(compiled_folder(root, folder).glob(f"{weights}-*/{REFUSAL}")):
        return ""
    return _reason_in(package_folder(root, folder, weights))


def _reason_in(package: Path) -> str:
    try:
        return (package / REFUSAL).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def is_decided(root: Path, folder: Path, weights: str) -> bool:
    """Whether there is a package or a stored refusal."""
    return bool(find_package(root, folder, weights) or refusal_of(root, folder, weights))


def wants_step(root: Path, folder: Path, *, fetched: bool = False) -> bool:
    """Whether a model should be compiled: it was just downloaded or converted, or had a step before."""
    wanted = fetched or (folder / MARKER).is_file() or compiled_folder(root, folder).is_dir()
    return wanted and bool(compiler()) and not is_decided(root, folder, weights_of(folder, "auto"))


def make_model_folder(root: Path, folder: Path) -> Path:
    """Creates the folder for the packages of the model in `folder`, writable by the user only.

    Raises:
        KvchatError: others can write to the data folder.
        OSError: it can't be created.
    """
    made = compiled_folder(root, folder)
    make_private(made)
    if root == find_paths().compiled:  # the user is responsible for another data folder
        close_to_others(root.parent)
    for each in (root, made):
        close_to_others(each)
    require_own(made, root.parent)
    (made / MODEL_PATH).write_text(str(folder.resolve()), encoding="utf-8")
    close_to_others(made / MODEL_PATH)
    return made


def refuse(package: Path, reason: str) -> None:
    """Stores why a model can't be compiled, so that it is not tried again until something changes."""
    make_private(package)
    (package / REFUSAL).write_text(reason, encoding="utf-8")
    close_to_others(package / REFUSAL)


def remove_stale(package: Path, weights: str) -> None:
    """Removes packages of the same precision for other versions of the model."""
    for path in package.parent.glob(f"{weights}-*"):
        if path != package:
            shutil.rmtree(path, ignore_errors=True)


def remove_old_packages(folder: Path) -> None:
    """Removes packages that an earlier version stored in the model's folder."""
    old = folder / OLD_FOLDER
    if old.is_symlink() or not old.is_dir():
        return
    shutil.rmtree(old, ignore_errors=True)
    logger.info("%s was removed: compiled code is in kvchat's data folder now", old)


# ---- checks before loading ------------------------------------------------------------------------------


def record_digests(package: Path) -> None:
    """Stores the SHA-256 of each file of a new package, and makes the files writable by the user only."""
    (package / DIGESTS).unlink(missing_ok=True)
    digests = {path.name: digest_of(path) for path in files_in(package)}
    (package / DIGESTS).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for path in (package, *package.iterdir()):
        close_to_others(path)


def require_intact(package: Path) -> None:
    """Checks that a package's files are those that were built.

    Raises:
        KvchatError: a file was changed, removed or added.
    """
    try:
        recorded = json.loads((package / DIGESTS).read_text(encoding="utf-8"))
        found = {path.name: digest_of(path) for path in files_in(package) if path.name != DIGESTS}
    except (OSError, ValueError) as error:
        raise KvchatError(f"The compiled step in {package} is damaged: {error}") from error
    if not isinstance(recorded, dict) or found != recorded:
        names = {*found, *recorded} if isinstance(recorded, dict) else {DIGESTS}
        wrong = sorted(name for name in names if name == DIGESTS or found.get(name) != recorded.get(name))
        raise KvchatError(
            f"The compiled step in {package} is damaged: {wrong[0]} is not what was built. "
            "`kvchat models prepare MODEL --force` builds it again."
        )


def stored_weights(package: Path) -> str:
    """How an intact package stores the weights, in words such as `int4, head int8`; torch is not needed.

    Raises:
        KvchatError: it is not intact.
    """
    require_intact(package)
    try:
        return str(json.loads((package / DESCRIPTION).read_text(encoding="utf-8"))["weights"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise KvchatError(f"The compiled step in {package} is damaged: {error}.") from error


def trusted_package(root: Path, folder: Path, weights: str) -> Path | None:
    """The package to load for the model in `folder`; None where there is none.

    Raises:
        KvchatError: others can write to it or to a folder above it, or the model can't be compiled.
    """
    if not compiled_folder(root, folder).is_dir():
        return None
    try:
        require_own(compiled_folder(root, folder), root.parent)
        package = find_package(root, folder, weights)
        if package:
            require_own(package, root.parent)
    except OSError as error:
        raise KvchatError(f"Compiled code in {root} can't be read: {reason_of(error)}.") from error
    if package is None and (reason := refusal_of(root, folder, weights)):
        raise KvchatError(reason)
    return package
