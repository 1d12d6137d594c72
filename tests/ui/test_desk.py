"""What an act costs is said before it is done: a cheap one is done at once, a dear one asks."""

from dataclasses import replace

import pytest

from kvchat.chat.conversation_commands import set_system
from kvchat.chat.cost_estimates import WORTH_ASKING_S
from kvchat.chat.session import Session
from kvchat.contract import (
    CacheCommand,
    CostEstimate,
    EstimateCost,
    EvictionPolicy,
    KVPrecision,
    Miss,
    SetBudget,
    SetPrecision,
    WarmCache,
)
from kvchat.text import megabytes
from kvchat.ui.screens.dialogs import AskLine, Confirm
from tests.support.screen_driver import Chat, running, saved_conversation, session_over
from tests.support.scripted_engine import PREVIEW, ScriptedEngine
from tests.ui.test_branches import SIZES, held_before
from tests.ui.test_hostile import WORST, assert_harmless

MISS = Miss("system prompt edited", 1100, 2.0, 3, "You are", "Be brief", 0)
DEAR, CHEAP = WORTH_ASKING_S + 0.1, WORTH_ASKING_S - 0.1


def acts_but_asks(chat: Chat) -> list[CacheCommand]:
    """What reached the engine, questions about prices aside."""
    return [act for act in chat.engine.acts if not isinstance(act, EstimateCost)]


def asked(chat: Chat) -> EstimateCost:
    """The one question about a price."""
    (ask,) = [act for act in chat.engine.acts if isinstance(act, EstimateCost)]
    return ask


def policy_of(chat: Chat) -> EvictionPolicy:
    """That of the open conversation."""
    return chat.session.current.policy


async def warmed(chat: Chat) -> None:
    """The open conversation has a cache."""
    await chat.ask("Go")
    assert chat.listed()[0].startswith("●")


async def back_to_the_chat(chat: Chat) -> None:
    """The question is answered, one way or the other."""
    await chat.until(lambda: chat.app.screen is chat.screen, "the question is gone")
    await chat.pilot.pause()


# --- policy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("policy", list(EvictionPolicy))
async def test_a_cheap_policy_is_chosen_at_once_and_its_price_told(
    policy: EvictionPolicy, size: tuple[int, int]
) -> None:
    engine = ScriptedEngine().prices(CHEAP, MISS)
    async with running(engine, size=size) as chat:
        await warmed(chat)
        await chat.send(f"/policy {policy.value}")
        await chat.until_said(f"Policy {policy.value}: the next turn reads 1,204 tokens, about 0.9 s")
        await chat.until_said(f"1,100 of them again. When the context is full: {PREVIEW}.")
        assert asked(chat).request.policy is policy
        assert chat.session.current.policy is policy
        assert chat.store.load(chat.session.current.id).policy is policy
        assert policy.value in chat.panel().partition("when full")[2].splitlines()[0]
        await chat.ask("Next")
        assert engine.requests[-1].policy is policy
        assert chat.app.screen is chat.screen


@pytest.mark.parametrize("seconds", [DEAR, None], ids=["dear", "not measured yet"])
@pytest.mark.parametrize(
    ("keys", "done"),
    [(["escape"], False), (["n"], False), (["enter"], False), (["y"], True)],
)
async def test_a_dear_policy_asks_first_and_does_nothing_unless_agreed(
    seconds: float | None, keys: list[str], done: bool
) -> None:
    engine = ScriptedEngine().prices(seconds, MISS)
    async with running(engine) as chat:
        await warmed(chat)
        await chat.send("/policy sinks")
        await chat.dialog(Confirm)
        await chat.until_visible("Policy sinks: the next turn reads 1,204 tokens")
        assert policy_of(chat) is EvictionPolicy.TURNS
        await chat.press(*keys)
        await back_to_the_chat(chat)
        assert (policy_of(chat) is EvictionPolicy.SINKS) is done
        assert ("sinks" in chat.panel()) is done
        assert acts_but_asks(chat) == []


