"""The first moments: the screen paints before the conversations are open; nothing typed meanwhile is lost."""

import asyncio
import subprocess
import sys

import pytest

from kvchat.chat.commands import COMMANDS
from kvchat.chat.session import Session
from kvchat.errors import KvchatError
from kvchat.ui.app import ChatApp
from kvchat.ui.screens.chat import ChatScreen
from tests.support.screen_driver import MODEL, Chat, running, saved_conversation, session_over
from tests.support.scripted_engine import ScriptedEngine


async def test_what_is_pressed_before_the_session_is_open_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = asyncio.Event()
    begin = ChatScreen._begin

    async def begin_later(screen: ChatScreen) -> None:
        await opened.wait()
        await begin(screen)

    tasks: list[asyncio.Task[None]] = []

    def begin_beside(screen: ChatScreen) -> None:
        tasks.append(asyncio.create_task(begin_later(screen)))

    monkeypatch.setattr(ChatScreen, "_begin", begin_beside)
    session = session_over()
    session.open(saved_conversation(session._store, ("user", "Hi"), ("assistant", "Ho")).id)
    session.save_draft("draft ")
    async with running(session=session, ready=False) as chat:
        await chat.press(*"typed", "enter", "!")
        for command in COMMANDS:
            if command.key and command.name != "leave":
                await chat.press(command.key)
        assert chat.engine.starts == 0
        assert chat.app.screen is chat.screen
        opened.set()
        await chat.until(lambda: "ready" in chat.status(), "the engine is ready")
        assert chat.prompt.text == "draft typed!"
        assert chat.answers() == ["Ho"]
        assert chat.engine.requests == []
        await chat.ask("more")
        assert chat.engine.requests[0].messages[-1].text == "draft typed!more"


async def test_conversations_that_cannot_be_opened_end_the_program_with_a_word() -> None:
    def refuse() -> Session:
        raise KvchatError("The file is locked.")

    engine = ScriptedEngine()
    app = ChatApp(refuse, engine.attach, model=MODEL)
    async with app.run_test() as pilot:
        await Chat(app, pilot, session_over(), engine).until_left()
    assert app.return_code == 1
    assert engine.starts == 0
    assert engine._state == "closed"


async def test_the_engine_starts_once_and_the_status_says_how_far_it_is() -> None:
    engine = ScriptedEngine(loads_at_once=False)
    async with running(engine, ready=False) as chat:
        await chat.until(lambda: "loading scripted" in chat.status(), "the engine is loading")
        await chat.until_visible("loading scripted")
        assert chat.prompt.has_focus
        engine.loading.open()
        await chat.until(lambda: "eager bf16" in chat.status(), "the engine is ready")
        await chat.until_visible("eager bf16 · 2 threads")
        assert engine.starts == 1


def test_the_first_paint_waits_for_nothing_that_is_needed_later() -> None:
    """What the chat imports before it paints; each of these takes tens of milliseconds."""
    later = {
        "markdown_it",
        "pygments.lexers",
        "rich.markdown",
        "rich.progress",
        "filelock",
        "email",
        "sqlite3",
    }
    later |= {
        "importlib.metadata",
        "kvchat.chat.exporters",
        "kvchat.cli.doctor",
        "kvchat.engine.setup.prepare",
    }
    later |= {"kvchat.ui.screens.dialogs", "kvchat.ui.widgets.markdown_layout"}
    modules = (
        "kvchat.cli.main, kvchat.engine_process.client, kvchat.models.resolve, "
        "kvchat.chat.model_choice, kvchat.ui.key_bindings, kvchat.ui.app"
    )
    program = f"import sys, {modules}, kvchat.engine.compiled.package as _; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "kvchat.ui.screens.chat" in imported
    assert imported.isdisjoint(later)
