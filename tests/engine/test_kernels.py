"""The kernels compute what plain torch computes from the same numbers, whatever is read together.

Where nothing may depend on company, on threads or on chunks, the answers are compared bit for bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.layer import AddressedLayer, HeadShape
from kvchat.cache.quantized_layer import QuantizedLayer
from kvchat.engine.compiled.abi import GROUP, TILE
from kvchat.engine.compiled.quantized_linear import Blocks, pack, round_to_blocks

pytestmark = pytest.mark.usefixtures("kernels")

BITS = (4, 8)
COLUMNS = 96
each_precision = pytest.mark.parametrize("bits", BITS)


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- products ----------------------------------------------------------------------------------------------


def blocks_of(rows: int, bits: int) -> Blocks:
    return round_to_blocks(random(rows, COLUMNS, seed=rows), bits)


def product(states: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """`[tokens, rows]`, without the rows that fill the last tile; those say nothing."""
    found: torch.Tensor = torch.ops.kvchat.product(states, pack(blocks))
    rows = len(blocks.quants)
    assert found.shape == (len(states), -(-rows // TILE) * TILE)
    assert not found[:, rows:].any()
    return found[:, :rows]


def allowed_error(states: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """`[tokens, rows]` in fp64: half a step of the states' 16 bits per group, and sums in fp32."""
    peaks = states.double().view(len(states), -1, GROUP).abs().amax(-1)
    scales = blocks.scales.double()
    quants = blocks.quants.double().abs().view(len(blocks.quants), -1, GROUP).sum(-1)
    rounding = peaks / (2 * 32767) @ (quants * scales).T
    parts = blocks.quants.double().abs() * scales.repeat_interleave(GROUP, 1)
    if blocks.minima is not None:
        parts += blocks.minima.double().abs().repeat_interleave(GROUP, 1)
    return rounding + 1e-6 * states.double().abs() @ parts.T


STATES = {
    "usual": random(9, COLUMNS),
    "large": random(5, COLUMNS) * 1e30,
    "of every size": random(5, COLUMNS) * 10 ** (12 * random(5, COLUMNS, seed=1)).clamp(-12, 12),
    "with one outlier": torch.cat([random(5, COLUMNS - 1), torch.full((5, 1), 1e4)], 1),
    "zeros": torch.zeros(3, COLUMNS),
    "half of them zeros": random(6, COLUMNS) * (torch.arange(COLUMNS) >= GROUP),
}


@each_precision
@pytest.mark.parametrize("rows", [1, 8, 16, 37, 136])
@pytest.mark.parametrize("kind", STATES)
def test_a_product_is_that_of_the_same_blocks_in_fp64(kind: str, rows: int, bits: int) -> None:
    states, blocks = STATES[kind], blocks_of(rows, bits)
    expected = states.double() @ blocks.weights().double().T
    found = product(states, blocks).double()
    assert found.isfinite().all()
    assert ((found - expected).abs() <= allowed_error(states, blocks)).all()


@each_precision
def test_results_are_bit_identical_for_every_batch_size(bits: int) -> None:
    """1, 2, 4 or 8 tokens are multiplied in one go, and 64 share unpacked weights; 2 or 4 tiles of rows are.

    Of 7 tiles some are left over, so that rows are multiplied in every way that this CPU has.
    """
    count = 150
    states, blocks = random(count, COLUMNS), blocks_of(7 * TILE, bits)
    alone = torch.cat([product(state[None], blocks) for state in states])
    for size in (2, 3, 4, 5, 8, 15, 64, 65, count):
        together = torch.cat([product(states[n : n + size], blocks) for n in range(0, count, size)])
        assert torch.equal(together, alone)


@each_precision
def test_a_row_of_a_product_does_not_depend_on_the_other_rows(bits: int) -> None:
    """Products are joined where they multiply the same states."""
    states, blocks = random(5, COLUMNS), blocks_of(5 * TILE, bits)
    whole = product(states, blocks)
    for start in range(0, 5 * TILE, TILE):
        part = blocks.rows(torch.arange(start, start + TILE))
        assert torch.equal(product(states, part), whole[:, start : start + TILE])


