"""Builds the compiled step of a model for this CPU, once, in a separate process.

Compiles the kernels, replaces linear layers by quantised ones, exports and compiles the model (`export`), and
measures what quantisation costs in quality. Takes a minute or two on two cores; the separate process frees
everything that it imported. Must not depend on conversations.
"""

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvchat.engine.compiled.export import RefusedError, compile_program, export_step
from kvchat.engine.compiled.gguf_weights import blocks_of, head_of
from kvchat.engine.compiled.package import (
    compiler,
    find_package,
    kernel_sources,
    make_model_folder,
    package_folder,
    record_digests,
    refusal_of,
    refuse,
    remove_stale,
)
from kvchat.engine.compiled.quantized_linear import quantise, rounded_blocks, rounded_head
from kvchat.engine.compiled.runner import (
    KERNELS,
    TOKENIZER,
    CompiledReader,
    CompiledStep,
    Cost,
    Description,
    load_kernels,
)
from kvchat.engine.model.dtypes import GGUF, QUANTISED_BITS, gguf_of
from kvchat.engine.model.fingerprint import weights_hash
from kvchat.engine.model.forward import forward_pass
from kvchat.engine.model.layout import DTYPES, ModelShape, new_kv
from kvchat.engine.model.transformers_model import Eager, load_eager, weights_bytes
from kvchat.errors import KvchatError, cause
from kvchat.models.resolve import remove_orphaned
from kvchat.models.staging import Progress, Report, staging
from kvchat.system.children import protect_children

LOADED, KERNELS_MADE, QUANTISED, EXPORTED, COMPILED, DONE = 5, 15, 25, 35, 95, 100
"""Per cent of the time after each step."""
HEARTBEAT_S = 0.5
SAMPLE_TOKENS = 512
WORST_KL = 0.5
"""Nats. Weights in 4 bits without calibration cost less, a wrongly compiled step far more."""
TEXT = Path(__file__).with_name("judged.txt")
"""The text on which quality is measured."""
NO_COMPILER = (
    "The model can't be compiled: there is no C++ compiler (g++). Answers come several times slower."
)

FLAGS = (
    *("-shared", "-fPIC", "-std=gnu++20", "-O3", "-fopenmp"),
    # GCC and Clang both take -mcpu on aarch64; there, older ones of Clang refuse -march=native
    "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
    "-fno-math-errno",  # lets loops with rounding be vectorised
    "-ffp-contract=off",  # the kernels say where a product and a sum are rounded once
    "-DC10_USING_CUSTOM_GENERATED_MACROS",  # the headers of an installed torch lack that file
)
REFUSED = 3
"""Exit code of the process that compiles for a `RefusedError`; any other failure may pass."""


Done = Callable[[int], None]
"""Called with the progress in per cent."""


# ---- requesting a package -------------------------------------------------------------------------------


def prepare_step(root: Path, folder: Path, weights: str, report: Report, *, force: bool = False) -> Path:
    """The package of the model in `folder`; builds it first if needed.

    Removes packages for other versions of the model, of torch or of the CPU.

    Args:
        root: kvchat's folder of compiled code.
        folder: a prepared model; nothing is written into it.
        weights: `gguf` (as the file has them), `int8`, `int4`, `fp32` or `bf16`.
        report: called with the progress; an exception in it stops the work and cleans up.
        force: build again even if there is a package or a refusal.

    Raises:
        KvchatError: there is no compiler, or compiling failed, or others can write to the data folder; the
            sentence says why. Only a `RefusedError` is stored.
    """
    if not force and (made := _decided(root, folder, weights)):
        return made
    if not compiler():
        raise KvchatError(NO_COMPILER)
    with staging(_model_folder(root, folder), report) as work:
        # another process may have made it while this one waited
        if not force and (made := _decided(root, folder, weights)):
            return made
        target = package_folder(root, folder, weights)
        try:
            _make(folder, weights, work, target.name, report)
        except RefusedError as error:
            shutil.rmtree(target, ignore_errors=True)
            refuse(target, str(error))
            raise
        if package_folder(root, folder, weights) != target:
            raise KvchatError(
                f"The model in {folder}, or kvchat, was changed while it was compiled. Try again."
            )
        remove_stale(target, weights)
        shutil.rmtree(target, ignore_errors=True)
        (work / "made").rename(target)
    remove_orphaned(root)
    return target


def _decided(root: Path, folder: Path, weights: str) -> Path | None:
    """The existing package; None where it has to be built.

    Raises:
        KvchatError: the model can't be compiled.
    """
    if not (made := find_package(root, folder, weights)) and (reason := refusal_of(root, folder, weights)):
        raise KvchatError(reason)
    return made


def _model_folder(root: Path, folder: Path) -> Path:
    try:
        return make_model_folder(root, folder)
    except OSError as error:
        raise KvchatError(f"Compiled code can't be kept in {root}: {cause(error)}.") from error


