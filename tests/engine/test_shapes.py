"""Other architectures through the same cache: sliding windows, shared KV layers, old position encodings."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from kvchat.contract import Sampling, Tokens
from kvchat.engine.engine import LocalEngine
from kvchat.engine.load import LoadedModel, assemble
from tests.engine.driving import (
    Chat,
    after_layer,
    assert_committed,
    assert_equals_cold,
    rendered,
    sentences,
    stopping_at,
    uncached_logits,
)
from tests.tiny import seeded_model, tiny_chat

WINDOW, CHUNK = 8, 7
Build = Callable[..., PreTrainedConfig]
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def config(kind: Build, chat: TokenizersBackend, **own: object) -> PreTrainedConfig:
    """A config of tiny sizes under the usual names."""
    return kind(
        vocab_size=len(chat),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=chat.bos_token_id,
        eos_token_id=chat.eos_token_id,
        pad_token_id=chat.pad_token_id,
        **own,
    )


def gpt2(chat: TokenizersBackend) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=len(chat),
        n_embd=64,
        n_layer=4,
        n_head=4,
        n_positions=512,
        initializer_range=0.2,
        bos_token_id=chat.bos_token_id,
        eos_token_id=chat.eos_token_id,
    )


def bloom(chat: TokenizersBackend) -> PreTrainedConfig:
    return BloomConfig(
        vocab_size=len(chat),
        hidden_size=64,
        n_layer=4,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=chat.bos_token_id,
        eos_token_id=chat.eos_token_id,
    )


SHAPES: dict[str, Callable[[TokenizersBackend], PreTrainedConfig]] = {
    "mistral": lambda chat: config(MistralConfig, chat, head_dim=16, sliding_window=WINDOW),
    "qwen3": lambda chat: config(Qwen3Config, chat, head_dim=16),
    "qwen3 sliding": lambda chat: config(
        Qwen3Config,
        chat,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
    ),
    "gemma2": lambda chat: config(Gemma2Config, chat, head_dim=16, sliding_window=WINDOW),
    "gemma3": lambda chat: config(
        Gemma3TextConfig, chat, head_dim=16, sliding_window=WINDOW, layer_types=ALTERNATING
    ),
    "gemma3n": lambda chat: config(
        Gemma3nTextConfig,
        chat,
        head_dim=16,
        vocab_size_per_layer_input=len(chat),
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=8,
    ),
    "phi3": lambda chat: config(Phi3Config, chat, sliding_window=WINDOW),
    "llama of old": lambda chat: config(LlamaConfig, chat, tie_word_embeddings=True),
    "gpt2": gpt2,
    "bloom": bloom,
}


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request: pytest.FixtureRequest) -> LoadedModel:
    """A tiny random model of that architecture."""
    chat = tiny_chat()
    return assemble(seeded_model(SHAPES[request.param](chat)), chat, request.param, precision="fp32")


def asked_twice(loaded: LoadedModel) -> Chat:
    """A conversation with two turns, both compared with a cold run."""
    chat = Chat(LocalEngine(loaded, prefill_chunk=CHUNK), loaded, sampling=Sampling(max_tokens=12))
    first = chat.ask(sentences(2))
    held = len(chat.kv)
    assert held > 2 * WINDOW
    second = chat.ask("And the train?")
    assert (second.started.reused_tokens, second.started.reuse_note) == (held, "")
    for played in (first, second):
        assert_equals_cold(played, loaded)
    return chat


def test_cached_turns_equal_cold_ones(shaped: LoadedModel) -> None:
    asked_twice(shaped)


def test_a_crop_to_before_the_window_equals_a_cold_run(shaped: LoadedModel) -> None:
    chat = asked_twice(shaped)
    del chat.messages[1:]
    again = chat.answer()
    assert again.started.prefilled_tokens == 1
    assert_committed(chat.kv, [*rendered(shaped, again.request.messages), *again.tokens[:-1]])
    assert_equals_cold(again, shaped)


def test_reported_bytes_are_those_of_the_formula(shaped: LoadedModel) -> None:
    chat = asked_twice(shaped)
    assert chat.kv.used_bytes == len(chat.kv) * shaped.facts.kv_bytes_per_token


@pytest.mark.parametrize("layer", [0, 2])
def test_a_stop_between_layers_ends_the_pass_at_once(shaped: LoadedModel, layer: int) -> None:
    chat = asked_twice(shaped)
    with after_layer(shaped.model, layer, 3, lambda: chat.engine.stop(chat.turn)):
        chat.messages.pop()
        stopped = chat.answer()
    assert (stopped.finished.stats.finish_reason, len(stopped.tokens)) == ("cancelled", 2)
    assert_equals_cold(chat.ask("Tell me about the sea."), shaped)


def test_the_context_ends_where_a_long_rope_would_spoil_what_is_cached() -> None:
    chat = tiny_chat()
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    long_rope = config(
        Phi3Config,
        chat,
        original_max_position_embeddings=60,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10_000.0, **factors},
    )
    loaded = assemble(seeded_model(long_rope), chat, "phi3 long", precision="fp32", context=400)
    assert loaded.facts.context_limit == 60
    talk = Chat(LocalEngine(loaded), loaded, sampling=Sampling(max_tokens=100))
    talk.ask("Hi", stopping_at(talk.engine, Tokens, 3))
    second = talk.ask("And?")
    assert second.finished.stats.finish_reason == "context"
    assert_equals_cold(second, loaded)


def test_the_window_of_these_tests_hides_something() -> None:
    """Else cached and uncached would be equal whatever the cache kept."""
    chat = tiny_chat()
    narrow = seeded_model(config(MistralConfig, chat, head_dim=16, sliding_window=WINDOW))
    wide = seeded_model(config(MistralConfig, chat, head_dim=16, sliding_window=None))
    ids = chat.backend_tokenizer.encode(sentences(2)).ids
    assert (uncached_logits(narrow, ids)[-1] - uncached_logits(wide, ids)[-1]).abs().max() > 1
    assert torch.equal(uncached_logits(narrow, ids[:4]), uncached_logits(wide, ids[:4]))
