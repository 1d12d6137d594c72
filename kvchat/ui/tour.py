"""The tour: eight things a KV cache does, each of them done in the chat and measured.

A step says what is about to happen, does it with the model that is loaded, and tells the figures. Nothing
here is prepared: what a step says afterwards is what it measured.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvchat.chat.cache_commands import precision
from kvchat.chat.wording import tokens
from kvchat.contract import (
    CacheMode,
    Drop,
    EvictionPolicy,
    KVPrecision,
    ModelFacts,
    SetBudget,
    TurnStats,
)
from kvchat.errors import KvchatError
from kvchat.text import megabytes, one_line

if TYPE_CHECKING:
    from kvchat.chat.controller import ChatController

LOOKS_EVERY_S = 0.05
STEP_TOKENS = 256
"""Tokens by which a cache grows, so that a budget for a multiple of it holds just that many."""
ANSWER_TOKENS = 40
STORY = """\
Read this, and answer in one short sentence: which pass do we take?

We leave Innsbruck on the second of May, early in the morning, with two cars and a trailer. The Brenner \
is open all year and has a motorway, but on a Saturday half of Bavaria is on it. The Reschen is a little \
higher, open all year too, and the road past the lake with the church tower in it is the one that \
everybody remembers. The Timmelsjoch is closed until the middle of June at the earliest, and no trailer \
is allowed on it anyway. The Jaufen opens when the snow lets it, often in late April, but it is narrow \
and has bends that the trailer won't like. Anna wants to see the lake. Tom wants to be in Meran before \
noon, and from the Reschen it is all downhill. Nobody wants to stand in a traffic jam. The weather \
report says dry and cold, with fog in the valleys until ten, and wind on the ridges from the afternoon \
on. We have chains with us, and hope to bring them home unused."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to see."""

    title: str
    before: str
    """What is about to happen, and where to look."""
    act: Callable[["Guide"], Awaitable[None]]
    after: Callable[["Guide"], str]
    """What was measured."""


