"""Several conversations: the list, switching, renaming, deleting, also while an answer is being written."""

import pytest
from rich.cells import cell_len

from kvchat.chat import session as conductor
from kvchat.chat.session import Session
from kvchat.ui.screens.dialogs import Confirm
from kvchat.ui.widgets.conversations import BADGE_CELLS, SIZE_CELLS, Row, TitleField
from tests.support.screen_driver import Chat, running, saved_conversation, session_over
from tests.support.scripted_engine import ScriptedEngine


def two_conversations() -> Session:
    """A session over a store with two conversations, the last used first: bread, alps."""
    session = session_over()
    saved_conversation(session._store, ("user", "About the alps"), ("assistant", "High."))
    saved_conversation(session._store, ("user", "About bread"), ("assistant", "Flour."))
    return session


def id_of(chat: Chat, title: str) -> str:
    return next(s.id for s in chat.session.conversations() if s.title == title)


async def choose(chat: Chat, title: str) -> None:
    """Goes to the list and highlights a conversation."""
    await chat.press("ctrl+s")
    assert chat.conversations.has_focus
    await chat.press("home")
    for _ in chat.conversations.options:
        if chat.conversations._highlighted_id() == id_of(chat, title):
            return
        await chat.press("down")
    pytest.fail(f"{title!r} is not in the list")


async def switch_to(chat: Chat, title: str) -> None:
    """Opens a conversation from the list."""
    await choose(chat, title)
    await chat.press("enter")
    await chat.until(lambda: chat.title() == title, f"{title!r} is open")


async def test_a_conversation_takes_its_title_from_its_first_message() -> None:
    async with running() as chat:
        assert chat.title() == "new conversation"
        await chat.ask("\n  Which pass over the mountains is open in May, and which one is closed?\nTell me.")
        assert chat.title() == "Which pass over the mountains is open in May…"
        assert [line for line in chat.listed() if "Which pass over" in line]
        await chat.ask("Another subject")
        assert chat.title() == "Which pass over the mountains is open in May…"


async def test_ctrl_n_opens_an_empty_conversation() -> None:
    engine = ScriptedEngine()
    async with running(engine) as chat:
        await chat.ask("First")
        await chat.press("ctrl+n")
        assert chat.title() == "new conversation"
        assert chat.questions() == []
        assert chat.prompt.has_focus
        await chat.ask("Second")
        assert [m.text for m in engine.requests[1].messages] == ["Second"]
        assert len(chat.listed()) == 2


async def test_nothing_is_saved_before_the_first_message() -> None:
    async with running() as chat:
        await chat.press("ctrl+n", "f4", "ctrl+n")
        assert chat.session.conversations() == []


async def test_ctrl_s_and_enter_open_a_conversation() -> None:
    async with running(session=two_conversations()) as chat:
        assert [line.split(maxsplit=1)[1].strip() for line in chat.listed()] == [
            "About bread",
            "About the alps",
        ]
        await switch_to(chat, "About the alps")
        assert chat.questions() == ["About the alps"]
        assert chat.answers() == ["High."]
        assert chat.prompt.has_focus
        await chat.ask("More")
        assert [m.text for m in chat.engine.requests[0].messages] == ["About the alps", "High.", "More"]


async def test_ctrl_s_from_the_list_goes_back_to_the_prompt() -> None:
    async with running(session=two_conversations(), size=(60, 20)) as chat:
        await chat.press("ctrl+s")
        assert chat.conversations.has_focus
        await chat.until_visible("About bread")
        await chat.press("ctrl+s")
        assert chat.prompt.has_focus
        await chat.until(lambda: "About bread" not in chat.visible(), "the list is gone")


async def test_the_list_says_what_is_warm() -> None:
    async with running(session=two_conversations()) as chat:
        await switch_to(chat, "About bread")
        assert all(line.startswith("○") for line in chat.listed())
        await chat.ask("And water?")
        assert [line[0] for line in chat.listed()] == ["●", "○"]
        assert "MB" in chat.listed()[0]


@pytest.mark.parametrize("width", [16, 31, 80])
def test_a_row_is_as_wide_as_the_list_and_its_bytes_stand_at_the_right(width: int) -> None:
    for title in ("Alps", "Which pass over the mountains is open in May", "山" * 30):
        for size in ("", "3.2 MB", "on disk", "1234.56 GB"):
            line = str(Row(title, "hot", size, current=False).content(width))
            assert cell_len(line) == width
            assert line.endswith(size)
            cut = title not in line
            assert ("…" in line) is cut
            room = width - BADGE_CELLS - (max(SIZE_CELLS, len(size) + 1) if size else 0)
            assert cut is (cell_len(title) > room)


