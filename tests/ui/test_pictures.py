"""Pictures of the screen. After a change that is meant: `pytest tests/ui --snapshot-update`; look at them."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Protocol

import pytest
from textual.pilot import Pilot

from kvchat.chat.conversation import Preset
from kvchat.chat.model_choice import ModelShelf
from kvchat.chat.session import Session
from kvchat.contract import (
    CacheBlock,
    CacheEvent,
    CacheEventKind,
    CacheMap,
    Evicted,
    LayerGroup,
    Miss,
    Sampling,
    SetBudget,
    WarmCache,
)
from kvchat.models.cards import DEFAULT_MODEL
from kvchat.models.resolve import MARKER
from kvchat.models.staging import Progress
from kvchat.ui.app import ChatApp
from kvchat.ui.preferences import Preferences
from kvchat.ui.screens.cache_map import MapScreen
from kvchat.ui.screens.caches import CachesScreen
from kvchat.ui.screens.compare import RaceScreen
from kvchat.ui.screens.dialogs import Confirm, Explanation, Help
from kvchat.ui.screens.models import ModelScreen
from kvchat.ui.screens.options import OptionsScreen
from kvchat.ui.screens.search import SearchScreen
from kvchat.ui.screens.settings import SettingsScreen
from kvchat.ui.screens.timeline import TimelineScreen
from kvchat.ui.themes import OWN
from kvchat.ui.widgets.cache_grid import CURSOR
from kvchat.ui.widgets.conversations import TitleField
from kvchat.ui.widgets.tour_card import TourCard
from tests.support.screen_driver import MODEL, Chat, saved_conversation, session_over, still
from tests.support.scripted_engine import ScriptedEngine

SIZES = [(200, 60), (100, 30), (60, 20)]
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
MISS = Miss(
    "system prompt edited", 1100, 2.26, 3, " You are a helpful", " Be brief.\n", 0, "<|im_start|>system\n"
)
EVICTED = "the 2 oldest messages are left out; what stays is read again: exact"
AN_EVENING = datetime(2026, 5, 17, 20, 15).timestamp()
Compare = Callable[..., bool]


class Scene(Protocol):
    """Brings the chat to where the picture is taken; its name is the picture's."""

    __name__: str

    def __call__(self, chat: Chat) -> Awaitable[None]: ...


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


async def missed(chat: Chat) -> None:
    """F6 after a turn that read something again, and a full context."""
    await chat.ask("Which pass over the Alps is open in May?")
    chat.engine._scripts.clear()
    chat.engine.answers("The Brenner.", reuse_note=MISS.cause, miss=MISS, restored=7)
    await chat.ask("And which one is the highest?")
    await chat.press("f6")
    await chat.dialog(Explanation)


async def evicted(chat: Chat) -> None:
    """The context was full in mid-answer."""
    await chat.ask("Which pass over the Alps is open in May?")
    chat.engine._scripts.clear()
    chat.engine.answers("The Bren", Evicted("", 512, EVICTED, 2), "ner.", restored=7)
    await chat.ask("And which one is the highest?")


async def caches(chat: Chat) -> None:
    """F8 with a cache of every kind."""
    await chat.ask("Which pass over the Alps is open in May?")
    names = [summary.id for summary in chat.session.conversations()]
    chat.engine.holds(
        WarmCache(names[0], 1347, 1_031_000_000, 994_000_000, "bf16", pinned=True, last_used=AN_EVENING),
        WarmCache(names[1], 312, 7_200_000, 0, "int8", next_evicted=True, last_used=AN_EVENING - 3600),
        WarmCache(names[2], 0, 0, 94_000_000),
    )
    await chat.press("f8")
    await chat.dialog(CachesScreen)
    chat.engine.command(SetBudget(2_000_000_000))
    await chat.until_visible("◐ on disk")


async def pricing(chat: Chat) -> None:
    """The question before an act that costs more than a second."""
    await chat.ask("Which pass over the Alps is open in May?")
    chat.engine.prices(2.4, MISS)
    await chat.send("/policy sinks")
    await chat.dialog(Confirm)


