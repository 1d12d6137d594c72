"""How a conversation answers: system prompt and sampling on one screen, and presets of them."""

from pathlib import Path

import pytest
from textual.widgets import Input, OptionList, TextArea

from kvchat.chat.conversation import Preset
from kvchat.chat.store import Store
from kvchat.contract import Sampling
from kvchat.ui.screens.options import OptionsScreen
from tests.support.screen_driver import Chat, running, saved_conversation, session_over
from tests.ui.test_hostile import WORST, assert_harmless

POET = Preset("Poet", "Rhyme.", Sampling(temperature=1.2, top_k=40, seed=7, max_tokens=64))


async def opened(chat: Chat) -> None:
    await chat.press("ctrl+o")
    await chat.dialog(OptionsScreen)


def field(chat: Chat, name: str) -> Input:
    return chat.app.screen.query_one(f"#{name}", Input)


def write(chat: Chat, **values: str) -> None:
    for name, value in values.items():
        field(chat, name).value = value


async def closed(chat: Chat) -> None:
    await chat.until(lambda: len(chat.app.screen_stack) == 1, "the screen is closed")


@pytest.mark.parametrize("size", [(60, 20), (116, 30), (160, 45)])
async def test_ctrl_o_changes_system_prompt_and_sampling_of_this_conversation(size: tuple[int, int]) -> None:
    session = session_over()
    session.open(saved_conversation(session._store, ("user", "Hi"), ("assistant", "Hello")).id)
    async with running(session=session, size=size) as chat:
        await opened(chat)
        assert field(chat, "temperature").value == "0"
        write(chat, temperature="0.7", seed="3", max_tokens="99")
        chat.app.screen.query_one(TextArea).text = "Be brief."
        await chat.press("ctrl+o")
        await closed(chat)
        await chat.until(lambda: session.current.system_prompt == "Be brief.", "it is set")
        saved = chat.store.load(session.current.id)
        assert saved.sampling == Sampling(temperature=0.7, seed=3, max_tokens=99)
        await chat.ask("And now?")
        assert chat.engine.requests[0].sampling == saved.sampling
        assert chat.engine.requests[0].messages[0].text == "Be brief."


async def test_escape_leaves_all_as_it_was() -> None:
    async with running() as chat:
        before = chat.session.current
        await opened(chat)
        write(chat, temperature="0.7")
        await chat.press("escape")
        await closed(chat)
        assert chat.session.current == before


@pytest.mark.parametrize(("name", "value"), [("temperature", "-1"), ("top_p", "2"), ("max_tokens", "x")])
async def test_a_wrong_value_is_said_and_stays_to_be_mended(name: str, value: str) -> None:
    async with running() as chat:
        await opened(chat)
        write(chat, **{name: value})
        await chat.press("ctrl+o")
        await chat.until_said(f"{value!r} is not.")
        assert field(chat, name).has_focus
        assert isinstance(chat.app.screen, OptionsScreen)


async def test_the_field_that_has_the_focus_is_explained() -> None:
    async with running() as chat:
        await opened(chat)
        field(chat, "temperature").focus()
        await chat.until_visible("How freely the next token is drawn")


async def test_presets_are_saved_taken_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "kvchat.db"
    async with running(session=session_over(Store(path))) as chat:
        await opened(chat)
        await chat.until_visible("None yet: give what stands here a name below.")
        chat.app.screen.query_one(TextArea).text = "Rhyme."
        write(chat, temperature="1.2", top_k="40", seed="7", max_tokens="64")
        field(chat, "save-as").value = "Poet"
        field(chat, "save-as").focus()
        await chat.press("enter")
        await chat.until_visible("Poet · temperature 1.2 · Rhyme.")
        await chat.press("escape")
        await closed(chat)
    store = Store(path)
    assert store.presets() == [POET]
    async with running(session=session_over(store)) as chat:
        await opened(chat)
        chat.app.screen.query_one(OptionList).focus()
        await chat.press("down", "enter", "ctrl+o")
        await closed(chat)
        assert (chat.session.current.system_prompt, chat.session.current.sampling) == (
            "Rhyme.",
            POET.sampling,
        )
        await opened(chat)
        chat.app.screen.query_one(OptionList).focus()
        await chat.press("down", "d")
        await chat.until(lambda: store.presets() == [], "it is deleted")


def test_a_preset_of_the_same_name_is_replaced() -> None:
    store = Store(None)
    store.save_preset(POET)
    store.save_preset(Preset("Poet", "", Sampling()))
    store.save_preset(Preset("Clerk", "", Sampling()))
    assert store.presets() == [Preset("Clerk", "", Sampling()), Preset("Poet", "", Sampling())]
    store.delete_preset("Nobody")


async def test_hostile_presets_and_prompts_are_harmless_and_stay_as_they_are() -> None:
    session = session_over()
    session.configure(system_prompt=WORST)
    session.save_preset(Preset(WORST, WORST, Sampling()))
    async with running(session=session) as chat:
        await opened(chat)
        assert_harmless(chat)
        await chat.press("ctrl+o")
        await closed(chat)
        assert chat.session.current.system_prompt == WORST
