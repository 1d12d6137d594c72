"""Everything that can happen to several conversations, in any order: no turn may ever differ from a cold run.

Hypothesis draws the order, and shrinks one that fails to the few steps that matter.
"""

import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import GROWTH_STEP
from kvchat.cache.packed_rows import pack_rows, unpack_rows
from kvchat.contract import (
    CacheCommand,
    CacheMode,
    Drop,
    Evicted,
    EvictionPolicy,
    Fork,
    KVPrecision,
    PrefillProgress,
    PromptMessage,
    Refused,
    Report,
    Sampling,
    SetBudget,
    SetPrecision,
    Spill,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    Warm,
)
from kvchat.engine.engine import UNBOUNDED, LocalEngine
from kvchat.engine.eviction import without_oldest
from kvchat.engine.model.loader import LoadedModel, assemble
from kvchat.engine.prompt import Renderer
from kvchat.errors import KvchatError
from tests.support.engine_driver import TOLERANCE, Tap, uncached_logits, user
from tests.support.oracle import Guard, tier
from tests.support.tiny import seeded_model, tiny_chat, tiny_config

CONTEXT, CHUNK = 320, 48
NAMES = ("alps", "bread", "rivers")
SYSTEM = "You answer in the words of the old towns."
WORDS = (
    "Which pass is open?",
    "How long is the drive over the pass to the old towns of the north?",
    "Mix the flour and the water, wait an hour, then add the salt. And then? Tell me about the sea.",
    "And?",
    " ".join(f"The drive over pass {number} takes three hours." for number in range(7)),
)
EXAMPLES, STEPS = 150, 12

names = st.sampled_from(NAMES)
texts = st.sampled_from(WORDS)
few = st.integers(1, 6)
precisions = st.sampled_from([KVPrecision.FP32, KVPrecision.AUTO, KVPrecision.INT8, KVPrecision.INT4])


@cache
def model() -> LoadedModel:
    """The tiny Llama with 2 layers."""
    chat = tiny_chat()
    config = tiny_config(chat)
    config.num_hidden_layers = 2
    return assemble(seeded_model(config), chat, "tiny", context=CONTEXT)


@cache
def renderer() -> Renderer:
    loaded = model()
    return Renderer(loaded.tokenizer, loaded.template, loaded.facts.tokenizer)


def budget_of(rows: int, conversations: float) -> int:
    """Bytes that so many conversations of so many tokens hold."""
    return int(model().new_kv().bytes_at(rows) * conversations)


def unshared(engine: LocalEngine, name: str) -> ConversationKV:
    """A copy of that conversation's cache, row for row, in memory of its own."""
    kept = engine.caches.get(name)
    assert kept is not None
    copy = model().new_kv(kept.precision.value)
    unpack_rows(copy, pack_rows(kept.kv.fork(len(kept.kv.ids))))
    return copy


@dataclass
class Talk:
    """A conversation as a session keeps it."""

    messages: list[PromptMessage]
    policy: EvictionPolicy = EvictionPolicy.TURNS
    kv: KVPrecision = KVPrecision.FP32
    evicted_messages: int = 0

    @property
    def open(self) -> bool:
        """Whether the last message waits for an answer."""
        return self.messages[-1:] != [] and self.messages[-1].role == "user"

    @property
    def exact(self) -> bool:
        """Whether the stored keys and values are the computed ones."""
        return self.kv in (KVPrecision.FP32, KVPrecision.AUTO)