@each_precision
def test_one_and_two_threads_multiply_alike(bits: int) -> None:
    states, blocks = random(33, COLUMNS), blocks_of(512, bits)  # more than one thread's worth
    two = product(states, blocks)
    torch.set_num_threads(1)
    assert torch.equal(product(states, blocks), two)


def test_states_that_do_not_lie_one_after_the_other_are_multiplied_too() -> None:
    states, blocks = random(COLUMNS, 5).T, blocks_of(16, 8)
    assert torch.equal(product(states, blocks), product(states.contiguous(), blocks))


def test_a_looked_up_row_is_the_row() -> None:
    blocks = blocks_of(37, 8)
    ids = torch.tensor([36, 0, 7, 8, 7, 21])
    assert torch.equal(torch.ops.kvchat.lookup(ids, pack(blocks)), blocks.weights()[ids])
    assert torch.equal(torch.ops.kvchat.lookup(ids[::2], pack(blocks)), blocks.weights()[ids[::2]])


def test_products_of_mismatched_shapes_are_refused() -> None:
    packed, states = pack(blocks_of(16, 8)), random(2, COLUMNS)
    multiply, lookup = torch.ops.kvchat.product, torch.ops.kvchat.lookup
    for other in (states[:, :64], states.bfloat16(), states[None]):
        with pytest.raises(RuntimeError, match="the blocks don't fit the states"):
            multiply(other, packed)
    for other in (packed[..., :100], packed.view(torch.int8), packed.transpose(0, 1), packed[0]):
        with pytest.raises(RuntimeError, match="these are no blocks of 4 or 8 bits"):
            multiply(states, other)
    for row in (-1, 16):
        with pytest.raises(RuntimeError, match=f"there is no row {row}"):
            lookup(torch.tensor([0, row]), packed)
    for ids, blocks in ((torch.tensor([0]), pack(blocks_of(16, 4))), (torch.tensor([0.0]), packed)):
        with pytest.raises(RuntimeError, match="rows are looked up in blocks of 8 bits"):
            lookup(ids, blocks)