@pytest.mark.parametrize("miss", [None, MISS])
async def test_reading_that_no_act_could_save_is_not_asked_about(miss: Miss | None) -> None:
    """Without a miss everything is new; without a cache there is nothing to lose."""
    engine = ScriptedEngine().prices(DEAR, miss)
    async with running(engine, held_before()) as chat:
        if miss is None:
            await warmed(chat)
        await chat.send("/policy sinks")
        await chat.until_said("Policy sinks: the next turn reads")
        assert policy_of(chat) is EvictionPolicy.SINKS


async def test_a_policy_that_the_model_refuses_is_not_chosen() -> None:
    engine = ScriptedEngine().prices(None, refusal=f"A gap is wrong here. {WORST}")
    async with running(engine, toasts=True) as chat:
        await warmed(chat)
        await chat.send("/policy sinks")
        await chat.until_said("Policy sinks: nothing was changed. A gap is wrong here. [/b]")
        await chat.until_visible("A gap is wrong")
        assert_harmless(chat)
        assert policy_of(chat) is EvictionPolicy.TURNS


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("nonsense", ["NONE", "sinks now", WORST])
@pytest.mark.parametrize("command", ["policy", "kv"])
async def test_what_is_no_policy_and_no_precision_is_refused(
    command: str, nonsense: str, size: tuple[int, int]
) -> None:
    async with running(toasts=True, size=size) as chat:
        await chat.send(f"/{command} {nonsense}")
        await chat.until_said("is none of them")
        await chat.pilot.pause()
        assert_harmless(chat)
        assert chat.engine.acts == []
        assert policy_of(chat) is EvictionPolicy.TURNS
        assert chat.session.current.kv is KVPrecision.AUTO


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("/policy", "When the context is full: turns. /policy none|turns|sinks|snapkv"),
        ("/kv", "Keys and values: auto. /kv auto|fp32|bf16|int8|int4"),
    ],
)
async def test_without_an_argument_it_says_what_is_chosen_and_what_could_be(command: str, said: str) -> None:
    async with running() as chat:
        await chat.send(command)
        await chat.until_said(said)
        assert chat.engine.acts == []


# --- system prompt ---------------------------------------------------------------------------------------


async def test_the_price_of_a_system_prompt_is_that_of_the_turn_with_it() -> None:
    engine = ScriptedEngine().prices(CHEAP, MISS)
    async with running(engine) as chat:
        await warmed(chat)
        await chat.send("/system Be brief")
        await chat.until_said("New system prompt: the next turn reads 1,204 tokens, about 0.9 s, 1,100")
        first = asked(chat).request.messages[0]
        assert (first.role, first.text) == ("system", "Be brief")
        assert chat.session.current.system_prompt == "Be brief"
        assert not any("context is full" in said for said in chat.said())


@pytest.mark.parametrize(("key", "prompt"), [("escape", ""), ("y", WORST)])
async def test_a_dear_system_prompt_is_set_only_when_agreed(key: str, prompt: str) -> None:
    engine = ScriptedEngine().prices(DEAR, MISS)
    async with running(engine) as chat:
        await warmed(chat)
        set_system(chat.screen.controller, WORST)
        await chat.dialog(Confirm)
        assert_harmless(chat)
        await chat.press(key)
        await back_to_the_chat(chat)
        assert chat.session.current.system_prompt == prompt


# --- KV precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kv", [KVPrecision.INT8, KVPrecision.INT4, KVPrecision.BF16, KVPrecision.AUTO])
async def test_rounding_a_cache_is_done_at_once_and_told(kv: KVPrecision, size: tuple[int, int]) -> None:
    async with running(size=size) as chat:
        await warmed(chat)
        await chat.send(f"/kv {kv.value}")
        await chat.until_said(f"Keys and values: {kv.value}, 0.1 MB → ")
        await chat.until_said("of the last 64 tokens, the model would choose 63 as before")
        assert chat.engine.acts == [SetPrecision(chat.session.current.id, kv)]
        assert chat.store.load(chat.session.current.id).kv is kv
        await chat.ask("Next")
        assert chat.engine.requests[-1].kv is kv


