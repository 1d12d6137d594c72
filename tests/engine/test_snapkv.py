"""Scores of tokens equal the attention weights of transformers' eager implementation."""

import pytest
import torch
from torch.nn.functional import avg_pool1d
from transformers import PreTrainedModel

from kvchat.cache.kv_cache import ConversationKV
from kvchat.engine.model.forward import CachedReader
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.model.sdpa import fold_attention
from kvchat.engine.snapkv import POOL, WINDOW, attention_scores, attention_weights, scoring_window
from kvchat.errors import KvchatError
from tests.support.engine_driver import assert_committed, sentences, uncached_logits
from tests.support.tiny import seeded_model, tiny_chat, tiny_config


def filled(loaded: LoadedModel, ids: list[int]) -> ConversationKV:
    kv = loaded.new_kv()
    CachedReader(loaded.model, kv).read(ids)
    return kv


def ids_of(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer.encode(text).ids)


@torch.inference_mode()
def eager_weights(ids: list[int]) -> torch.Tensor:
    """The tiny model's attention `[layers, heads, queries, tokens]`, as transformers reports it."""
    chat = tiny_chat()
    config = tiny_config(chat)
    config._attn_implementation = "eager"
    model = seeded_model(config)
    return torch.cat(model(input_ids=torch.tensor([ids]), output_attentions=True).attentions)


def same_weights_folded() -> PreTrainedModel:
    model = seeded_model(tiny_config(tiny_chat()))
    fold_attention(model)
    return model


def test_scores_are_the_maximum_attention_over_heads(
    tiny: LoadedModel,
) -> None:
    ids = ids_of(tiny, sentences(12))
    assert len(ids) > 3 * WINDOW
    kv = tiny.new_kv()
    model = same_weights_folded()
    CachedReader(model, kv).read(ids)
    scores = torch.tensor(attention_scores(model, kv))
    paid = eager_weights(ids)[:, :, -WINDOW:].mean(dim=2).amax(dim=1).sum(dim=0)
    expected = avg_pool1d(paid[None], POOL, stride=1, padding=POOL // 2, count_include_pad=False)[0]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


def test_scoring_leaves_the_cache_as_it_was(tiny: LoadedModel) -> None:
    ids = ids_of(tiny, sentences(8))
    kv = filled(tiny, ids)
    assert len(attention_scores(tiny.model, kv)) == len(ids)
    assert_committed(kv, ids)
    following = CachedReader(tiny.model, kv).read(ids[:1])[0]
    cold = uncached_logits(tiny.model, [*ids, ids[0]])[-1]
    torch.testing.assert_close(following, cold, atol=1e-3, rtol=0)


@pytest.mark.parametrize("tokens", [1, 2, 5, WINDOW, WINDOW + 1])
def test_a_short_cache_has_a_score_for_every_token(tiny: LoadedModel, tokens: int) -> None:
    ids = ids_of(tiny, sentences(8))[:tokens]
    kv = filled(tiny, ids)
    assert len(attention_scores(tiny.model, kv)) == tokens
    assert_committed(kv, ids)


def test_nothing_before_a_gap_is_read_again(tiny: LoadedModel) -> None:
    """Those tokens were read with others in sight than are there now."""
    ids = ids_of(tiny, sentences(8))
    kv = filled(tiny, ids)
    kv.select([*range(4), *range(len(ids) - 10, len(ids))])
    assert scoring_window(kv) == 9
    rows, positions = kv.rows, kv.positions
    assert len(attention_scores(tiny.model, kv)) == len(rows)
    assert (kv.rows, kv.positions) == (rows, positions)


def test_weights_are_causal_and_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 3, 8, generator=generator)
    key = torch.randn(1, 2, 10, 8, generator=generator)
    weights = attention_weights(query, key, 8**-0.5)
    assert weights.shape == (4, 3, 10)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 3))
    assert (weights > 0).sum(dim=-1).tolist() == [[8, 9, 10]] * 4


def test_attention_that_cannot_be_recorded_is_refused_with_a_sentence(tiny: LoadedModel) -> None:
    config = tiny_config(tiny_chat())
    config._attn_implementation = "eager"
    model, ids = seeded_model(config), list(range(5, 45))
    kv = tiny.new_kv()
    CachedReader(model, kv).read(ids)
    with pytest.raises(KvchatError, match="can't be recorded"):
        attention_scores(model, kv)
    assert_committed(kv, ids)
