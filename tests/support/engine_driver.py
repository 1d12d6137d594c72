"""Drives an engine as a session does, and compares its results with plain transformers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvchat.cache.kv_cache import ConversationKV
from kvchat.contract import (
    CacheMode,
    EvictionPolicy,
    KVPrecision,
    PromptMessage,
    Sampling,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.prompt import Renderer
from tests.support import tiny

GREEDY = Sampling(max_tokens=4)
TOLERANCE = 1e-3
"""Two fp32 passes over the same ids in different chunks differ by 1e-4, one wrong cached token by over 1."""

Watch = Callable[[TurnEvent], None]
turn_ids = count(1)


on_both_models = pytest.mark.parametrize(
    "loaded", ["tiny", pytest.param("smollm2", marks=pytest.mark.model)], indirect=True
)
"""For tests that depend on the size, the rounding or the tokenizer of a model."""


def affordable(loaded: LoadedModel, of_tiny: int, of_real: int) -> int:
    """As many rounds as the model's size allows."""
    return of_tiny if loaded.facts.name == tiny.NAME else of_real


def user(text: str) -> PromptMessage:
    return PromptMessage("user", text)


def sentences(number: int) -> str:
    """A long text."""
    return " ".join(f"The drive over pass {i} takes three hours." for i in range(number))


@dataclass(frozen=True)
class Played:
    """One turn that was consumed to its end, with the model's forward passes."""

    request: TurnRequest
    events: list[TurnEvent]
    logits: list[torch.Tensor]
    """The last logits of each finished forward pass, `[vocabulary]`."""
    evaluated: int
    """Tokens that went into the model, counted by a hook."""

    @property
    def started(self) -> TurnStarted:
        event = self.events[0]
        assert isinstance(event, TurnStarted), event
        return event

    @property
    def finished(self) -> TurnFinished:
        event = self.events[-1]
        assert isinstance(event, TurnFinished), event
        return event

    @property
    def failed(self) -> TurnFailed:
        event = self.events[-1]
        assert isinstance(event, TurnFailed), event
        return event

    @property
    def tokens(self) -> list[int]:
        """The generated ids in the order they were reported."""
        return [i for event in self.events if isinstance(event, Tokens) for i in event.token_ids]


@dataclass
class Tap:
    """Records the inputs and outputs of a model."""

    logits: list[torch.Tensor] = field(default_factory=list)
    """After the last token of each finished forward pass, `[vocabulary]`."""
    inputs: list[list[int]] = field(default_factory=list)
    """The ids of each forward pass that was started."""

    @property
    def evaluated(self) -> int:
        """Tokens that went in."""
        return sum(len(ids) for ids in self.inputs)

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """Records inside the block, with hooks on the embeddings and on the model."""
        begin = model.get_input_embeddings().register_forward_pre_hook(self._enter)
        end = model.register_forward_hook(self._leave)
        try:
            yield
        finally:
            begin.remove()
            end.remove()

    def _enter(self, _module: object, args: tuple[torch.Tensor, ...]) -> None:
        self.inputs.append(args[0].flatten().tolist())

    def _leave(self, _module: object, _args: object, output: CausalLMOutputWithPast) -> None:
        assert output.logits is not None
        self.logits.append(output.logits[0, -1].float().clone())


def play(
    engine: LocalEngine, loaded: LoadedModel, request: TurnRequest, watch: Watch = lambda _event: None
) -> Played:
    """Consumes a turn, calls `watch` with every event, and checks the invariants of every turn."""
    tap, events = Tap(), []
    with tap.on(loaded.model):
        for event in engine.turn(request):
            events.append(event)
            watch(event)
    played = Played(request, events, tap.logits, tap.evaluated)
    check_counts(played)
    return played


def check_counts(played: Played) -> None:
    """Counts and texts of a turn agree with each other and with the model's inputs."""
    last = played.events[-1]
    if not isinstance(last, TurnFinished):
        return
    stats = last.stats
    assert stats.prompt_tokens == stats.reused_tokens + stats.prefilled_tokens
    assert (stats.prompt_tokens, stats.reused_tokens) == (
        played.started.prompt_tokens,
        played.started.reused_tokens,
    )
    if stats.finish_reason != "cancelled":
        assert stats.evaluated_tokens == played.evaluated
    assert "".join(event.text for event in played.events if isinstance(event, Tokens)) == last.text
    assert played.tokens == list(last.token_ids)