@pytest.mark.parametrize(
    ("kv_dtype", "disk_only", "kv"),
    [
        ("int8", False, KVPrecision.BF16),
        ("int8", False, KVPrecision.AUTO),
        ("int4", False, KVPrecision.INT8),
        ("bf16", False, KVPrecision.FP32),
        ("", True, KVPrecision.INT4),
    ],
)
@pytest.mark.parametrize(("key", "done"), [("escape", False), ("y", True)])
async def test_what_can_not_be_rounded_is_read_again_and_asks_first(
    kv_dtype: str, disk_only: bool, kv: KVPrecision, key: str, done: bool
) -> None:
    session = held_before()
    name = session.current.id
    cache = WarmCache(name, 0, 0, 500_000) if disk_only else WarmCache(name, 9, 9000, kv_dtype=kv_dtype)
    engine = ScriptedEngine().holds(cache).prices(DEAR, MISS)
    async with running(engine, session) as chat:
        await chat.until(lambda: chat.listed()[0][0] != "○", "there is a cache")
        await chat.send(f"/kv {kv.value}")
        await chat.dialog(Confirm)
        assert asked(chat).request.kv is kv
        await chat.press(key)
        await back_to_the_chat(chat)
        assert acts_but_asks(chat) == ([SetPrecision(name, kv)] if done else [])
        assert session.current.kv is (kv if done else KVPrecision.AUTO)


async def test_a_precision_without_a_cache_holds_from_the_next_turn_on() -> None:
    async with running() as chat:
        await chat.send("/kv int8")
        await chat.until_said("Keys and values: int8; nothing is cached.")
        await chat.ask("Go")
        assert chat.engine.requests[0].kv is KVPrecision.INT8


# --- budget ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [("2GB", 2_000_000_000), ("512 mb", 512_000_000), ("1e9", 1_000_000_000), ("0.5g", 500_000_000)],
)
async def test_slash_budget_changes_it_and_the_panel_shows_it(size: str, bytes_: int) -> None:
    async with running() as chat:
        await chat.send(f"/budget {size}")
        await chat.until_said("All KV caches together may take")
        assert chat.engine.acts == [SetBudget(bytes_)]
        await chat.until(lambda: f"of {megabytes(bytes_)}" in chat.panel(), "the panel shows it")


BAD_SIZES = ["much", "-1", "0", "0 MB", "nan", "inf", "1e999", "GB", "2 GB of it", "[/b]", WORST]


@pytest.mark.parametrize("size", BAD_SIZES)
async def test_slash_budget_refuses_what_is_no_size(size: str) -> None:
    async with running(toasts=True) as chat:
        await chat.send(f"/budget {size}")
        await chat.until_said("A budget is a size, such as 2GB or 512MB.")
        await chat.pilot.pause()
        assert_harmless(chat)
        assert chat.engine.acts == []


@pytest.mark.parametrize("size", SIZES)
async def test_slash_budget_alone_asks(size: tuple[int, int]) -> None:
    async with running(size=size) as chat:
        await chat.send("/budget")
        await chat.dialog(AskLine)
        await chat.until_visible("2GB or 512MB")
        await chat.press(*"64MB", "enter")
        await back_to_the_chat(chat)
        assert chat.engine.acts == [SetBudget(64_000_000)]
        await chat.until(lambda: "of 64.0 MB" in chat.panel(), "the panel shows the budget")


