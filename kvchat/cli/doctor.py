"""`kvchat doctor`: checks this machine, the installation and the model. Must not import torch."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile

import click

from kvchat.cli.options import data_dir, setting
from kvchat.config.paths import Paths, find_paths
from kvchat.errors import KvchatError, as_sentence, reason
from kvchat.models.cards import DEFAULT_MODEL, WheelSource, find_card
from kvchat.models.resolve import installed, is_prepared
from kvchat.text import megabytes, one_line
from kvchat.validation.plain_json import write_json

FEATURES = {
    "amx_tile": "AMX multiplies tiles of bf16: the fastest prefill",
    "avx512_bf16": "the processor computes in bf16: weights take half the memory, and prefill is fast",
    "avx512f": "AVX-512: 512-bit vectors",
    "avx2": "AVX2: 256-bit vectors",
}
"""Flags of x86 processors, best first."""
COMPILERS = ("g++", "clang++", "c++")
ENOUGH_DISK = 2_000_000_000
ENOUGH_MEMORY = 1_500_000_000
MIN_COLUMNS = 60


class Verdict(StrEnum):
    """Result of a check."""

    GOOD = "ok"
    SLOW = "slower"
    """kvchat works, with limits."""
    BAD = "missing"


MARKS = {Verdict.GOOD: "✓", Verdict.SLOW: "–", Verdict.BAD: "✗"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check."""

    name: str
    found: str
    means: str
    """The consequence for kvchat, as a sentence."""
    verdict: Verdict = Verdict.GOOD


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@setting("model")
@data_dir
def doctor(as_json: bool, model: str | None, data_dir: Path | None) -> None:
    """Check this machine, the installation and the model. Exit code 1 if something is missing."""
    findings = list(examine(find_paths(data_dir), model or DEFAULT_MODEL))
    if as_json:
        click.echo(write_json([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            click.echo(f"{MARKS[finding.verdict]} {finding.name:<10} {one_line(finding.found)}")
            click.echo(f"{'':<13}{finding.means}")
    sys.exit(any(finding.verdict is Verdict.BAD for finding in findings))


def examine(paths: Paths, model: str) -> Iterator[Finding]:
    """Runs all checks."""
    yield processor(cpu_flags())
    yield cores()
    yield memory()
    yield compiler()
    yield libraries()
    yield weights(paths, model)
    yield compiled(paths, model)
    yield disk(paths)
    yield folders(paths)
    yield terminal(os.environ, shutil.get_terminal_size((0, 0)))


def processor(flags: set[str]) -> Finding:
    """Instruction sets of the processor."""
    name = platform.machine()
    best = next((flag for flag in FEATURES if flag in flags), None)
    if best is None:
        means = "no known vector instructions; weights are computed in fp32."
        return Finding("processor", name, means, Verdict.SLOW)
    fast = best in ("amx_tile", "avx512_bf16")
    also = "" if fast else "; weights are computed in fp32, in twice the memory of bf16"
    found = f"{name}, {', '.join(flag for flag in FEATURES if flag in flags)}"
    return Finding("processor", found, f"{FEATURES[best]}{also}.", Verdict.GOOD if fast else Verdict.SLOW)


def cpu_flags() -> set[str]:
    """Flags of the first processor from /proc/cpuinfo; empty on systems without it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(flags.partition(":")[2].split())


def cores() -> Finding:
    """Number of physical cores."""
    import psutil

    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    means = "the model uses all of them; --threads gives it fewer."
    if physical == 1:
        return Finding("cores", "1", "the screen and the model share it: typing may lag.", Verdict.SLOW)
    return Finding("cores", str(physical), means)


def memory() -> Finding:
    """Available memory for weights and caches."""
    import psutil

    free = psutil.virtual_memory().available
    found = f"{megabytes(free)} free of {megabytes(psutil.virtual_memory().total)}"
    if free < ENOUGH_MEMORY:
        means = "the default model needs about 1 GB with torch: close other programs first."
        return Finding("memory", found, means, Verdict.SLOW)
    return Finding(
        "memory", found, f"KV caches may take a quarter, {megabytes(free // 4)}; --kv-budget changes that."
    )


def compiler() -> Finding:
    """Whether there is a C++ compiler for the decode step."""
    path = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if path is None:
        means = "`kvchat models prepare` needs one for fast decoding: on Debian, apt install g++."
        return Finding("compiler", "none", means, Verdict.SLOW)
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=False, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    found = (said.splitlines() or [path])[0]
    return Finding("compiler", found, "`kvchat models prepare` can compile a fast decode step.")


def libraries() -> Finding:
    """Installed versions of torch, transformers and textual."""
    found = []
    for name in ("torch", "transformers", "textual"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            means = f"{name} can't be imported: install kvchat again in this environment."
            return Finding("libraries", f"no {name}", means, Verdict.BAD)
    return Finding("libraries", ", ".join(found), "the engine and the screen can start.")


def weights(paths: Paths, model: str) -> Finding:
    """Whether the model is downloaded."""
    try:
        folder = is_prepared(model, paths.models)
    except (KvchatError, OSError) as error:
        return Finding("model", model, as_sentence(error), Verdict.BAD)
    if folder is None:
        card = find_card(model)
        size = card.source.wheel_bytes if card and isinstance(card.source, WheelSource) else 0
        fetched = f", {megabytes(size)}" if size else ""
        means = f"the first start downloads it{fetched}; after that kvchat works offline."
        return Finding("model", f"{model} is not downloaded yet", means, Verdict.SLOW)
    size = next((m.bytes for m in installed(paths.models, paths.compiled) if m.path == folder), 0)
    found = f"{model}, {megabytes(size)}" if size else model
    return Finding("model", found, "it is downloaded: kvchat works offline.")


def compiled(paths: Paths, model: str) -> Finding:
    """Whether there is trusted compiled code for the model."""
    from kvchat.engine.compiled.package import trusted_package
    from kvchat.engine.model.dtypes import weights_of

    again = f"`kvchat models prepare {model}` compiles it, and makes it several times faster."
    try:
        folder = is_prepared(model, paths.models)
        package = trusted_package(paths.compiled, folder, weights_of(folder, "auto")) if folder else None
    except KvchatError as error:
        return Finding("compiled", "can't be used", one_line(str(error)), Verdict.SLOW)
    if package is None:
        return Finding("compiled", "not yet", again, Verdict.SLOW)
    return Finding("compiled", package.name, "the model runs compiled for this processor.")


def disk(paths: Paths) -> Finding:
    """Free disk space of the data folder."""
    place = next(p for p in (paths.database.parent, *paths.database.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < ENOUGH_DISK:
        means = "saved caches may take 4 GB (--kv-disk); the least recently used are deleted when it is full."
        return Finding("disk", f"{megabytes(free)} free", means, Verdict.SLOW)
    return Finding("disk", f"{megabytes(free)} free", "enough for conversations and their caches.")


def folders(paths: Paths) -> Finding:
    """Whether kvchat's folders can be written; creates a temporary file in each."""
    for place in dict.fromkeys((paths.database.parent, paths.models, paths.compiled, paths.kv, paths.logs)):
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        try:
            with TemporaryFile(dir=existing):
                pass
        except OSError as error:
            means = f"nothing can be saved in {place}: make it writable, or choose another with --data-dir."
            return Finding("folders", f"{existing}: {reason(error)}", one_line(means), Verdict.BAD)
    return Finding("folders", str(paths.database.parent), "conversations, models and caches can be saved.")


def terminal(environment: "os._Environ[str] | dict[str, str]", size: os.terminal_size) -> Finding:
    """Type, colours and size of the terminal."""
    kind = environment.get("TERM", "")
    colours = (
        "true colour" if environment.get("COLORTERM") in ("truecolor", "24bit") else "256 colours or fewer"
    )
    shape = f", {size.columns}×{size.lines}" if size.columns else ""
    found = f"{kind or 'none'}, {colours}{shape}"
    if kind in ("", "dumb"):
        means = "it can't show the chat screen: `kvchat chat --plain` and `kvchat run` work."
        return Finding("terminal", found, means, Verdict.SLOW)
    if "NO_COLOR" in environment:
        return Finding("terminal", found, "NO_COLOR is set: the chat has no colours.")
    if size.columns and size.columns < MIN_COLUMNS:
        means = f"the chat needs {MIN_COLUMNS} columns; in fewer, lines are cut off."
        return Finding("terminal", found, means, Verdict.SLOW)
    return Finding("terminal", found, "the chat screen works, with the mouse if the terminal supports it.")
