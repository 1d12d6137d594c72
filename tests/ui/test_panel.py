"""The panel's numbers: functions of values, tested without a screen."""

from dataclasses import replace
from math import prod

import pytest
from textual.content import Content

from kvchat.chat.reducer import KEPT_STEPS
from kvchat.chat.state import ChatState, TurnFigures, figures_of
from kvchat.contract import (
    CacheMode,
    EvictionPolicy,
    FinishReason,
    ModelFacts,
    PoolState,
    PromptMessage,
    Sampling,
    Tokens,
    TurnRequest,
    TurnStats,
)
from kvchat.text import megabytes
from kvchat.ui.redraw_rate import CPU_SHARE, FASTEST_S, SLOWEST_S, pause_after
from kvchat.ui.widgets.panel import (
    INNER_WIDTH,
    WHEN_FULL,
    bar,
    big_letters,
    comparison_lines,
    duration,
    kv_lines,
    memory_lines,
    mode_lines,
    panel_content,
    ratio_lines,
    saving_lines,
    shares,
    sparkline,
    ttft_lines,
    turn_lines,
)
from tests.support.scripted_engine import FACTS, stats_of


def stats(
    mode: CacheMode = CacheMode.ON, *, reused: int = 0, prompt: int = 104, written: int = 10
) -> TurnStats:
    """Figures of a turn with so many tokens."""
    message = PromptMessage("user", "word " * (prompt - 4))
    request = TurnRequest("turn", "conversation", (message,), mode, Sampling())
    return stats_of(request, reused, written, FinishReason.STOP)


def text(lines: list[Content]) -> str:
    return "\n".join(line.plain for line in lines)


POOL = PoolState((), 0, 2_000_000_000, 0, 0)


def tokens(count: int, *, said: str = "x", seconds: float = 0.02) -> Tokens:
    return Tokens("turn", said, (1,) * count, (seconds,) * count, "scripted", count, count * 10)


# --- lines -----------------------------------------------------------------------------------------------


LARGE = replace(
    FACTS, layers=126, kv_heads=16, head_dim=128, kv_dtype="fp32", kv_dtype_bytes=4, context_limit=131_072
)