async def test_titles_have_the_room_that_the_list_has() -> None:
    title = "Which pass over the mountains is open in late May and June"
    session = session_over()
    saved_conversation(session._store, ("user", "x"), ("assistant", "y"), title=title)
    async with running(session=session, size=(116, 30)) as chat:
        await chat.until_visible("○ Which pass over the mountain… ▕")
        await chat.pilot.resize_terminal(180, 30)
        await chat.until_visible("○ Which pass over the mountains is open…  ▕")


@pytest.mark.parametrize("size", [(60, 20), (116, 30)])
async def test_r_renames_in_the_place_of_the_title(size: tuple[int, int]) -> None:
    async with running(session=two_conversations(), size=size) as chat:
        await choose(chat, "About the alps")
        await chat.press("r")
        field = await title_field(chat)
        assert field.value == "About the alps"
        titles = [line.split()[1:3] for line in chat.listed()]
        row = chat.conversations.region.y + titles.index(["About", "the"])
        await chat.until(lambda: field.region.y == row, "the field stands over the title")
        field.value = "Mountains"
        await chat.press("enter")
        assert chat.conversations.has_focus
        await chat.until(lambda: any("Mountains" in line for line in chat.listed()), "the list is renamed")
        assert id_of(chat, "Mountains")


async def test_escape_leaves_the_title_as_it_was() -> None:
    async with running(session=two_conversations()) as chat:
        await choose(chat, "About the alps")
        await chat.press("r")
        await title_field(chat)
        await chat.press("x", "escape")
        await chat.until(lambda: not chat.screen.query(TitleField), "the field is gone")
        assert chat.conversations.has_focus
        assert id_of(chat, "About the alps")


async def title_field(chat: Chat) -> TitleField:
    """Waits for the field over a title."""
    await chat.until(lambda: isinstance(chat.app.focused, TitleField), "the title is edited")
    return chat.screen.query_one(TitleField)


@pytest.mark.parametrize("key", ["d", "delete"])
async def test_d_deletes_after_asking(key: str) -> None:
    async with running(session=two_conversations()) as chat:
        gone = id_of(chat, "About the alps")
        await choose(chat, "About the alps")
        await chat.press(key)
        await chat.dialog(Confirm)
        assert "About the alps" in chat.visible()
        assert chat.store.exists(gone)
        await chat.press("y")
        await chat.until(lambda: not chat.store.exists(gone), "it is deleted")
        await chat.until(lambda: len(chat.listed()) == 1, "the list is shorter")
        assert chat.engine.forgotten == [gone]


@pytest.mark.parametrize("key", ["n", "escape"])
async def test_no_deletes_nothing(key: str) -> None:
    async with running(session=two_conversations()) as chat:
        await choose(chat, "About the alps")
        await chat.press("d")
        await chat.dialog(Confirm)
        await chat.press(key)
        await chat.until(lambda: chat.app.screen is chat.screen, "the dialog is gone")
        assert len(chat.session.conversations()) == 2
        assert chat.engine.forgotten == []


async def test_enter_alone_deletes_nothing() -> None:
    async with running(session=two_conversations()) as chat:
        await choose(chat, "About the alps")
        await chat.press("d")
        await chat.dialog(Confirm)
        await chat.press("enter")
        await chat.until(lambda: chat.app.screen is chat.screen, "the dialog is gone")
        assert len(chat.session.conversations()) == 2


async def test_the_buttons_of_the_question_can_be_clicked() -> None:
    async with running(session=two_conversations()) as chat:
        for button, left in (("#no", 2), ("#yes", 1)):
            await choose(chat, "About the alps")
            await chat.press("d")
            await chat.dialog(Confirm)
            await chat.pilot.click(button)
            await chat.until(lambda: chat.app.screen is chat.screen, "the dialog is gone")
            await chat.press("ctrl+s")
            assert len(chat.session.conversations()) == left


async def test_deleting_the_open_conversation_opens_an_empty_one() -> None:
    async with running() as chat:
        await chat.ask("Mine")
        await chat.send("/delete")
        await chat.dialog(Confirm)
        await chat.press("y")
        await chat.until(lambda: chat.title() == "new conversation", "an empty conversation is open")
        assert chat.questions() == []
        assert chat.session.conversations() == []


async def test_deleting_another_conversation_keeps_what_is_typed() -> None:
    async with running(session=two_conversations()) as chat:
        await chat.write("Not sent yet")
        await choose(chat, "About the alps")
        await chat.press("d")
        await chat.dialog(Confirm)
        await chat.press("y")
        await chat.until(lambda: len(chat.listed()) == 1, "it is deleted")
        await chat.pilot.pause()
        assert chat.prompt.text == "Not sent yet"