def _make(folder: Path, weights: str, work: Path, identity: str, report: Report) -> None:
    """Runs this module in a separate process whose temporary files are all in `work`.

    This includes torch's caches, which contain pickles and code and would be in /tmp by default.
    """
    places = {"TMPDIR": str(work), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    protect_children()
    command = [sys.executable, "-P", "-m", __name__, str(folder), weights, str(work / "made"), identity]
    with (
        (work / "log").open("w+", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env=os.environ | places,
            stdin=subprocess.PIPE,  # closing it ends the process
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # a process group that includes the C++ compilers
        ) as process,
    ):
        try:
            _follow(process, report)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if code := process.wait():
            if code < 0:
                raise KvchatError(
                    f"The model isn't compiled: the compiler was ended by {signal.Signals(-code).name}. "
                    "Is there too little memory?"
                )
            log.seek(0)
            lines = log.read().strip().splitlines()
            reason = lines[-1] if lines else f"the compiler ended with {code}"
            kind = RefusedError if code == REFUSED else KvchatError
            raise kind(f"The model can't be compiled: {reason}")


def _follow(process: "subprocess.Popen[str]", report: Report) -> None:
    """Reports the progress that the process prints, at least twice a second."""
    done = [0]

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            done[0] = int(line)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    while listener.is_alive():
        report(Progress("compile", done[0], COMPILED))
        listener.join(HEARTBEAT_S)
    report(Progress("compile", done[0], COMPILED))


# ---- building -------------------------------------------------------------------------------------------


def refusal(shape: ModelShape) -> str:
    """Why a model of this shape can't be compiled; empty where it can."""
    kinds = sorted({*shape.kinds} - {"full_attention", "sliding_attention"})
    return f"the compiled step does not support layers of the kind {', '.join(kinds)}" if kinds else ""


def make_package(
    eager: Eager, target: Path, done: Done, weights: str, identity: str, file: Path | None
) -> None:
    """Compiles a model into the new folder `target`; replaces layers of the model.

    Args:
        weights: as for `prepare_step`.
        identity: the package's name.
        file: the GGUF file that the model came from, if any.

    Raises:
        RefusedError: the model can't be compiled, or the compiled step computes something else.
        KvchatError: something failed that may work another time.
    """
    model, shape = eager.model, eager.shape
    if reason := refusal(shape):
        raise RefusedError(reason)
    target.mkdir(parents=True)
    compile_kernels(target / KERNELS)
    load_kernels(target)
    done(KERNELS_MADE)
    sample = eager.tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids[:SAMPLE_TOKENS]
    sample = sample[: max(2, min(SAMPLE_TOKENS, shape.position_limit) - 1)]
    expected = forward_pass(model, sample, range(len(sample)), None, keep=len(sample)).float().log_softmax(-1)
    revision, vocabulary = weights_hash(model), model.config.get_text_config(decoder=True).vocab_size
    words = _replace_layers(model, weights, file)
    done(QUANTISED)
    program = export_step(model, sum(head is not None for head in shape.heads))
    done(EXPORTED)
    compile_program(program, target)
    description = Description(
        fingerprint=identity,
        revision=revision,
        weights=words,
        weights_bytes=weights_bytes(model),
        kv_dtype="fp32" if weights == "fp32" else "bf16",
        vocabulary=vocabulary,
        end_ids=tuple(sorted(eager.end_ids)),
        shape=shape,
        template=eager.template,
        cost=Cost(0, 0.0, 0.0),
    )
    description.save(target)
    (target / TOKENIZER).write_text(eager.tokenizer.to_str(), encoding="utf-8")
    record_digests(target)
    done(COMPILED)
    kv = new_kv(shape, "auto", DTYPES[description.kv_dtype])
    found = CompiledReader(kv, CompiledStep(target)).read(sample, keep=len(sample)).log_softmax(-1)
    cost = compare(expected, found)
    if not cost.kl < WORST_KL:
        raise RefusedError(f"the compiled step differs from the model by {cost.kl:.2f} nats")
    replace(description, cost=cost).save(target)
    record_digests(target)
    done(DONE)


def compare(expected: torch.Tensor, found: torch.Tensor) -> Cost:
    """Compares log-probabilities `[tokens, vocabulary]`."""
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    agreeing = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return Cost(len(expected), float(kl), float(agreeing))


def _replace_layers(model: PreTrainedModel, weights: str, file: Path | None) -> str:
    """Quantises linear layers as `weights` says; returns their precision in words."""
    if weights == GGUF:
        assert file is not None
        blocks, head = blocks_of(model, file), head_of(file)
    elif weights in QUANTISED_BITS:
        blocks, head = rounded_blocks(model, QUANTISED_BITS[weights]), rounded_head(model)
    else:
        return weights
    quantise(model, blocks, head)
    bits = {found.bits for found in blocks.values()}
    words = [f"int{each}" for each in sorted(bits)] or [_name(model.dtype)]
    if head is not None and words != ["int8"]:
        words.append("head int8")
    return ", ".join(words)


def compile_kernels(library: Path) -> None:
    """Compiles the kernels for this CPU into the shared library of that name.

    Raises:
        KvchatError: the compiler failed.
    """
    torch_folder, source = Path(torch.__file__).parent, kernel_sources()[0]
    command = [compiler() or "g++", *FLAGS, f"-I{torch_folder / 'include'}", str(source), "-o", str(library)]
    links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run([*command, *links], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KvchatError(f"{source.name}: {done.stderr.strip() or done.returncode}")


def _name(dtype: torch.dtype) -> str:
    return next(name for name, each in DTYPES.items() if each is dtype)


# ---- the process ----------------------------------------------------------------------------------------


def main(folder: Path, weights: str, target: Path, identity: str) -> None:
    """Loads a model and builds its package; prints the progress in per cent, one number a line."""
    eager = load_eager(folder, folder.name, DTYPES.get(weights, torch.float32), "cpu")
    _print_progress(LOADED)
    make_package(eager, target, _print_progress, weights, identity, gguf_of(folder))


def _print_progress(done: int) -> None:
    print(done, flush=True)  # noqa: T201 - the parent reads it


def _leave_with_parent() -> None:
    """Ends this process and its compilers when the parent process ends."""

    def wait() -> None:
        sys.stdin.read()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _leave_with_parent()
    try:
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    except RefusedError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(REFUSED)
    except KvchatError as error:
        sys.exit(str(error))
