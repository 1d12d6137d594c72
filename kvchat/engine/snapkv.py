"""Scores for SnapKV eviction: how much the latest queries attend to each cached token.

The attention kernel returns no weights, so the latest tokens are read again while queries and keys are
recorded. SnapKV (arXiv 2404.14469) keeps a set of tokens per head; here one set serves all heads and layers:
scores are the maximum over the heads of a layer, summed over layers. A mean over heads would hide the few
heads that retrieve.
"""

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import avg_pool1d

from kvchat.cache.kv_cache import ConversationKV
from kvchat.engine.model.forward import CachedReader
from kvchat.errors import KvchatError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 32
"""Latest tokens whose queries count."""
POOL = 7
"""Width of the average pooling over neighbouring tokens."""


def scoring_window(kv: ConversationKV) -> int:
    """Latest tokens that are read again to score a cache; all of them are after its last gap."""
    return max(0, min(WINDOW, len(kv) - 1, len(kv.ids) - kv.index.last_gap_end - 1))


def attention_scores(model: "PreTrainedModel", kv: ConversationKV) -> list[float]:
    """One score per row; reads the last `scoring_window` tokens again. Without any, all scores are 0.

    Raises:
        KvchatError: this model's attention can't be recorded.
    """
    from kvchat.engine.model.sdpa import watching_attention  # imports transformers' models

    window = scoring_window(kv)
    if not window:
        return [0.0] * len(kv)
    tail = kv.ids[len(kv.ids) - window :]
    kv.truncate(len(kv.ids) - window)
    total = torch.zeros(len(kv) + window)
    layers = 0

    def watch(query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        nonlocal layers
        total.add_(attention_weights(query, key, scaling).mean(dim=1).amax(dim=0).cpu())
        layers += 1

    with watching_attention(watch):
        CachedReader(model, kv).read(tail)
    if not layers:
        raise KvchatError("This model's attention can't be recorded, so snapkv can't score its tokens.")
    pooled = avg_pool1d(total[None], POOL, stride=1, padding=POOL // 2, count_include_pad=False)[0]
    return [float(score) for score in pooled]


@torch.inference_mode()
def attention_weights(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Weights `[heads, queries, tokens]` of the last queries over all keys, causal, in fp32."""
    heads, queries, tokens = query.shape[1], query.shape[2], key.shape[2]
    keys = key[0].float().repeat_interleave(heads // key.shape[1], dim=0)
    logits = query[0].float() @ keys.transpose(-1, -2) * scaling
    hidden = torch.ones(queries, tokens, dtype=torch.bool).triu(tokens - queries + 1)
    return logits.masked_fill(hidden.to(logits.device), float("-inf")).softmax(dim=-1)
