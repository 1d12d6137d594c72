"""The core that every front end shares: it runs commands, saves what the engine reports, holds what is drawn.

A front end passes on lines, keys and the engine's events, all from one thread, and draws `state`. This module
knows the session, an engine and a port; it knows no screen, no terminal and no torch.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kvchat.chat.active_turn import ActiveTurn, NotSent
from kvchat.chat.conversation import Message
from kvchat.chat.conversation_files import Archive
from kvchat.chat.cost_estimates import CostEstimates
from kvchat.chat.engine_supervisor import EngineSupervisor
from kvchat.chat.port import Asking, EngineEvent, NoViewError, Port
from kvchat.chat.prompt_cost import PromptCost
from kvchat.chat.reducer import (
    Abandoned,
    Asked,
    Configured,
    EngineReplaced,
    Event,
    Forgotten,
    ModelChosen,
    NotAnswered,
    Opened,
    reduce,
)
from kvchat.chat.session import Session
from kvchat.chat.state import ChatState
from kvchat.chat.wording import converted_words
from kvchat.config.settings import sampling_of
from kvchat.contract import (
    Converted,
    CostEstimate,
    Died,
    PoolState,
    Ready,
    Refused,
    SetBudget,
    Status,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)
from kvchat.errors import KvchatError
from kvchat.models.cards import find_card

if TYPE_CHECKING:
    from kvchat.chat.commands import Command
    from kvchat.chat.model_choice import Models

Saved = TypeVar("Saved")


class ChatController:
    """Conducts one session with one engine for one front end."""

    def __init__(
        self,
        session: Session,
        engine: EngineSupervisor,
        port: Port,
        model_title: str = "",
        models: "Models | None" = None,
    ) -> None:
        """
        Args:
            session: the conversations.
            engine: reports to the front end, which calls `on_event`.
            port: the front end.
            model_title: what the model that answers is called.
            models: those that can be chosen; None where there is only one.
        """
        self.session = session
        self.engine = engine
        self.port = port
        self.models = models
        name = session.current.model or session.defaults.model
        self.state = ChatState(model_name=name, model_title=model_title)
        self.costs = CostEstimates(self)
        self.archive = Archive(session, port.say)
        self.prompt_cost = PromptCost(session, engine, port.show_cost, Path.cwd())
        self.editing: int | None = None
        """Id of the question that the next message replaces."""
        self.budget: SetBudget | None = None
        """What all caches may take, where that was changed in this run."""
        self._show_turns()

    # --- events -------------------------------------------------------------------------------------------

    def on_event(self, event: EngineEvent) -> ChatState:
        """Takes an event of the engine: saves what it says, and returns the state after it."""
        if not isinstance(event, TurnEvent) and self.prompt_cost.on_status(event):
            return self.state
        self._apply(event)
        if isinstance(event, TurnEvent):
            self._in_turn(event)
        else:
            self._on_status(event)
        return self.refresh()

    def refresh(self) -> ChatState:
        """The state, with what the session knows of the open conversation and of the turn under way."""
        current = self.session.current
        if (self.state.mode, self.state.policy) != (current.mode, current.policy):
            self._apply(Configured(current.mode, current.policy))
        if self.state.active and not self.session.pending:
            self._apply(Abandoned())
        return self.state

    def _apply(self, event: Event) -> None:
        self.state = reduce(self.state, event, time.perf_counter())

    def _in_turn(self, event: TurnEvent) -> None:
        pending = self.session.pending
        if pending is None or pending.turn != event.turn:
            if isinstance(event, TurnFinished):
                self._save(partial(self.session.note_events, event.pool.events))
            return
        match event:
            case TurnStarted():
                self.session.note_started(event)
            case Tokens():
                self._save(partial(self.session.keep_partial, event))
            case TurnFinished():
                self._save(partial(self.session.finish_turn, event))
            case TurnFailed():
                self._save(partial(self._fail, event))
            case _:
                pass

    def _fail(self, event: TurnFailed) -> None:
        question = self.session.fail_turn(event.turn)
        if question is None:
            return
        if question.conversation == self.session.current.id:
            self._apply(NotAnswered(question))
        else:
            self.session.keep_for_later(question)

    def _on_status(self, status: Status) -> None:
        match status:
            case Ready():
                if self.budget:
                    self.engine.command(self.budget)
                self.costs.opened()
            case PoolState():
                self._save(partial(self.session.note_events, status.events))
            case Died():
                self.costs.on_death()
            case CostEstimate():
                self.costs.on_estimate(status)
            case Converted():
                self.port.say(converted_words(status))
            case Refused():
                self.port.say(status.reason)
            case _:
                pass

    def _save(self, save: Callable[[], Saved]) -> Saved | None:
        try:
            return save()
        except KvchatError as error:
            self.port.not_saved(error)
            return None

    # --- commands -----------------------------------------------------------------------------------------

    async def run(self, command: "Command", argument: str = "") -> None:
        """Does what a command asks for, or says why it can't be done."""
        try:
            done = command.run(self, argument)
            if done is not None:
                await done
        except NoViewError:
            self.port.say(f"/{command.slash} belongs to the screen. Without one, {command.instead}.")
        except KvchatError as error:
            self.port.say(str(error))
        self.refresh()

    # --- turns --------------------------------------------------------------------------------------------

    @property
    def answering(self) -> ActiveTurn | None:
        """The turn under way, in whichever conversation."""
        return self.session.pending

    async def send(self, text: str) -> TurnRequest:
        """Asks in the open conversation, in the place of the question that is edited if there is one.

        Raises:
            KvchatError: another answer is under way, or it can't be saved.
        """
        edited = self.editing if any(m.id == self.editing for m in self.session.current.messages) else None
        if edited is None:
            request = self.session.begin_turn(text)
        else:
            request = self.session.edit(edited, text)
            self._show_turns()
        self.editing = None
        await self.answer(request, Asking.NEW if edited is None else Asking.EDITED)
        return request

    async def answer(self, request: TurnRequest, asking: Asking) -> None:
        """Lets the engine answer a turn that the session has begun."""
        self.begin(request)
        await self.port.begin_answer(asking)
        self.engine.submit(request)

    def begin(self, request: TurnRequest) -> None:
        """Notes that a turn begins."""
        text = self.session.pending.text if self.session.pending else ""
        self._apply(Asked(request.turn, request.conversation, text))

    def question(self, number: str) -> Message:
        """A question of the open conversation by its number; the last one without a number.

        Raises:
            KvchatError: there is no such question.
        """
        found = self.session.current.question(number)
        if found is None:
            raise KvchatError("Which question? They are counted from 1: 2 is the second one.")
        return found

    def stop(self) -> bool:
        """Stops the answer under way; False if there is none."""
        if self.session.pending:
            self.engine.stop(self.session.pending.turn)
        return self.session.pending is not None

    def stop_in(self, conversation: str) -> None:
        """Stops the answer under way if it belongs to that conversation."""
        if self.session.pending and self.session.pending.conversation == conversation:
            self.stop()

    # --- conversations ------------------------------------------------------------------------------------

    async def opened(self, words: str = "") -> None:
        """Another conversation is open: shows it, and what going on with it costs."""
        self._show_turns()
        await self.port.open_conversation(words)
        held = self.session.current.model
        if self.models and self.session.current.messages and held and held != self.state.model_name:
            from kvchat.chat.model_choice import title_of

            now = title_of(self.state.model_name)
            self.port.say(
                f"This conversation was held with {title_of(held)}; {now} goes on and reads it again. "
                "/model changes it."
            )
        self.costs.opened()

    async def changed(self, words: str = "") -> None:
        """The open conversation has other messages now: shows it."""
        self._show_turns()
        await self.port.show_conversation(words)

    def _show_turns(self) -> None:
        self.editing = None
        current = self.session.current
        self._apply(Opened(current.id, tuple(m.stats for m in current.messages if m.stats)))
        self.refresh()

    def title_of(self, conversation: str) -> str:
        """Of a saved conversation; empty where there is none."""
        return next((s.title for s in self.session.conversations() if s.id == conversation), "")

    # --- the engine ---------------------------------------------------------------------------------------

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache."""
        self._apply(Forgotten(conversation))
        self.engine.forget(conversation)

    async def switch_model(self, name: str) -> None:
        """Lets another model answer, in the open conversation and in new ones.

        Raises:
            KvchatError: it is not here, answers already, or an answer is under way.
        """
        from kvchat.chat.model_choice import title_of

        if self.session.pending:
            raise KvchatError("An answer is still being written. Esc stops it; then choose the model.")
        assert self.models is not None
        lasting, factory = self.models.open(name)
        if lasting == self.state.model_name:
            raise KvchatError(f"{title_of(lasting)} answers already.")
        self.engine.switch(factory)
        # a model is sampled as its card recommends
        sampling = sampling_of(find_card(lasting))
        self.session.configure(model=lasting, sampling=sampling)
        self.session.defaults = replace(self.session.defaults, model=lasting, sampling=sampling)
        self._apply(ModelChosen(lasting, title_of(lasting)))
        self._apply(EngineReplaced())
        await self.port.engine_replaced()

    def restart_engine(self) -> None:
        """Ends the engine's process, and starts it again."""
        self._apply(EngineReplaced())
        self.engine.restart()

    def abandon(self) -> NotSent | None:
        """Ends the turn under way without the engine; returns a question whose answer had not begun."""
        return self._save(self.session.abandon_turn)

    def close(self) -> None:
        """Ends the turn under way and the engine; a question without an answer waits as a draft."""
        if self.models:
            self.models.close()
        if question := self.abandon():
            self._save(partial(self.session.keep_for_later, question))
        self.engine.close()
