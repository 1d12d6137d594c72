"""The panel: what the cache did in this turn, what it holds, and what it was worth.

The functions turn a `ChatState` into lines. They know figures only, so that
every line can be tested without a screen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from textual.content import Content
from textual.widgets import Static

from kvchat.chat.state import ChatState
from kvchat.chat.wording import BITS
from kvchat.contract import CacheMode, EvictionPolicy, ModelFacts, PoolState, TokenStatus, TurnStats
from kvchat.text import clean, megabytes
from kvchat.ui.formatting import FATES

GLYPHS = {
    "O": ("█▀█", "█ █", "▀▀▀"),
    "N": ("█▄ █", "█ ▀█", "▀  ▀"),
    "F": ("█▀▀", "█▀ ", "▀  "),
    "T": ("▀█▀", " █ ", " ▀ "),
    "U": ("█ █", "█ █", "▀▀▀"),
    "R": ("█▀█", "█▀▄", "▀ ▀"),
}
COLOURS = {CacheMode.ON: "$text-success", CacheMode.TURN: "$text-warning", CacheMode.OFF: "$text-error"}
MEANING = {
    CacheMode.ON: "kept across turns",
    CacheMode.TURN: "thrown away each turn",
    CacheMode.OFF: "re-reads all, each token",
}
WHEN_FULL = {
    EvictionPolicy.NONE: "ends there",
    EvictionPolicy.TURNS: "exact",
    EvictionPolicy.SINKS: "approximate",
    EvictionPolicy.SNAPKV: "approximate",
}
(REUSED, REUSED_STYLE), (READ, READ_STYLE) = FATES[TokenStatus.REUSED], FATES[TokenStatus.READ]
MEMORY = {"weights": "▓", "this KV": "█", "other KV": "▒", "free": "░"}
MEMORY_STYLES = {
    "weights": "$text-secondary",
    "this KV": "$text-success",
    "other KV": "$text-warning",
    "free": "$text-muted",
}
TURNS_SHOWN = 8
TTFT_CELLS = 18
SPARKS = "▁▂▃▄▅▆▇█"
INNER_WIDTH = 32


def big_letters(word: str) -> tuple[str, str, str]:
    """`word` in letters three lines high."""
    rows = zip(*(GLYPHS[letter] for letter in word.upper()), strict=True)
    first, second, third = (" ".join(row) for row in rows)
    return first, second, third


def bar(value: float, largest: float, width: int, glyph: str) -> str:
    """A bar of whole cells; anything above nothing is one at least."""
    if value <= 0 or largest <= 0:
        return ""
    return glyph * max(1, round(value / largest * width))


def sparkline(values: Sequence[float], width: int) -> str:
    """The latest values as a line of blocks; the highest of them is full."""
    shown = values[-width:]
    top = max(shown, default=0.0)
    return "".join(SPARKS[min(7, int(value / top * 7.999))] for value in shown) if top > 0 else ""


def shares(parts: Sequence[int], cells: int) -> list[int]:
    """So many cells divided among the parts; each that is not nothing has one at least."""
    total = sum(parts)
    if not total or cells < sum(part > 0 for part in parts):
        return [0] * len(parts)
    given = [max(1, part * cells // total) if part else 0 for part in parts]
    while (over := sum(given) - cells) != 0:
        largest = max(range(len(parts)), key=lambda i: given[i] if over > 0 else parts[i])
        given[largest] -= 1 if over > 0 else over
    return given


def duration(seconds: float) -> str:
    """`0.20 s`, `31.4 s`, `250 s`, `12 min`, `2.5 h`."""
    if seconds >= 6000:
        return f"{seconds / 3600:,.1f} h"
    if seconds >= 600:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds:.{2 if seconds < 10 else 1 if seconds < 100 else 0}f} s"


def heading(words: str) -> Content:
    return Content.assemble(("\n" + words, "bold $text-accent"))


def row(name: str, value: str, rest: str = "", style: str = "$text-muted") -> Content:
    return Content.assemble((f"{name:<10}", "$text-muted"), (f"{value:>9}", "bold"), (f" {rest}", style))


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"


def rate(value: float | None) -> str:
    return "–" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def mode_lines(state: ChatState) -> list[Content]:
    """The cache mode, large, and what it means."""
    style = f"bold {COLOURS[state.mode]}"
    lines = [Content.assemble((line, style)) for line in big_letters(state.mode.value)]
    return [*lines, *mode_line(state)]


def mode_line(state: ChatState) -> list[Content]:
    """The cache mode in one line; the status line has its name."""
    return [Content.assemble((MEANING[state.mode], COLOURS[state.mode]))]


def turn_lines(state: ChatState) -> list[Content]:
    """What this turn reused, read and wrote, and how fast."""
    turn = state.turn
    counts = {"reused": turn.reused, "read": turn.read, "written": turn.written}
    largest = max(counts.values())
    lines = [
        row(name, f"{count:,}", bar(count, largest, INNER_WIDTH - 20, glyph), colour)
        for (name, count), (glyph, colour) in zip(counts.items(), FATES.values(), strict=False)
    ]
    if turn.restored:
        lines.append(row("restored", f"{turn.restored:,}", "from disk"))
    if turn.evicted:
        lines.append(row("evicted", f"{turn.evicted:,}", "context full", FATES[TokenStatus.EVICTED][1]))
    lines += [
        row("TTFT", seconds(turn.ttft_s)),
        row("prefill", rate(turn.prefill_tok_s), "tok/s"),
        row("decode", rate(turn.decode_tok_s), "tok/s"),
    ]
    latest = f"{state.step_ms[-1]:.1f}" if state.step_ms else "–"
    lines.append(row("ms/token", latest))
    lines.append(Content.assemble((sparkline(state.step_ms, INNER_WIDTH), "$text-accent")))
    if turn.drafted:
        kept = f"{turn.accepted / turn.drafted:.0%} kept"
        lines.append(row("drafted", f"{turn.drafted:,}", kept))
    lines += path_lines(state.model)
    note = turn.reading or clean(turn.reuse_note)
    return [
        heading("this turn"),
        *lines,
        *([Content.assemble((note, "italic $text-warning"))] if note else []),
    ]


def path_lines(model: ModelFacts | None) -> list[Content]:
    """Which code decodes and, where it is not the fastest, why."""
    if model is None:
        return []
    line = Content.assemble((f"{'path':<10}", "$text-muted"), (clean(model.path), "bold"))
    return [line, *(Content.assemble((clean(note), "$text-muted")) for note in path_notes(model))]


def path_notes(model: ModelFacts) -> list[str]:
    """What the engine says about its path, among what it says about the model."""
    return [note for note in model.notes if "compiled" in note]


def ttft_lines(state: ChatState) -> list[Content]:
    """TTFT of the latest turns as bars, each divided as its prompt was: reused, and read."""
    if not state.turns:
        return []
    legend = Content.assemble(
        ("\nTTFT by turn  ", "bold $text-accent"),
        (f"{REUSED} reused ", REUSED_STYLE),
        (f"{READ} read", READ_STYLE),
    )
    longest = max(turn.ttft_s for turn in state.turns[-TURNS_SHOWN:])
    numbered = list(enumerate(state.turns, start=1))[-TURNS_SHOWN:]
    return [legend, *(ttft_bar(number, turn, longest) for number, turn in numbered)]


def ttft_bar(number: int, turn: TurnStats, longest: float) -> Content:
    """One turn: as long as its TTFT."""
    cells = max(1, round(turn.ttft_s / longest * TTFT_CELLS)) if longest > 0 else 1
    parts = (turn.reused_tokens, turn.prefilled_tokens)
    reused, read = shares(parts, cells) if cells > 1 else (0, 1)
    return Content.assemble(
        (f"{number:>3} ", "$text-muted"),
        (REUSED * reused, REUSED_STYLE),
        (READ * read, READ_STYLE),
        " " * (TTFT_CELLS - reused - read),
        (f"{turn.ttft_s:>8.2f} s", "bold"),
    )


def memory_lines(state: ChatState) -> list[Content]:
    """Weights, this cache, the other ones and what is free: one bar, and bytes."""
    if (model := state.model) is None:
        return []
    free = state.pool.free_bytes if state.pool else 0
    sizes = dict(
        zip(MEMORY, (model.weights_bytes, state.turn.kv_bytes, state.others_bytes, free), strict=True)
    )
    cells = dict(zip(MEMORY, shares(list(sizes.values()), INNER_WIDTH), strict=True))
    filled = Content.assemble(*((MEMORY[name] * cells[name], MEMORY_STYLES[name]) for name in MEMORY))
    rest = {"weights": model.weights_dtype, "this KV": state.turn.kv_dtype or model.kv_dtype}
    rows = [
        Content.assemble(
            (f"{MEMORY[name]} ", MEMORY_STYLES[name]),
            (f"{name:<8}", "$text-muted"),
            (f"{megabytes(size) if size or name != 'free' else '–':>9}", "bold"),
            (f" {rest.get(name, '')}", "$text-muted"),
        )
        for name, size in sizes.items()
    ]
    process = row("process", megabytes(state.rss_bytes) if state.rss_bytes else "–")
    return [heading("memory"), filled, *rows, process, *pool_rows(state.pool)]


def kv_lines(state: ChatState) -> list[Content]:
    """The formula with this model's numbers, and how full the context is."""
    if (model := state.model) is None:
        return []
    tokens = state.turn.kv_tokens
    stored_as = state.turn.kv_dtype or model.kv_dtype
    bits = BITS.get(stored_as, 8 * model.kv_dtype_bytes)
    used = model.kv_bytes_per_token * tokens * bits // (8 * model.kv_dtype_bytes)
    freed = "then freed" if state.mode is CacheMode.TURN and tokens else stored_as
    size = f"{bits // 8} bytes" if bits > 8 else f"{bits} bits"
    formula = (
        f"2 × {model.layers} layers × {model.kv_heads} KV heads\n× {model.head_dim} dim × {size} × {tokens:,}"
    )
    limit = state.turn.limit or model.context_limit
    return [
        heading("KV cache"),
        Content.assemble((formula, "$text-muted")),
        row("used", megabytes(used), freed),
        row("allocated", megabytes(state.turn.kv_bytes)),
        row("context", f"{state.turn.context:,}", f"of {limit:,}"),
        row("when full", state.policy.value, WHEN_FULL[state.policy]),
        *(
            Content.assemble((clean(note), "$text-muted"))
            for note in model.notes
            if note not in path_notes(model)
        ),
    ]