@pytest.mark.parametrize("keys", [["escape"], ["enter"], [*"64MB", "escape"]])
async def test_turning_away_from_the_budget_changes_nothing(keys: list[str]) -> None:
    async with running() as chat:
        await chat.send("/budget")
        await chat.dialog(AskLine)
        await chat.press(*keys)
        await back_to_the_chat(chat)
        assert chat.engine.acts == []


async def test_bad_input_in_the_budget_dialog_is_refused() -> None:
    async with running(toasts=True) as chat:
        await chat.send("/budget")
        await chat.dialog(AskLine)
        await chat.press(*"[/b]", "enter")
        await back_to_the_chat(chat)
        await chat.until_visible("A budget is a size")
        assert_harmless(chat)
        assert chat.engine.acts == []


async def test_an_engine_that_starts_again_is_told_the_budget_again() -> None:
    async with running() as chat:
        await chat.send("/budget 64MB")
        await chat.until(lambda: "of 64.0 MB" in chat.panel(), "the panel shows the budget")
        chat.engine.die("The engine was killed (signal 9).")
        await chat.until(lambda: len(chat.engine.acts) == 2, "the new engine is told")
        assert chat.engine.acts == [SetBudget(64_000_000)] * 2


# --- an engine that gives no price -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "said"), [("/policy sinks", "Policy sinks"), ("/system Be brief", "New system prompt")]
)
async def test_without_an_engine_nothing_is_priced_and_nothing_hangs(command: str, said: str) -> None:
    engine = ScriptedEngine(loads_at_once=False).prices(DEAR, MISS)
    async with running(engine, held_before(), ready=False) as chat:
        await chat.until(lambda: "loading scripted" in chat.status(), "the engine is loading")
        await chat.send(command)
        await chat.until_said(f"{said}: holds from the next turn on.")
        current = chat.session.current
        assert (current.policy, current.system_prompt) != (EvictionPolicy.TURNS, "")
        assert engine.acts == []
        engine.loading.open()
        await chat.until(lambda: "ready" in chat.status(), "the engine is ready")


@pytest.mark.parametrize(
    ("command", "said"), [("/policy sinks", "Policy sinks"), ("/system Be brief", "New system prompt")]
)
async def test_while_an_answer_streams_nothing_is_priced_and_nothing_hangs(command: str, said: str) -> None:
    engine = ScriptedEngine().prices(DEAR, MISS)
    gate = engine.gate()
    engine.answers("Half", gate, " done")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Half")
        await chat.send(command)
        await chat.until_said(f"{said}: holds from the next turn on.")
        assert chat.app.screen is chat.screen
        assert engine.requests[0].policy is EvictionPolicy.TURNS
        gate.open()
        await chat.until_idle()
        assert chat.answers() == ["Half done"]
        assert engine.acts == []
        await chat.ask("Next")
        request = engine.requests[1]
        assert request.policy is EvictionPolicy.SINKS or request.messages[0].text == "Be brief"


async def test_a_precision_asked_for_while_an_answer_streams_comes_after_it() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Half", gate, " done")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Half")
        await chat.send("/kv int8")
        await chat.until(lambda: engine.acts, "the engine is told")
        assert chat.said() == []
        gate.open()
        await chat.until_said("Keys and values: int8, ")
        assert chat.answers() == ["Half done"]


async def test_an_engine_that_dies_before_it_names_a_price_holds_nothing_up() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await warmed(chat)
        engine.answers_acts = False
        await chat.send("/policy sinks")
        await chat.until(lambda: engine.acts, "the price is asked")
        assert policy_of(chat) is EvictionPolicy.TURNS
        engine.die("The engine was killed (signal 9).")
        await chat.until_said("Policy sinks: holds from the next turn on.")
        assert policy_of(chat) is EvictionPolicy.SINKS


