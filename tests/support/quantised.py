"""The tiny Llama as a 4-bit GGUF file, and converted to a folder."""

from pathlib import Path

import gguf
import torch
from torch import nn

from tests.support.tiny import LAYERS, tiny_chat, tiny_model

Q4_0, Q4_1, Q8_0 = (getattr(gguf.GGMLQuantizationType, kind) for kind in ("Q4_0", "Q4_1", "Q8_0"))


def save_quantised(folder: Path) -> Path:
    """Writes `model.gguf` (Q4_1 and Q4_0, the head in Q8_0) and the folder with exactly its weights."""
    chat = tiny_chat()
    model = tiny_model(chat)
    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(LAYERS)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            stored = f"{names.get_name(name)}.weight"
            kind = Q8_0 if name == "lm_head" else Q4_0 if name.endswith("up_proj") else Q4_1
            data = gguf.quantize(module.weight.detach().numpy(), kind)
            writer.add_tensor(stored, data, raw_dtype=kind)
            module.weight.data = torch.tensor(gguf.dequantize(data, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_pretrained(folder)
    chat.save_pretrained(folder)
    return folder
