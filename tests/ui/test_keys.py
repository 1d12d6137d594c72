"""Keys that the user gave to commands."""

import pytest

from kvchat.chat.commands import COMMANDS, remapped
from kvchat.errors import KvchatError
from kvchat.ui.help_text import help_markdown
from kvchat.ui.key_bindings import checked_keys
from kvchat.ui.preferences import Preferences
from kvchat.ui.screens.dialogs import Help
from tests.support.screen_driver import running


def test_keys_are_taken_as_they_are_written() -> None:
    assert checked_keys({"panel": "F9", "clear": "ctrl+g, alt+k"}) == {"panel": "f9", "clear": "ctrl+g,alt+k"}
    assert checked_keys({}) == {}


def test_two_commands_may_swap_their_keys() -> None:
    assert checked_keys({"panel": "f4", "cache": "f3"}) == {"panel": "f4", "cache": "f3"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pannel": "f9"}, "names pannel, which is no command. Commands: help, "),
        ({"panel": ""}, "gives panel no key"),
        ({"panel": 9}, "gives panel no key"),
        ({"panel": "f99"}, "gives panel the key f99, which there is not"),
        ({"panel": "hyper+k"}, r"the key hyper\+k, which there is not"),
        ({"panel": "k"}, "the key k, which is for writing"),
        ({"panel": "shift+k"}, "which is for writing"),
        ({"panel": "ctrl+c"}, "which copies, stops and quits"),
        ({"panel": "enter"}, "which sends the message"),
        ({"panel": "f4"}, "leaves F4 to panel and cache"),
        ({"panel": "f9", "clear": "f9"}, "leaves F9 to panel and clear"),
        ("f9", r"\[keys\] is a table"),
    ],
)
def test_what_is_no_key_is_named_in_a_sentence(given: object, words: str) -> None:
    with pytest.raises(KvchatError, match=words):
        checked_keys(given)


async def test_a_command_listens_to_its_new_key_and_no_more_to_its_old_one() -> None:
    async with running(preferences=Preferences(keys={"panel": "f9"})) as chat:
        await chat.press("f3")
        assert chat.shows("#panel")
        await chat.press("f9")
        await chat.until(lambda: not chat.shows("#panel"), "the panel is hidden")


async def test_a_command_without_a_key_can_be_given_one() -> None:
    async with running(preferences=Preferences(keys={"clear": "ctrl+g,alt+k"})) as chat:
        for key in ("ctrl+g", "alt+k"):
            await chat.ask("First")
            await chat.press(key)
            await chat.until(lambda: chat.questions() == [], "the transcript is empty")


async def test_the_help_and_the_line_of_keys_tell_the_new_key() -> None:
    keys = {"panel": "f9", "help": "ctrl+g"}
    async with running(preferences=Preferences(keys=keys)) as chat:
        await chat.until_visible("F9 panel")
        await chat.press("ctrl+g")
        await chat.dialog(Help)
        await chat.until_visible("Ctrl+G")
    assert "| F9 | `/panel`" in help_markdown(remapped(keys))
    assert "| F3 | `/panel`" in help_markdown(COMMANDS)