class Guide:
    """Does the steps in the open conversation, and keeps what they measured."""

    def __init__(self, controller: "ChatController") -> None:
        self._controller = controller
        self._session = controller.session
        self.measured: list[TurnStats] = []
        self.budget = 0
        """What all caches may take outside of the tour; 0 while that is not changed."""
        self.bytes_before = 0
        """Of the cache before it was stored in fewer bits."""

    @classmethod
    def begin(cls, controller: "ChatController") -> "Guide":
        """Sets the conversations aside and opens an empty one for the tour.

        Raises:
            KvchatError: an answer is under way.
        """
        controller.session.aside()
        controller.session.configure(
            mode=CacheMode.ON, system_prompt="", kv=KVPrecision.AUTO, policy=EvictionPolicy.TURNS
        )
        return cls(controller)

    def end(self) -> None:
        """Brings the conversations back; nothing of the tour stays."""
        self.restore_budget()
        self._controller.forget(self._session.back())

    @property
    def model(self) -> ModelFacts:
        """What is loaded."""
        model = self._controller.state.model
        assert model is not None
        return model

    @property
    def last(self) -> TurnStats:
        """Figures of the latest turn."""
        return self.measured[-1]

    @property
    def kv_bytes(self) -> int:
        """What the cache of the tour takes in memory."""
        held = self._controller.state.caches.get(self._session.current.id)
        return held.bytes if held else 0

    @property
    def agreement(self) -> tuple[int, int]:
        """(tokens that the model would still choose after the conversion, of so many)."""
        done = self._controller.state.converted
        return (done.agreeing_tokens, done.compared_tokens) if done else (0, 0)

    def seconds_to_read(self, count: int) -> float | None:
        """What reading so many tokens takes; None where no read was long enough to tell."""
        rate = self._controller.state.prefill_rate
        return count / rate if rate else None

    async def ready(self) -> None:
        """Waits for the engine."""
        await until(lambda: self._controller.state.ready and self._controller.state.pool)

    async def ask(self, text: str, longest: int = ANSWER_TOKENS) -> None:
        """Asks in the chat, and waits for the end of the answer.

        Raises:
            KvchatError: there is none.
        """
        await self.ready()
        sampling = replace(self._session.current.sampling, temperature=0.0, max_tokens=longest)
        self._session.configure(sampling=sampling)
        await self._controller.send(text)
        await until(lambda: not self._controller.answering)
        head = self._session.current.head
        if head is None or head.stats is None:
            raise KvchatError("The tour ends here: the question was not answered.")
        self.measured.append(head.stats)

    async def ask_without_cache(self) -> None:
        """One short answer without a cache, and then with it again."""
        self._session.configure(mode=CacheMode.OFF)
        try:
            await self.ask("Say it in three words.", 8)
        finally:
            self._session.configure(mode=CacheMode.ON)

    async def drop(self) -> None:
        """Frees the cache, and asks."""
        conversation = self._session.current.id
        self._controller.engine.command(Drop(conversation))
        await until(lambda: conversation not in self._controller.state.caches)
        await self.ask("And who wants to be early?", 16)

    async def fill(self) -> None:
        """Makes the budget so small that the next turn is too much for it."""
        held = self._controller.state.turn.context
        rows = max(1, (held - 1) // STEP_TOKENS) * STEP_TOKENS
        size = self.model.kv_bytes_per_token * rows
        pool = self._controller.state.pool
        self.budget = pool.budget_bytes if pool else 0
        self._session.configure(policy=EvictionPolicy.TURNS)
        # while a layer grows, its old memory is held besides
        self._controller.engine.command(SetBudget(size + 2 * size // max(1, self.model.layers)))
        await self.ask("What do we have with us?", 16)
        self.restore_budget()

    def restore_budget(self) -> None:
        """Gives all caches what they had before."""
        if self.budget:
            self._controller.engine.command(SetBudget(self.budget))
        self.budget = 0

    async def quantise(self) -> None:
        """Stores the cache in 8 bits, and asks."""
        self.bytes_before, before = self.kv_bytes, self._controller.state.converted
        precision(self._controller, KVPrecision.INT8)
        await until(lambda: self._controller.state.converted is not before)
        await self.ask("And the weather?", 16)

    async def restart(self) -> None:
        """Ends the engine's process, starts another one, and asks."""
        self._controller.restart_engine()
        await until(lambda: self._controller.state.pool)
        await self.ask("Thank you! Any last advice?", 16)


async def until(condition: Callable[[], object]) -> None:
    """Waits until it holds; the card can be left at any time."""
    while not condition():  # noqa: ASYNC110 - it looks at many things, and none of them has an event
        await asyncio.sleep(LOOKS_EVERY_S)


def after_prefill(guide: Guide) -> str:
    """What the first prompt took."""
    stats = guide.last
    return (
        f"It read {tokens(stats.prefilled_tokens)} in {stats.prefill_s:.2f} s: "
        f"{stats.prefill_tok_s:,.0f} tok/s. The first text came after {stats.ttft_s:.2f} s. "
        "█ beside your message means: read."
    )


def after_decode(guide: Guide) -> str:
    """What reuse did to the second turn."""
    first, second = guide.measured[0], guide.last
    return (
        f"{tokens(second.reused_tokens)} were reused (▒), only {second.prefilled_tokens:,} were read: the "
        "first "
        f"text came after {second.ttft_s:.2f} s instead of {first.ttft_s:.2f} s. Then it wrote a token "
        f"every {ms(second)}."
    )


def after_toggle(guide: Guide) -> str:
    """What the cache was worth."""
    off = guide.last
    on = next(stats for stats in reversed(guide.measured) if stats.cache_mode == CacheMode.ON)
    return (
        f"A token took {ms(off)} without the cache, {ms(on)} with it. For {tokens(off.generated_tokens)} of "
        f"answer, {off.evaluated_tokens:,} went through the model. The cache is on again."
    )


def after_growth(guide: Guide) -> str:
    """What the cache takes."""
    stats, model = guide.last, guide.model
    full = model.context_limit * model.kv_bytes_per_token
    return (
        f"{tokens(stats.kv_tokens)} × {model.kv_bytes_per_token:,} bytes = {megabytes(stats.kv_used_bytes)}; "
        f"{megabytes(stats.kv_bytes)} are allocated, since it grows in steps. "
        f"A full context of {model.context_limit:,} tokens would take {megabytes(full)}."
    )


def after_reset(guide: Guide) -> str:
    """What a dropped cache costs."""
    stats = guide.last
    why = one_line(stats.reuse_note) or "nothing was cached"
    return (
        f"It read {tokens(stats.prefilled_tokens)} again, and the first text took {stats.ttft_s:.2f} s. "
        f"The reason stands under the answer, and in F6: {why}."
    )


def after_eviction(guide: Guide) -> str:
    """What was left out."""
    stats = guide.last
    if not stats.evicted_tokens:
        return f"Everything still fitted into {tokens(stats.context_limit)}: nothing had to go."
    return (
        f"{tokens(stats.context_limit)} fitted, so {stats.evicted_tokens:,} went: the oldest turns, dimmed "
        "above "
        f"(×). {stats.prefilled_tokens:,} that stayed were read again, as if the others had never been: that "
        "is exact, and took "
        f"{stats.ttft_s:.2f} s. F5 shows what is left. The budget is as it was."
    )


def after_precision(guide: Guide) -> str:
    """What fewer bits do."""
    agreeing, compared = guide.agreement
    done = guide.bytes_before
    checked = (
        f" For {agreeing} of the last {compared} tokens the model's first choice is the same."
        if compared
        else ""
    )
    return f"{megabytes(done)} became {megabytes(guide.kv_bytes)} before the turn went on.{checked}"


def after_restart(guide: Guide) -> str:
    """What came back from disk."""
    stats = guide.last
    if not stats.restored_tokens:
        read = tokens(stats.prefilled_tokens)
        return f"Nothing came from disk, so {read} were read: {one_line(stats.reuse_note)}."
    again = guide.seconds_to_read(stats.restored_tokens)
    instead = f" Reading them would have taken about {again:.1f} s." if again else ""
    return (
        f"{tokens(stats.restored_tokens)} came from disk in {stats.restore_s:.2f} s, checked and bit for "
        "bit as "
        f"they were; {stats.prefilled_tokens:,} were read.{instead}"
    )


def ms(stats: TurnStats) -> str:
    """Milliseconds of one token of its answer."""
    return f"{1000 / stats.decode_tok_s:,.0f} ms" if stats.decode_tok_s else "–"


STEPS = (
    Step(
        "Prefill",
        "A long question is about to be sent. Before its first word the model has to read all of it: that is "
        "prefill, and the time to the first text (TTFT) is mostly that. Watch `read` in the panel (F3).",
        lambda guide: guide.ask(STORY),
        after_prefill,
    ),
    Step(
        "Decode",
        "Now a short question. Keys and values of everything so far are in the cache, so only the new "
        "words are "
        "read; then the answer is written token by token: that is decode.",
        lambda guide: guide.ask("And why not the Timmelsjoch?"),
        after_decode,
    ),
    Step(
        "The toggle",
        "The same conversation without a cache (F4 does that): each of 8 tokens reads everything again.",
        Guide.ask_without_cache,
        after_toggle,
    ),
    Step(
        "Memory",
        "A cache costs memory: 2 × layers × KV heads × head dim × bytes for each token. Watch `this KV` grow "
        "while the answer is written. The cache was off, so this turn reads everything once more.",
        lambda guide: guide.ask("List what each of us wants.", 60),
        after_growth,
    ),
    Step(
        "Reset",
        "The cache of this conversation is about to be dropped. The text stays; the next turn has to read "
        "all "
        "of it, and says why.",
        Guide.drop,
        after_reset,
    ),
    Step(
        "Eviction",
        "What if the context is full? The memory for caches is made so small for a moment that this "
        "conversation "
        "doesn't fit. The policy `turns` lets the oldest turns go. (Caches of your other conversations "
        "move to "
        "disk meanwhile.)",
        Guide.fill,
        after_eviction,
    ),
    Step(
        "Precision",
        "Keys and values can be stored in 8 bits: less memory, and nearly the same answers. The cache is "
        "converted where it is; nothing is read again.",
        Guide.quantise,
        after_precision,
    ),
    Step(
        "Restart",
        "The engine's process is about to end, and another one starts: a few seconds. Every turn was saved "
        "to "
        "disk, so the conversation should go on where it was.",
        Guide.restart,
        after_restart,
    ),
)