async def test_a_price_that_comes_late_changes_no_other_conversation() -> None:
    engine = ScriptedEngine().prices(CHEAP, MISS)
    session = session_over()
    other = saved_conversation(session._store, ("user", "Other"), ("assistant", "Yes"))
    async with running(engine, session) as chat:
        await warmed(chat)
        engine.answers_acts = False
        await chat.send("/policy sinks")
        await chat.until(lambda: engine.acts, "the price is asked")
        key = asked(chat).key
        session.open(other.id)
        await chat.screen.controller.opened()
        for _ in range(2):
            engine._on_status(CostEstimate(key, 1, 0, 1, 0.1, None, PREVIEW))
        await chat.until_said("another conversation is open")
        assert policy_of(chat) is EvictionPolicy.TURNS
        assert len(chat.said()) == 1


async def test_what_the_engine_refuses_is_said() -> None:
    async with running(toasts=True) as chat:
        await warmed(chat)
        chat.engine._held.clear()
        await chat.press("f8")
        await chat.press("w")
        await chat.press("escape")
        await chat.until_visible("There is no such cache.")


# --- opening a conversation ------------------------------------------------------------------------------


def talked() -> Session:
    """A session in which a saved conversation is open."""
    session = session_over()
    talk = saved_conversation(session._store, ("user", "Which pass?"), ("assistant", "The Brenner."))
    session.open(talk.id)
    return session


async def test_opening_a_conversation_that_must_be_read_again_says_so_and_what_it_costs() -> None:
    """For instance because it goes on with another model."""
    miss = Miss("model changed: little → large", 1100, 1.5)
    engine = ScriptedEngine().prices(2.0, miss)
    engine.tells_openings = True
    session = talked()
    async with running(engine, session=session) as chat:
        await chat.until_said(
            "Going on here: the next turn reads 1,204 tokens, about 2.0 s, 1,100 of them again. "
            "Model changed: little → large."
        )
        assert {ask.request.conversation for ask in engine.openings} == {session.current.id}


async def test_opening_a_conversation_that_is_all_there_says_nothing() -> None:
    engine = ScriptedEngine().prices(0.1)
    engine.tells_openings = True
    async with running(engine, session=talked()) as chat:
        await chat.until(lambda: engine.openings, "the price is asked")
        await chat.pilot.pause()
        assert not any("Going on here" in said for said in chat.said())


async def test_the_price_of_going_on_is_not_told_to_whoever_went_on_already() -> None:
    engine = ScriptedEngine().prices(2.0, MISS)
    engine.tells_openings, engine.answers_acts = True, False
    writing = engine.gate()
    engine.answers(writing, "The Brenner.")
    async with running(engine, session=talked()) as chat:
        await chat.until(lambda: engine.openings, "the price is asked")
        await chat.send("And in winter?")
        await chat.until(lambda: writing.reached, "it is under way")
        engine._on_status(replace(engine._price, key=engine.openings[-1].key))
        writing.open()
        await chat.until_idle()
        assert not any("Going on here" in said for said in chat.said())


# --- editing ---------------------------------------------------------------------------------------------


async def test_editing_tells_its_price_and_asks_where_that_is_high() -> None:
    engine = ScriptedEngine().prices(CHEAP)
    async with running(engine) as chat:
        await warmed(chat)
        await chat.ask("And the second?")
        await chat.send("/edit 1")
        await chat.until_said("Asked anew in that place: the next turn reads 1,204 tokens, about 0.9 s.")
        question = chat.session.current.messages[0].text
        assert [message.text for message in asked(chat).request.messages] == [question]
        await chat.until(lambda: chat.prompt.text == question, "the question is in the prompt")
        await chat.press("escape")
        engine.prices(DEAR, MISS)
        await chat.send("/edit 1")
        await chat.dialog(Confirm)
        assert chat.prompt.text == ""
        await chat.press("n")
        await back_to_the_chat(chat)
        assert chat.prompt.text == ""
        await chat.send("/edit 1")
        await chat.dialog(Confirm)
        await chat.press("y")
        await chat.until(lambda: chat.prompt.text == question, "the question is in the prompt")
