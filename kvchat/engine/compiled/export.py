"""Exports a model as a graph over tokens and plain tensors, and compiles the graph with AOTInductor.

torch.export records transformers' own code for any number of tokens, so prompts, single tokens and drafts
use one graph and one copy of the weights. The cache is not part of the graph: attention gets a table of
addresses, so one graph serves every KV precision and length.
See https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html.
"""

import shutil
from collections import defaultdict
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
from kvchat.engine.compiled.runner import LIBRARY, WEIGHTS
from kvchat.errors import KvchatError

EXAMPLE_TOKENS, EXAMPLE_SELECTED = 7, 3
"""Example sizes for export; any two different numbers give the same graph."""
LONGEST = 1 << 20
"""Upper bound of tokens, which torch.export requires."""
ATTENTION = "kvchat_step"
SPECIAL = ("position_bias", "head_mask")
"""Attention arguments of some models that `step_attention` does not support."""

config_of_export: Any = _export_config  # its `patch` is made at run time


class RefusedError(KvchatError):
    """This model can't be compiled by this code and compiler, however often it is tried."""


def export_step(model: PreTrainedModel, layers: int) -> torch.export.ExportedProgram:
    """Exports a model as a graph for any number of tokens. `layers` store keys and values.

    Replaces the model's attention. The kernels have to be loaded.

    Raises:
        RefusedError: torch.export can't record this model.
    """
    tokens = torch.export.Dim("tokens", min=1, max=LONGEST)
    selected = torch.export.Dim("selected", min=1, max=LONGEST)
    ids = torch.zeros(1, EXAMPLE_TOKENS, dtype=torch.int64)
    table = torch.zeros(layers, len(Memory._fields), dtype=torch.int64)
    inputs = (ids, ids.clone(), ids.clone()[None, None], table, torch.arange(EXAMPLE_SELECTED))
    shapes = ({1: tokens}, {1: tokens}, {3: tokens}, None, {0: selected})
    _describe_kernels()
    AttentionInterface.register(ATTENTION, step_attention)
    model.set_attn_implementation(ATTENTION)
    try:
        # without this, torch.export would specialise on a single token
        with torch.no_grad(), config_of_export.patch(backed_size_oblivious=True):
            return torch.export.export(Step(model, layers), inputs, dynamic_shapes=shapes)
    except (OSError, MemoryError):  # not the model's fault
        raise
    except Exception as error:  # torch.export raises many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise RefusedError(f"torch.export refuses it ({type(error).__name__}: {reason})") from error


def compile_program(program: torch.export.ExportedProgram, target: Path) -> None:
    """Compiles a graph for this CPU; writes its weights to a separate file."""
    from torch._inductor import aot_compile  # the compiler: seconds of import
    from torch._inductor import config as inductor_config

    inputs, keywords = program.example_inputs or ((), {})
    module: Any = program.module(check_guards=False)
    join_products(module)
    options = {
        # the code between the kernels is so short that starting threads would take longer
        "cpp.threads": 1,
        "aot_inductor.package_constants_in_so": False,
    }
    patches = config_of_export.patch(backed_size_oblivious=True), inductor_config.patch(options)
    with torch.no_grad(), patches[0], patches[1]:
        made = aot_compile(module, inputs, keywords)
    library = target / LIBRARY
    for suffix in (".so", ".json"):  # the second has the signatures of our own operators
        shutil.move(Path(str(made)).with_suffix(suffix), library.with_suffix(suffix))
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    names = runner.get_constant_names_to_original_fqns()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **_loose_tensors(module)}
    # cloned, since two names may share a tensor, which safetensors refuses
    weights = {name: tensors[original].detach().contiguous().clone() for name, original in names.items()}
    save_file(weights, target / WEIGHTS)


def _loose_tensors(module: torch.fx.GraphModule) -> dict[str, torch.Tensor]:
    """Constants in the graph that are neither parameters nor buffers."""
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
    """Fuses products with the same input into one: queries, keys and values; gate and up projections.

    Fewer, larger products are faster, and the input is quantised only once.
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


_tables: list[torch.Tensor] = []
"""The table of the step being exported, since transformers can't pass it to its attention."""


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
    """Attention function for transformers over the cache in the table; also stores the new keys and values.

    Gets the rows of the new tokens in place of a mask; `sliding_window` is the number of visible rows.

    Raises:
        KvchatError: the model passes arguments that are not supported.
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
    """Registers the kernels' output shapes for torch.export; can be called again."""
    shapes = {"attend": _attend_shape, "product": _product_shape, "lookup": _lookup_shape}
    for name, shape in shapes.items():
        torch.library.register_fake(f"kvchat::{name}", shape, allow_override=True)  # type: ignore[arg-type]


class Step(nn.Module):
    """A model as a function of plain tensors."""

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
        selected: torch.Tensor,
    ) -> torch.Tensor:
        """Logits `[selected, vocabulary]` in fp32; writes keys and values to the memory in `table`.

        Args:
            ids: `[1, tokens]`, as are their positions.
            rows: `[1, 1, 1, tokens]`, the consecutive rows of the cache that they fill.
            table: `[layers, fields]`, a `Memory` each.
            selected: indices of the tokens whose logits are returned.
        """
        _tables[:] = [table]
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=rows,
            past_key_values=Cache(layers=[_PassThroughLayer() for _ in range(self.layers)]),
            use_cache=True,
            logits_to_keep=selected,
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float()


class _PassThroughLayer(CacheLayerMixin):
    """A cache layer inside the graph that passes states on to the attention, which stores them."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the states `[1, kv_heads, tokens, head_dim]` unchanged."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Unknown inside the graph; positions are inputs."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: there is no mask."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1