@pytest.mark.parametrize("model", [FACTS, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("held", [0, 1, 1347])
def test_the_formula_is_the_models_own_and_gives_the_bytes_shown(model: ModelFacts, held: int) -> None:
    state = ChatState(model=model, turn=TurnFigures(kv_tokens=held, kv_bytes=held * 7))
    shown = text(kv_lines(state))
    formula = shown.partition("used")[0].replace("KV cache", "")
    factors = [int(word.replace(",", "")) for word in formula.split() if word.replace(",", "").isdigit()]
    assert factors == [2, model.layers, model.kv_heads, model.head_dim, model.kv_dtype_bytes, held]
    product = prod(factors)
    assert product == model.kv_bytes_per_token * held
    assert f"used{megabytes(product):>15}" in shown
    assert f"allocated{megabytes(held * 7):>10}" in shown


@pytest.mark.parametrize(
    ("stored_as", "size", "bits"),
    [("fp32", "4 bytes", 32), ("bf16", "2 bytes", 16), ("int8", "8 bits", 8), ("int4", "4 bits", 4)],
)
def test_the_formula_is_that_of_the_precision_that_is_stored(stored_as: str, size: str, bits: int) -> None:
    state = ChatState(model=FACTS, turn=TurnFigures(kv_tokens=1000, kv_dtype=stored_as))
    shown = text(kv_lines(state))
    assert f"× 64 dim × {size} × 1,000" in shown
    numbers = 2 * FACTS.layers * FACTS.kv_heads * FACTS.head_dim * 1000
    assert f"used{megabytes(numbers * bits // 8):>15} {stored_as}" in shown


def test_a_cache_that_the_turn_threw_away_is_said_to_be_freed() -> None:
    turn = TurnFigures(kv_tokens=10)
    assert "then freed" in text(kv_lines(ChatState(mode=CacheMode.TURN, model=FACTS, turn=turn)))
    assert "then freed" not in text(kv_lines(ChatState(model=FACTS, turn=turn)))


def lines_of(state: ChatState) -> dict[str, list[str]]:
    """The panel's rows by their first words."""
    rows = [line.plain for line in (*turn_lines(state), *memory_lines(state), *kv_lines(state))]
    return {line[:10].strip(): line[10:].split() for line in rows}


def test_what_came_from_disk_and_what_was_dropped_is_shown_where_there_is_some() -> None:
    turn = TurnFigures(reused=1204, restored=1100, evicted=512)
    shown = lines_of(ChatState(turn=turn))
    assert shown["restored"] == ["1,100", "from", "disk"]
    assert shown["evicted"] == ["512", "context", "full"]
    assert not {"restored", "evicted"} & set(lines_of(ChatState(turn=TurnFigures(reused=1204))))


def test_all_caches_are_counted_against_the_budget_and_those_on_disk_against_its_cap() -> None:
    pool = PoolState((), 31_000_000, 2_000_000_000, 94_000_000, 8_000_000_000)
    shown = lines_of(ChatState(model=FACTS, pool=pool))
    assert shown["all KV"] == ["31.0", "MB", "of", "2.00", "GB"]
    assert shown["on disk"] == ["94.0", "MB", "of", "8.00", "GB"]
    shown = lines_of(ChatState(model=FACTS, pool=replace(pool, disk_cap_bytes=0)))
    assert "on disk" not in shown
    assert "all KV" not in lines_of(ChatState(model=FACTS))


@pytest.mark.parametrize("policy", list(EvictionPolicy))
def test_the_policy_and_whether_it_is_exact_are_shown(policy: EvictionPolicy) -> None:
    shown = lines_of(ChatState(model=FACTS, policy=policy))
    assert shown["when full"] == [policy.value, *WHEN_FULL[policy].split()]


def test_the_notes_of_the_model_are_shown_without_control_characters() -> None:
    model = replace(FACTS, notes=("3 of 30 layers slide\x1b[31m over 512 [/b] tokens.",))
    assert text(kv_lines(ChatState(model=model))).endswith("3 of 30 layers slide[31m over 512 [/b] tokens.")


def test_the_limit_is_the_one_of_the_last_turn() -> None:
    assert lines_of(ChatState(model=FACTS))["context"] == ["0", "of", "8,192"]
    state = ChatState(model=FACTS, turn=TurnFigures(reused=7, limit=4096))
    assert lines_of(state)["context"] == ["7", "of", "4,096"]


def test_without_a_model_there_is_no_formula() -> None:
    assert kv_lines(ChatState()) == []


@pytest.mark.parametrize(
    ("value", "largest", "width", "shown"),
    [
        (0, 10, 8, ""),
        (5, 0, 8, ""),
        (-1, 10, 8, ""),
        (10, 10, 8, "▒▒▒▒▒▒▒▒"),
        (5, 10, 8, "▒▒▒▒"),
        (1, 1_000_000, 8, "▒"),
    ],
)
def test_a_bar_is_as_long_as_its_share(value: float, largest: float, width: int, shown: str) -> None:
    assert bar(value, largest, width, "▒") == shown


@pytest.mark.parametrize(
    ("values", "width", "shown"),
    [
        ([], 8, ""),
        ([0.0, 0.0], 8, ""),
        ([8.0], 8, "█"),
        ([1.0, 4.0, 8.0], 8, "▁▄█"),
        ([100.0, 1.0, 8.0], 2, "▁█"),
    ],
)
def test_a_sparkline_shows_the_latest_values(values: list[float], width: int, shown: str) -> None:
    assert sparkline(values, width) == shown


@pytest.mark.parametrize("mode", list(CacheMode))
def test_the_mode_stands_in_large_letters_of_one_width(mode: CacheMode) -> None:
    rows = big_letters(mode.value)
    assert len({len(row) for row in rows}) == 1
    assert text(mode_lines(ChatState(mode=mode))).startswith("\n".join(rows))


def test_what_is_not_known_yet_is_a_dash() -> None:
    words = [line.plain.split() for line in turn_lines(ChatState())[1:] if line.plain]
    lines = {name: rest for name, *rest in words}
    assert lines["reused"] == ["0"]
    assert lines["TTFT"] == ["–"]
    assert lines["prefill"] == lines["decode"] == ["–", "tok/s"]
    assert lines["ms/token"] == ["–"]


def test_a_reading_in_progress_comes_before_the_note() -> None:
    turn = TurnFigures(reuse_note="template changed")
    assert text(turn_lines(ChatState(turn=turn))).endswith("template changed")
    turn = replace(turn, reading="reading 5 of 10")
    assert text(turn_lines(ChatState(turn=turn))).endswith("reading 5 of 10")


def test_the_ledger_adds_up_all_turns_and_says_that_seconds_are_an_estimate() -> None:
    turns = (stats(reused=50), stats(CacheMode.OFF), stats(reused=90))
    state = ChatState(
        turn=figures_of(turns[-1]), largest_prefill=replace(turns[0], prefill_tok_s=100.0), turns=turns
    )
    shown = text(saving_lines(state))
    assert "this turn        90 tok ≈ 0.90 s" in shown
    assert "all turns       140 tok ≈ 1.40 s" in shown
    assert "estimate at 100 tok/s" in shown
    unmeasured = text(saving_lines(replace(state, largest_prefill=None)))
    assert "140" in unmeasured
    assert "≈" not in unmeasured
    assert saving_lines(ChatState(turns=(stats(CacheMode.OFF),))) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0.20 s"), (31.44, "31.4 s"), (250.0, "250 s"), (720.0, "12 min"), (9000.0, "2.5 h")],
)
def test_a_duration_is_as_exact_as_its_size_deserves(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("parts", "cells", "given"),
    [
        ([0, 0], 10, [0, 0]),
        ([1, 0], 10, [10, 0]),
        ([1, 1000], 10, [1, 9]),
        ([1, 1, 1_000_000, 1], 32, [1, 1, 29, 1]),
        ([1, 1], 1, [0, 0]),
        ([3, 1], 8, [6, 2]),
    ],
)
def test_cells_are_shared_out_and_nothing_that_is_there_vanishes(
    parts: list[int], cells: int, given: list[int]
) -> None:
    assert shares(parts, cells) == given


def test_the_memory_bar_has_a_glyph_for_each_part_and_a_row_with_its_bytes() -> None:
    pool = replace(POOL, used_bytes=12_000_000, free_bytes=8_000_000_000)
    state = ChatState(model=FACTS, turn=TurnFigures(kv_bytes=31_000_000), pool=pool)
    _, filled, *rows = memory_lines(state)
    assert len(filled.plain) == INNER_WIDTH
    assert list(dict.fromkeys(filled.plain)) == ["▓", "█", "▒", "░"]
    assert text(rows).splitlines()[:4] == [
        "▓ weights  269.0 MB bf16",
        "█ this KV   31.0 MB bf16",
        "▒ other KV  12.0 MB ",
        "░ free      8.00 GB ",
    ]
    assert memory_lines(ChatState()) == []


def test_bars_of_ttft_are_as_long_as_it_was_and_show_what_was_reused_and_what_read() -> None:
    turns = (stats(prompt=104), stats(reused=94), replace(stats(reused=52), ttft_s=0.208))
    legend, *bars = [line.plain for line in ttft_lines(ChatState(turns=turns))]
    assert "▒ reused" in legend
    assert "█ read" in legend
    counted = [(line.count("▒"), line.count("█")) for line in bars]
    assert counted == [(0, 18), (1, 1), (9, 9)]
    assert [line.split()[0] for line in bars] == ["1", "2", "3"]
    assert bars[0].endswith("0.21 s")
    assert ttft_lines(ChatState()) == []
    many = [line.plain.split()[0] for line in ttft_lines(ChatState(turns=turns * 5))[1:]]
    assert many == ["8", "9", "10", "11", "12", "13", "14", "15"]


def test_drafting_is_shown_only_where_something_was_drafted() -> None:
    assert "drafted" not in text(turn_lines(ChatState()))
    drafting = replace(figures_of(stats()), drafted=16, accepted=12)
    assert "drafted" in text(turn_lines(ChatState(turn=drafting)))
    assert "16 75% kept" in text(turn_lines(ChatState(turn=drafting)))


def test_the_path_is_shown_with_the_reason_why_it_is_no_faster_one() -> None:
    model = replace(FACTS, notes=("decode is not compiled: no compiler", "4 layers see 512 tokens"))
    state = ChatState(model=model)
    assert "path      eager bf16\ndecode is not compiled: no compiler" in text(turn_lines(state))
    assert "compiled" not in text(kv_lines(state))
    assert "4 layers see 512 tokens" in text(kv_lines(state))


def test_without_a_finished_turn_nothing_is_compared() -> None:
    assert comparison_lines(ChatState()) == []


@pytest.mark.parametrize(
    ("modes", "ratios"),
    [
        (["on"], []),
        (["turn"], []),
        (["off"], []),
        (["turn", "off"], []),
        (["on", "turn"], ["on: TTFT 10.4× sooner than turn"]),
        (["on", "off"], ["on: decode 10.0× faster than off"]),
        (["on", "turn", "off"], ["on: TTFT 10.4× sooner than turn", "on: decode 10.0× faster than off"]),
    ],
)
def test_ratios_are_shown_only_where_both_sides_were_measured(modes: list[str], ratios: list[str]) -> None:
    by_mode = {mode: stats(CacheMode(mode), reused=94 if mode == "on" else 0) for mode in modes}
    assert [line.plain for line in ratio_lines(by_mode)] == ratios
    shown = [line.plain for line in comparison_lines(ChatState(by_mode=by_mode))]
    assert [line for line in shown if "×" in line] == ratios


def test_nothing_is_divided_by_zero() -> None:
    zero = {mode.value: replace(stats(mode), ttft_s=0.0, decode_tok_s=0.0) for mode in CacheMode}
    assert ratio_lines(zero) == []
    assert len(comparison_lines(ChatState(by_mode=zero))) == 2 + len(CacheMode)


def test_the_comparison_has_a_line_for_every_mode() -> None:
    state = ChatState(by_mode={"turn": stats(CacheMode.TURN)})
    assert [line.plain.split() for line in comparison_lines(state)[2:]] == [
        ["on", "–", "–", "–"],
        ["turn", "0.21", "s", "80.0", "114"],
        ["off", "–", "–", "–"],
    ]


@pytest.mark.parametrize(
    ("model", "context"),
    [(FACTS, 1347), (FACTS, 8192), (LARGE, 131_072)],
)
def test_no_line_is_wider_than_the_panel(model: ModelFacts, context: int) -> None:
    on = stats(reused=context - 30, prompt=context - 20)
    off = replace(on, cache_mode="off", decode_tok_s=0.31, ttft_s=20.45)
    state = ChatState(
        model=model,
        turn=replace(
            figures_of(on),
            kv_tokens=context,
            kv_bytes=context * model.kv_bytes_per_token,
            restored=context - 30,
            evicted=context - 30,
            limit=context,
        ),
        policy=EvictionPolicy.SNAPKV,
        pool=PoolState((), 999_900_000, 99_990_000_000, 999_900_000, 99_990_000_000, (), 99_990_000_000),
        step_ms=(5.0, 3211.0) * KEPT_STEPS,
        rss_bytes=999_900_000,
        largest_prefill=replace(on, prefill_tok_s=1234.5),
        by_mode={"on": replace(on, decode_tok_s=128.0), "turn": off, "off": off},
        turns=(replace(on, ttft_s=123.4), off, on) * 40,
    )
    lines = panel_content(state).plain.splitlines()
    assert [line for line in lines if len(line) > INNER_WIDTH] == []


# --- pace ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu_s", "pause_s"),
    [(0.0, FASTEST_S), (0.05, 0.05 / CPU_SHARE), (10.0, SLOWEST_S), (1e9, SLOWEST_S)],
)
def test_the_pause_after_a_draw_follows_from_its_cost(cpu_s: float, pause_s: float) -> None:
    assert pause_after(cpu_s) == pytest.approx(pause_s)
