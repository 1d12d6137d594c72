"""Makes the compiled step of a model: exported from transformers' own code, compiled for this CPU.

torch.export records the model reading any number of tokens, with its linear layers replaced by those of
`packed` and its attention by that of `kernels/`, and AOTInductor
(https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html) makes C++ of it. One graph serves
prompts, single tokens and drafts, so there is one copy of the weights. The cache is not part of the graph:
the attention is handed a table of where its rows lie, so that one graph serves every precision and length.
Takes a minute or two of both cores, once, in a process of its own: what it imports and leaves behind goes
with it. It refuses to know conversations.
"""

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as _export_config
from safetensors.torch import save_file
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvchat.cache.layer import Memory
from kvchat.engine.compiled.abi import GROUP, TILE
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
from kvchat.engine.compiled.quantized_linear import blocks_of, head_of, quantise, rounded_blocks, rounded_head
from kvchat.engine.compiled.runner import (
    KERNELS,
    LIBRARY,
    TOKENIZER,
    WEIGHTS,
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
"""Per cent of the time that have passed after each step."""
HEARTBEAT_S = 0.5
EXAMPLE_TOKENS, EXAMPLE_KEPT = 7, 3
"""What the step is recorded with; any other numbers give the same graph, as long as they differ."""
LONGEST = 1 << 20
"""Tokens: a bound that the compiler asks for."""
JUDGED_TOKENS = 512
WORST_KL = 0.5
"""Nats; weights in 4 bits without a calibration cost less, and a step that was compiled wrong far more."""
TEXT = Path(__file__).with_name("judged.txt")
"""What the cost of quantised weights is measured on."""
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
ATTENTION = "kvchat_step"
SPECIAL = ("position_bias", "head_mask")
"""What some models hand to their attention beside the usual; `step_attention` has no place for it."""

config_of_export: Any = _export_config  # its `patch` is made at run time


class RefusedError(KvchatError):
    """This model can't be compiled by this code and compiler, however often it is tried."""


REFUSED = 3
"""Exit code of the process that compiles for a `RefusedError`; any other failure may pass."""


Done = Callable[[int], None]
"""Told the per cent that are done."""


# ---- asking for a package -------------------------------------------------------------------------------


def prepare_step(root: Path, folder: Path, weights: str, report: Report, *, force: bool = False) -> Path:
    """The folder of the compiled step of the model in `folder`; makes it first where it is not there.

    What was made for other versions of the model, of torch or of the CPU is removed.

    Args:
        root: kvchat's folder of compiled code.
        folder: a prepared model; nothing is written into it.
        weights: `gguf` (as the file has them), `int8`, `int4`, `fp32` or `bf16`.
        report: called with the progress; what it raises stops the work and cleans up.
        force: compile again what is there, and what was refused.

    Raises:
        KvchatError: there is no compiler, or compiling failed, or others can write to the data folder; the
            sentence says why. Only a `RefusedError` is remembered.
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
    """The package that is there; None where it has to be made.

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
    """Runs this module in a process of its own, whose temporary files all lie in `work`.

    So do torch's caches, which hold pickles and code; by default they lie in /tmp.
    """
    places = {"TMPDIR": str(work), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    protect_children()
    command = [sys.executable, "-P", "-m", __name__, str(folder), weights, str(work / "made"), identity]
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


# ---- making one -----------------------------------------------------------------------------------------


def refusal(shape: ModelShape) -> str:
    """Why a model of this shape has no compiled step; empty where it can have one."""
    if kinds := sorted({*shape.kinds} - {"full_attention", "sliding_attention"}):
        return (
            f"its layers of the kind {', '.join(kinds)} keep more than keys and values, and the step does not"
        )
    return ""


def make_package(
    eager: Eager, target: Path, done: Done, weights: str, identity: str, file: Path | None
) -> None:
    """Compiles a model into the new folder `target`; its layers are replaced on the way.

    Args:
        weights: as for `prepare_step`.
        identity: the package's name.
        file: the GGUF file that the model came from, if any.

    Raises:
        RefusedError: the model can't be compiled, or what was compiled does not say what the model says.
        KvchatError: something failed that another try may not meet.
    """
    model, shape = eager.model, eager.shape
    if reason := refusal(shape):
        raise RefusedError(reason)
    target.mkdir(parents=True)
    compile_kernels(target / KERNELS)
    load_kernels(target)
    done(KERNELS_MADE)
    judged = eager.tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids[:JUDGED_TOKENS]
    judged = judged[: max(2, min(JUDGED_TOKENS, shape.position_limit) - 1)]
    expected = forward_pass(model, judged, range(len(judged)), None, keep=len(judged)).float().log_softmax(-1)
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
    found = CompiledReader(kv, CompiledStep(target)).read(judged, keep=len(judged)).log_softmax(-1)
    cost = judge(expected, found)
    if not cost.kl < WORST_KL:
        raise RefusedError(f"what was compiled does not say what the model says ({cost.kl:.2f} nats off)")
    replace(description, cost=cost).save(target)
    record_digests(target)
    done(DONE)


def judge(expected: torch.Tensor, found: torch.Tensor) -> Cost:
    """Compares log-probabilities `[tokens, vocabulary]`."""
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    agreeing = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return Cost(len(expected), float(kl), float(agreeing))


def _replace_layers(model: PreTrainedModel, weights: str, file: Path | None) -> str:
    """Stores linear layers in blocks where `weights` says so; returns how they are stored, in words."""
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


def export_step(model: PreTrainedModel, layers: int) -> torch.export.ExportedProgram:
    """A model reading tokens as a graph, for any number of them. `layers` keep keys and values.

    The model's attention is another one afterwards. The kernels have to be loaded.

    Raises:
        RefusedError: transformers' code for this model can't be recorded.
    """
    tokens = torch.export.Dim("tokens", min=1, max=LONGEST)
    kept = torch.export.Dim("kept", min=1, max=LONGEST)
    ids = torch.zeros(1, EXAMPLE_TOKENS, dtype=torch.int64)
    table = torch.zeros(layers, len(Memory._fields), dtype=torch.int64)
    inputs = (ids, ids.clone(), ids.clone()[None, None], table, torch.arange(EXAMPLE_KEPT))
    shapes = ({1: tokens}, {1: tokens}, {3: tokens}, None, {0: kept})
    _describe_kernels()
    AttentionInterface.register(ATTENTION, step_attention)
    model.set_attn_implementation(ATTENTION)
    try:
        # a single token is a number of tokens like any other, not a graph of its own
        with torch.no_grad(), config_of_export.patch(backed_size_oblivious=True):
            return torch.export.export(Step(model, layers), inputs, dynamic_shapes=shapes)
    except (OSError, MemoryError):  # says nothing about the model
        raise
    except Exception as error:  # whatever a model does that can't be recorded
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise RefusedError(f"torch.export refuses it ({type(error).__name__}: {reason})") from error


def compile_program(program: torch.export.ExportedProgram, target: Path) -> None:
    """Compiles a graph for this CPU; its weights go into a file of their own."""
    from torch._inductor import aot_compile  # the compiler: seconds of import
    from torch._inductor import config as inductor_config

    inputs, keywords = program.example_inputs or ((), {})
    module: Any = program.module(check_guards=False)
    join_products(module)
    options = {
        # between the kernels there is so little to do that starting threads for it takes longer
        "cpp.threads": 1,
        "aot_inductor.package_constants_in_so": False,
    }
    patches = config_of_export.patch(backed_size_oblivious=True), inductor_config.patch(options)
    with torch.no_grad(), patches[0], patches[1]:
        made = aot_compile(module, inputs, keywords)
    library = target / LIBRARY
    for suffix in (".so", ".json"):  # the second says how our own operators are called
        shutil.move(Path(str(made)).with_suffix(suffix), library.with_suffix(suffix))
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    names = runner.get_constant_names_to_original_fqns()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **_loose_tensors(module)}
    # the same tensor may stand under two names, and a file holds each once
    weights = {name: tensors[original].detach().contiguous().clone() for name, original in names.items()}
    save_file(weights, target / WEIGHTS)


def _loose_tensors(module: torch.fx.GraphModule) -> dict[str, torch.Tensor]:
    """Constants that torch.export found in the model's code."""
    named = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    found: dict[str, torch.Tensor] = {}
    for name in named:
        value: Any = module
        for part in str(name).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            found[str(name)] = value
    return found


def join_products(module: torch.fx.GraphModule) -> None:
    """Makes one product of those that multiply the same states: queries, keys and values; gate and up.

    Fewer of them have more to do each, and the states are rounded once.
    """
    graph, product = module.graph, torch.ops.kvchat.product.default
    groups: dict[tuple[torch.fx.Node, int], list[torch.fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is product:
            states, blocks = node.args
            source = states.args[0] if states.target is torch.ops.aten.reshape.default else states
            groups[source, _constant(module, blocks).shape[-1]].append(node)
    for index, nodes in enumerate(group for group in groups.values() if len(group) > 1):
        parts = [_constant(module, node.args[1]) for node in nodes]
        module.register_buffer(f"joined_{index}", torch.cat(parts))
        with graph.inserting_before(nodes[0]):
            blocks = graph.get_attr(f"joined_{index}")
            joined = graph.call_function(product, (nodes[0].args[0], blocks))
        start = 0
        for node, part in zip(nodes, parts, strict=True):
            stop = start + len(part) * TILE
            with graph.inserting_before(node):
                rows = graph.call_function(torch.ops.aten.slice.Tensor, (joined, 1, start, stop))
            node.replace_all_uses_with(rows)
            graph.erase_node(node)
            start = stop
    graph.eliminate_dead_code()
    module.recompile()


def _constant(module: torch.fx.GraphModule, node: Any) -> torch.Tensor:  # noqa: ANN401
    return module.get_buffer(str(node.target))


def compile_kernels(library: Path) -> None:
    """Compiles the kernels for this CPU into the shared library of that name.

    Raises:
        KvchatError: the compiler refuses it.
    """
    torch_folder, source = Path(torch.__file__).parent, kernel_sources()[0]
    command = [compiler() or "g++", *FLAGS, f"-I{torch_folder / 'include'}", str(source), "-o", str(library)]
    links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run([*command, *links], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KvchatError(f"{source.name}: {done.stderr.strip() or done.returncode}")


_tables: list[torch.Tensor] = []
"""The table of the step that is being recorded: transformers hands no such thing to its attention."""


def step_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,  # noqa: ANN401 - whatever a model hands on
) -> tuple[torch.Tensor, None]:
    """transformers' attention function over the cache in the table; new keys and values go into it.

    Instead of a mask it gets the rows of the new tokens; `sliding_window` is how many rows are in sight.

    Raises:
        KvchatError: the model wants more of its attention than scores, a window and a sum.
    """
    if special := sorted(name for name in SPECIAL if options.get(name) is not None):
        raise KvchatError(f"its attention has {', '.join(special)}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    sinks = None if s_aux is None else s_aux.float().contiguous()
    result = torch.ops.kvchat.attend(
        query.float(),
        key.float(),
        value.float(),
        attention_mask,
        _tables[-1],
        module.layer_idx,
        scale,
        sliding_window or 0,
        softcap or 0.0,
        sinks,
    )
    return result.to(query.dtype), None


def _attend_shape(
    query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_rest: object
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _product_shape(states: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    return states.new_empty(states.shape[0], blocks.shape[0] * TILE)


def _lookup_shape(ids: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    return torch.empty(ids.shape[0], blocks.shape[1] * GROUP, device=ids.device)


def _describe_kernels() -> None:
    """Tells torch.export what shapes the kernels answer with; again does nothing."""
    shapes = {"attend": _attend_shape, "product": _product_shape, "lookup": _lookup_shape}
    for name, shape in shapes.items():
        torch.library.register_fake(f"kvchat::{name}", shape, allow_override=True)  # type: ignore[arg-type]


class Step(nn.Module):
    """A model as a function of tokens and plain tensors."""

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        table: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """Logits `[kept, vocabulary]` in fp32; keys and values go where the table says.

        Args:
            ids: `[1, tokens]`, as are their positions.
            rows: `[1, 1, 1, tokens]`, the consecutive rows of the cache that they fill.
            table: `[layers, fields]`, a `Memory` each.
            kept: which of the tokens to answer.
        """
        _tables[:] = [table]
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=rows,
            past_key_values=Cache(layers=[_Elsewhere() for _ in range(self.layers)]),
            use_cache=True,
            logits_to_keep=kept,
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float()


class _Elsewhere(CacheLayerMixin):
    """A layer of the cache inside the graph: what it is handed goes on to the attention, which stores it."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands on states `[1, kv_heads, tokens, head_dim]`."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Not known inside the graph; positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is made."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _name(dtype: torch.dtype) -> str:
    return next(name for name, each in DTYPES.items() if each is dtype)


# ---- the process ----------------------------------------------------------------------------------------


def main(folder: Path, weights: str, target: Path, identity: str) -> None:
    """Loads a model and makes its package, printing the per cent that are done, a line each."""
    eager = load_eager(folder, folder.name, DTYPES.get(weights, torch.float32), "cpu")
    _tell(LOADED)
    make_package(eager, target, _tell, weights, identity, gguf_of(folder))


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
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    except RefusedError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(REFUSED)
    except KvchatError as error:
        sys.exit(str(error))