def pool_rows(pool: PoolState | None) -> list[Content]:
    """What all caches take, in memory and on disk."""
    if pool is None:
        return []
    rows = [row("all KV", megabytes(pool.used_bytes), f"of {megabytes(pool.budget_bytes)}")]
    if pool.disk_cap_bytes:
        rows.append(row("on disk", megabytes(pool.disk_bytes), f"of {megabytes(pool.disk_cap_bytes)}"))
    return rows


def saving_lines(state: ChatState) -> list[Content]:
    """The ledger: tokens that were not read again, and what that was worth."""
    ledger = {"this turn": state.turn.reused, "all turns": sum(turn.reused_tokens for turn in state.turns)}
    if not any(ledger.values()):
        return []
    measured = state.prefill_rate
    how = f"estimate at {measured:,.0f} tok/s" if measured else "no reading rate measured yet"
    rows = [
        row(name, f"{count:,}", f"tok ≈ {duration(count / measured)}" if measured else "tok")
        for name, count in ledger.items()
    ]
    return [heading("saved by reuse"), *rows, Content.assemble((how, "$text-muted"))]


def comparison_lines(state: ChatState) -> list[Content]:
    """The last figures of each mode side by side: measured, never estimated."""
    if not state.by_mode:
        return []
    header = Content.assemble((f"{'':<6}{'TTFT':>8}{'tok/s':>8}{'tokens':>9}", "$text-muted"))
    lines = [heading("last turn in each mode"), header]
    for mode in CacheMode:
        stats = state.by_mode.get(mode.value)
        if stats is None:
            line = f"{mode.value:<6}{'–':>8}{'–':>8}{'–':>9}"
        else:
            at = stats.prompt_tokens + stats.generated_tokens
            line = f"{mode.value:<6}{stats.ttft_s:>6.2f} s{rate(stats.decode_tok_s):>8}{at:>9,}"
        lines.append(Content.assemble((line, "bold" if mode is state.mode else "")))
    return [*lines, *ratio_lines(state.by_mode)]


