"""Pictures of the screen. After a change that is meant: `pytest tests/ui --snapshot-update`; look at them."""

import re
from collections.abc import Awaitable, Callable

import pytest
from textual.pilot import Pilot

from kvchat.session import Session
from kvchat.ui.app import ChatApp
from kvchat.ui.screens.dialogs import Confirm, Help
from tests.ui.driving import MODEL, Chat, saved_conversation, session_over, still
from tests.ui.scripted import ScriptedEngine

SIZES = [(150, 44), (100, 30), (60, 20)]
ANSWER = """\
Most **high passes** open between late May and June; two stay open all year:

| pass | height | open |
|---|---:|---|
| Brenner | 1,370 m | all year |
| Reschen | 1,507 m | all year |

1. Look at the *road report* before you leave.
2. Take chains until May:

```python
def chains(month: int) -> bool:
    return month < 6 or snow[month] > 0
```

> The drive over the Brenner takes about `3 h 10 min`.
"""
Compare = Callable[..., bool]
Scene = Callable[[Chat], Awaitable[None]]


async def empty(chat: Chat) -> None:
    """Nothing was written yet."""


async def talk(chat: Chat) -> None:
    """Two turns with the cache and one without it."""
    await chat.ask("Which pass over the Alps is open in May?")
    await chat.press("f4", "f4")
    await chat.ask("And without the cache?")
    await chat.press("f4")
    await chat.ask("How long is the drive, and what do I need?")
    await chat.write("and how far is")


async def helped(chat: Chat) -> None:
    """The help is open."""
    await chat.press("f1")
    await chat.dialog(Help)


async def deleting(chat: Chat) -> None:
    """The question before a conversation is deleted."""
    await chat.ask("Which pass over the Alps is open in May?")
    await chat.send("/delete")
    await chat.dialog(Confirm)


def session_with_others() -> Session:
    """An empty conversation, and three older ones in the list."""
    session = session_over()
    for title in ("Bread", "KV caches, how do they work?", "漢字と絵文字 🏔️ in a title"):
        saved_conversation(session._store, ("user", title), ("assistant", "Well."))
    return session


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("scene", [empty, talk, helped, deleting], ids=lambda scene: str(scene.__name__))
def test_the_screen_looks_as_it_did(scene: Scene, size: tuple[int, int], snap_compare: Compare) -> None:
    engine = ScriptedEngine()
    for answer in ("The Brenner is open all year.", "It is, but slower.", ANSWER):
        engine.answers(*re.findall(r"\s*\S+\s?", answer))
    session = session_with_others()
    app = still(ChatApp(lambda: session, engine.attach, model=MODEL))

    async def play(pilot: Pilot[None]) -> None:
        chat = Chat(app, pilot, session, engine)
        await chat.until(lambda: "ready" in chat.status(), "the engine is ready")
        await scene(chat)
        await chat.until(lambda: not chat.app._notifications, "nothing is said in passing")
        await pilot.pause()

    assert snap_compare(app, terminal_size=size, run_before=play)