def a_model_in(folder: Path) -> Path:
    """A folder that holds what looks like the default model."""
    made = folder / "models" / DEFAULT_MODEL
    made.mkdir(parents=True)
    (made / MARKER).write_text("{}")
    (made / "model.safetensors").write_bytes(b"\0" * 640_000)
    return made.parent


async def mapped(chat: Chat) -> None:
    """F5 with a sink, a gap, a fork, two precisions, and a part that is on disk only."""
    await chat.ask("Which pass over the Alps is open in May?")
    held = CacheBlock(0, 4, 0, "user", "Which pass", True, True, "int8", 4 * 11_520, sink=True)
    places = [(4, 16, 0), (20, 16, 0), (36, 16, 1), (52, 16, 1), (68, 16, 1), (84, 9, 1)]
    rest = [replace(held, start=s, tokens=n, message=m, bytes=n * 11_520, sink=False) for s, n, m in places]
    rest = [replace(block, role="assistant" if block.message else "user") for block in rest]
    rest[0] = replace(rest[0], shared=True)
    rest[2] = replace(rest[2], in_memory=False, on_disk=False, bytes=0, precision="")
    rest[3] = replace(rest[3], in_memory=False, bytes=0)
    rest[5] = replace(rest[5], precision="bf16", on_disk=False)
    layers = (LayerGroup("full", 30, 0, 1_031_000),)
    name = chat.session.current.id
    chat.engine.map = CacheMap(name, (held, *rest), layers, 1_031_000, 712_000, ("fork",))
    await chat.press("f5")
    await chat.dialog(MapScreen)
    await chat.until_visible("8 bits")
    await chat.press("up")
    await chat.until(lambda: CURSOR in chat.visible(), "the cursor is drawn")


async def raced(chat: Chat) -> None:
    """F7, after both runs."""
    await chat.send("/cache compare Which pass over the Alps is open in May?")
    await chat.dialog(RaceScreen)
    await chat.until_visible("Both wrote the same")


async def touring(chat: Chat) -> None:
    """The tour, after its first step."""
    await chat.send("/tour")
    await chat.until(lambda: chat.screen.query(TourCard), "the card is there")
    await chat.until_visible("Enter runs it")
    await chat.press("enter")
    await chat.until_visible("Enter goes on")


async def told(chat: Chat) -> None:
    """The timeline with an event of every kind."""
    await chat.ask("Which pass over the Alps is open in May?")
    name = chat.session.current.id
    events = [
        CacheEvent(name, kind, 40 * n, 900_000 * n, n / 100, "because" * (n % 3 == 0), AN_EVENING + 61 * n)
        for n, kind in enumerate(CacheEventKind)
    ]
    chat.session.note_events(events)
    await chat.send("/cache timeline")
    await chat.dialog(TimelineScreen)


def session_with_others() -> Session:
    """An empty conversation, and three older ones in the list."""
    session = session_over()
    for title in ("Bread", "KV caches, how do they work?", "漢字と絵文字 🏔️ in a title"):
        saved_conversation(session._store, ("user", title), ("assistant", "Well."))
    return session


async def completing(chat: Chat) -> None:
    """A slash word is being typed."""
    await chat.press("slash", "c")
    await chat.until_visible("/continue")


async def settings(chat: Chat) -> None:
    """F2, at a setting that the file sets."""
    await chat.press("f2")
    await chat.dialog(SettingsScreen)
    await chat.press(*("down",) * 6)


async def models(chat: Chat) -> None:
    """Ctrl+L, one model here, one being fetched, and the others not."""
    await chat.ask("Which pass over the Alps is open in May?")
    assert chat.screen.controller.models
    chat.screen.controller.models.fetching["qwen3-0.6b"] = Progress("download", 310_000_000, 1_190_000_000)
    await chat.press("ctrl+l")
    await chat.dialog(ModelScreen)
    await chat.until_visible("26%")


async def listed(chat: Chat) -> None:
    """Ctrl+S, where the list has to be asked for."""
    await chat.ask("Which pass over the Alps is open in May?")
    await chat.press("ctrl+s")
    if not chat.conversations.has_focus:
        await chat.press("ctrl+s")
    await chat.until(lambda: chat.conversations.has_focus, "the list has the focus")


