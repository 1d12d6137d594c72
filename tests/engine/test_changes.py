"""Every change of a history: the common prefix of cache and prompt is reused, the rest is read.

Regenerating, editing, undoing, continuing, forking and changing the system prompt are all that rule: each of
these turns reads exactly what it leaves, and equals a cold run in fp32.
"""

from collections.abc import Callable

import pytest
import torch

from kvchat.cache.kv_cache import ConversationKV
from kvchat.cache.layer import GROWTH_STEP
from kvchat.cache.prefix import common_prefix
from kvchat.contract import (
    CacheEventKind,
    CacheMode,
    Fork,
    KVPrecision,
    PoolState,
    PromptMessage,
    Report,
    Sampling,
    Tokens,
)
from kvchat.engine.cache_source import LEAST_SHARED
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel
from tests.support.engine_driver import (
    TOLERANCE,
    Chat,
    Played,
    assert_committed,
    assert_equals_cold,
    rendered,
    sentences,
    stopping_at,
    uncached_logits,
    user,
)

SYSTEM = "You answer in one word, and you never talk about the sea or the rivers of the north."
QUESTIONS = ("Which pass is open in May?", "How long is the drive?", "And the train?")
Change = Callable[[Chat], Played]


def talked(engine: LocalEngine, loaded: LoadedModel, system: str = SYSTEM, name: str = "chat") -> Chat:
    """A conversation of three turns."""
    chat = Chat(engine, loaded, name, system=system)
    for question in QUESTIONS:
        chat.ask(question)
    return chat


def contents(kv: ConversationKV) -> list[torch.Tensor]:
    """A copy of all keys and values."""
    return [tensor.clone() for layer in kv.stored for tensor in layer.read()]


def assert_same(kv: ConversationKV, before: list[torch.Tensor]) -> None:
    for now, then in zip(contents(kv), before, strict=True):
        assert torch.equal(now, then)


def assert_follows_the_rule(played: Played, cached: tuple[int, ...], loaded: LoadedModel) -> None:
    """The longest common prefix is reused, everything else is read once, and the result is a cold run's."""
    prompt = rendered(loaded, played.request.messages, played.request.today)
    reused = min(common_prefix(cached, prompt), len(prompt) - 1)
    stats = played.finished.stats
    assert (stats.reused_tokens, stats.prefilled_tokens) == (reused, len(prompt) - reused)
    assert played.evaluated == len(prompt) - reused + stats.generated_tokens - 1
    assert_equals_cold(played, loaded)


def asked(chat: Chat) -> Played:
    return chat.ask("Are you sure?")


def edited(index: int, *, alone: bool) -> Change:
    """Another text for one message; later messages are removed or stay."""

    def change(chat: Chat) -> Played:
        chat.messages[index] = PromptMessage(chat.messages[index].role, "Nobody knows the way.")
        if not alone:
            del chat.messages[index + 1 :]
        return chat.answer() if chat.messages[-1].role == "user" else asked(chat)

    return change


def undone(turns: int) -> Change:
    """The latest turns never happened."""

    def change(chat: Chat) -> Played:
        del chat.messages[len(chat.messages) - 2 * turns :]
        return asked(chat)

    return change


def with_system(*text: str) -> Change:
    def change(chat: Chat) -> Played:
        chat.messages[:1] = [PromptMessage("system", each) for each in text]
        return asked(chat)

    return change


def an_answer_in_between_removed(chat: Chat) -> Played:
    del chat.messages[3:5]
    return asked(chat)


