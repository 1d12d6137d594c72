"""Makes the compiled decode step of a model: exported from transformers' own code, compiled for this CPU.

torch.export records one step of the model, with its linear layers replaced by those of `int4` where the GGUF
file holds 4 bits, and AOTInductor (https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html)
makes C++ of it. The cache goes in as whole tensors, sliced inside the graph: views into larger buffers would
come with other strides than those that were compiled in. Takes a minute of both cores, once, in a process of
its own: what it imports and leaves behind goes with it. It refuses to know conversations.
"""

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvchat.cache.layers import HeadShape
from kvchat.engine.compiled import (
    FOLDER,
    KERNELS,
    LIBRARY,
    SHORTEST,
    Description,
    fingerprint,
    load_kernels,
    package_folder,
)
from kvchat.engine.int4 import Int4Linear, Int8Linear, blocks_of, head_of
from kvchat.engine.load import LoadedModel, load_model
from kvchat.engine.shape import DTYPES, ModelShape
from kvchat.errors import KvchatError
from kvchat.staging import Progress, Report, staging

LOADED, QUANTISED, KERNELS_MADE, EXPORTED, COMPILED = 5, 10, 20, 25, 100
"""Per cent of the time that have passed after each step."""
HEARTBEAT_S = 0.5
EXAMPLE_LENGTH, EXAMPLE_CAPACITY = 300, 512
"""What the step is recorded with; any other numbers give the same graph, as long as they differ."""
LONGEST = 1 << 24
"""Tokens: a bound that the compiler asks for."""
NO_COMPILER = (
    "there is no C++ compiler (g++), so answers are decoded by uncompiled code, several times slower"
)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    *("-shared", "-fPIC", "-std=c++20", "-O3", "-march=native", "-fopenmp"),
    "-fno-math-errno",  # lets loops with rounding be vectorised
    "-mprefer-vector-width=512" if platform.machine() == "x86_64" else "-DNDEBUG",
    "-DC10_USING_CUSTOM_GENERATED_MACROS",  # the headers of an installed torch lack that file
)
ATTENTION = "kvchat_step"
SPECIAL = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")
"""What some models hand to their attention beside the usual; `step_attention` has no place for it."""

Done = Callable[[int], None]
"""Told the per cent that are done."""


# ---- asking for a package -------------------------------------------------------------------------------


def prepare_step(folder: Path, precision: str, report: Report) -> Path:
    """The folder of the compiled step of the model in `folder`; makes it first where it is not there.

    What was made for other versions of the model, of torch or of the CPU is removed.

    Args:
        folder: a prepared model; the package is kept in it.
        precision: `fp32` or `bf16`: what the model computes in, and keeps keys and values in.
        report: called with the progress; what it raises stops the work and cleans up.

    Raises:
        KvchatError: there is no compiler, or this model can't be compiled; the sentence says why.
    """
    dtype = DTYPES[precision]
    target = package_folder(folder, dtype)
    if target.is_dir():
        return target
    if not compiler():
        raise KvchatError(f"The decode step can't be compiled: {NO_COMPILER}.")
    with staging(folder / FOLDER, report) as work:
        if not target.is_dir():  # another process may have made it while this one waited
            _make(folder, precision, work, report)
            _remove_stale(target.parent, dtype)
            (work / "made").rename(target)
    return target


