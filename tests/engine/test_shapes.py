"""Other architectures through the same cache: sliding windows, shared layers, experts, recurrent states.

`SHAPES` is the table of what each of them can do; every row is measured on a tiny random model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import pytest
import torch
import transformers as tf
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import rounded_up
from kvchat.cache.packed_rows import pack_rows, unpack_rows
from kvchat.cache.quantized_layer import QuantizedLayer
from kvchat.cache.rope_shift import rotated
from kvchat.cache.state_layer import HybridLayer, RecurrentLayer
from kvchat.engine.model.forward import CachedReader, Stopped, forward_pass, stopping_between_layers
from kvchat.engine.model.layout import NO_LIMIT
from kvchat.engine.model.loader import LoadedModel, assemble
from kvchat.engine.model.probe import measure
from kvchat.errors import KvchatError
from tests.support.tiny import seeded_model, tiny_chat

WINDOW, VOCABULARY, CONTEXT, LAYERS = 8, 300, 512, 4
TOLERANCE = 1e-3
"""Two fp32 passes over the same ids in other chunks differ by 1e-4, one wrong cached token by over 0.1."""
SLIDING = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2
PROMPT, REPLY, QUESTION = 40, 6, 11
"""Tokens of a turn: the reply is read one by one."""

Kind = Callable[..., PreTrainedConfig]


def config(kind: Kind, **own: object) -> PreTrainedConfig:
    """A config of tiny sizes under the usual names."""
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return kind(**sizes | own)


def older(kind: Kind, **own: object) -> PreTrainedConfig:
    """The same for kinds that call their sizes by other names."""
    return kind(vocab_size=VOCABULARY, initializer_range=0.2, bos_token_id=1, eos_token_id=2, **own)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"hidden_size": 64, "num_hidden_layers": LAYERS, "state_size": 16}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA_HEADS = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
GEMMA3N = {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.0] * LAYERS,
    "laurel_rank": 8,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

ANYWHERE, SINCE_MARK, MARKS_ONLY = "anywhere", "to marks, anywhere after the last", "to marks"
GAPS = ""


@dataclass(frozen=True)
class Can:
    """What a model of one architecture can do with its cache."""

    made: Callable[[], PreTrainedConfig]
    goes_back: str = ANYWHERE
    no_gaps: str = GAPS
    """Part of the sentence that refuses policies with gaps; empty where they work."""
    positions: str = "rotary"
    layout: str = "half"
    notes: tuple[str, ...] = ()
    """A part of each note."""


A_WINDOW = "mask of a sliding window"
A_STATE = "a recurrent state can't forget"
OF_EXPERTS = "expert layers: experts store no keys and values"
OF_A_STATE = "recurrent layers: a crop returns to the last turn end"
HALF_SLIDING = "sliding window of 8 in 2 of 4 layers"
ALL_SLIDING = "sliding window of 8 in 4 of 4 layers"

SHAPES: dict[str, Can] = {
    "Llama": Can(lambda: config(tf.LlamaConfig)),
    "Qwen2": Can(lambda: config(tf.Qwen2Config)),
    "Qwen3": Can(lambda: config(tf.Qwen3Config, head_dim=16)),
    "Cohere": Can(lambda: config(tf.CohereConfig), layout="interleaved"),
    "Mistral": Can(
        lambda: config(tf.MistralConfig, head_dim=16, sliding_window=WINDOW),
        no_gaps=A_WINDOW,
        notes=(ALL_SLIDING,),
    ),
    "Gemma 2": Can(
        lambda: config(tf.Gemma2Config, head_dim=16, sliding_window=WINDOW),
        no_gaps=A_WINDOW,
        notes=(HALF_SLIDING,),
    ),
    "Gemma 3": Can(
        lambda: config(tf.Gemma3TextConfig, head_dim=16, sliding_window=WINDOW, layer_types=SLIDING),
        no_gaps=A_WINDOW,
        notes=(HALF_SLIDING,),
    ),
    "Gemma 3n": Can(
        lambda: config(
            tf.Gemma3nTextConfig, head_dim=16, sliding_window=WINDOW, layer_types=SLIDING, **GEMMA3N
        ),
        no_gaps=A_WINDOW,
        notes=("sliding window of 8 in 1 of 2 layers", "2 of 4 layers store no keys and values"),
    ),
    "Phi": Can(lambda: config(tf.PhiConfig)),
    "Phi-3": Can(lambda: config(tf.Phi3Config)),
    "GPT-2": Can(
        lambda: older(tf.GPT2Config, n_embd=64, n_layer=LAYERS, n_head=4, n_positions=CONTEXT),
        no_gaps="its positions are learned and end at 512",
        positions="learned",
        layout="none",
    ),
    "Bloom": Can(
        lambda: older(tf.BloomConfig, hidden_size=64, n_layer=LAYERS, n_head=4),
        no_gaps="ALiBi",
        positions="alibi",
        layout="none",
    ),
    "OLMoE": Can(lambda: config(tf.OlmoeConfig, **EXPERTS), notes=(OF_EXPERTS,)),
    "Qwen3-MoE": Can(
        lambda: config(tf.Qwen3MoeConfig, head_dim=16, moe_intermediate_size=32, **EXPERTS),
        notes=(OF_EXPERTS,),
    ),
    "DeepSeek-V3": Can(lambda: config(tf.DeepseekV3Config, **DEEPSEEK), layout="other", notes=(OF_EXPERTS,)),
    "gpt-oss": Can(
        lambda: config(
            tf.GptOssConfig,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            layer_types=SLIDING,
        ),
        no_gaps=A_WINDOW,
        notes=(OF_EXPERTS, HALF_SLIDING, "attention sinks are in the model"),
    ),
    "LFM2": Can(
        lambda: config(tf.Lfm2Config, layer_types=["conv", "full_attention"] * 2, conv_L_cache=3),
        SINCE_MARK,
        "a convolution mixes neighbouring tokens",
        notes=("2 convolution layers",),
    ),
    "Qwen3-Next": Can(
        lambda: config(
            tf.Qwen3NextConfig,
            head_dim=16,
            layer_types=LINEAR,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            **DELTA,
            **EXPERTS,
        ),
        MARKS_ONLY,
        A_STATE,
        notes=(OF_EXPERTS, OF_A_STATE),
    ),
    "Falcon-H1": Can(
        lambda: config(
            tf.FalconH1Config,
            head_dim=16,
            mamba_n_groups=1,
            mamba_d_conv=4,
            mamba_chunk_size=8,
            **MAMBA_HEADS,
        ),
        MARKS_ONLY,
        A_STATE,
        notes=(OF_A_STATE,),
    ),
    "Mamba": Can(
        lambda: older(tf.MambaConfig, **MAMBA),
        MARKS_ONLY,
        A_STATE,
        positions="none",
        layout="none",
        notes=(OF_A_STATE, "read one token at a time"),
    ),
    "Mamba2": Can(
        lambda: older(tf.Mamba2Config, num_heads=8, head_dim=16, n_groups=1, chunk_size=8, **MAMBA),
        MARKS_ONLY,
        A_STATE,
        positions="none",
        layout="none",
        notes=(OF_A_STATE,),
    ),
}


def assembled(name: str) -> LoadedModel:
    return assemble(seeded_model(SHAPES[name].made()), tiny_chat(), name)


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request: pytest.FixtureRequest) -> LoadedModel:
    """A tiny random model of that architecture."""
    return assembled(request.param)


def some_ids(number: int, seed: int = 0) -> list[int]:
    """Token ids that stand for text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (number,), generator=generator).tolist()


