"""Commands and events without any front end: a scripted engine, and a port that notes its calls."""

from collections.abc import Callable, Iterator
from contextlib import closing
from inspect import iscoroutine
from queue import Empty, SimpleQueue

import pytest

from kvchat.chat.commands import COMMANDS, Command, parse_slash
from kvchat.chat.controller import ChatController
from kvchat.chat.conversation_commands import delete_now
from kvchat.chat.engine_supervisor import EngineSupervisor
from kvchat.chat.port import Act, Asking, EngineEvent, NoViewError, Port, complete
from kvchat.chat.session import ConversationDefaults, Session
from kvchat.chat.store import Store
from kvchat.contract import (
    CacheMode,
    Drop,
    EvictionPolicy,
    Fork,
    KVPrecision,
    Miss,
    PoolState,
    SetBudget,
    SetPrecision,
    TurnFinished,
)
from kvchat.errors import KvchatError
from tests.support.scripted_engine import PATIENCE_S, Fails, ScriptedEngine

MISS = Miss("system prompt edited", 1100, 2.0)


class Recorder(Port):
    """Notes everything, and answers as the test says."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.views: list[tuple[str, str]] = []
        self.has_views = True
        self.agrees = True
        self.answer: str | None = None
        """To questions for a line; None turns away."""
        self.asked: list[str] = []
        self.shown: list[str] = []
        self.askings: list[Asking] = []
        self.given_back: list[str] = []
        self.edited: list[str] = []
        self.errors: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def not_saved(self, error: KvchatError) -> None:
        self.errors.append(str(error))

    def confirm(self, question: str, yes: str, act: Act) -> None:
        self.asked.append(question)
        if self.agrees and iscoroutine(done := act()):
            complete(done)

    def ask_line(self, question: str, value: str, act: Callable[[str], object], otherwise: str) -> None:
        self.asked.append(question)
        if self.answer is not None and iscoroutine(done := act(self.answer)):
            complete(done)

    async def open_conversation(self, words: str = "") -> None:
        self.shown.append("opened")

    async def show_conversation(self, words: str = "") -> None:
        self.shown.append("changed")

    async def begin_answer(self, asking: Asking) -> None:
        self.askings.append(asking)

    def give_back(self, text: str) -> None:
        self.given_back.append(text)

    def edit(self, text: str) -> None:
        self.edited.append(text)

    def open_view(self, name: str, argument: str) -> None:
        if not self.has_views:
            raise NoViewError
        self.views.append((name, argument))


class Driver:
    """A controller whose engine's events are taken when the test wants them."""

    def __init__(self, session: Session, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.port = Recorder()
        self.events: SimpleQueue[EngineEvent] = SimpleQueue()
        supervisor = EngineSupervisor(engine.attach, self.events.put)
        self.chat = ChatController(session, supervisor, self.port, "Scripted")
        supervisor.start()
        self.until(lambda: self.chat.state.pool is not None)

    @property
    def session(self) -> Session:
        return self.chat.session

    def until(self, condition: Callable[[], bool]) -> None:
        """Takes events until it holds."""
        while not condition():
            self.chat.on_event(self.events.get(timeout=PATIENCE_S))

    def settle(self) -> None:
        """Takes what the engine has reported; the scripted one does commands at once."""
        try:
            while True:
                self.chat.on_event(self.events.get(timeout=0.0))
        except Empty:
            return

    def ask(self, text: str) -> None:
        """A whole turn."""
        complete(self.chat.send(text))
        self.until(lambda: self.chat.answering is None)
        self.until(lambda: self.engine._state == "ready" or not self.events.empty())
        self.settle()

    def line(self, text: str) -> None:
        """A slash command and what the engine says to it; a turn that it begins is answered."""
        parsed = parse_slash(text)
        assert parsed, text
        complete(self.chat.run(*parsed))
        self.settle()
        self.until(lambda: self.chat.answering is None)

    def not_sent(self) -> str:
        """The question of the state that was not sent."""
        question = self.chat.state.not_sent
        return question.text if question else ""

    def messages(self) -> list[tuple[str, str]]:
        return [(m.role, m.text) for m in self.session.current.messages]


@pytest.fixture
def store() -> Iterator[Store]:
    with closing(Store(None)) as store:
        yield store


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def driver(store: Store, engine: ScriptedEngine) -> Iterator[Driver]:
    driver = Driver(Session(store, ConversationDefaults(model="scripted")), engine)
    yield driver
    driver.chat.close()


def command_of(name: str) -> Command:
    return next(command for command in COMMANDS if command.name == name)


# --- turns -----------------------------------------------------------------------------------------------


def test_a_turn_is_saved_and_its_state_is_that_of_the_events(driver: Driver) -> None:
    driver.engine.answers("Good ", "day.")
    driver.ask("Hello")
    assert driver.messages() == [("user", "Hello"), ("assistant", "Good day.")]
    assert driver.port.askings == [Asking.NEW]
    state = driver.chat.state
    assert state.active is None
    assert len(state.turns) == 1
    assert set(state.caches) == {driver.session.current.id}
    assert state.model_title == "Scripted"


def test_a_stopped_answer_stays(driver: Driver) -> None:
    driver.engine.answers("One", gate := driver.engine.gate(), "two")
    complete(driver.chat.send("Go"))
    driver.until(lambda: driver.chat.state.active is not None and driver.chat.state.active.text == "One")
    assert not gate.is_open
    driver.line("/stop")
    assert driver.messages() == [("user", "Go"), ("assistant", "One")]
    assert driver.session.current.messages[-1].finish_reason == "cancelled"
    driver.line("/stop")
    assert driver.port.views == [("stop", "")]


def test_a_turn_that_goes_on_while_another_conversation_is_open_is_saved_where_it_belongs(
    driver: Driver, store: Store
) -> None:
    driver.engine.answers("One", gate := driver.engine.gate(), " two")
    complete(driver.chat.send("Go"))
    first = driver.session.current.id
    driver.until(lambda: driver.chat.state.active is not None and driver.chat.state.active.text == "One")
    complete(driver.chat.run(command_of("new")))
    assert driver.session.current.id != first
    assert driver.chat.state.turn.written == 0
    assert driver.chat.state.active_here is None
    gate.open()
    driver.until(lambda: driver.chat.answering is None)
    assert [m.text for m in store.load(first).messages] == ["Go", "One two"]
    assert driver.messages() == []


def test_a_question_without_an_answer_is_in_the_state_or_waits_as_a_draft_elsewhere(
    driver: Driver, store: Store
) -> None:
    driver.engine.answers(Fails("No room.")).answers(gate := driver.engine.gate(), Fails("No room."))
    driver.ask("A long one")
    assert driver.not_sent() == "A long one"
    complete(driver.chat.send("Another"))
    assert driver.not_sent() == ""
    left = driver.session.current.id
    complete(driver.chat.run(command_of("new")))
    gate.open()
    driver.until(lambda: driver.chat.answering is None)
    assert driver.not_sent() == ""
    assert store.draft(left) == "Another"


def test_an_answer_that_cannot_be_saved_is_reported_and_the_turn_ends(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(event: TurnFinished) -> None:
        driver.session.pending = None
        raise KvchatError("The disk is full.")

    monkeypatch.setattr(driver.session, "finish_turn", full)
    driver.ask("Hello")
    assert driver.port.errors == ["The disk is full."]
    assert driver.chat.state.active is None


def test_regenerate_continue_undo_and_edit_answer_in_their_own_ways(driver: Driver) -> None:
    for text in ("One", "Two", "Three", "Four"):
        driver.engine.answers(text)
    driver.ask("First")
    driver.line("/regen")
    driver.ask("Second")
    driver.line("/edit 1")
    assert driver.port.edited == ["First"]
    assert any("Asked anew in that place: the next turn reads" in said for said in driver.port.said)
    driver.ask("Anew")
    assert driver.messages() == [("user", "Anew"), ("assistant", "Four")]
    assert driver.chat.editing is None
    driver.line("/undo")
    assert driver.port.given_back == ["Anew"]
    assert driver.port.askings == [Asking.NEW, Asking.AGAIN, Asking.NEW, Asking.EDITED]
    driver.line("/edit 7")
    assert "Which question?" in driver.port.said[-1]
    driver.line("/continue")
    assert driver.port.said[-1] == "There is no answer to go on with."


# --- settings and caches ---------------------------------------------------------------------------------


def test_the_cache_mode_goes_round_and_is_in_the_state(driver: Driver) -> None:
    for mode in (CacheMode.TURN, CacheMode.OFF, CacheMode.ON):
        driver.line("/cache")
        assert driver.session.current.mode is driver.chat.state.mode is mode
    driver.line("/cache nonsense")
    assert driver.port.said[-1] == "The cache modes are on, turn and off; not nonsense."


@pytest.mark.parametrize("agrees", [True, False])
def test_a_change_that_costs_much_is_asked_about(driver: Driver, agrees: bool) -> None:
    driver.ask("Hello")
    driver.engine.prices(2.4, MISS)
    driver.port.agrees = agrees
    driver.line("/policy sinks")
    assert driver.port.asked[0].startswith("Policy sinks: the next turn reads 1,204 tokens, about 2.4 s")
    assert (driver.chat.state.policy is EvictionPolicy.SINKS) is agrees


def test_a_change_that_waits_for_its_cost_is_made_when_the_engine_dies(driver: Driver) -> None:
    driver.ask("Hello")
    driver.engine.answers_acts = False
    driver.line("/system Be brief.")
    assert driver.session.current.system_prompt == ""
    driver.engine.die("killed")
    driver.until(lambda: bool(driver.session.current.system_prompt))
    assert driver.port.said[-1] == "New system prompt: holds from the next turn on."


def test_precision_and_budget_reach_the_engine_and_a_new_engine_gets_the_budget_again(driver: Driver) -> None:
    driver.ask("Hello")
    driver.line("/kv int8")
    here = driver.session.current.id
    assert SetPrecision(here, KVPrecision.INT8) in driver.engine.acts
    assert driver.chat.state.converted
    driver.port.answer = "512MB"
    driver.line("/budget")
    assert driver.engine.acts.count(SetBudget(512_000_000)) == 1
    driver.line("/budget much")
    assert driver.port.said[-1] == "A budget is a size, such as 2GB or 512MB."
    driver.engine.die("killed")
    driver.until(lambda: not driver.chat.state.ready)
    assert driver.chat.state.caches == {}
    driver.until(lambda: driver.chat.state.pool is not None)
    driver.until(lambda: driver.engine.acts.count(SetBudget(512_000_000)) == 2)


def test_a_report_of_the_engine_reads_the_list_of_conversations_at_most_once(
    driver: Driver, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.ask("Hello")
    driver.session.conversations()
    monkeypatch.setattr(Store, "_read_summaries", lambda _store: pytest.fail("read again"))
    for _ in range(3):
        driver.chat.on_event(PoolState((), 0, 1, 0, 0))
        assert [each.title for each in driver.session.conversations()] == ["Hello"]


# --- conversations ---------------------------------------------------------------------------------------


def test_a_fork_shares_the_cache_and_the_parent_stays(driver: Driver) -> None:
    driver.ask("Hello")
    parent = driver.session.current.id
    driver.line("/fork")
    child = driver.session.current.id
    assert Fork(parent, child) in driver.engine.acts
    assert set(driver.chat.state.caches) == {parent, child}
    assert driver.port.shown[-1] == "opened"


def test_titles_clearing_and_deleting(driver: Driver) -> None:
    driver.line("/rename X")
    assert "has no messages yet" in driver.port.said[-1]
    driver.ask("Hello")
    driver.line("/rename  A better  one")
    assert driver.session.current.title == "A better one"
    driver.port.answer = "Asked for"
    driver.line("/rename")
    assert driver.session.current.title == "Asked for"
    driver.port.agrees = False
    driver.line("/delete")
    assert driver.port.asked[-1] == "Delete “Asked for” for good?"
    here = driver.session.current.id
    assert len(driver.session.conversations()) == 1
    driver.line("/clear")
    assert driver.messages() == []
    assert here not in driver.chat.state.caches
    driver.ask("Again")
    driver.port.agrees = True
    driver.line("/delete")
    assert driver.session.conversations() == []
    assert driver.engine.forgotten == [here, here]


def test_deleting_a_conversation_that_is_being_answered_ends_its_turn(driver: Driver) -> None:
    driver.engine.answers("One", driver.engine.gate(), "two")
    complete(driver.chat.send("Go"))
    driver.until(lambda: driver.chat.state.active is not None and driver.chat.state.active.text == "One")
    complete(delete_now(driver.chat, driver.session.current.id))
    assert driver.chat.answering is None
    assert driver.chat.refresh().active is None
    assert driver.session.conversations() == []


def test_a_private_conversation_is_not_written(driver: Driver, store: Store) -> None:
    driver.line("/private")
    driver.ask("Secret")
    assert not driver.engine.requests[0].persist
    assert store.summaries() == []


# --- views and models ------------------------------------------------------------------------------------


def test_a_command_whose_view_is_missing_says_what_to_do_instead(driver: Driver) -> None:
    driver.line("/cache compare Why?")
    assert driver.port.views == [("compare", "Why?")]
    driver.port.has_views = False
    driver.line("/panel")
    assert driver.port.said[-1] == (
        "/panel belongs to the screen. Without one, the figures of a turn stand after its answer."
    )


def test_without_models_there_is_none_to_choose(driver: Driver) -> None:
    driver.line("/model x")
    assert driver.port.said == ["No other model can be had here."]


def test_dropping_a_cache_is_in_the_state_when_the_engine_reports_it(driver: Driver) -> None:
    driver.ask("Hello")
    driver.chat.engine.command(Drop(driver.session.current.id))
    driver.until(lambda: not driver.chat.state.caches)
    assert driver.chat.state.turn.kv_tokens == 0
