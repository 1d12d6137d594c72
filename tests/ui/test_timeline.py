"""The timeline: every event of a cache is a line, with its glyph, its tokens, its bytes and its reason."""

from datetime import datetime

import pytest

from kvchat.contract import CacheEvent, CacheEventKind
from kvchat.ui.screens.caches import CachesScreen
from kvchat.ui.screens.timeline import BAR_CELLS, EMPTY, KINDS, SHOWN, TimelineScreen, event_line, timeline
from tests.support.screen_driver import running

AT = datetime(2026, 5, 17, 20, 15, 3).timestamp()
DAY_S = 86_400


def event(kind: CacheEventKind, tokens: int = 10, *, note: str = "", at: float = AT) -> CacheEvent:
    return CacheEvent("id", kind, tokens, 31_000_000, 0.023, note, at)


def test_every_kind_of_event_has_a_glyph_of_its_own() -> None:
    assert set(KINDS) == set(CacheEventKind)
    assert len({glyph for glyph, _ in KINDS.values()}) == len(KINDS)


def test_a_line_tells_when_what_how_much_and_why() -> None:
    line = event_line(event(CacheEventKind.MISS, 1204, note="system prompt edited"), 1204).plain
    before_why, why = line[:-20], line[-20:]
    assert before_why.split() == ["20:15:03", "█", "miss", "1,204", "█" * BAR_CELLS, "31.0", "MB", "23", "ms"]
    assert why == "system prompt edited"


@pytest.mark.parametrize(
    ("tokens", "largest", "cells"), [(0, 10, 0), (1, 1000, 1), (5, 10, BAR_CELLS // 2), (0, 0, 0)]
)
def test_bars_are_as_long_as_the_tokens(tokens: int, largest: int, cells: int) -> None:
    drawn = event_line(event(CacheEventKind.SAVE, tokens), largest).plain
    assert drawn.count("↓") == cells + 1


def test_days_have_a_line_and_an_empty_timeline_says_what_will_be_there() -> None:
    events = [
        event(CacheEventKind.SAVE),
        event(CacheEventKind.SAVE),
        event(CacheEventKind.DROP, at=AT + DAY_S),
    ]
    lines = timeline(events).plain.splitlines()
    assert [line for line in lines if "2026" in line] == ["Sunday, 17 May 2026", "Monday, 18 May 2026"]
    assert len(lines) == 5
    assert timeline([]).plain == EMPTY


def test_of_a_long_life_the_latest_part_is_drawn() -> None:
    lines = timeline([event(CacheEventKind.SAVE, n + 1) for n in range(SHOWN + 7)]).plain.splitlines()
    assert lines[0] == "… 7 earlier ones"
    assert len(lines) == SHOWN + 2
    assert f"{SHOWN + 7:,}" in lines[-1]


async def test_it_opens_for_the_open_conversation_and_from_the_list_of_caches() -> None:
    async with running() as chat:
        await chat.send("/cache timeline")
        await chat.dialog(TimelineScreen)
        await chat.until_visible("Nothing has happened to this cache yet.")
        await chat.press("escape")
        await chat.ask("Bread?")
        name = chat.session.current.id
        chat.session.note_events([CacheEvent(name, CacheEventKind.SAVE, 10, note="[/b]\x1b[31mred", at=AT)])
        await chat.press("ctrl+n", "f8")
        await chat.dialog(CachesScreen)
        await chat.press("t")
        await chat.dialog(TimelineScreen)
        await chat.until_visible("timeline · Bread?")
        await chat.until_visible("[/b][31mred")
        await chat.press("down", "t")
        await chat.until(lambda: isinstance(chat.app.screen, CachesScreen), "the list is there again")