class Machine(RuleBasedStateMachine):
    """Three conversations, one store, and an engine that may end at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvchat-machine-"))
        self.turns = count(1)
        self.talks: dict[str, Talk] = {}
        self.budget = UNBOUNDED
        self.engine = self.started()

    def started(self) -> LocalEngine:
        """An engine as a new process would make it."""
        self.reports: list[Report] = []
        self.disk = tier(self.folder)
        return LocalEngine(
            model(),
            prefill_chunk=CHUNK,
            budget_bytes=self.budget,
            disk=self.disk,
            report=self.reports.append,
        )

    def teardown(self) -> None:
        self.engine.close()
        shutil.rmtree(self.folder)

    @initialize(system=st.booleans(), kv=precisions, past=st.tuples(*[st.integers(0, 8)] * len(NAMES)))
    def begin(self, system: bool, kv: KVPrecision, past: tuple[int, ...]) -> None:
        """Some conversations begin elsewhere: they have a past that no engine here has read."""
        opening = [PromptMessage("system", SYSTEM)] if system else []
        for name, turns in zip(NAMES, past, strict=True):
            said = [
                m for n in range(turns) for m in (user(f"{n} {WORDS[1]}"), PromptMessage("assistant", "Far."))
            ]
            self.talks[name] = Talk([*opening, *said], kv=kv)

    # What a user says.

    @rule(name=names)
    def ask_and_hear_a_long_answer(self, name: str) -> None:
        self.say(name, WORDS[0])
        self.answer(name, 70)

    @rule(name=names, text=texts, most=few)
    def ask(self, name: str, text: str, most: int) -> None:
        self.say(name, text)
        self.answer(name, most)

    @rule(name=names, text=texts, stop=few)
    def stop_in_mid_answer(self, name: str, text: str, stop: int) -> None:
        self.say(name, text)
        self.answer(name, 9, stop=(Tokens, stop))

    @rule(name=names, text=texts, stop=st.integers(1, 3))
    def stop_in_prefill(self, name: str, text: str, stop: int) -> None:
        self.say(name, " ".join([text] * 3))
        self.answer(name, 4, stop=(PrefillProgress, stop))

    @rule(name=names, most=few)
    def regenerate(self, name: str, most: int) -> None:
        talk = self.talks[name]
        if talk.messages and talk.messages[-1].role == "assistant":
            talk.messages.pop()
        if talk.open:
            self.answer(name, most)

    @rule(name=names, text=texts, back=st.integers(0, 3), most=few)
    def edit(self, name: str, text: str, back: int, most: int) -> None:
        """Replaces one of the questions, and what came after it."""
        talk = self.talks[name]
        asked = [i for i, message in enumerate(talk.messages) if message.role == "user"]
        if len(asked) > back:
            del talk.messages[asked[-1 - back] :]
            self.shorten(talk)
            self.say(name, text)
            self.answer(name, most)

    @rule(name=names)
    def undo(self, name: str) -> None:
        talk = self.talks[name]
        while talk.messages and talk.messages[-1].role == "assistant":
            talk.messages.pop()
        if talk.open:
            talk.messages.pop()
        self.shorten(talk)

    @rule(name=names, child=names)
    def fork(self, name: str, child: str) -> None:
        if name != child:
            parent = self.talks[name]
            self.talks[child] = replace(parent, messages=list(parent.messages))
            self.engine.forget(child)
            self.do(Fork(name, child))

    @rule(name=names, policy=st.sampled_from([EvictionPolicy.NONE, EvictionPolicy.TURNS]))
    def choose_policy(self, name: str, policy: EvictionPolicy) -> None:
        self.talks[name].policy = policy

    @rule(name=names, kv=precisions)
    def choose_precision(self, name: str, kv: KVPrecision) -> None:
        """For what is read from now on; a cache that is stored otherwise is of no use then."""
        self.talks[name].kv = kv

    @rule(name=names, kv=precisions)
    def convert(self, name: str, kv: KVPrecision) -> None:
        self.talks[name].kv = kv
        self.do(SetPrecision(name, kv))

    # What happens to caches.

    @rule(name=names)
    def spill(self, name: str) -> None:
        self.do(Spill(name))

    @rule(name=names)
    def drop(self, name: str) -> None:
        self.do(Drop(name))

    @rule(name=names)
    def warm(self, name: str) -> None:
        self.do(Warm(name, self.talks[name].kv))

    @rule()
    def restart(self) -> None:
        self.engine.close()
        self.engine = self.started()

    @rule()
    def kill(self) -> None:
        """The engine is killed; rows that were not queued for the disk are lost."""
        self.disk.close()
        self.engine = self.started()

    @rule(size=st.sampled_from([(GROWTH_STEP, 1), (GROWTH_STEP, 2.3), (CONTEXT, 1.3), (CONTEXT, 2.6), None]))
    def change_budget(self, size: tuple[int, float] | None) -> None:
        self.budget = budget_of(*size) if size else UNBOUNDED
        self.do(SetBudget(self.budget))

    @rule(name=names, place=st.floats(0, 0.999), cut=st.booleans())
    def corrupt(self, name: str, place: float, cut: bool) -> None:
        """One byte of the newest file of a conversation is another one now, or it ends there."""
        with suppress(KvchatError):
            self.disk.find(name)  # waits until it is written
        found = sorted((self.folder / name).glob("*.safetensors"))
        if found and found[-1].stat().st_size:
            raw = bytearray(found[-1].read_bytes())
            raw[int(len(raw) * place)] ^= 0xFF
            found[-1].write_bytes(raw[: int(len(raw) * place)] if cut else raw)

    @invariant()
    def memory_is_within_the_budget(self) -> None:
        Guard(self.engine)()

    # How it is done, and what is checked.

    def say(self, name: str, text: str) -> None:
        """A question; it joins one that was not answered."""
        talk = self.talks[name]
        if talk.open:
            text = f"{talk.messages.pop().text}\n\n{text}"
        talk.messages.append(user(text))

    def shorten(self, talk: Talk) -> None:
        """Where there are no more messages than were evicted, none count as evicted."""
        if talk.evicted_messages >= sum(message.role != "system" for message in talk.messages):
            talk.evicted_messages = 0

    def do(self, act: CacheCommand) -> None:
        self.reports.clear()
        self.engine.command(act)
        failed = [r for r in self.reports if isinstance(r, Refused) and "engine failed" in r.reason]
        assert failed == []

    def answer(self, name: str, most: int, stop: tuple[type[TurnEvent], int] | None = None) -> None:
        """One turn, compared with a cold run."""
        talk = self.talks[name]
        self.shorten(talk)
        request = TurnRequest(
            f"t{next(self.turns)}",
            name,
            tuple(talk.messages),
            CacheMode.ON,
            Sampling(max_tokens=most),
            talk.kv,
            talk.policy,
            talk.evicted_messages,
        )
        run = Run(request)
        guard, seen = Guard(self.engine), 0
        with run.tap.on(model().model):
            for event in self.engine.turn(request):
                run.events.append(event)
                if isinstance(event, TurnStarted) and not talk.exact:
                    run.alone = unshared(self.engine, name)
                guard()
                seen += stop is not None and isinstance(event, stop[0])
                if stop is not None and seen == stop[1]:
                    self.engine.stop(request.turn)
        last = run.events[-1]
        if isinstance(last, TurnFailed):
            run.check_failure(last)
            talk.messages.pop()
            self.shorten(talk)
            return
        assert isinstance(last, TurnFinished)
        run.check(talk, last)
        talk.evicted_messages = last.evicted_messages
        if last.token_ids:
            talk.messages.append(PromptMessage("assistant", last.text, last.token_ids, last.tokenizer))


@dataclass
class Run:
    """One turn and what passed through the model meanwhile."""

    request: TurnRequest
    events: list[TurnEvent] = field(default_factory=list)
    tap: Tap = field(default_factory=Tap)
    alone: ConversationKV | None = None
    """A copy of a quantised cache as the turn found it, in memory of its own."""

    def check_failure(self, failed: TurnFailed) -> None:
        """The only reason is that what may not be dropped is too long."""
        assert "no room for an answer" in failed.reason

    def check(self, talk: Talk, finished: TurnFinished) -> None:
        started = self.events[0]
        assert isinstance(started, TurnStarted)
        assert started.reused_tokens + started.prefilled_tokens == started.prompt_tokens
        self.check_re_reading(started)
        assert len(self.prompt(finished.evicted_messages)) + len(finished.token_ids) <= CONTEXT
        if talk.exact:
            self.check_answer(finished)
        elif not any(isinstance(event, Evicted) for event in self.events[2:]):
            self.check_unshared(finished.stats.reused_tokens)

    def prompt(self, evicted_messages: int) -> tuple[int, ...]:
        """The ids of the messages that stay, by a renderer that knows nothing of this turn."""
        return renderer().render(without_oldest(self.request.messages, evicted_messages)).ids

    def check_re_reading(self, started: TurnStarted) -> None:
        """Where more is read than the last message and what leads to it, there is a reason."""
        evicted_messages = next(
            (e.evicted_messages for e in self.events[:2] if isinstance(e, Evicted)),
            self.request.evicted_messages,
        )
        messages = without_oldest(self.request.messages, evicted_messages)
        history = any(message.role == "assistant" for message in messages)
        again = renderer().render(messages).ends[-2] - 1 if len(messages) > 1 else 0
        assert started.prompt_tokens == len(renderer().render(messages).ids)
        if history and started.reused_tokens < again:
            assert started.miss is not None
            assert started.miss.cause
            assert started.miss.tokens == again - started.reused_tokens
            assert started.reuse_note == started.miss.cause

    def check_answer(self, finished: TurnFinished) -> None:
        """Logits and choices since the last eviction are those of a cold pass over the messages that stay."""
        prompt = self.prompt(finished.evicted_messages)
        chosen = [i for event in self.events if isinstance(event, Tokens) for i in event.token_ids]
        generated = finished.stats.generated_tokens
        late = [i for i, event in enumerate(self.events) if isinstance(event, Evicted)]
        before = sum(isinstance(event, Tokens) for event in self.events[: late[-1]]) if late else 0
        if generated == before:
            return
        found = torch.stack(self.tap.logits[before - generated :])
        cold = uncached_logits(model().model, [*prompt, *chosen])[len(prompt) - 1 :]
        torch.testing.assert_close(found, cold[before:generated], atol=TOLERANCE, rtol=0)
        assert cold.argmax(dim=-1).tolist()[before : len(chosen)] == chosen[before:]

    def check_unshared(self, reused: int) -> None:
        """Logits are those of a cache with the same rows that shares its memory with no other."""
        kv = self.alone
        assert kv is not None
        assert len(kv) == reused
        reader = model().reader(kv)
        for ids, found in zip(self.tap.inputs, self.tap.logits, strict=False):
            torch.testing.assert_close(reader.read(ids)[-1], found, atol=TOLERANCE, rtol=0)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
