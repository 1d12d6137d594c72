"""F2: every setting, changed in place and written to the file."""

from pathlib import Path

import pytest
from textual.widgets import Input, OptionList, Static

from kvchat.config.file import read_config
from kvchat.config.settings import SETTINGS
from kvchat.contract import CacheMode, SetBudget
from kvchat.ui.preferences import Preferences
from kvchat.ui.redraw_rate import STILL
from kvchat.ui.screens.dialogs import AskLine
from kvchat.ui.screens.settings import SettingsScreen
from tests.support.screen_driver import Chat, running


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)
    return tmp_path / "config.toml"


def write(file: Path, text: str) -> None:
    file.write_text(text)


def written(file: Path) -> str:
    """What stands in the file."""
    return file.read_text() if file.exists() else ""


async def open_at(chat: Chat, name: str) -> OptionList:
    """Opens the settings and marks one."""
    await chat.press("f2")
    await chat.dialog(SettingsScreen)
    listed = chat.app.screen.query_one(OptionList)
    listed.highlighted = listed.get_option_index(name)
    await chat.pilot.pause()
    return listed


def line(listed: OptionList, name: str) -> str:
    return " ".join(str(listed.get_option(name).prompt).split())


async def answer(chat: Chat, text: str) -> None:
    """Answers the question for a value."""
    await chat.dialog(AskLine)
    chat.app.screen.query_one(Input).value = text
    await chat.press("enter")
    await chat.dialog(SettingsScreen)


async def test_every_setting_is_listed_and_explained(file: Path) -> None:
    async with running(preferences=Preferences(config_file=file)) as chat:
        listed = await open_at(chat, "model")
        about = chat.app.screen.query_one("#about", Static)
        for setting in SETTINGS:
            listed.highlighted = listed.get_option_index(setting.name)
            words = setting.help
            await chat.until(lambda: words in str(about.content), "it is explained")  # noqa: B023 - at once
            assert setting.holds.value in str(about.content)
        assert written(file) == ""


async def test_a_value_is_asked_for_checked_and_written(file: Path) -> None:
    async with running(preferences=Preferences(config_file=file)) as chat:
        listed = await open_at(chat, "max-tokens")
        assert line(listed, "max-tokens") == "max-tokens the model card's"
        await chat.press("enter")
        await answer(chat, "many")
        await chat.until_said("max-tokens is a whole number from 1 to 10,000,000; 'many' is not.")
        assert written(file) == ""
        await chat.press("enter")
        await answer(chat, "64")
        await chat.until(lambda: line(listed, "max-tokens") == "● max-tokens 64", "it is shown")
        assert read_config(file).values == {"max_tokens": 64}
        await chat.press("escape", "ctrl+n")
        assert chat.session.current.sampling.max_tokens == 64
        await open_at(chat, "max-tokens")
        await chat.press("delete")
        await chat.until(lambda: read_config(file).values == {}, "it is taken out")
        assert chat.session.defaults.sampling.max_tokens == 512


async def test_words_are_stepped_through_and_hold_for_new_conversations(file: Path) -> None:
    async with running(preferences=Preferences(config_file=file)) as chat:
        listed = await open_at(chat, "cache")
        await chat.press("enter")
        await chat.until(lambda: line(listed, "cache") == "● cache turn", "the next word is taken")
        await chat.press("left", "left")
        await chat.until(lambda: line(listed, "cache") == "● cache off", "and from the first the last")
        modes = [chat.session.current.mode]
        await chat.press("escape", "ctrl+n")
        modes.append(chat.session.current.mode)
        assert modes == [CacheMode.ON, CacheMode.OFF]


async def test_the_theme_and_motion_change_at_once_and_are_kept(file: Path) -> None:
    async with running(preferences=Preferences(config_file=file)) as chat:
        await open_at(chat, "theme")
        await chat.press("right")
        await chat.until(lambda: chat.app.theme == "kvchat-light", "the colours are others")
        listed = chat.app.screen.query_one(OptionList)
        listed.highlighted = listed.get_option_index("reduced-motion")
        await chat.press("space")
        await chat.until(lambda: chat.app.has_class(STILL), "nothing moves")
        assert chat.app.animation_level == "none"
        assert read_config(file).values == {"theme": "kvchat-light", "reduced_motion": True}


async def test_the_budget_changes_at_once(file: Path) -> None:
    async with running(preferences=Preferences(config_file=file)) as chat:
        await open_at(chat, "kv-budget")
        await chat.press("enter")
        await answer(chat, "512MB")
        await chat.until(lambda: SetBudget(512_000_000) in chat.engine.acts, "the engine is told")


async def test_a_variable_that_wins_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCHAT_THREADS", "1")
    async with running(preferences=Preferences(config_file=file)) as chat:
        listed = await open_at(chat, "threads")
        assert line(listed, "threads") == "● threads 1"
        await chat.until_visible("KVCHAT_THREADS wins")


async def test_a_file_that_cannot_be_written_is_told_and_changes_nothing(file: Path) -> None:
    write(file, "theme = ")
    async with running(preferences=Preferences(config_file=file)) as chat:
        await open_at(chat, "theme")
        await chat.press("right")
        await chat.until_said("can't be changed")
        assert chat.app.theme == "kvchat-dark"
        assert written(file) == "theme = "


async def test_without_a_file_changes_hold_for_this_run() -> None:
    async with running() as chat:
        await open_at(chat, "theme")
        await chat.press("right")
        await chat.until(lambda: chat.app.theme == "kvchat-light", "the colours are others")
