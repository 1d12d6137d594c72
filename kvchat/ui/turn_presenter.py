"""Follows a turn on the screen: asks the session, runs it on the engine, shows what comes back.

It knows the session, the bridge and the widgets that show a turn; it refuses to know keys and commands.
"""

from collections.abc import Callable
from dataclasses import replace

from kvchat.chat.active_turn import ActiveTurn, NotSent
from kvchat.chat.conversation import Message
from kvchat.chat.session import Session
from kvchat.contract import (
    Died,
    Evicted,
    Loading,
    PoolState,
    PrefillProgress,
    Ready,
    Status,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    WarmCache,
)
from kvchat.errors import KvchatError
from kvchat.text import one_line
from kvchat.ui.panel_model import Figures
from kvchat.ui.turn_thread import RESTARTS, EngineBridge
from kvchat.ui.widgets.message import answer_note
from kvchat.ui.widgets.transcript import Transcript

STARTS_AGAIN = "\nIt starts again; /regen asks for the answer once more."
GAVE_UP = f"\nIt ended {RESTARTS} times in a row before it was ready: it is not started again."


class Turns:
    """The turns of this run of the program."""

    def __init__(
        self,
        session: Session,
        bridge: EngineBridge,
        transcript: Transcript,
        who: str,
        give_back: Callable[[NotSent], None],
    ) -> None:
        """`give_back` takes a question of the open conversation that was not sent, to be sent again."""
        self._session = session
        self._bridge = bridge
        self._transcript = transcript
        self._give_back = give_back
        self.who = who
        """What the model that answers is called."""
        self.figures = Figures()
        self.status = "starting"
        self.warm: dict[str, WarmCache] = {}
        self.pool: PoolState | None = None
        self._started: TurnStarted | None = None
        self._evicted: list[Evicted] = []
        """In the turn under way."""
        self.editing: int | None = None
        """The question that the next message replaces."""

    @property
    def answering(self) -> ActiveTurn | None:
        """The turn under way, in whichever conversation."""
        return self._session.pending

    async def show_conversation(self, *, answering: bool = True) -> None:
        """Shows the open conversation and, unless it only begins, the answer that streams in it."""
        conversation = self._session.current
        self.editing = None
        pending = self._pending_here() if answering else None
        partial = pending.reply.id if pending and pending.reply else None
        messages = [m for m in conversation.messages if m.id != partial]
        await self._transcript.show(messages, self.who, conversation.unseen)
        self.figures.opened(conversation, self.warm.get(conversation.id))
        if pending:
            self.figures.resumed(len(pending.ids))
            if self._started and self._started.turn == pending.turn:
                self.figures.started(self._started)
            await self._transcript.begin_answer(self.who)
            for evicted in self._evicted:
                await self._show_evicted(evicted)
            self._append(pending.text)

    async def send(self, text: str) -> TurnRequest:
        """Saves and shows the user's message, and asks the engine; returns what it was asked.

        Raises:
            KvchatError: another answer is under way.
        """
        if self.editing is None:
            request = self._session.begin_turn(text)
            await self._transcript.ask(self._session.current.messages)
        else:
            request = self._session.edit(self.editing, text)
            await self.show_conversation(answering=False)
        await self._run(request)
        return request

    async def undo(self) -> str:
        """Takes the last question back; returns its text.

        Raises:
            KvchatError: there is none, or an answer is under way.
        """
        text = self._session.undo()
        await self.show_conversation()
        return text

    async def go_on(self) -> None:
        """Asks the model to go on with the last answer.

        Raises:
            KvchatError: that answer has ended, or another is under way.
        """
        request = self._session.continue_answer()
        await self._transcript.drop_answers_after_last_question(self._session.current.messages)
        await self._run(request)
        self._append(self._session.pending.text if self._session.pending else "")

    def edit(self, number: str) -> str:
        """Lets the next message replace a question; returns the text of that one.

        Raises:
            KvchatError: there is no such question.
        """
        question = self._question(number)
        self.editing = question.id
        return question.text

    def question_id(self, number: str) -> int:
        """Id of a question; of the last one without a number.

        Raises:
            KvchatError: there is no such question.
        """
        return self._question(number).id

    def answer_to(self, number: str) -> int:
        """Id of the answer to a question; of the question itself where there is none.

        Raises:
            KvchatError: there is no such question.
        """
        return self._session.current.answer_to(self._question(number)).id

    def _question(self, number: str) -> Message:
        found = self._session.current.question(number)
        if found is None:
            raise KvchatError("Which question? The transcript numbers them: 2 is the second one.")
        return found

    async def regenerate(self) -> TurnRequest:
        """Asks for the last answer again, or sends the last message that was not sent; returns the request.

        Raises:
            KvchatError: there is none, or another answer is under way.
        """
        request = self._session.regenerate()
        await self._transcript.drop_answers_after_last_question(self._session.current.messages)
        await self._run(request)
        return request

    async def _run(self, request: TurnRequest) -> None:
        self._evicted.clear()
        await self._transcript.begin_answer(self.who)
        self.figures.asked()
        self._bridge.run_turn(request)

    def stop(self) -> bool:
        """Stops the answer under way; False if there is none."""
        if self.answering:
            self._bridge.stop(self.answering.turn)
            return True
        return False

    def forget(self, conversation: str) -> None:
        """Frees a conversation's cache."""
        self.warm.pop(conversation, None)
        self._bridge.forget(conversation)

    async def on_event(self, event: TurnEvent) -> None:
        """Shows what happened in a turn; one whose conversation was deleted shows nothing."""
        pending = self.answering
        if isinstance(event, TurnFinished):
            self._note_pool(event.pool)
        if pending is None or pending.turn != event.turn:
            if isinstance(event, TurnFinished):
                self._session.note_events(event.pool.events)
            return
        here = self._pending_here() is not None
        match event:
            case TurnStarted():
                self._started = event
                self._session.note_started(event)
                if here:
                    self.figures.started(event)
            case Evicted():
                self._evicted.append(event)
                if here:
                    await self._show_evicted(event)
            case PrefillProgress() if here:
                self.figures.prefilled(event)
            case Tokens():
                if here:
                    self.figures.tokens(event)
                    self._append(event.text)
                # shown first: where it can't be saved, it can still be read
                self._session.keep_partial(event)
            case TurnFinished():
                await self._finish(event, pending, here=here)
            case TurnFailed():
                await self._fail(event, pending, here=here)

    async def on_status(self, status: Status) -> None:
        """Notes how the engine is."""
        match status:
            case Loading():
                self.status = f"{one_line(status.stage)} …"
            case Ready():
                self.status = "ready"
                self.figures.ready(status.model, status.rss_bytes)
            case PoolState():
                self._note_pool(status)
                self._session.note_events(status.events)
            case Died():
                self.lost("the engine is not running" if status.for_good else "starting again …")
                again = GAVE_UP if status.for_good else STARTS_AGAIN
                said = "\n".join(("\nIts last words:", *status.log_tail)) if status.log_tail else ""
                await self._transcript.notice(f"{status.reason}{again}{said}", error=True)

    def lost(self, status: str) -> None:
        """There is no engine any more, and with it went every cache in memory."""
        self.warm.clear()
        self.pool = None
        self.figures.lost()
        self.status = status

    async def _show_evicted(self, event: Evicted) -> None:
        self.figures.evicted(event)
        self._transcript.leave_out(
            replace(self._session.current, evicted_messages=event.evicted_messages).unseen
        )
        await self._transcript.notice(f"The context was full: {event.note}.", last=False)

    async def _finish(self, event: TurnFinished, pending: ActiveTurn, *, here: bool) -> None:
        try:
            self._session.finish_turn(event)
        finally:
            if here:
                self.figures.finished(event)
                if self._transcript.streaming:
                    note = answer_note(event.stats, event.stats.finish_reason)
                    # an answer that was gone on with is longer than what this turn wrote
                    self._transcript.streaming.finish(pending.text, note)
                self._transcript.streaming = None
                await self._transcript.settle(self._session.current.messages)

    async def _fail(self, event: TurnFailed, pending: ActiveTurn, *, here: bool) -> None:
        not_sent = None
        try:
            not_sent = self._session.fail_turn(event.turn)
        finally:
            if here:
                await self._show_failure(pending, event.reason)
        if not_sent and here:
            self._give_back(not_sent)
        elif not_sent:
            self._session.keep_for_later(not_sent)

    async def _show_failure(self, pending: ActiveTurn, reason: str) -> None:
        streaming, self._transcript.streaming = self._transcript.streaming, None
        if streaming is None:
            return
        if pending.text:
            streaming.finish(pending.text, answer_note(None, "error"))
        else:
            await self._transcript.drop(streaming)
        if not pending.is_answered:
            current = self._session.current
            self.figures.opened(current, self.warm.get(current.id))
        if self._evicted or (pending.before and not pending.is_answered):
            editing = self.editing
            await self.show_conversation()
            self.editing = editing
        await self._transcript.settle(self._session.current.messages)
        await self._transcript.notice(reason, error=True)

    def _note_pool(self, pool: PoolState) -> None:
        self.pool = pool
        self.warm = {cache.conversation: cache for cache in pool.caches}
        self.figures.pool(pool, self._session.current.id)

    def _append(self, text: str) -> None:
        if self._transcript.streaming and text:
            self._transcript.streaming.say("")
            self._transcript.streaming.append(text)

    def _pending_here(self) -> ActiveTurn | None:
        pending = self.answering
        return pending if pending and pending.conversation == self._session.current.id else None