def ratio_lines(by_mode: Mapping[str, TurnStats]) -> list[Content]:
    """How much sooner and faster `on` was, where the other mode was measured too."""
    on, turn, off = (by_mode.get(mode.value) for mode in CacheMode)
    lines = []
    if on and turn and on.ttft_s > 0:
        lines.append(f"on: TTFT {rate(turn.ttft_s / on.ttft_s)}× sooner than turn")
    if on and off and off.decode_tok_s > 0:
        lines.append(f"on: decode {rate(on.decode_tok_s / off.decode_tok_s)}× faster than off")
    return [Content.assemble((line, "$text-success")) for line in lines]


def panel_content(state: ChatState, *, dense: bool = False) -> Content:
    """All lines of the panel; `dense` where it has a few rows only."""
    parts = (
        mode_line if dense else mode_lines,
        turn_lines,
        ttft_lines,
        memory_lines,
        kv_lines,
        saving_lines,
        comparison_lines,
    )
    return Content("\n").join([line for part in parts for line in part(state)])


class CachePanel(Static):
    """Draws a `ChatState`."""

    def __init__(self) -> None:
        super().__init__(id="panel-content")
        # there are none, and looking for some in every line took a tenth of a draw
        self.auto_links = False
        self._shown = ChatState()
        self._dense = False

    def show(self, state: ChatState) -> None:
        """Draws what changed."""
        state = replace(state, active=None)  # the text of an answer is drawn elsewhere
        if state != self._shown:
            self._shown = state
            content = panel_content(state, dense=self._dense)
            before = str(self.content).count("\n")
            # while an answer streams it is drawn often, and a layout of the whole screen costs the most
            self.update(content, layout=content.plain.count("\n") != before)

    def on_mount(self) -> None:
        """Draws the empty state."""
        self.update(panel_content(self._shown))

    def on_resize(self) -> None:
        """Where the screen is short, the figures come first."""
        dense = self.screen.has_class("-short")
        if dense != self._dense:
            self._dense = dense
            self.update(panel_content(self._shown, dense=dense))
