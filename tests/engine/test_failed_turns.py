"""After a turn without an answer, the next prompt is as if that turn had not happened."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager

import pytest
import torch

from kvchat.chat.session import ConversationDefaults, Session
from kvchat.chat.store import Store
from kvchat.cli.run import run_turns
from kvchat.contract import EvictionPolicy, Sampling, TurnEvent, TurnRequest
from kvchat.engine.engine import UNBOUNDED, LocalEngine
from kvchat.engine.model.forward import CachedReader
from kvchat.engine.model.loader import LoadedModel
from kvchat.errors import KvchatError
from tests.support.engine_driver import after_layer, decoder_layers, rendered

FIRST, FAILED, NEXT = "Which pass is open in May?", "This one fails.", "How long is the drive?"
DEFAULTS = ConversationDefaults(system_prompt="Be brief.", sampling=Sampling(max_tokens=4))


class Recording(LocalEngine):
    """An engine that records its requests."""

    requests: list[TurnRequest]

    def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
        """Answers."""
        self.requests.append(request)
        yield from super().turn(request)


def recording(loaded: LoadedModel) -> Recording:
    engine = Recording(loaded)
    engine.requests = []
    return engine


@contextmanager
def too_long(_engine: LocalEngine) -> Iterator[str]:
    """A message that is longer than the context."""
    yield "pass " * _engine.facts.context_limit


@contextmanager
def without_budget(engine: LocalEngine) -> Iterator[str]:
    """A budget that holds no conversation."""
    engine.caches.budget_bytes = 1
    yield FAILED
    engine.caches.budget_bytes = UNBOUNDED


@contextmanager
def template_error(engine: LocalEngine) -> Iterator[str]:
    """A template that refuses the message."""

    def refuse(*_: object) -> None:
        raise KvchatError("The template refuses this.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.planner.prompts, "render", refuse)
        yield FAILED


@contextmanager
def broken(engine: LocalEngine) -> Iterator[str]:
    """A forward pass that raises in the middle."""

    def break_down() -> None:
        raise RuntimeError("it broke")

    with after_layer(engine._loaded.model, 0, 1, break_down):
        yield FAILED


@contextmanager
def not_a_number(engine: LocalEngine) -> Iterator[str]:
    """A forward pass whose second layer, and so everything after it, is NaN."""

    def spoil(_module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0] * float("nan"), *args[1:])

    handle = decoder_layers(engine._loaded.model)[1].register_forward_pre_hook(spoil)
    try:
        yield FAILED
    finally:
        handle.remove()


FAILURES = [too_long, without_budget, template_error, broken, not_a_number]
Failure = Callable[[LocalEngine], AbstractContextManager[str]]


def last_prompt(loaded: LoadedModel, engine: Recording) -> list[int]:
    """The prompt ids of the latest turn, without the conversation's date."""
    return rendered(loaded, engine.requests[-1].messages)


@pytest.mark.parametrize("before", [[], [FIRST]], ids=["first", "second"])
@pytest.mark.parametrize("failure", FAILURES)
def test_the_next_prompt_and_its_answer_are_as_if_the_failed_message_had_not_been_sent(
    loaded: LoadedModel, failure: Failure, before: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    engine, control = recording(loaded), recording(loaded)
    with closing(Store(None)) as store, closing(Store(None)) as other:
        session = Session(store, DEFAULTS)
        run_turns(session, engine, before, as_json=False)
        with failure(engine) as text, pytest.raises(KvchatError):
            run_turns(session, engine, [text], as_json=False)
        capsys.readouterr()
        session.open(session.current.id)  # as `run -c` does
        run_turns(session, engine, [NEXT], as_json=False)
        said = capsys.readouterr().out
        run_turns(Session(other, DEFAULTS), control, [*before, NEXT], as_json=False)
        assert last_prompt(loaded, engine) == last_prompt(loaded, control)
        assert capsys.readouterr().out.endswith(said)
        marks = [(m.text == text, m.not_sent) for m in session.current.messages]
        assert marks.count((True, True)) == 1
        assert (False, True) not in marks


def test_a_failed_turn_leaves_no_nan_in_the_cache(loaded: LoadedModel) -> None:
    engine = recording(loaded)
    with closing(Store(None)) as store:
        session = Session(store, DEFAULTS)
        run_turns(session, engine, [FIRST], as_json=False)
        with not_a_number(engine) as text, pytest.raises(KvchatError, match="NaN"):
            run_turns(session, engine, [text], as_json=False)
        assert engine.caches.get(session.current.id) is None


def test_rows_that_a_failed_turn_evicted_are_read_again(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = recording(loaded)
    with closing(Store(None)) as store:
        session = Session(
            store, ConversationDefaults(sampling=DEFAULTS.sampling, policy=EvictionPolicy.SINKS)
        )
        run_turns(session, engine, [FIRST], as_json=False)
        prompt = engine.planner.plan(session.request_as_if())
        limit = len(prompt.rendered.ids) + 8
        monkeypatch.setattr(engine.planner.prompts, "limit", lambda _request: limit)
        reads = CachedReader.read

        def break_down(reader: CachedReader, ids: list[int], keep: int = 1) -> torch.Tensor:
            kept = engine.caches.get(session.current.id)
            if kept and kept.kv.index.has_gap:
                raise RuntimeError("it broke")
            return reads(reader, ids, keep)

        monkeypatch.setattr(CachedReader, "read", break_down)
        with pytest.raises(KvchatError, match="it broke"):
            run_turns(session, engine, ["The drive takes three hours. " * 2], as_json=False)
        assert engine.caches.get(session.current.id) is None
