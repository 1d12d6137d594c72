"""A stop, an exception or a closed iterator at any point leaves a consistent cache."""

import threading

import pytest
import torch

from kvchat.cache.prefix import common_prefix
from kvchat.contract import CacheMode, PrefillProgress, Sampling, Tokens, TurnEvent, TurnStarted
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.forward import CachedReader
from kvchat.engine.model.loader import LoadedModel
from tests.support.engine_driver import (
    TOLERANCE,
    Chat,
    Played,
    after_layer,
    assert_committed,
    assert_equals_cold,
    decoder_layers,
    rendered,
    sentences,
    stopping_at,
    uncached_logits,
)

REPLY = 5
FIRST, SECOND, NEXT = "Which pass is open in May?", "How long is the drive?", "Tell me about the sea."
PREFILL, DECODE = 1, 3
"""Forward passes of a turn: the first reads the prompt, each later one a token of the answer."""


class BrokenError(Exception):
    """What an interrupted forward pass raises."""


def break_down() -> None:
    raise BrokenError("it broke")


def chatting(engine: LocalEngine, loaded: LoadedModel, mode: CacheMode = CacheMode.ON) -> Chat:
    """A conversation with one turn behind it."""
    chat = Chat(engine, loaded, mode=mode, sampling=Sampling(max_tokens=REPLY))
    chat.ask(FIRST)
    return chat


def assert_holds_all_but_the_last_token(chat: Chat, played: Played) -> None:
    """The cache is the prompt and the answer so far, without the token that was chosen and never read."""
    prompt = rendered(chat.loaded, played.request.messages)
    assert_committed(chat.kv, [*prompt, *played.tokens[:-1]])


def assert_next_turn_equals_cold(chat: Chat) -> None:
    answered, cached = chat.messages[-1].role == "assistant", len(chat.kv)
    following = chat.ask(NEXT)
    assert following.finished.stats.finish_reason == "length"
    if answered:
        assert (following.started.reused_tokens, following.started.reuse_note) == (cached, "")
    assert_holds_all_but_the_last_token(chat, following)
    assert_equals_cold(following, chat.loaded)


@pytest.mark.parametrize("index", range(REPLY))
def test_a_stop_at_any_token_keeps_the_tokens_read(
    engine: LocalEngine, loaded: LoadedModel, index: int
) -> None:
    chat = chatting(engine, loaded)
    stopped = chat.ask(SECOND, stopping_at(engine, Tokens, index))
    assert stopped.finished.stats.finish_reason == "cancelled"
    assert len(stopped.tokens) == index + 1
    assert_holds_all_but_the_last_token(chat, stopped)
    assert_next_turn_equals_cold(chat)


