"""Slash words are offered while they are typed."""

import pytest

from kvchat.chat.commands import COMMANDS
from kvchat.contract import CacheMode
from kvchat.ui.completion import completions
from kvchat.ui.screens.dialogs import Help
from kvchat.ui.widgets.completions import Completions, shortened
from tests.support.screen_driver import Chat, running

BORDERS = 2


def offered(text: str) -> list[str]:
    return [completion.text for completion in completions(text, {"theme": ["kvchat-dark", "nord"]})]


def shown(chat: Chat) -> list[str]:
    """The words in the list over the prompt."""
    offers = chat.screen.query_one(Completions)
    return [str(option.prompt).split()[0] for option in offers.options] if offers.display else []


def test_a_slash_offers_every_command() -> None:
    assert offered("/") == [f"/{command.slash}" for command in COMMANDS]


@pytest.mark.parametrize(
    ("text", "first"),
    [("/se", "/settings"), ("/cac", "/cache"), ("/RE", "/regen"), ("/qu", "/exit"), ("/precision", "/kv")],
)
def test_what_is_typed_finds_commands_by_word_alias_and_title(text: str, first: str) -> None:
    assert offered(text)[0] == first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/cache o", ["/cache on", "/cache off"]),
        ("/cache m", ["/cache map"]),
        ("/policy s", ["/policy sinks", "/policy snapkv"]),
        ("/theme n", ["/theme nord"]),
    ],
)
def test_arguments_are_offered_where_they_are_known(text: str, words: list[str]) -> None:
    assert offered(text) == words


@pytest.mark.parametrize(
    "text",
    ["", "hello", " /help", "/nothing", "/help", "/cache on", "/theme nord", "/system Be brief", "/he\nlp"],
)
def test_nothing_is_offered_for_other_text_and_for_what_is_whole(text: str) -> None:
    assert offered(text) == []


@pytest.mark.parametrize(
    ("text", "cells", "fits"),
    [("Keep the cache.", 15, "Keep the cache."), ("Keep the cache.", 14, "Keep the …"), ("Keep", 0, "…")],
)
def test_help_is_shortened_at_a_word(text: str, cells: int, fits: str) -> None:
    assert shortened(text, cells).strip() == fits


async def test_the_list_comes_with_the_slash_and_goes_with_it() -> None:
    async with running() as chat:
        assert shown(chat) == []
        await chat.press("slash")
        await chat.until(lambda: len(shown(chat)) == len(COMMANDS), "every command is offered")
        await chat.press("p", "a", "n")
        await chat.until(lambda: shown(chat) == ["/panel"], "one is left")
        await chat.press(*["backspace"] * 4)
        await chat.until(lambda: shown(chat) == [], "the list is gone")


async def test_tab_takes_a_command_and_then_its_argument() -> None:
    async with running() as chat:
        await chat.press("slash", "c", "a", "c", "h", "tab")
        assert chat.prompt.text == "/cache "
        await chat.until(lambda: shown(chat)[:3] == ["on", "turn", "off"], "the modes are offered")
        await chat.press("down", "enter")
        await chat.until(lambda: chat.session.current.mode is CacheMode.TURN, "the mode is set")
        assert chat.prompt.text == ""
        assert shown(chat) == []


async def test_enter_runs_what_is_marked() -> None:
    async with running() as chat:
        await chat.press("slash", "h", "e", "enter")
        await chat.dialog(Help)


async def test_up_from_the_first_goes_to_the_last() -> None:
    async with running() as chat:
        await chat.press("slash", *"cache", "space", "o", "up", "enter")
        await chat.until(lambda: chat.session.current.mode is CacheMode.OFF, "the last one was taken")


async def test_enter_after_a_lone_slash_runs_nothing() -> None:
    async with running() as chat:
        await chat.press("slash", "enter")
        await chat.until_said("There is no command /.")
        assert chat.app.screen is chat.screen


async def test_escape_closes_the_list_and_stops_nothing() -> None:
    async with running() as chat:
        await chat.press("slash", "p", "a", "escape")
        await chat.until(lambda: shown(chat) == [], "the list is gone")
        assert chat.prompt.text == "/pa"
        await chat.press("n")
        await chat.until(lambda: shown(chat) == ["/panel"], "another text is offered something again")


async def test_a_click_takes_a_command() -> None:
    async with running() as chat:
        await chat.press("slash", "s", "y")
        await chat.until(lambda: shown(chat)[:1] == ["/system"], "it is offered")
        offers = chat.screen.query_one(Completions)
        # the list shrinks while one types, and moves down as it does
        await chat.until(lambda: offers.region.height == len(offers.options) + BORDERS, "it has its size")
        await chat.until(lambda: "/system" in chat.line(offers.region.y + 1), "it is drawn in its place")
        await chat.pilot.click(Completions, offset=(3, 1))
        await chat.until(lambda: chat.prompt.text == "/system ", "it is taken")
        assert chat.prompt.has_focus


async def test_the_words_of_the_theme_command_are_the_themes() -> None:
    async with running() as chat:
        await chat.press("slash", *"theme", "space", "k")
        await chat.until(lambda: shown(chat) == ["kvchat-dark", "kvchat-light"], "kvchat's own are offered")
