"""Reads quantised weights from a GGUF file without rounding them a second time.

GGUF blocks of the types Q4_0, Q4_1 and Q8_0 are 32 numbers `quant · scale + minimum`, the layout that the
kernels multiply. Other types are rounded to 8 bits.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import nn

from kvchat.engine.compiled.abi import GROUP
from kvchat.engine.compiled.quantized_linear import Blocks, packable, round_to_blocks

UNQUANTISED = {"F32", "F16", "BF16"}
FOUR_BITS = {gguf.GGMLQuantizationType.Q4_0: 1, gguf.GGMLQuantizationType.Q4_1: 2}
"""How many 16-bit floats a block starts with: its scale, and its minimum where that is not -8 scales."""
ZERO_4_0 = 8
"""The quant of Q4_0 that stands for zero."""


def head_of(path: Path) -> Blocks | None:
    """The output matrix `[vocabulary, hidden]` of a GGUF file in 8 bits; None where the file has 16."""
    reader: Any = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    head = tensors.get("output.weight", tensors.get("token_embd.weight"))  # tied in many small models
    if head is None or head.tensor_type.name in UNQUANTISED:
        return None
    return round_to_blocks(torch.tensor(gguf.dequantize(head.data, head.tensor_type)), 8)


def read_blocks(tensor: Any) -> Blocks | None:  # noqa: ANN401 - gguf.ReaderTensor; the library has no types
    """The blocks of one matrix of a GGUF file; None where it is not quantised.

    Types other than Q4_0 and Q4_1 are rounded to 8 bits, finer than any of them. Source of the layout:
    `block_q4_0` and `block_q4_1` in llama.cpp's ggml-common.h. The low halves of the 16 bytes are the first
    16 quants, the high halves the others.
    """
    if tensor.data.ndim != 2 or tensor.tensor_type.name in UNQUANTISED:
        return None
    floats_before = FOUR_BITS.get(tensor.tensor_type)
    if floats_before is None:
        return round_to_blocks(torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)), 8)
    raw = torch.tensor(tensor.data).view(len(tensor.data), -1, 2 * floats_before + GROUP // 2)
    floats = raw[..., : 2 * floats_before].contiguous().view(torch.float16).float()
    halves = raw[..., 2 * floats_before :]
    quants = torch.cat([halves & 15, halves >> 4], -1).flatten(1).int()
    scale = floats[..., 0]
    return Blocks(4, quants, scale, floats[..., 1] if floats_before == 2 else -ZERO_4_0 * scale)


def blocks_of(model: nn.Module, path: Path) -> dict[str, Blocks]:
    """Name → blocks of every linear layer of `model` that the GGUF file at `path` holds quantised.

    The file may have rows in another order (Llama's queries and keys), so rows are matched by their values;
    a layer whose rows don't all match is skipped.
    """
    reader: Any = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = _names_in_file(reader)
    found: dict[str, Blocks] = {}
    for name, module in model.named_modules():
        tensor = tensors.get(f"{names.get_name(name)}.weight")
        if not isinstance(module, nn.Linear) or not packable(module) or tensor is None:
            continue
        blocks = read_blocks(tensor)
        if blocks and (arranged := arrange(blocks, module.weight)):
            found[name] = arranged
    return found


def arrange(blocks: Blocks, weight: torch.Tensor) -> Blocks | None:
    """The blocks with their rows in the order of `weight [out, in]`; None where the rows differ."""
    found = blocks.weights().to(weight.dtype)
    if found.shape != weight.shape:
        return None
    if torch.equal(found, weight):
        return blocks
    places: dict[bytes, list[int]] = defaultdict(list)
    for place, row in enumerate(_row_bytes(found)):
        places[row].append(place)
    order = [places[row].pop() if places[row] else -1 for row in _row_bytes(weight)]
    return None if -1 in order else blocks.rows(torch.tensor(order))


def _row_bytes(weight: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in weight.detach().contiguous().view(torch.uint8).numpy()]


def _names_in_file(reader: Any) -> Any:  # noqa: ANN401
    """gguf's table from module names to tensor names."""
    wanted = reader.get_field("general.architecture").contents()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    layers = reader.get_field(f"{wanted}.block_count").contents()
    return gguf.get_tensor_name_map(architecture, layers)