CHANGES: dict[str, Change] = {
    "nothing but a new question": asked,
    "regenerate": Chat.again,
    "continue the last answer": Chat.answer,
    **{f"edit message {i} and drop the rest": edited(i, alone=False) for i in range(1, 7)},
    **{f"edit message {i} only": edited(i, alone=True) for i in range(1, 7)},
    **{f"undo {n}": undone(n) for n in (1, 2, 3)},
    "remove a turn in between": an_answer_in_between_removed,
    "another system prompt": with_system("You answer in verse."),
    "a longer system prompt": with_system(SYSTEM + " Be brief."),
    "no system prompt": with_system(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_reads_exactly_the_tokens_after_the_common_prefix(
    engine: LocalEngine, loaded: LoadedModel, name: str
) -> None:
    chat = talked(engine, loaded)
    cached = chat.kv.ids
    assert_follows_the_rule(CHANGES[name](chat), cached, loaded)
    cached = chat.kv.ids
    following = chat.ask("Why?")
    assert following.started.reused_tokens == len(cached)
    assert following.started.miss is None
    assert_follows_the_rule(following, cached, loaded)


def test_undoing_a_change_reads_as_many_tokens_as_the_change(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    chat = talked(engine, loaded)
    before = list(chat.messages)
    chat.messages[3] = user("How long is the walk?")
    chat.ask("Are you sure?")
    chat.messages[:] = before
    cached = chat.kv.ids
    assert_follows_the_rule(chat.ask("Are you sure?"), cached, loaded)


@pytest.mark.parametrize("said", [1, 3])
def test_a_stopped_answer_continues_where_it_ended(
    engine: LocalEngine, loaded: LoadedModel, said: int
) -> None:
    """The token that was chosen last was never read, and is all there is to read."""
    whole = Chat(LocalEngine(loaded), loaded, system=SYSTEM, sampling=Sampling(max_tokens=8)).ask(
        QUESTIONS[0]
    )
    chat = Chat(engine, loaded, system=SYSTEM, sampling=Sampling(max_tokens=8))
    stopped = chat.ask(QUESTIONS[0], stopping_at(engine, Tokens, said - 1))
    assert stopped.tokens == whole.tokens[:said]
    cached = chat.kv.ids
    chat.sampling = Sampling(max_tokens=8 - said)
    rest = chat.answer()
    assert (rest.started.prefilled_tokens, rest.started.miss) == (1, None)
    assert_follows_the_rule(rest, cached, loaded)
    assert [*stopped.tokens, *rest.tokens] == whole.tokens
    assert [m.role for m in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[-1].token_ids == tuple(whole.tokens)
    assert chat.messages[-1].text == whole.finished.text
    cached = chat.kv.ids
    assert_follows_the_rule(chat.ask(QUESTIONS[1]), cached, loaded)


def assert_a_long_chat_reads_nothing_twice(loaded: LoadedModel) -> None:
    """20 turns: what a turn reads is its prompt without everything that was read before it.

    Each prompt goes on where the one before ended, so that one cold pass has the logits of all turns.
    """
    engine = LocalEngine(loaded)
    chat = Chat(engine, loaded, system=SYSTEM, sampling=Sampling(max_tokens=3))
    read, chosen_from = 0, dict[int, torch.Tensor]()
    for turn in range(20):
        cached = chat.kv.ids if turn else ()
        played = chat.ask(f"And pass {turn}?")
        prompt = rendered(loaded, played.request.messages)
        assert tuple(prompt[: len(cached)]) == cached
        assert played.started.reused_tokens == len(cached)
        assert played.started.prefilled_tokens == len(prompt) - len(cached)
        assert (played.started.miss, played.finished.stats.reuse_note) == (None, "")
        read += played.evaluated
        assert_committed(chat.kv, [*prompt, *played.tokens[:-1]])
        generated = played.logits[-played.finished.stats.generated_tokens :]
        chosen_from |= {len(prompt) - 1 + i: logits for i, logits in enumerate(generated)}
    assert read == len(chat.kv.ids)
    cold = uncached_logits(loaded.model, chat.kv.ids)[[*chosen_from]]
    torch.testing.assert_close(torch.stack([*chosen_from.values()]), cold, atol=TOLERANCE, rtol=0)


def test_every_turn_of_a_long_chat_reads_its_new_tokens_and_nothing_else(loaded: LoadedModel) -> None:
    assert_a_long_chat_reads_nothing_twice(loaded)


@pytest.mark.model
def test_every_turn_of_a_long_chat_with_a_real_model_reads_its_new_tokens(smollm2: LoadedModel) -> None:
    assert_a_long_chat_reads_nothing_twice(smollm2)


def forked(chat: Chat, messages: int) -> Chat:
    """Another conversation that starts with the first messages of this one."""
    child = Chat(chat.engine, chat.loaded, "child", sampling=chat.sampling)
    child.messages = chat.messages[:messages]
    chat.engine.command(Fork(chat.name, child.name))
    return child


@pytest.mark.parametrize("messages", range(1, 8))
def test_a_fork_at_any_message_reuses_the_prefix_and_keeps_the_parent(
    engine: LocalEngine, loaded: LoadedModel, messages: int
) -> None:
    parent = talked(engine, loaded)
    cached, before = parent.kv.ids, contents(parent.kv)
    child = forked(parent, messages)
    played = child.ask("And by boat?") if child.messages[-1].role != "user" else child.answer()
    assert_follows_the_rule(played, cached, loaded)
    assert parent.kv.ids == cached
    assert_same(parent.kv, before)
    child_held, child_before = child.kv.ids, contents(child.kv)
    assert_follows_the_rule(parent.ask("Are you sure?"), cached, loaded)
    assert_same(child.kv, child_before)
    assert_follows_the_rule(child.ask("Why?"), child_held, loaded)


def test_a_fork_shares_memory_copy_on_write(loaded: LoadedModel) -> None:
    reports: list[Report] = []
    engine = LocalEngine(loaded, report=reports.append)
    parent = talked(engine, loaded)
    alone = engine.pool().used_bytes
    child = forked(parent, len(parent.messages))
    assert child.kv.storages() == parent.kv.storages()
    (pool,) = reports
    assert isinstance(pool, PoolState)
    assert pool.used_bytes == alone
    assert [c.bytes for c in pool.caches] == [alone, alone]
    (event,) = [e for e in pool.events if e.kind is CacheEventKind.FORK]
    assert (event.conversation, event.tokens, event.bytes) == ("child", len(parent.kv), 0)
    parent.again()  # over rows that the child still has
    assert child.kv.storages().keys().isdisjoint(parent.kv.storages())
    assert engine.pool().used_bytes == 2 * alone


def test_a_fork_outlives_its_parent(engine: LocalEngine, loaded: LoadedModel) -> None:
    parent = talked(engine, loaded)
    child = forked(parent, len(parent.messages))
    cached = child.kv.ids
    engine.forget(parent.name)
    assert [c.conversation for c in engine.pool().caches] == ["child"]
    assert_follows_the_rule(child.ask("Are you sure?"), cached, loaded)


def test_a_fork_without_a_cache_is_read_once(engine: LocalEngine, loaded: LoadedModel) -> None:
    parent = talked(LocalEngine(loaded), loaded)
    parent.engine = engine
    child = forked(parent, len(parent.messages))
    assert engine.pool().caches == ()
    assert_follows_the_rule(child.ask("Are you sure?"), (), loaded)


def test_forks_that_grow_past_the_shared_memory_stay_apart(tiny: LoadedModel) -> None:
    engine = LocalEngine(tiny)
    parent = talked(engine, tiny)
    child = forked(parent, len(parent.messages))
    for number in (1, 2):
        for chat in (parent, child):
            cached = chat.kv.ids
            played = chat.ask(f"{chat.name} {number}: {sentences(GROWTH_STEP // 12)}")
            assert_follows_the_rule(played, cached, tiny)
    assert len(parent.kv) > 2 * GROWTH_STEP


def test_another_conversations_prefix_is_shared(engine: LocalEngine, loaded: LoadedModel) -> None:
    source = talked(engine, loaded)
    cached, before = source.kv.ids, contents(source.kv)
    engine.pool()
    sharer = Chat(engine, loaded, "sharer", system=SYSTEM)
    played = sharer.ask("What is the code?")
    assert played.started.reused_tokens > LEAST_SHARED
    assert_follows_the_rule(played, cached, loaded)
    (event,) = [e for e in played.finished.pool.events if e.kind is CacheEventKind.SHARE]
    assert (event.conversation, event.tokens) == ("sharer", played.started.reused_tokens)
    assert source.name in event.note
    assert_same(source.kv, before)
    assert_follows_the_rule(source.ask("Why?"), cached, loaded)
    cached = sharer.kv.ids
    assert_follows_the_rule(sharer.ask("Why?"), cached, loaded)


def test_the_longest_prefix_is_shared(engine: LocalEngine, loaded: LoadedModel) -> None:
    talked(engine, loaded, name="one")
    other = Chat(engine, loaded, "other", system=SYSTEM)
    other.ask("What is the code? Tell me.")
    cached = other.kv.ids
    sharer = Chat(engine, loaded, "sharer", system=SYSTEM)
    assert_follows_the_rule(sharer.ask("What is the code? Tell nobody."), cached, loaded)


def test_a_short_prefix_is_not_shared(engine: LocalEngine, loaded: LoadedModel) -> None:
    talked(engine, loaded, system="Yes.")
    played = Chat(engine, loaded, "other", system="No.").ask("What is the code?")
    assert_follows_the_rule(played, (), loaded)
    assert not [e for e in played.finished.pool.events if e.kind is CacheEventKind.SHARE]


@pytest.mark.parametrize("mode", [CacheMode.OFF, CacheMode.TURN])
def test_no_prefix_is_shared_with_a_conversation_without_a_cache(tiny: LoadedModel, mode: CacheMode) -> None:
    engine = LocalEngine(tiny)
    talked(engine, tiny)
    played = Chat(engine, tiny, "other", system=SYSTEM, mode=mode).ask("What is the code?")
    assert played.started.reused_tokens == 0
    assert_equals_cold(played, tiny)


def test_no_prefix_is_shared_in_another_precision(tiny: LoadedModel) -> None:
    engine = LocalEngine(tiny)
    talked(engine, tiny)
    other = Chat(engine, tiny, "other", system=SYSTEM)
    other.precision = KVPrecision.BF16
    assert other.ask("What is the code?").started.reused_tokens == 0


def test_a_longer_prefix_of_another_conversation_is_preferred(
    engine: LocalEngine, loaded: LoadedModel
) -> None:
    """An edit that makes a conversation equal to another one."""
    other = talked(engine, loaded)
    chat = Chat(engine, loaded, "chat 2", system="Another one.")
    chat.ask(QUESTIONS[1])
    chat.messages = list(other.messages)
    cached = other.kv.ids
    assert_follows_the_rule(chat.ask("Are you sure?"), cached, loaded)


@pytest.mark.model
def test_the_rule_holds_for_a_real_model(smollm2: LoadedModel) -> None:
    """One change after the other, and the fork and its parent to the end."""
    engine = LocalEngine(smollm2)
    parent = talked(engine, smollm2)
    for change in (
        Chat.again,
        Chat.answer,
        edited(3, alone=False),
        undone(1),
        with_system("Answer in verse."),
    ):
        cached = parent.kv.ids
        assert_follows_the_rule(change(parent), cached, smollm2)
    cached, before = parent.kv.ids, contents(parent.kv)
    child = forked(parent, len(parent.messages) - 1)
    assert_follows_the_rule(child.answer(), cached, smollm2)
    assert_same(parent.kv, before)
    assert_follows_the_rule(parent.ask("And by boat?"), cached, smollm2)
    sharer = Chat(engine, smollm2, "sharer")
    sharer.messages = parent.messages[:3]
    cached = parent.kv.ids
    played = sharer.ask("And on foot?")
    assert played.started.reused_tokens > LEAST_SHARED
    assert_follows_the_rule(played, cached, smollm2)
