"""Commands: one table, reached by key, slash word and palette; and what each of them does."""

from collections import Counter
from pathlib import Path

import pytest
from textual.command import CommandPalette
from textual.widgets import Input, Markdown

from kvchat.chat.commands import (
    ALIASES,
    COMMANDS,
    Command,
    parse_slash,
)
from kvchat.chat.controller import ChatController
from kvchat.chat.engine_supervisor import EngineSupervisor
from kvchat.chat.model_choice import Models, ModelShelf
from kvchat.chat.port import Port, complete
from kvchat.contract import CacheMode
from kvchat.ui.help_text import help_markdown, key_label
from kvchat.ui.key_bindings import UNBOUND, bindings
from kvchat.ui.screens.dialogs import AskLine, Help
from kvchat.ui.views import VIEWS
from kvchat.ui.widgets.panel import MEANING
from tests.support.screen_driver import MODEL, running, session_over
from tests.support.scripted_engine import ScriptedEngine


class ViewsOnly(Port):
    """Notes which views are opened."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def open_view(self, name: str, argument: str) -> None:
        self.opened.append(name)


def views_of(command: Command) -> list[str]:
    """The views that a command opens in an empty conversation, with a model to choose."""
    port, engine = ViewsOnly(), ScriptedEngine()
    shelf = ModelShelf(Path("/nowhere"), lambda *_: engine.attach, lambda name: [name])
    models = Models(shelf, port.say, lambda: None)
    chat = ChatController(
        session_over(), EngineSupervisor(engine.attach, lambda _: None), port, MODEL, models
    )
    complete(chat.run(command))
    return port.opened


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_an_action_and_stands_in_the_help(command: Command) -> None:
    opened = views_of(command)
    assert set(opened) <= set(VIEWS)
    assert bool(command.instead) <= bool(opened)
    assert f"`/{command.slash}" in help_markdown()
    assert command.help in help_markdown()
    assert not command.key or key_label(command.key) in help_markdown()
    assert parse_slash(f"/{command.slash}") == (command, "")


@pytest.mark.parametrize("field", ["name", "title", "key", "slash"])
def test_no_two_commands_share_a_name_a_key_or_a_slash_word(field: str) -> None:
    values = [getattr(command, field) for command in COMMANDS]
    assert [value for value, count in Counter(values).items() if value and count > 1] == []


def test_every_alias_means_a_command() -> None:
    slashes = {command.slash for command in COMMANDS}
    assert set(ALIASES.values()) <= slashes
    assert not set(ALIASES) & slashes


def test_every_key_is_bound_to_its_command() -> None:
    bound = {(binding.key, binding.action) for binding in bindings() if not isinstance(binding, tuple)}
    assert bound == {
        (command.key or UNBOUND + command.name, f"run_command('{command.name}')") for command in COMMANDS
    }


@pytest.mark.parametrize(
    ("text", "name", "argument"),
    [
        ("/system Be brief, (please) 'now'", "system", "Be brief, (please) 'now'"),
        ("/system Line one\nline two", "system", "Line one\nline two"),
        ("/quit", "leave", ""),
        ("/?", "help", ""),
        ("/retry ", "regenerate", ""),
    ],
)
def test_a_slash_word_names_a_command(text: str, name: str, argument: str) -> None:
    parsed = parse_slash(text)
    assert parsed
    assert (parsed[0].name, parsed[1]) == (name, argument)


@pytest.mark.parametrize("text", ["/nothing", "/", "/helpme", "//", "/etc/hosts is a file"])
def test_other_words_name_none(text: str) -> None:
    assert parse_slash(text) is None


async def test_every_command_is_in_the_palette() -> None:
    async with running() as chat:
        offered = {system.title: system.help for system in chat.app.get_system_commands(chat.app.screen)}
        assert offered.items() >= {command.title: command.help for command in COMMANDS}.items()
        assert "Quit" in offered
        await chat.press("ctrl+p")
        await chat.dialog(CommandPalette)
        chat.app.screen.query_one(Input).value = "Cache mode"
        await chat.until_visible("Keep the KV cache")
        await chat.press("enter")
        await chat.until(lambda: chat.session.current.mode is CacheMode.TURN, "the command ran")


async def test_slash_help_opens_the_help_and_escape_closes_it() -> None:
    async with running() as chat:
        await chat.send("/help")
        await chat.dialog(Help)
        assert chat.app.screen.query_one(Markdown).source == help_markdown()
        await chat.press("escape")
        await chat.until(lambda: chat.app.screen is chat.screen, "the help is closed")
        assert chat.prompt.text == ""


async def test_f1_opens_and_closes_the_help() -> None:
    async with running() as chat:
        await chat.press("f1")
        await chat.dialog(Help)
        await chat.press("f1")
        await chat.until(lambda: chat.app.screen is chat.screen, "the help is closed")


async def test_slash_new_opens_an_empty_conversation() -> None:
    async with running() as chat:
        await chat.ask("First")
        await chat.send("/new")
        await chat.until(lambda: chat.title() == "new conversation", "an empty conversation is open")
        assert chat.questions() == []


async def test_slash_clear_empties_the_conversation_and_its_cache() -> None:
    async with running() as chat:
        await chat.ask("First")
        cleared = chat.session.current.id
        await chat.send("/clear")
        await chat.until(lambda: chat.questions() == [], "the transcript is empty")
        assert chat.engine.forgotten == [cleared]
        assert chat.kept() == []
        assert chat.title() == "First"
        assert chat.listed()[0].startswith("○")
        await chat.ask("Second")
        assert [m.text for m in chat.engine.requests[1].messages] == ["Second"]


@pytest.mark.parametrize("mode", list(CacheMode))
async def test_slash_cache_sets_a_mode(mode: CacheMode) -> None:
    async with running() as chat:
        await chat.send(f"/cache {mode.value}")
        await chat.until(lambda: MEANING[mode] in chat.panel(), "the panel shows the mode")
        await chat.ask("Go")
        assert chat.engine.requests[0].mode is mode


async def test_slash_cache_without_a_mode_takes_the_next_one() -> None:
    async with running() as chat:
        await chat.send("/cache")
        await chat.until(lambda: MEANING[CacheMode.TURN] in chat.panel(), "the panel shows the mode")


@pytest.mark.parametrize("nonsense", ["nonsense", "ON", "[/b]", "on off"])
async def test_slash_cache_refuses_what_is_no_mode(nonsense: str) -> None:
    async with running() as chat:
        await chat.send(f"/cache {nonsense}")
        await chat.until_said(f"on, turn and off; not {nonsense}")
        assert chat.session.current.mode is CacheMode.ON


async def test_slash_system_sets_the_system_prompt_of_the_next_turn() -> None:
    async with running() as chat:
        await chat.send("/system Be brief, (please) 'now' [/b]")
        await chat.until_said("New system prompt")
        await chat.ask("Go")
        first = chat.engine.requests[0].messages[0]
        assert (first.role, first.text) == ("system", "Be brief, (please) 'now' [/b]")
        assert chat.store.load(chat.session.current.id).system_prompt == first.text


async def test_slash_system_alone_asks_and_enter_keeps_the_line_breaks() -> None:
    async with running() as chat:
        chat.session.configure(system_prompt="Be brief.\n\nBe kind.")
        await chat.send("/system")
        await chat.dialog(AskLine)
        await chat.press("enter")
        await chat.until(lambda: chat.app.screen is chat.screen, "the dialog is closed")
        assert chat.session.current.system_prompt == "Be brief.\n\nBe kind."
        await chat.send("/system")
        await chat.dialog(AskLine)
        chat.app.screen.query_one(Input).value = "Be long."
        await chat.press("enter")
        await chat.until(lambda: chat.session.current.system_prompt == "Be long.", "the prompt is set")


async def test_slash_rename_gives_another_title() -> None:
    async with running() as chat:
        await chat.ask("First")
        await chat.send("/rename  Better [/b] (title)")
        await chat.until(lambda: chat.title() == "Better [/b] (title)", "the title is another")
        await chat.send("/rename")
        await chat.dialog(AskLine)
        assert chat.app.screen.query_one(Input).value == "Better [/b] (title)"


async def test_an_empty_conversation_has_no_title_to_change() -> None:
    async with running() as chat:
        await chat.send("/rename Early")
        await chat.until_said("no messages yet")
        assert chat.session.conversations() == []


async def test_slash_regen_writes_the_answer_again() -> None:
    engine = ScriptedEngine().answers("First").answers("Second")
    async with running(engine) as chat:
        await chat.ask("Go")
        await chat.send("/regen")
        await chat.until_drawn("Second")


async def test_slash_sessions_panel_and_stop() -> None:
    engine = ScriptedEngine()
    engine.answers("Half", engine.gate())
    async with running(engine) as chat:
        await chat.send("/panel")
        await chat.until(lambda: not chat.screen.query_one("#panel").display, "the panel is hidden")
        await chat.send("Go")
        await chat.until_drawn("Half")
        await chat.send("/stop")
        await chat.until_idle()
        assert chat.kept()[-1] == ("assistant", "Half", "cancelled")
        await chat.send("/sessions")
        await chat.until(lambda: chat.conversations.has_focus, "the list has the focus")


@pytest.mark.parametrize("word", ["/exit", "/quit"])
async def test_slash_exit_leaves(word: str) -> None:
    async with running() as chat:
        await chat.write(word)
        await chat.press("enter")
        await chat.until_left()
    assert chat.engine._state == "closed"
    assert chat.app.return_code == 0
    assert chat.store.summaries() == []


@pytest.mark.parametrize("text", ["/nonsense", "/", "/[/b]"])
async def test_an_unknown_command_is_refused_and_stays_in_the_prompt(text: str) -> None:
    async with running() as chat:
        await chat.send(text)
        await chat.until_said(f"There is no command {text}.")
        assert chat.prompt.text == text
        assert chat.engine.requests == []


async def test_several_lines_that_start_with_a_slash_are_a_message() -> None:
    async with running() as chat:
        await chat.ask("/etc/hosts:\n127.0.0.1 localhost")
        assert chat.engine.requests[0].messages[0].text == "/etc/hosts:\n127.0.0.1 localhost"


async def test_ctrl_c_copies_a_selection_and_stops_nothing() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Half", gate)
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Half")
        await chat.write("copy me")
        chat.prompt.select_all()
        await chat.press("ctrl+c")
        assert chat.app.clipboard == "copy me"
        assert engine.stops == []
        assert chat.prompt.text == "copy me"
        gate.open()
        await chat.until_idle()


async def test_ctrl_c_copies_what_is_selected_in_the_transcript() -> None:
    engine = ScriptedEngine().answers("Read and copy")
    async with running(engine) as chat:
        await chat.ask("Go")
        await chat.until_visible("Read and copy")
        chat.screen.text_select_all()
        await chat.press("ctrl+c")
        assert "Read and copy" in chat.app.clipboard


async def test_ctrl_c_copies_what_is_selected_in_a_dialog() -> None:
    engine = ScriptedEngine()
    engine.answers("Half", engine.gate())
    async with running(engine) as chat:
        await chat.send("A title")
        await chat.until_drawn("Half")
        await chat.send("/rename")
        await chat.dialog(AskLine)
        chat.app.screen.query_one(Input).select_all()
        await chat.press("ctrl+c")
        assert chat.app.clipboard == "A title"
        assert engine.stops == []


async def test_ctrl_c_stops_an_answer_and_only_that() -> None:
    engine = ScriptedEngine()
    engine.answers("Half", engine.gate())
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Half")
        await chat.press("ctrl+c")
        await chat.until_idle()
        assert chat.kept()[-1] == ("assistant", "Half", "cancelled")
        assert chat.said() == []
        await chat.press("ctrl+c")
        await chat.until_said("Ctrl+C again quits.")


async def test_ctrl_c_twice_quits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvchat.ui.app.QUIT_WITHIN_S", 60.0)
    async with running() as chat:
        await chat.press("ctrl+c")
        await chat.until_said("Ctrl+C again quits.")
        assert not chat.left
        await chat.press("ctrl+c")
        await chat.until_left()
    assert chat.app.return_code == 0


async def test_a_second_ctrl_c_that_comes_late_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvchat.ui.app.QUIT_WITHIN_S", 0.0)
    async with running() as chat:
        await chat.press("ctrl+c")
        await chat.press("ctrl+c")
        await chat.until(lambda: not chat.left, "it asks again")