class Reading:
    """One conversation, read as by an engine: checkpoints before the last prompt token and at turn ends."""

    def __init__(self, loaded: LoadedModel, kv: ConversationKV | None = None) -> None:
        self.model = loaded.model
        self.kv = loaded.new_kv() if kv is None else kv
        self.reader = CachedReader(self.model, self.kv)

    def read(self, ids: Sequence[int]) -> None:
        """Reads on, and compares with a cold pass over everything."""
        found = self.reader.read(ids)
        assert_equal_logits(found, cold(self.model, self.kv.ids))

    def turn(self, prompt: Sequence[int], reply: Sequence[int]) -> None:
        if prompt[:-1]:
            self.reader.read(prompt[:-1])
        self.kv.checkpoint()
        for token in (prompt[-1], *reply):
            self.read([token])
        self.kv.checkpoint()


def cold(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """The oracle: logits `[1, vocabulary]` after one plain pass over all ids."""
    return forward_pass(model, ids, range(len(ids)), None)


def assert_equal_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert found.argmax() == expected.argmax()


def one_turn(loaded: LoadedModel) -> Reading:
    reading = Reading(loaded)
    reading.turn(some_ids(PROMPT), some_ids(REPLY, 1))
    return reading


def assert_whole(kv: ConversationKV, length: int) -> None:
    """All layers have as many tokens as the cache."""
    assert [layer.length for layer in kv.stored] == [length] * len(kv.stored)
    assert len(kv) == len(kv.ids) == length


def passes_through(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers in the order they run."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def failing_after(model: PreTrainedModel, layer: int) -> Iterator[None]:
    """Inside the block, a pass fails when that layer has done its part of it."""

    def fail(*_: object) -> None:
        raise InterruptedError

    handle = passes_through(model)[layer].register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_a_model_supports_what_the_table_says(shaped: LoadedModel) -> None:
    can, shape = SHAPES[shaped.facts.name], shaped.shape
    assert shape.is_croppable == (can.goes_back != MARKS_ONLY)
    assert any(shape.states) == (can.goes_back != ANYWHERE)
    assert (shape.positions, shape.rotary) == (can.positions, can.layout)
    assert can.no_gaps in shape.gap_refusal
    assert bool(can.no_gaps) == bool(shape.gap_refusal)
    assert len(shape.notes) == len(can.notes)
    for found, expected in zip(shape.notes, can.notes, strict=True):
        assert expected in found
    assert shape.position_limit == (NO_LIMIT if can.positions in ("alibi", "none") else CONTEXT)
    assert (shaped.facts.notes, shaped.facts.gap_refusal) == (shape.notes, shape.gap_refusal)


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_equal_a_cold_pass(shaped: LoadedModel, chunk: int) -> None:
    reading, ids = Reading(shaped), some_ids(PROMPT)
    for start in range(0, PROMPT, chunk):
        reading.read(ids[start : start + chunk])
    assert_whole(reading.kv, PROMPT)


def test_a_second_turn_continues_the_first(shaped: LoadedModel) -> None:
    reading = one_turn(shaped)
    reading.turn(some_ids(QUESTION, 2), some_ids(REPLY, 3))
    assert_whole(reading.kv, PROMPT + 2 * REPLY + QUESTION)


def test_regenerating_reads_one_token(shaped: LoadedModel) -> None:
    reading = one_turn(shaped)
    assert reading.kv.reachable(PROMPT - 1) == PROMPT - 1
    reading.kv.truncate(PROMPT - 1)
    reading.read(some_ids(PROMPT)[-1:])
    for token in some_ids(REPLY, 4):
        reading.read([token])
    assert_whole(reading.kv, PROMPT + REPLY)


def test_an_early_edit_returns_as_far_as_the_table_says(shaped: LoadedModel) -> None:
    reading = one_turn(shaped)
    edited = 12
    reached = reading.kv.reachable(edited)
    assert reached == (edited if SHAPES[shaped.facts.name].goes_back == ANYWHERE else 0)
    reading.kv.truncate(reached)
    reading.read([*some_ids(PROMPT)[reached:edited], *some_ids(QUESTION, 5)])
    assert_whole(reading.kv, edited + QUESTION)


def test_a_crop_inside_a_reply_returns_as_far_as_the_table_says(shaped: LoadedModel) -> None:
    reading = one_turn(shaped)
    reading.turn(some_ids(QUESTION, 2), [])
    end = len(reading.kv)
    for token in some_ids(REPLY, 3):
        reading.read([token])
    reached = reading.kv.reachable(end + 2)
    assert reached == (end if SHAPES[shaped.facts.name].goes_back == MARKS_ONLY else end + 2)
    reading.kv.truncate(reached)
    reading.read(some_ids(QUESTION, 6))
    assert_whole(reading.kv, reached + QUESTION)


def test_a_crop_to_an_unreachable_length_is_refused(shaped: LoadedModel) -> None:
    reading = one_turn(shaped)
    if reading.kv.reachable(PROMPT + 2) == PROMPT + 2:
        reading.kv.truncate(PROMPT + 2)
        assert_whole(reading.kv, PROMPT + 2)
        return
    with pytest.raises(ValueError, match=f"can't go back to {PROMPT + 2} of {PROMPT + REPLY}"):
        reading.kv.truncate(PROMPT + 2)
    assert_whole(reading.kv, PROMPT + REPLY)
    reading.read(some_ids(2, 7))


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_failure_in_any_layer_leaves_no_trace(shaped: LoadedModel, layer: int, tokens: int) -> None:
    reading = one_turn(shaped)
    reading.read(some_ids(3, 2))
    committed = len(reading.kv)
    with failing_after(shaped.model, layer), pytest.raises(InterruptedError):
        reading.reader.read(some_ids(tokens, 8))
    marks_only = SHAPES[shaped.facts.name].goes_back == MARKS_ONLY
    assert_whole(reading.kv, PROMPT + REPLY if marks_only else committed)
    reading.read(some_ids(QUESTION, 9))


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_failure_in_the_very_first_pass_leaves_an_empty_cache(shaped: LoadedModel, layer: int) -> None:
    reading = Reading(shaped)
    with failing_after(shaped.model, layer), pytest.raises(InterruptedError):
        reading.reader.read(some_ids(5))
    assert_whole(reading.kv, 0)
    reading.read(some_ids(QUESTION, 9))


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_stop_is_checked_before_every_layer(shaped: LoadedModel, layer: int) -> None:
    reading, asked = one_turn(shaped), count()
    with (
        stopping_between_layers(shaped.model, lambda: next(asked) == layer),
        pytest.raises(Stopped),
    ):
        reading.reader.read([5])
    assert next(asked) == layer + 1
    assert_whole(reading.kv, PROMPT + REPLY)
    reading.read(some_ids(QUESTION, 9))


def test_both_branches_of_a_fork_equal_cold_passes(shaped: LoadedModel) -> None:
    parent = one_turn(shaped)
    branch = Reading(shaped, parent.kv.fork(PROMPT - 1))
    branch.read(some_ids(QUESTION, 10))
    whole = Reading(shaped, parent.kv.fork(len(parent.kv)))
    whole.read(some_ids(QUESTION, 11))
    parent.read(some_ids(QUESTION, 12))
    for reading in (branch, whole):
        reading.read(some_ids(3, 13))
    assert parent.kv.ids == (*some_ids(PROMPT), *some_ids(REPLY, 1), *some_ids(QUESTION, 12))


def test_a_packed_cache_continues_bit_identically(shaped: LoadedModel) -> None:
    """Packed after each of two turns, with a regeneration between them."""
    live, restored = one_turn(shaped), shaped.new_kv()
    unpack_rows(restored, pack_rows(live.kv))
    live.kv.truncate(PROMPT - 1)
    live.turn(some_ids(PROMPT)[-1:], some_ids(REPLY, 4))
    live.turn(some_ids(QUESTION, 2), some_ids(REPLY, 3))
    unpack_rows(restored, pack_rows(live.kv))
    assert restored.ids == live.kv.ids
    again = Reading(shaped, restored)
    for ids in (some_ids(1, 5), some_ids(QUESTION, 6)):
        assert torch.equal(again.reader.read(ids), live.reader.read(ids))
    back = restored.reachable(PROMPT + REPLY)
    assert back == live.kv.reachable(PROMPT + REPLY) == PROMPT + REPLY
    restored.truncate(back)
    again.read(some_ids(QUESTION, 7))


def test_bytes_are_those_of_the_measured_shape(shaped: LoadedModel) -> None:
    shape, fresh = shaped.shape, shaped.new_kv()
    to_read = fresh.bytes_to_read(PROMPT)
    recorded = PROMPT * sum(state.recorded_bytes for state in shape.states if state)
    foretold = rounded_up(PROMPT) * shape.kv_bytes_per_token(torch.float32) + shape.state_bytes
    assert fresh.bytes_at(PROMPT) == to_read == foretold + recorded
    reading = Reading(shaped, fresh)
    reading.read(some_ids(PROMPT))
    assert fresh.used_bytes == PROMPT * shape.kv_bytes_per_token(torch.float32)
    # the window at the start of a record is also stored, until the next checkpoint
    windows = shape.state_bytes if recorded else 0
    assert fresh.storage_bytes == foretold + recorded + windows
    fresh.checkpoint()
    assert fresh.storage_bytes == foretold + shape.state_bytes
    fresh.clear()
    assert (fresh.storage_bytes, len(fresh)) == (0, 0)
    reading.read(some_ids(PROMPT, 1))


def test_a_cleared_cache_behaves_like_a_new_one(shaped: LoadedModel) -> None:
    reading = one_turn(shaped)
    reading.kv.clear()
    found = reading.reader.read(some_ids(QUESTION, 3))
    assert torch.equal(found, Reading(shaped).reader.read(some_ids(QUESTION, 3)))


def test_gaps_are_refused_where_there_is_a_state(shaped: LoadedModel) -> None:
    reading = one_turn(shaped)
    if not reading.kv.states:
        reading.kv.select([0, 1, *range(20, PROMPT)])
        assert reading.kv.index.has_gap
        return
    with pytest.raises(ValueError, match="can't forget"):
        reading.kv.select([0, 1])


def test_a_gap_keeps_positions_where_the_table_allows_gaps(shaped: LoadedModel) -> None:
    """The first layer's keys depend on nothing but token and position: after the gap they stay the same."""
    if SHAPES[shaped.facts.name].no_gaps:
        assert shaped.shape.gap_refusal
        return
    reading, whole = one_turn(shaped), one_turn(shaped)
    reading.kv.select([*range(4), *range(20, PROMPT)])
    whole.kv.truncate(PROMPT)
    for kv in (reading.kv, whole.kv):
        CachedReader(shaped.model, kv).read([7, 8])
    ours, theirs = reading.kv.stored[0], whole.kv.stored[0]
    assert ours.keys is not None
    assert theirs.keys is not None
    last = slice(ours.length - 2, ours.length), slice(theirs.length - 2, theirs.length)
    torch.testing.assert_close(ours.keys[:, :, last[0]], theirs.keys[:, :, last[1]])


def test_the_measured_rotation_moves_keys_to_other_positions(shaped: LoadedModel) -> None:
    """A single token, read at position 100, has the keys of position 3 rotated by 97."""
    frequencies = shaped.rotary_frequencies()
    if frequencies is None:
        assert shaped.shape.rotary_dims == 0
        return
    keys = []
    for position in (3, 100):
        kv = shaped.new_kv()
        with kv.append([9]) as past:
            forward_pass(shaped.model, [9], [position], past)
        keys.append([layer.keys[:, :, :1] for layer in kv.stored if layer.keys is not None])
    interleaved = shaped.shape.rotary == "interleaved"
    for at_3, at_100 in zip(*keys, strict=True):
        moved = rotated(at_3, torch.tensor([97]), frequencies, interleaved=interleaved)
        torch.testing.assert_close(moved, at_100, atol=1e-4, rtol=0)


def test_bf16_weights_are_measured_alike(shaped: LoadedModel) -> None:
    model = seeded_model(SHAPES[shaped.facts.name].made()).to(torch.bfloat16)  # type: ignore[arg-type]
    found, expected = measure(model, "bf16"), shaped.shape
    for name in ("kinds", "heads", "positions", "rotary", "is_croppable", "gap_refusal", "notes"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize("name", ["Phi", "Falcon-H1", "LFM2", "Mamba2"])
def test_attention_is_quantised_and_states_are_not(name: str) -> None:
    kv = assembled(name).new_kv("int8")
    expected = {
        "Phi": {QuantizedLayer},
        "Falcon-H1": {HybridLayer},
        "LFM2": {RecurrentLayer, QuantizedLayer},
        "Mamba2": {RecurrentLayer},
    }
    assert {type(layer) for layer in kv.layers} == expected[name]


def test_another_precision_is_that_of_the_stored_keys() -> None:
    loaded = assembled("Llama")
    kv = loaded.new_kv("bf16")
    CachedReader(loaded.model, kv).read(some_ids(5))
    assert {layer.keys.dtype for layer in kv.stored if layer.keys is not None} == {torch.bfloat16}
    assert kv.used_bytes == 5 * loaded.shape.kv_bytes_per_token(torch.bfloat16)
    assert {type(layer) for layer in loaded.new_kv("auto").layers} == {DenseLayer}


def test_a_compressed_layer_is_measured_and_not_computed() -> None:
    """DeepSeek stores one latent key and one rotated part per token, whatever its config says about heads."""
    heads = {
        (head.kv_heads, head.key_dim, head.value_dim) for head in assembled("DeepSeek-V3").shape.heads if head
    }
    assert heads == {(1, DEEPSEEK["kv_lora_rank"], DEEPSEEK["qk_rope_head_dim"])}


def test_a_model_without_attention_has_no_heads() -> None:
    loaded = assembled("Mamba2")
    assert (loaded.facts.layers, loaded.facts.kv_heads, loaded.facts.head_dim) == (0, 0, 0)
    assert (loaded.facts.kv_bytes_per_token, len(loaded.shape.kinds)) == (0, LAYERS)


def test_unsupported_layers_are_refused_with_a_sentence() -> None:
    model = seeded_model(config(tf.LlamaConfig))
    model.config.layer_types = ["full_attention", "indexed_attention"] * 2
    with pytest.raises(KvchatError, match="strange has layers of the kind indexed_attention"):
        measure(model, "strange")


def test_longrope_limits_the_context_to_its_original_length() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    long_rope = config(
        tf.Phi3Config,
        original_max_position_embeddings=60,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10_000.0, **factors},
    )
    loaded = assemble(seeded_model(long_rope), tiny_chat(), "long", context=400)
    assert (loaded.facts.context_limit, loaded.shape.position_limit) == (60, 60)
    Reading(loaded).turn(some_ids(50), some_ids(10, 1))


def test_without_a_position_limit_the_requested_context_is_used() -> None:
    chat, made = tiny_chat(), SHAPES["Bloom"].made
    limits = [
        assemble(seeded_model(made()), chat, "bloom", context=asked).facts.context_limit
        for asked in (None, 100, 5000)
    ]
    assert limits == [2048, 100, 5000]


def test_the_window_of_these_tests_hides_something() -> None:
    """Else cached and uncached results would be equal with any cache."""
    narrow = seeded_model(config(tf.MistralConfig, head_dim=16, sliding_window=WINDOW))
    wide = seeded_model(config(tf.MistralConfig, head_dim=16, sliding_window=None))
    ids = some_ids(PROMPT)
    assert (cold(narrow, ids) - cold(wide, ids)).abs().max() > 1
    assert torch.equal(cold(narrow, ids[:4]), cold(wide, ids[:4]))


def test_one_wrong_token_is_more_than_the_tolerance(shaped: LoadedModel) -> None:
    """Else these equalities would hold for a cache of other tokens, too."""
    ids = some_ids(PROMPT)
    other = [*ids[:-2], ids[-2] + 1 if ids[-2] < VOCABULARY - 1 else 3, ids[-1]]
    assert (cold(shaped.model, ids) - cold(shaped.model, other)).abs().max() > 20 * TOLERANCE