def test_a_stop_before_the_first_token_answers_nothing_and_keeps_the_history(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    chat = chatting(engine, loaded)
    cached = chat.kv.ids
    stopped = chat.ask(SECOND, stopping_at(engine, TurnStarted))
    assert stopped.finished.stats.finish_reason == "cancelled"
    assert (stopped.tokens, stopped.logits, stopped.finished.stats.evaluated_tokens) == ([], [], 0)
    assert_committed(chat.kv, cached)
    assert_next_turn_equals_cold(chat)


def test_a_stop_that_comes_before_its_turn_is_not_lost(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = chatting(engine, loaded)
    chat.messages.append(chat.messages[0])
    request = chat.request()
    engine.stop(request.turn)
    events = list(engine.turn(request))
    assert [type(event).__name__ for event in events] == ["TurnStarted", "TurnFinished"]
    assert_next_turn_equals_cold(chat)


def test_a_stop_from_another_thread_ends_the_turn(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = chatting(engine, loaded)

    def stop(event: TurnEvent) -> None:
        if isinstance(event, Tokens):
            thread = threading.Thread(target=engine.stop, args=(event.turn,))
            thread.start()
            thread.join()

    stopped = chat.ask(SECOND, stop)
    assert len(stopped.tokens) == 1
    assert_holds_all_but_the_last_token(chat, stopped)
    assert_next_turn_equals_cold(chat)


def test_a_stop_meant_for_another_turn_changes_nothing(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = chatting(engine, loaded)
    played = chat.ask(SECOND, lambda _event: engine.stop("some other turn"))
    assert played.finished.stats.finish_reason == "length"
    assert_equals_cold(played, loaded)


@pytest.mark.parametrize("call", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_a_stop_between_layers_ends_the_pass_at_once(loaded: LoadedModel, call: int) -> None:
    for layer in range(loaded.facts.layers):
        check_stop_after(layer, call, loaded)


def check_stop_after(layer: int, call: int, loaded: LoadedModel) -> None:
    engine = LocalEngine(loaded)
    chat = chatting(engine, loaded)
    cached = chat.kv.ids
    with after_layer(loaded.model, layer, call, lambda: engine.stop(chat.turn)):
        stopped = chat.ask(SECOND)
    assert stopped.finished.stats.finish_reason == "cancelled"
    # after the last layer there is none left to refuse: that pass ends, and the turn with its token
    passes = call if layer == loaded.facts.layers - 1 else call - 1
    assert len(stopped.logits) == len(stopped.tokens) == passes
    if stopped.tokens:
        assert_holds_all_but_the_last_token(chat, stopped)
    else:
        assert_committed(chat.kv, cached)
    assert_next_turn_equals_cold(chat)


@pytest.mark.parametrize("mode", list(CacheMode))
def test_a_stop_between_layers_works_in_every_mode(tiny: LoadedModel, mode: CacheMode) -> None:
    engine = LocalEngine(tiny)
    chat = chatting(engine, tiny, mode)
    with after_layer(tiny.model, 1, DECODE, lambda: engine.stop(chat.turn)):
        stopped = chat.ask(SECOND)
    assert stopped.finished.stats.finish_reason == "cancelled"
    assert len(stopped.tokens) == DECODE - 1
    following = chat.ask(NEXT)
    assert_equals_cold(following, tiny)


def test_a_stop_during_chunked_prefill_keeps_the_finished_chunks(loaded: LoadedModel) -> None:
    chunk, finished = 8, 2
    engine = LocalEngine(loaded, prefill_chunk=chunk)
    chat = chatting(engine, loaded)
    cached = len(chat.kv)
    stopped = chat.ask(sentences(4), stopping_at(engine, PrefillProgress, finished - 1))
    prompt = rendered(loaded, stopped.request.messages)
    assert stopped.tokens == []
    assert_committed(chat.kv, prompt[: cached + finished * chunk])
    retried = chat.answer()
    assert retried.started.reused_tokens == cached + finished * chunk
    assert retried.started.reuse_note == ""
    assert_equals_cold(retried, loaded)


def test_a_stop_inside_a_chunk_gives_up_that_chunk_only(tiny: LoadedModel) -> None:
    chunk, finished = 8, 2
    engine = LocalEngine(tiny, prefill_chunk=chunk)
    chat = chatting(engine, tiny)
    cached = len(chat.kv)
    with after_layer(tiny.model, 1, finished + 1, lambda: engine.stop(chat.turn)):
        stopped = chat.ask(sentences(4))
    prompt = rendered(tiny, stopped.request.messages)
    assert_committed(chat.kv, prompt[: cached + finished * chunk])
    assert_equals_cold(chat.answer(), tiny)


@pytest.mark.parametrize("call", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_an_exception_in_any_layer_fails_the_turn_and_rolls_every_layer_back(
    loaded: LoadedModel, call: int
) -> None:
    for layer in range(loaded.facts.layers):
        chat = chatting(LocalEngine(loaded), loaded)
        cached = chat.kv.ids
        with after_layer(loaded.model, layer, call, break_down):
            broken = chat.ask(SECOND)
        assert "BrokenError: it broke" in broken.failed.reason
        assert len(broken.tokens) == call - 1
        if broken.tokens:
            assert_holds_all_but_the_last_token(chat, broken)
        else:
            assert_committed(chat.kv, cached)
        assert_next_turn_equals_cold(chat)


def test_a_failed_turn_can_be_asked_again(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = chatting(engine, loaded)
    with after_layer(loaded.model, 1, DECODE, break_down):
        chat.ask(SECOND)
    retried = chat.answer()
    assert retried.started.prefilled_tokens == 1
    assert_equals_cold(retried, loaded)


def test_a_question_edited_after_its_turn_failed_costs_nothing_read_before(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    chat = chatting(engine, loaded)
    with after_layer(loaded.model, 1, DECODE, break_down):
        chat.ask(SECOND)
    cached = chat.kv.ids
    chat.messages.pop()
    edited = chat.ask(NEXT)
    prompt = rendered(loaded, edited.request.messages)
    assert edited.started.reused_tokens == common_prefix(cached, prompt) < len(cached)
    assert (edited.started.reuse_note, edited.started.miss) == ("", None)
    assert_equals_cold(edited, loaded)


@pytest.mark.parametrize("new", [1, 5], ids=["one token", "five tokens"])
def test_a_pass_that_fails_after_any_layer_does_not_change_the_cache(loaded: LoadedModel, new: int) -> None:
    ids = loaded.tokenizer.encode(sentences(2)).ids
    start = ids[:-new]
    cold = uncached_logits(loaded.model, ids)[-1]
    kv = loaded.new_kv()
    CachedReader(loaded.model, kv).read(start)
    for layer in range(loaded.facts.layers):
        reader = CachedReader(loaded.model, kv)
        with after_layer(loaded.model, layer, 1, break_down), pytest.raises(BrokenError):
            reader.read(ids[-new:])
        assert reader.evaluated == 0
        assert_committed(kv, start)
    logits = CachedReader(loaded.model, kv).read(ids[-new:])
    torch.testing.assert_close(logits[0], cold, atol=TOLERANCE, rtol=0)


def test_an_interrupt_of_the_process_rolls_back_too(engine: LocalEngine, loaded: LoadedModel) -> None:
    chat = chatting(engine, loaded)
    cached = chat.kv.ids

    def interrupt() -> None:
        raise KeyboardInterrupt

    with after_layer(loaded.model, 1, PREFILL, interrupt), pytest.raises(KeyboardInterrupt):
        chat.ask(SECOND)
    assert_committed(chat.kv, cached)
    assert_next_turn_equals_cold(chat)


def test_closing_the_iterator_during_a_turn_leaves_a_consistent_cache(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    chat = chatting(engine, loaded)
    chat.messages.append(chat.messages[0])
    request = chat.request()
    turn = engine.turn(request)
    tokens: list[int] = []
    while len(tokens) < 3:
        event = next(turn)
        tokens += event.token_ids if isinstance(event, Tokens) else ()
    del turn
    assert_committed(chat.kv, [*rendered(loaded, request.messages), *tokens[:-1]])
    assert not any(layer._forward_pre_hooks for layer in decoder_layers(loaded.model))
    assert_next_turn_equals_cold(chat)
