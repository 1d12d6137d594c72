"""Text that nobody should trust: whatever a model, a user, a file or a log says is shown and does nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.segment import Segment
from textual.widgets import Input

from kvchat.chat.model_choice import ModelShelf
from kvchat.contract import Loading
from kvchat.models.resolve import MARKER
from kvchat.text import clean, one_line
from kvchat.ui.preferences import Preferences
from kvchat.ui.screens.dialogs import AskLine, Confirm
from kvchat.ui.widgets.conversations import TitleField
from kvchat.ui.widgets.markdown import markdown_of
from tests.support.screen_driver import Chat, rendered, running, saved_conversation, session_over
from tests.support.scripted_engine import Fails, ScriptedEngine

MARKUP = "[/b] [/] [red]r[/red] [@click=app.bell]x[/] [$x] a[0] = b[i] \\[/] [link=file:///etc]"
CONTROLS = (
    "a\x1b[31mred\x1b[0m b\x1b]0;title\x07 c\x1b]8;;http://x\x1b\\link d\x9b2J e\x07\x08\x7f\x00 "
    "f\x90q\x9c g\x1b[2J\x1b[H h\x1bc end"
)
BIDI = "user\u202etxt.exe\u2066 i\u2069 \u200fmarks\u200e end"
WIDE = "漢字かな交じり文 🏔️👩‍👩‍👧‍👦 é́́ ｆｕｌｌ\u200b\ufeff end"
HTML = "<think>plan</think> <script>x()</script>\n\n<!-- note -->\n\n<div onclick='x'>\n\ntext\n\n</div> end"
TABLE = "| a[0] | [/b] |\n|:--|--:|\n| \x1b[31m | `[@click=app.bell]` |\n| only one |\n\n> - > 1. deep\n\nend"
NESTED = "".join(f"{'  ' * depth}- level {depth} [/b]\n" for depth in range(12)) + "\nend"
FENCE = "```python [/b]\na[0] = b[i]\x1b[31m\n# never closed [/]"
LONG_LINE = "word[/] " * 625
DEEP = "> " * 60 + "[" * 200 + "end" + "]" * 200
LINKS = "[x](javascript:alert) [y](file:///etc/passwd '[/b]') ![z](http://x/y.png) <http://x> [r]: http://x\n\nend"
HOSTILE = {
    "markup": MARKUP,
    "controls": CONTROLS,
    "bidi": BIDI,
    "wide": WIDE,
    "html": HTML,
    "table": TABLE,
    "nested": NESTED,
    "open fence": FENCE,
    "long line": LONG_LINE,
    "deep": DEEP,
    "links": LINKS,
    "blank": " \n\t\n ",
    "everything": "\n\n".join((MARKUP, CONTROLS, BIDI, WIDE, HTML, TABLE, NESTED, LINKS, FENCE)),
}
WORST = f"{MARKUP} {CONTROLS} {BIDI}"


def segments(chat: Chat) -> Iterator[Segment]:
    """Everything that is drawn, on every screen that is open."""
    for screen in chat.app.screen_stack:
        for strip in rendered(screen):
            yield from strip


def assert_harmless(chat: Chat) -> None:
    """No control character is drawn, nothing reorders a line, and no text became something to click."""
    if chat.app._exception:
        raise chat.app._exception
    for segment in segments(chat):
        assert segment.control is None
        for letter in segment.text:
            assert letter.isprintable() or letter in HARMLESS, f"{letter!r} in {segment.text!r}"
        meta = segment.style.meta if segment.style else {}
        assert "app.bell" not in str(meta.get("@click", "")), segment


HARMLESS = "\u200b\u200d\u200e\u200f\ufeff\ufe0f"
"""Format characters that the terminal may have: joiners, and the marks that right-to-left text needs."""


async def look_everywhere(chat: Chat) -> None:
    """Looks at the screen, at its other end, and at it in another width."""
    assert_harmless(chat)
    chat.transcript.scroll_home(animate=False)
    await chat.pilot.pause()
    assert_harmless(chat)
    await chat.pilot.resize_terminal(84, 24)
    await chat.pilot.pause()
    assert_harmless(chat)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_hostile_message_and_a_hostile_answer_are_shown_and_kept_as_they_are(text: str) -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    middle = len(text) // 2
    engine.answers(text[:middle], gate, *text[middle:])
    async with running(engine) as chat:
        await chat.screen.controller.send(text)
        await chat.until_reached(gate)
        await chat.pilot.pause()
        assert_harmless(chat)
        gate.open()
        await chat.until_idle()
        assert engine.requests[0].messages[0].text == text
        assert [kept for _, kept, _ in chat.kept()] == [text, text]
        await look_everywhere(chat)


@pytest.mark.parametrize("visible", ["a[0] = b[i]", "[@click=app.bell]x[/]", "[/b]", "[red]r[/red]"])
async def test_brackets_stay_visible_in_messages_answers_and_titles(visible: str) -> None:
    engine = ScriptedEngine().answers(f"Then {visible}\n\n```\ncode {visible}\n```")
    async with running(engine) as chat:
        await chat.ask(visible)
        await chat.until_visible(f"Then {visible}")
        await chat.until_visible(f"code {visible}")
        assert chat.questions() == [visible]
        assert chat.title() == visible
        assert chat.visible().count(visible) >= 4


@pytest.mark.parametrize("visible", ["<think>plan</think>", "<script>alert(1)</script>"])
async def test_html_stays_visible(visible: str) -> None:
    engine = ScriptedEngine().answers(f"See {visible} inline\n\n", f"{visible}\n\nmore")
    async with running(engine) as chat:
        await chat.ask(visible)
        await chat.until_visible(f"{visible} inline")
        assert chat.visible().count(visible) >= 4


async def test_the_end_of_a_long_line_and_of_an_open_fence_can_be_read() -> None:
    engine = ScriptedEngine().answers("x" * 5000 + " THE-END").answers("```\n" + "y" * 300 + "\nFENCE-END")
    async with running(engine) as chat:
        await chat.ask("Go")
        await chat.until_visible("THE-END")
        await chat.ask("Go on")
        await chat.until_visible("FENCE-END")


async def test_hostile_titles_are_harmless_wherever_they_stand() -> None:
    session = session_over()
    for text in HOSTILE.values():
        saved_conversation(session._store, ("user", "Hi"), ("assistant", "Ho"), title=text)
    async with running(session=session) as chat:
        for text, summary in zip(reversed(HOSTILE.values()), session.conversations(), strict=True):
            session.open(summary.id)
            await chat.screen.controller.opened()
            assert chat.title() == (one_line(text) or "new conversation")
            assert_harmless(chat)
        chat.conversations.focus()
        for _ in HOSTILE:
            await chat.press("down", "r")
            await chat.until(lambda: isinstance(chat.app.focused, TitleField), "the title is edited")
            assert_harmless(chat)
            await chat.press("escape")
            await chat.until(lambda: chat.conversations.has_focus, "the list has the focus")
            await chat.press("d")
            await chat.dialog(Confirm)
            assert_harmless(chat)
            await chat.press("escape")
        await chat.send(f"/rename {WORST}")
        await chat.until(lambda: chat.title() == one_line(WORST), "the title is another")
        assert_harmless(chat)


async def test_a_hostile_system_prompt_a_hostile_command_and_a_hostile_mode() -> None:
    async with running(toasts=True) as chat:
        for text, said in (
            (f"/system {WORST}", "New system prompt"),
            (f"/cache {WORST}", "The cache modes are"),
            (f"/{MARKUP}{CONTROLS}", "There is no command"),
            (f"/{CONTROLS}", "There is no command"),
        ):
            await chat.send(text)
            await chat.until_visible(said)
            assert_harmless(chat)
            chat.prompt.text = ""
            chat.app.clear_notifications()
        assert chat.session.current.system_prompt == clean(WORST)
        chat.screen.say(f"An error: {WORST}")
        await chat.until_visible("An error: ")
        assert_harmless(chat)
        await chat.send("/system")
        await chat.dialog(AskLine)
        assert_harmless(chat)
        assert "a[0] = b[i]" in chat.app.screen.query_one(Input).value


async def test_what_is_pasted_recalled_and_drafted_is_harmless() -> None:
    session = session_over()
    session.open(saved_conversation(session._store, ("user", WORST), ("assistant", "Ho")).id)
    session.save_draft(WORST)
    async with running(session=session) as chat:
        assert_harmless(chat)
        chat.prompt.text = ""
        await chat.press("up")
        assert "a[0] = b[i]" in chat.prompt.text
        await chat.pilot.pause()
        assert_harmless(chat)
        chat.prompt.text = ""
        await chat.write(WORST)
        assert "a[0] = b[i]" in chat.prompt.text
        await chat.pilot.pause()
        assert_harmless(chat)


async def test_a_hostile_log_and_a_hostile_reason() -> None:
    engine = ScriptedEngine()
    engine.answers("Half", engine.gate()).answers(Fails(WORST))
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Half")
        engine.die(f"Killed {WORST}", WORST, "last line a[0] = b[i]")
        await chat.until_noticed("last line a[0] = b[i]")
        await chat.until_visible("last line a[0] = b[i]")
        assert_harmless(chat)
        await chat.until(lambda: "ready" in chat.status(), "the engine is there again")
        await chat.ask("Again")
        await look_everywhere(chat)


async def test_a_hostile_model_name_and_a_hostile_note() -> None:
    engine = ScriptedEngine().answers("Fine", reuse_note=WORST)
    async with running(engine, model=f"model {WORST}") as chat:
        engine._on_status(Loading(WORST))
        await chat.until(lambda: "a[0] = b[i]" in chat.status().split(" · ")[1], "the status says it")
        assert_harmless(chat)
        await chat.ask("Go")
        await look_everywhere(chat)
        assert "a[0] = b[i]" in chat.notes()[0]


async def test_a_hostile_conversation_opens() -> None:
    session = session_over()
    talk = [(role, text) for text in HOSTILE.values() for role in ("user", "assistant")]
    session.open(saved_conversation(session._store, *talk).id)
    async with running(session=session) as chat:
        await chat.until(lambda: chat.answers()[-1:] == [markdown_of(HOSTILE["everything"])], "it is there")
        await look_everywhere(chat)
        for place in range(len(talk)):
            await chat.transcript.go_to(place, ["end", "[/b]"])
            await chat.pilot.pause()
            assert_harmless(chat)


async def test_hostile_settings_and_hostile_names_of_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCHAT_SYSTEM", f"{MARKUP} {CONTROLS}".replace("\0", ""))
    made = tmp_path / "models" / "[@click=app.bell]x[\x1b[31m]"
    made.mkdir(parents=True)
    (made / MARKER).write_text("{}")
    shelf = ModelShelf(made.parent, lambda _folder, _name: ScriptedEngine().attach, lambda _name: ["false"])
    async with running(shelf=shelf, preferences=Preferences(config_file=tmp_path / "c.toml")) as chat:
        await chat.press("f2")
        await chat.until_visible("temperature")
        assert_harmless(chat)
        await chat.press("escape", "ctrl+l")
        await chat.until_visible("SmolLM2")
        await chat.press("end")
        await chat.until_visible("[@click=app.bell]x[[31m]")
        assert_harmless(chat)
        await chat.press("enter")
        await chat.until(lambda: "[@click=app.bell]x" in chat.status(), "it answers")
        assert_harmless(chat)
        for text in (f"/theme {WORST}", f"/model {WORST}"):
            await chat.send(text)
            await chat.pilot.pause()
            assert_harmless(chat)