@pytest.mark.parametrize("saved_every_s", [0.0, 3600.0], ids=["saved", "not saved yet"])
async def test_an_answer_goes_on_in_its_own_conversation_while_another_is_open(
    saved_every_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conductor, "PARTIAL_EVERY_S", saved_every_s)
    engine = ScriptedEngine()
    first, second = engine.gate(), engine.gate()
    engine.answers("Knead ", first, "and ", second, "wait.")
    async with running(engine, two_conversations()) as chat:
        await switch_to(chat, "About bread")
        await chat.send("How?")
        await chat.until_drawn("Knead ")
        await switch_to(chat, "About the alps")
        assert chat.answers() == ["High."]
        first.open()
        await chat.until_reached(second)
        await chat.until(lambda: pending_text(chat) == "Knead and ", "the answer grows unseen")
        assert chat.answers() == ["High."]
        await switch_to(chat, "About bread")
        await chat.until_drawn("Knead and ")
        assert chat.answers() == ["Flour.", "Knead and "]
        second.open()
        await chat.until_idle()
        assert chat.answers() == ["Flour.", "Knead and wait."]
        assert [text for _, text, _ in chat.kept()] == ["About bread", "Flour.", "How?", "Knead and wait."]


def pending_text(chat: Chat) -> str:
    return chat.session.pending.text if chat.session.pending else ""


@pytest.mark.parametrize("saved_every_s", [0.0, 3600.0], ids=["saved", "not saved yet"])
async def test_an_answer_that_ends_elsewhere_is_there_on_coming_back(
    saved_every_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conductor, "PARTIAL_EVERY_S", saved_every_s)
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Knead ", gate, "and wait.")
    async with running(engine, two_conversations()) as chat:
        await switch_to(chat, "About bread")
        await chat.send("How?")
        await chat.until_drawn("Knead ")
        await switch_to(chat, "About the alps")
        gate.open()
        await chat.until_idle()
        assert chat.answers() == ["High."]
        assert [text for _, text, _ in chat.kept()] == ["About the alps", "High."]
        assert chat.figure("written") == "0"
        assert chat.compared() == {}
        await switch_to(chat, "About bread")
        assert chat.answers() == ["Flour.", "Knead and wait."]
        assert "stop" in [finish for _, _, finish in chat.kept()][-1:]


async def test_the_figures_of_an_answer_under_way_are_its_own_on_coming_back() -> None:
    engine = ScriptedEngine().answers("one", "two", "three", "four", "five")
    gate = engine.gate()
    engine.answers("six", gate, "seven", end := engine.gate())
    async with running(engine, two_conversations()) as chat:
        await switch_to(chat, "About bread")
        await chat.ask("First")
        await chat.send("Second")
        await chat.until_drawn("six")
        await switch_to(chat, "About the alps")
        await switch_to(chat, "About bread")
        gate.open()
        await chat.until_reached(end)
        await chat.until_drawn("sixseven")
        await chat.until(lambda: chat.figure("written") == "2", "the panel counts this turn's tokens")
        # About bread, Flour., First and Second with four marks each, and the five tokens after First
        assert int(chat.figure("reused")) + int(chat.figure("read")) == 6 + 5 + 5 + 5 + 5
        end.open()
        await chat.until_idle()


async def test_deleting_a_conversation_while_its_answer_is_written() -> None:
    engine = ScriptedEngine()
    engine.answers("Never ", engine.gate(), "ends").answers("Next")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Never ")
        gone = chat.session.current.id
        await chat.send("/delete")
        await chat.dialog(Confirm)
        await chat.press("y")
        await chat.until(lambda: not chat.store.exists(gone), "it is deleted")
        await chat.until(lambda: chat.answers() == [], "the transcript is empty")
        assert engine.stops == [engine.requests[0].turn]
        assert not chat.screen.answering
        await chat.ask("Something else")
        assert chat.answers() == ["Next"]
        assert chat.session.conversations()[0].title == "Something else"
        assert len(chat.session.conversations()) == 1


async def test_clearing_a_conversation_while_its_answer_is_written() -> None:
    engine = ScriptedEngine()
    engine.answers("Never ", engine.gate(), "ends").answers("Next")
    async with running(engine) as chat:
        await chat.send("Go")
        await chat.until_drawn("Never ")
        await chat.send("/clear")
        await chat.until_idle()
        await chat.until(lambda: chat.questions() == [], "the transcript is empty")
        assert chat.answers() == []
        assert chat.kept() == []
        await chat.ask("Something else")
        assert [text for _, text, _ in chat.kept()] == ["Something else", "Next"]


async def test_clearing_stops_no_answer_of_another_conversation() -> None:
    engine = ScriptedEngine()
    gate = engine.gate()
    engine.answers("Knead ", gate, "and wait.")
    async with running(engine, two_conversations()) as chat:
        await switch_to(chat, "About bread")
        await chat.send("How?")
        await chat.until_drawn("Knead ")
        await switch_to(chat, "About the alps")
        await chat.send("/clear")
        await chat.until(lambda: chat.questions() == [], "the transcript is empty")
        gate.open()
        await chat.until_idle()
        await switch_to(chat, "About bread")
        assert chat.answers() == ["Flour.", "Knead and wait."]
