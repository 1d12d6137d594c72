"""Shows the open conversation and the turn under way in the transcript."""

from dataclasses import replace
from typing import TYPE_CHECKING

from kvchat.chat.active_turn import ActiveTurn
from kvchat.chat.engine_supervisor import RESTARTS
from kvchat.chat.port import Asking, EngineEvent
from kvchat.chat.state import ChatState
from kvchat.contract import Died, Evicted, Tokens, TurnFailed, TurnFinished
from kvchat.ui.widgets.message import answer_note

if TYPE_CHECKING:
    from kvchat.chat.controller import ChatController
    from kvchat.ui.widgets.transcript import Transcript

STARTS_AGAIN = "\nIt starts again; /regen asks for the answer once more."
GAVE_UP = f"\nIt ended {RESTARTS} times in a row before it was ready: it is not started again."


class TurnPresenter:
    """Draws what the controller's state says of a turn."""

    def __init__(self, controller: "ChatController", transcript: "Transcript") -> None:
        self._controller = controller
        self._transcript = transcript

    async def show_conversation(self, *, answering: bool = True) -> None:
        """Shows the open conversation and, unless it only begins, the answer that streams in it."""
        state, session = self._controller.state, self._controller.session
        active = state.active_here if answering else None
        pending = session.pending if active else None
        partial = pending.reply.id if pending and pending.reply else None
        messages = [m for m in session.current.messages if m.id != partial]
        await self._transcript.show(messages, state.model_title, session.current.unseen)
        if active:
            await self._transcript.begin_answer(state.model_title)
            for evicted in active.evictions:
                await self._show_evicted(evicted)
            self._append(active.text)

    async def begin_answer(self, asking: Asking) -> None:
        """Shows the question that is about to be answered, and the beginning of its answer."""
        state, messages = self._controller.state, self._controller.session.current.messages
        if asking is Asking.NEW:
            await self._transcript.ask(messages)
        elif asking is Asking.EDITED:
            await self.show_conversation(answering=False)
        else:
            await self._transcript.drop_answers_after_last_question(messages)
        await self._transcript.begin_answer(state.model_title)
        self._append(state.active.text if state.active else "")

    async def on_event(self, event: EngineEvent, pending: ActiveTurn | None, before: ChatState) -> None:
        """Shows an event that the controller has handled.

        Args:
            event: it.
            pending: the turn that was under way before it.
            before: the state before it.
        """
        if isinstance(event, Died):
            again = GAVE_UP if event.for_good else STARTS_AGAIN
            said = "\n".join(("\nIts last words:", *event.log_tail)) if event.log_tail else ""
            await self._transcript.notice(f"{event.reason}{again}{said}", error=True)
        active = before.active_here
        if pending is None or active is None or active.turn != getattr(event, "turn", None):
            return
        match event:
            case Evicted():
                await self._show_evicted(event)
            case Tokens():
                self._append(event.text)
            case TurnFinished():
                await self._finish(event, pending)
            case TurnFailed():
                await self._fail(event, pending, rearranged=bool(active.evictions))
            case _:
                pass

    async def _show_evicted(self, event: Evicted) -> None:
        current = self._controller.session.current
        self._transcript.leave_out(replace(current, evicted_messages=event.evicted_messages).unseen)
        await self._transcript.notice(f"The context was full: {event.note}.", last=False)

    async def _finish(self, event: TurnFinished, pending: ActiveTurn) -> None:
        if self._transcript.streaming:
            note = answer_note(event.stats, event.stats.finish_reason)
            # an answer that was gone on with is longer than what this turn wrote
            self._transcript.streaming.finish(pending.text, note)
        self._transcript.streaming = None
        await self._transcript.settle(self._controller.session.current.messages)

    async def _fail(self, event: TurnFailed, pending: ActiveTurn, *, rearranged: bool) -> None:
        """`rearranged` where messages were dimmed in this turn."""
        streaming, self._transcript.streaming = self._transcript.streaming, None
        if streaming is None:
            return
        if pending.text:
            streaming.finish(pending.text, answer_note(None, "error"))
        else:
            await self._transcript.drop(streaming)
        if rearranged or (pending.before and not pending.is_answered):
            await self.show_conversation()
        await self._transcript.settle(self._controller.session.current.messages)
        await self._transcript.notice(event.reason, error=True)

    def _append(self, text: str) -> None:
        if self._transcript.streaming and text:
            self._transcript.streaming.say("")
            self._transcript.streaming.append(text)