async def panelled(chat: Chat) -> None:
    """F3, where the panel has to be asked for."""
    await chat.ask("Which pass over the Alps is open in May?")
    if not chat.shows("#panel"):
        await chat.press("f3")


async def searching(chat: Chat) -> None:
    """Ctrl+F, with hits in a title, a question, and a question that was taken back."""
    await chat.ask("Which pass is open?")
    await chat.ask("How high is it?")
    chat.session.undo()
    await chat.screen.controller.opened()
    await chat.press("ctrl+f")
    await chat.dialog(SearchScreen)
    await chat.press(*"how")
    await chat.until_visible("3 hits")


async def options(chat: Chat) -> None:
    """Ctrl+O with a preset, at a field that is explained."""
    chat.session.save_preset(Preset("Poet", "Rhyme.", Sampling(temperature=1.2, seed=7)))
    await chat.press("ctrl+o")
    await chat.dialog(OptionsScreen)
    await chat.press("tab")


async def renaming(chat: Chat) -> None:
    """R in the list: the title is edited over its line."""
    await listed(chat)
    await chat.press("r")
    await chat.until(lambda: chat.screen.query(TitleField), "the title is edited")


async def private(chat: Chat) -> None:
    """A conversation of which nothing is written, after a turn."""
    await chat.send("/private")
    await chat.until(lambda: "private" in chat.title(), "it is private")
    await chat.ask("Which pass over the Alps is open in May?")


async def attached(chat: Chat) -> None:
    """A file went with a message, and another one is in the prompt."""
    await chat.ask("Read @notes.md")
    chat.engine.tells_typed = True
    await chat.write("And compare it with @notes.md")
    await chat.until_visible("will read")


LAYOUTS = [empty, talk, panelled, listed, helped, caches, settings, mapped, raced]
"""Scenes that are laid out anew where there is more room."""
DIALOGS = [deleting, missed, evicted, pricing, completing, models, touring, told]
DIALOGS += [searching, options, renaming, private, attached]
COLOURFUL = [talk, caches, mapped, raced]
"""Scenes in which the light theme has its own colours to get wrong."""
DARK, LIGHT = (theme.name for theme in OWN)
VAST, MEDIUM, NARROW = SIZES
PICTURES = [
    *((scene, size, DARK) for scene in LAYOUTS for size in SIZES),
    *((scene, size, DARK) for scene in DIALOGS for size in (MEDIUM, NARROW)),
    *((scene, MEDIUM, LIGHT) for scene in COLOURFUL),
]


def picture_name(scene: Scene, size: tuple[int, int], theme: str) -> str:
    """`talk-100x30-kvchat-dark`."""
    return f"{scene.__name__}-{size[0]}x{size[1]}-{theme}"


@pytest.mark.parametrize(("scene", "size", "theme"), PICTURES, ids=[picture_name(*p) for p in PICTURES])
def test_the_screen_looks_as_it_did(
    scene: Scene,
    size: tuple[int, int],
    theme: str,
    snap_compare: Compare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    moments = (datetime.fromtimestamp(AN_EVENING + n).isoformat() for n in count())
    monkeypatch.setattr("kvchat.chat.store.now", moments.__next__)
    (tmp_path / "notes.md").write_text("The Brenner is open.\nThe Stelvio is not.\n")
    engine = ScriptedEngine()
    for answer in ("The Brenner is open all year.", "It is, but slower.", ANSWER):
        engine.answers(*re.findall(r"\s*\S+\s?", answer))
    session = session_with_others()
    file = tmp_path / "config.toml"
    file.write_text("max-tokens = 256\n")
    shelf = ModelShelf(a_model_in(tmp_path), lambda _folder, _name: engine.attach, lambda _name: ["false"])
    preferences = Preferences(theme, config_file=file)
    app = still(ChatApp(lambda: session, engine.attach, model=MODEL, preferences=preferences, shelf=shelf))

    async def play(pilot: Pilot[None]) -> None:
        chat = Chat(app, pilot, session, engine)
        await chat.until(lambda: "ready" in chat.status(), "the engine is ready")
        await scene(chat)
        app.clear_notifications()
        await pilot.pause()

    assert snap_compare(app, terminal_size=size, run_before=play)
