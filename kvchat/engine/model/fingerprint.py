"""The fingerprint of everything that keys and values depend on, from the model in memory."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from kvchat.cache.fingerprint import Fingerprint
from kvchat.contract import ModelFacts
from kvchat.engine.chat_template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 64
"""Numbers of each weight tensor that are hashed; further training changes nearly all of them."""


def identify(
    facts: ModelFacts, revision: str, template: ChatTemplate, frequencies: Sequence[float]
) -> Fingerprint:
    """The fingerprint of caches in the precision that `auto` means.

    Args:
        revision: the `weights_hash`.
        frequencies: of the rotary position embedding.
    """
    return Fingerprint(
        model=facts.name,
        revision=revision,
        weights=precision_words(facts),
        kv=facts.kv_dtype,
        rope=_hash(json.dumps(list(frequencies))),
        template=_hash(template.text),
        tokenizer=facts.tokenizer,
        transformers=version("transformers").partition(".")[0],
    )


def precision_words(facts: ModelFacts) -> str:
    """The precision of the weights that compute keys and values; a compiled step has its own weights."""
    eager = facts.path.startswith("eager")
    return facts.weights_dtype if eager else f"{facts.weights_dtype}, {facts.path}"


@torch.inference_mode()
def weights_hash(model: "PreTrainedModel") -> str:
    """16 hex digits over the names, shapes and a sample of every weight tensor."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