# ---- attention ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The inputs of one layer's attention."""

    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 64
    value_dim: int = 64
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    @property
    def shape(self) -> HeadShape:
        return HeadShape(self.kv_heads, self.key_dim, self.value_dim)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.key_dim)

    def states(self, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values; sharp enough that a wrong row in sight would show."""
        return (
            3 * random(1, self.heads, tokens, self.key_dim, seed=seed),
            random(1, self.kv_heads, tokens, self.key_dim, seed=seed + 1),
            random(1, self.kv_heads, tokens, self.value_dim, seed=seed + 2),
        )

    @property
    def sink(self) -> torch.Tensor | None:
        return random(self.heads, seed=5) if self.sinks else None

    def attend(
        self, layer: AddressedLayer, states: Sequence[torch.Tensor], cuts: Sequence[int]
    ) -> torch.Tensor:
        """Reads the tokens in chunks of those sizes; `[tokens, heads, value_dim]`."""
        assert sum(cuts) == states[0].shape[2]
        ends = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
        return torch.cat(
            [self._chunk(layer, [each[:, :, a:b] for each in states]) for a, b in pairwise(ends)]
        )

    def _chunk(self, layer: AddressedLayer, states: Sequence[torch.Tensor]) -> torch.Tensor:
        tokens = states[0].shape[2]
        layer.reserve(tokens)
        table = torch.tensor([layer.memory()])
        rows = torch.arange(layer.length, layer.length + tokens)
        options = (table, 0, self.scale, self.window, self.softcap, self.sink)
        found: torch.Tensor = torch.ops.kvchat.attend(*states, rows, *options)
        layer.advance(tokens)
        return found[0]

    def expected(self, layer: AddressedLayer, query: torch.Tensor) -> torch.Tensor:
        """The same by torch in fp64, for the last tokens of what the layer holds."""
        none = torch.zeros(1, self.kv_heads, 0, 1).expand(-1, -1, -1, self.key_dim)
        # appending nothing reads everything in fp32
        keys, values = layer.update(none, none[..., :1].expand(-1, -1, -1, self.value_dim))
        groups, tokens = self.heads // self.kv_heads, query.shape[2]
        keys, values = (each.double().repeat_interleave(groups, 1) for each in (keys, values))
        scores = query.double() @ keys.transpose(2, 3) * self.scale
        if self.softcap:
            scores = self.softcap * (scores / self.softcap).tanh()
        own = torch.arange(layer.length - tokens, layer.length)[:, None]
        row = torch.arange(layer.length)
        hidden = row > own
        if self.window:
            hidden |= row <= own - self.window
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.sink is not None:
            scores = torch.cat([scores, self.sink.double()[None, :, None, None].expand(1, -1, tokens, 1)], -1)
        weights = scores.softmax(-1)[..., : layer.length]
        return (weights @ values)[0].transpose(0, 1)


CASES = {
    "usual": Case(),
    "nine heads on three": Case(9, 3),
    "no groups": Case(3, 3),
    "dims of 12 and 20": Case(4, 2, 12, 20),
    "dims of 20 and 12": Case(4, 1, 20, 12),
    "window": Case(window=50),
    "a window of one": Case(window=1),
    "a window wider than a chunk": Case(window=200),
    "softcap": Case(softcap=5.0),
    "sinks": Case(sinks=True),
    "all of it": Case(6, 2, 24, 40, window=33, softcap=8.0, sinks=True),
}
WHOLE = 300
CUTS = {
    "at once": [300],
    "one by one": [1] * 300,
    "as the engine reads": [128, 128, 44],
    "unevenly": [7, 1, 16, 17, 63, 65, 1, 130],
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_the_oracle_is_torchs_own_attention() -> None:
    case = Case(window=0)
    layer = DenseLayer(case.shape, torch.float32)
    query, keys, values = case.states(40)
    layer.update(keys, values)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(case.expected(layer, query).float(), theirs[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_torch_over_the_same_rows(case: Case, dtype: torch.dtype) -> None:
    layer = DenseLayer(case.shape, dtype)
    states = case.states(WHOLE)
    found = case.attend(layer, states, [WHOLE])
    torch.testing.assert_close(found.double(), case.expected(layer, states[0]), atol=2e-5, rtol=1e-4)
    keys, values = layer.read()
    assert torch.equal(keys, states[1].to(dtype))
    assert torch.equal(values, states[2].to(dtype))


@pytest.mark.parametrize("cuts", [name for name in CUTS if name != "at once"])
def test_exact_rows_are_attended_to_alike_in_any_chunks(case: Case, cuts: str) -> None:
    states = case.states(WHOLE)
    expected = case.attend(DenseLayer(case.shape, torch.bfloat16), states, [WHOLE])
    found = case.attend(DenseLayer(case.shape, torch.bfloat16), states, CUTS[cuts])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cuts", [[1] * 200, [30, 34, 64, 1, 63, 8], [64, 7, 57, 64, 8]])
@each_precision
def test_quantised_rows_are_attended_to_alike_in_any_chunks(bits: int, cuts: list[int]) -> None:
    """None of them crosses the end of a block, as none does that the engine reads."""
    case = Case(6, 2, 24, 40, window=90)
    states = case.states(200)
    expected = case.attend(QuantizedLayer(bits, case.shape, torch.bfloat16), states, [64, 64, 64, 8])
    found = case.attend(QuantizedLayer(bits, case.shape, torch.bfloat16), states, cuts)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cropped", [0, 1, 100, 128, 170])
@each_precision
def test_quantised_rows_are_those_that_the_layer_reads(bits: int, cropped: int, dtype: torch.dtype) -> None:
    """Also after crops into blocks, which leave slots with fewer rows, and a second one of the same block."""
    case = Case(6, 2, 24, 64)
    layer = QuantizedLayer(bits, case.shape, dtype)
    for tokens, kept in ((230, cropped), (90, cropped + 70), (33, cropped + 103)):
        layer.update(*case.states(tokens, seed=tokens)[1:])
        layer.truncate(kept)
    states = case.states(3, seed=9)
    found = case.attend(layer, states, [3] if layer.length % 64 < 61 else [1, 1, 1])
    torch.testing.assert_close(
        found.double()[-1:], case.expected(layer, states[0][:, :, -1:]), atol=2e-5, rtol=1e-4
    )


def test_one_and_two_threads_attend_alike(case: Case) -> None:
    states = case.states(WHOLE)
    two = case.attend(DenseLayer(case.shape, torch.float32), states, [WHOLE])
    torch.set_num_threads(1)
    assert torch.equal(case.attend(DenseLayer(case.shape, torch.float32), states, [WHOLE]), two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_filled_never_count(case: Case, dtype: torch.dtype) -> None:
    """Whatever was in the memory: a number that is none would spread."""
    layer, clean = (DenseLayer(case.shape, dtype) for _ in range(2))
    layer.reserve(20)
    assert layer.keys is not None
    assert layer.values is not None
    layer.keys.fill_(torch.nan)
    layer.values.fill_(torch.nan)
    states = case.states(20)
    assert torch.equal(case.attend(layer, states, [3, 17]), case.attend(clean, states, [20]))


def test_huge_scores_overflow_nothing() -> None:
    case = Case()
    query, keys, values = case.states(40)
    layer = DenseLayer(case.shape, torch.float32)
    found = case.attend(layer, (query * 1e4, keys * 1e4, values), [40])
    torch.testing.assert_close(found.double(), case.expected(layer, query * 1e4), atol=1e-4, rtol=1e-4)


def test_attention_over_mismatched_memory_is_refused() -> None:
    """It would read and write what belongs to others."""
    case = Case()
    layer = DenseLayer(case.shape, torch.float32)
    query, keys, values = case.states(4)
    layer.reserve(4)
    table, rows = torch.tensor([layer.memory()]), torch.arange(4)
    options = (case.scale, 0, 0.0, None)

    def refused(sentence: str, *given: torch.Tensor, layer: int = 0) -> None:
        with pytest.raises(RuntimeError, match=sentence):
            torch.ops.kvchat.attend(*given, layer, *options)

    refused("the table has other fields or layers", query, keys, values, rows, table[:, 1:].contiguous())
    refused("the table has other fields or layers", query, keys, values, rows, table.int())
    refused("the table has other fields or layers", query, keys, values, rows, table, layer=1)
    refused("don't fit the cache", query[..., :32], keys, values, rows, table)
    refused("don't fit the cache", query[:, :3], keys, values, rows, table)
    refused("don't fit the cache", query, keys[:, :1], values, rows, table)
    refused("don't fit the cache", query, keys, values[..., :32], rows, table)
    refused("don't fit the cache", query, keys, values, rows[:3], table)
    refused("there is no room for these rows", query, keys, values, rows + layer.capacity - 3, table)
    refused("there is no room for these rows", query, keys, values, rows - 1, table)
    refused("expected scalar type Float", query.double(), keys, values, rows, table)


# ---- NaN and infinity --------------------------------------------------------------------------------------


@each_precision
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_product_with_nan_or_infinity_is_nan(bits: int, bad: float) -> None:
    """In whichever column, and only for the token that has it."""
    clean, blocks = random(9, COLUMNS), blocks_of(5 * TILE, bits)
    expected = product(clean, blocks)
    for column in range(COLUMNS):
        states = clean.clone()
        states[4, column] = bad
        found = product(states, blocks)
        assert found[4].isnan().all()
        found[4] = expected[4]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("cuts", [[150], [1] * 150])
def test_attention_with_a_query_or_key_of_nan_is_nan(cuts: list[int]) -> None:
    """For the query's head and token, or for all queries that see the key; the others are what they were."""
    case = Case(6, 2, window=40, softcap=5.0, sinks=True)
    clean = case.states(150)
    expected = case.attend(DenseLayer(case.shape, torch.bfloat16), clean, cuts)
    for which, tokens, heads in ((0, slice(70, 71), slice(1, 2)), (1, slice(70, 110), slice(3, 6))):
        states = [each.clone() for each in clean]
        states[which][0, 1, 70, 5] = math.nan
        found = case.attend(DenseLayer(case.shape, torch.bfloat16), states, cuts)
        assert found[tokens, heads].isnan().all()
        found[tokens, heads] = expected[tokens, heads]
        assert torch.equal(found, expected)