class Chat:
    """One conversation with an engine; stores its messages as a session does."""

    def __init__(
        self,
        engine: LocalEngine,
        loaded: LoadedModel,
        name: str = "chat",
        *,
        system: str = "",
        mode: CacheMode = CacheMode.ON,
        sampling: Sampling = GREEDY,
        policy: EvictionPolicy = EvictionPolicy.TURNS,
        today: str = "",
        persist: bool = True,
    ) -> None:
        self.engine = engine
        self.loaded = loaded
        self.name = name
        self.mode = mode
        self.sampling = sampling
        self.policy = policy
        self.today = today
        self.persist = persist
        self.precision = KVPrecision.AUTO
        self.evicted_messages = 0
        self.turn = ""
        """The id of the latest turn."""
        self.messages = [PromptMessage("system", system)] if system else []

    def ask(self, text: str, watch: Watch = lambda _event: None) -> Played:
        """Asks one more question; joins an unanswered one before it."""
        if self.messages and self.messages[-1].role == "user":
            text = f"{self.messages.pop().text}\n\n{text}"
        self.messages.append(user(text))
        return self.answer(watch)

    def answer(self, watch: Watch = lambda _event: None) -> Played:
        """Answers the last message, or continues it; the answer becomes a message if there is one."""
        played = play(self.engine, self.loaded, self.request(), watch)
        last = played.events[-1]
        if not isinstance(last, TurnFinished):
            return played
        self.evicted_messages = last.evicted_messages
        if last.token_ids:
            self._add(last)
        return played

    def _add(self, answer: TurnFinished) -> None:
        begun = self.messages.pop() if self.messages[-1].role == "assistant" else PromptMessage("", "")
        text, ids = begun.text + answer.text, begun.token_ids + answer.token_ids
        self.messages.append(PromptMessage("assistant", text, ids, answer.tokenizer))

    def again(self) -> Played:
        """Regenerates the last answer."""
        assert self.messages.pop().role == "assistant"
        return self.answer()

    def request(self) -> TurnRequest:
        """The turn that answers the messages as they are."""
        self.turn = f"t{next(turn_ids)}"
        return TurnRequest(
            self.turn,
            self.name,
            tuple(self.messages),
            self.mode,
            self.sampling,
            self.precision,
            self.policy,
            self.evicted_messages,
            self.today,
            self.persist,
        )

    @property
    def kv(self) -> ConversationKV:
        """The resident cache of this conversation."""
        cache = self.engine.caches.get(self.name)
        assert cache is not None
        return cache.kv


def stopping_at(engine: LocalEngine, kind: type[TurnEvent], index: int = 0) -> Watch:
    """Stops the turn when its event number `index` of that kind arrives."""
    seen = count()

    def watch(event: TurnEvent) -> None:
        if isinstance(event, kind) and next(seen) == index:
            engine.stop(event.turn)

    return watch


def rendered(loaded: LoadedModel, messages: Sequence[PromptMessage], today: str = "") -> list[int]:
    """The ids of a conversation, by a new renderer."""
    renderer = Renderer(loaded.tokenizer, loaded.template, loaded.facts.tokenizer)
    return list(renderer.render(messages, today).ids)


@torch.inference_mode()
def uncached_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """The reference: one plain pass of transformers over all ids, `[len(ids), vocabulary]`."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.float()


def assert_equals_cold(played: Played, loaded: LoadedModel) -> None:
    """The turn's logits equal those of a pass without a cache; a greedy turn chose the same tokens."""
    prompt = rendered(loaded, played.request.messages, played.request.today)
    generated = played.finished.stats.generated_tokens
    assert generated > 0
    cold = uncached_logits(loaded.model, [*prompt, *played.tokens])[len(prompt) - 1 :][:generated]
    torch.testing.assert_close(torch.stack(played.logits[-generated:]), cold, atol=TOLERANCE, rtol=0)
    if played.request.sampling.temperature == 0 and played.request.sampling.repeat_penalty == 1:
        assert cold.argmax(dim=-1).tolist()[: len(played.tokens)] == played.tokens


def assert_committed(kv: ConversationKV, ids: Sequence[int]) -> None:
    """Every layer has exactly as many tokens as the cache, and those are `ids`."""
    assert [layer.length for layer in kv.stored] == [len(kv)] * len(kv.stored)
    assert list(kv.ids) == list(ids)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers in the order they run."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def after_layer(model: PreTrainedModel, layer: int, call: int, action: Callable[[], None]) -> Iterator[None]:
    """Inside the block, `action` runs in the `call`-th forward pass, after `layer`."""
    calls = count(1)

    def hook(*_: object) -> None:
        if next(calls) == call:
            action()

    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def saying(model: PreTrainedModel, ids: Sequence[int]) -> Iterator[None]:
    """Inside the block, the model's greedy answer starts with `ids`, one for each forward pass."""
    script = iter(ids)

    def hook(_module: object, _args: object, output: CausalLMOutputWithPast) -> None:
        if (token := next(script, None)) is not None:
            assert output.logits is not None
            output.logits[0, -1, token] += 1e4

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