def compiler() -> str | None:
    """Where the C++ compiler is that AOTInductor would call."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", default))


def _make(folder: Path, precision: str, work: Path, report: Report) -> None:
    """Runs this module in a process of its own, whose temporary files all lie in `work`."""
    places = {"TMPDIR": str(work), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    command = [sys.executable, "-m", __name__, str(folder), precision, str(work / "made")]
    with (
        (work / "log").open("w+", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env=os.environ | places,
            stdin=subprocess.PIPE,  # its end tells the process that nobody waits any more
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # a group of its own, C++ compilers included, that can be ended as one
        ) as process,
    ):
        try:
            _follow(process, report)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if process.wait():
            log.seek(0)
            lines = log.read().strip().splitlines()
            reason = lines[-1] if lines else f"the compiler ended with {process.returncode}"
            raise KvchatError(f"The decode step can't be compiled: {reason}")


def _follow(process: "subprocess.Popen[str]", report: Report) -> None:
    """Reports what the process says, and twice a second that it is alive."""
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


def _remove_stale(packages: Path, dtype: torch.dtype) -> None:
    """Removes packages of the same precision: whatever they were made for is not there any more."""
    for path in packages.iterdir():
        try:
            stale = Description.load(path).dtype == _name(dtype)
        except KvchatError:
            stale = path.is_dir() and not path.name.startswith(".")
        if stale:
            shutil.rmtree(path, ignore_errors=True)


# ---- making one -----------------------------------------------------------------------------------------


def refusal(shape: ModelShape) -> str:
    """Why a model of this shape has no compiled step; empty where it can have one."""
    if kinds := sorted({*shape.kinds} - {"full_attention"}):
        return f"its layers of the kind {', '.join(kinds)} need a mask or a state, and the step has neither"
    return ""


def make_package(loaded: LoadedModel, target: Path, done: Done, weights: str, identity: str) -> None:
    """Compiles the step of a model, whose linear layers are those to be used, into the new folder `target`.

    Raises:
        KvchatError: the model can't be compiled.
    """
    if reason := refusal(loaded.shape):
        raise KvchatError(reason)
    heads = tuple(head for head in loaded.shape.heads if head)
    target.mkdir(parents=True)
    compile_kernels(target / KERNELS)
    load_kernels(target)
    done(KERNELS_MADE)
    program = export_step(loaded.model, heads)
    done(EXPORTED)
    compile_program(program, target / LIBRARY)
    Description(identity, weights, _name(loaded.model.dtype), heads).save(target)
    done(COMPILED)


def export_step(model: PreTrainedModel, heads: tuple[HeadShape, ...]) -> torch.export.ExportedProgram:
    """One decode step as a graph, for any capacity of the cache and any number of filled rows.

    The model's attention is another one afterwards. The kernels have to be loaded.

    Raises:
        KvchatError: transformers' code for this model can't be recorded.
    """
    capacity = torch.export.Dim("capacity", min=SHORTEST, max=LONGEST)
    tokens = torch.export.Dim("tokens", min=SHORTEST, max=LONGEST)
    tensors = [tensor for head in heads for tensor in _example(head, model.dtype)]
    mask = torch.zeros(1, 1, 1, EXAMPLE_LENGTH)
    position = torch.tensor([[EXAMPLE_LENGTH - 1]])
    shapes = (None, None, {3: tokens}, tuple({2: capacity} for _ in tensors))
    _describe_kernels()
    AttentionInterface.register(ATTENTION, step_attention)
    model.set_attn_implementation(ATTENTION)
    try:
        with torch.no_grad():
            return torch.export.export(
                Step(model), (torch.tensor([[1]]), position, mask, *tensors), dynamic_shapes=shapes
            )
    except Exception as error:  # whatever a model does that can't be recorded
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise KvchatError(f"torch.export refuses it ({type(error).__name__}: {reason})") from error


def compile_program(program: torch.export.ExportedProgram, library: Path) -> None:
    """Compiles a graph for this CPU, weights included."""
    from torch._inductor import aot_compile  # the compiler: seconds of import

    inputs, keywords = program.example_inputs or ((), {})
    module: Any = program.module(check_guards=False)
    with torch.no_grad():
        made = aot_compile(module, inputs, keywords)
    for suffix in (".so", ".json"):  # the second says how our own operators are called
        shutil.move(Path(str(made)).with_suffix(suffix), library.with_suffix(suffix))


def compile_kernels(library: Path) -> None:
    """Compiles `kernels.cpp` for this CPU into the shared library of that name.

    Raises:
        KvchatError: the compiler refuses it.
    """
    torch_folder = Path(torch.__file__).parent
    command = [compiler() or "g++", *FLAGS, f"-I{torch_folder / 'include'}", str(SOURCE), "-o", str(library)]
    links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run([*command, *links], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KvchatError(f"{SOURCE.name}: {done.stderr.strip() or done.returncode}")


def quantise(model: PreTrainedModel, file: Path) -> str:
    """Replaces the linear layers that the GGUF file holds in 4 bits, and the head if it is quantised too.

    Returns how the weights are stored now, in words.
    """
    blocks = blocks_of(model, file)
    for name, found in blocks.items():
        linear = model.get_submodule(name)
        model.set_submodule(name, Int4Linear(found, linear.bias, model.dtype))  # type: ignore[arg-type]
    words = ["int4"] if blocks else [_name(model.dtype)]
    head = model.get_output_embeddings()
    weight = head_of(file)
    if isinstance(head, nn.Linear) and weight is not None and weight.shape == head.weight.shape:
        model.set_output_embeddings(Int8Linear(weight, head.bias))
        words.append("head int8")
    return ", ".join(words)


def step_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,  # noqa: ANN401 - whatever a model hands on
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for one query: each key and value is read once.

    Raises:
        KvchatError: the model wants more of its attention than scores, a mask and a sum.
    """
    if special := sorted(name for name in SPECIAL if options.get(name) is not None):
        raise KvchatError(f"its attention has {', '.join(special)}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return torch.ops.kvchat.attend(query.contiguous(), key, value, attention_mask, scale), None


def _attend_shape(
    query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, _mask: torch.Tensor, _scale: float
) -> torch.Tensor:
    return query.new_empty(1, 1, query.shape[1], value.shape[3])


def _product8_shape(states: torch.Tensor, quants: torch.Tensor, _scales: torch.Tensor) -> torch.Tensor:
    return states.new_empty(states.shape[0], quants.shape[0], dtype=torch.float32)


def _describe_kernels() -> None:
    """Tells torch.export what shapes the kernels answer with; again does nothing."""
    for name, shape in (("kvchat::attend", _attend_shape), ("kvchat::product8", _product8_shape)):
        torch.library.register_fake(name, shape, allow_override=True)


class Step(nn.Module):
    """A model as a function of one token and plain tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, token: torch.Tensor, position: torch.Tensor, mask: torch.Tensor, *tensors: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[1, vocabulary]`; writes the last of the filled rows of every tensor.

        Args:
            token: `[1, 1]`, as is its position.
            mask: fp32 `[1, 1, 1, tokens]`, added to the scores; its length says how many rows are filled now.
            tensors: keys and values of layer after layer, `[1, kv_heads, capacity, head_dim]`.
        """
        tokens = mask.shape[-1]
        torch._check(tokens <= tensors[0].shape[2])  # type: ignore[no-untyped-call]
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        layers = [_Rows(keys, values, tokens) for keys, values in pairs]
        output = self.model(
            input_ids=token,
            position_ids=position,
            attention_mask=mask,
            past_key_values=Cache(layers=layers),  # type: ignore[arg-type]
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


class _Rows(CacheLayerMixin):
    """A layer of the cache inside the graph: the new token goes into the last of the `tokens` rows."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.tokens = keys, values, tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes states `[1, kv_heads, 1, head_dim]`; returns all filled rows."""
        assert self.keys is not None
        assert self.values is not None
        last, end = self.tokens - 1, self.tokens
        self.keys[:, :, last:end] = key_states
        self.values[:, :, last:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens before the new one."""
        return self.tokens - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, index of the first)."""
        return self.tokens, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _example(head: HeadShape, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for dim in (head.key_dim, head.value_dim):
        yield torch.zeros(1, head.kv_heads, EXAMPLE_CAPACITY, dim, dtype=dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the process ----------------------------------------------------------------------------------------


def main(folder: Path, precision: str, target: Path) -> None:
    """Loads a model and makes its package, telling the per cent that are done, a line each."""
    loaded = load_model(folder, folder.name, precision=precision, device="cpu", compiled=False)
    _tell(LOADED)
    file = folder / "model.gguf"
    weights = quantise(loaded.model, file) if file.is_file() else _name(loaded.model.dtype)
    _tell(QUANTISED)
    identity = fingerprint(folder, loaded.model.dtype)
    make_package(loaded, target, _tell, weights, identity)


def _tell(done: int) -> None:
    print(done, flush=True)  # noqa: T201 - the parent reads it


def _leave_with_parent() -> None:
    """Ends this process and the compilers it started when its parent ends: nobody would take the package."""

    def wait() -> None:
        sys.stdin.read()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _leave_with_parent()
    try:
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    except KvchatError as error:
        sys.exit(str(error))
