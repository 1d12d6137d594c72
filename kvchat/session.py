"""The conductor: begins a turn, finishes it, undoes it; and which conversation is open.

Everything is saved before anything happens with it: the user's message before the engine sees it, the answer
while it is being written. It knows values and the store; it refuses to know torch, textual and processes.
"""

import secrets
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvchat.contract import CacheMode, FinishReason, Sampling, Tokens, TurnFinished, TurnRequest
from kvchat.conversation import Conversation, Message, Summary, title_from
from kvchat.errors import KvchatError

if (
    TYPE_CHECKING
):  # sqlite-utils takes a fifth of a second to import, and the first paint must not wait for it
    from kvchat.store import Store

UNSAVED = ""
"""Key of the draft that belongs to no conversation yet."""
PARTIAL_EVERY_S = 1.0
"""An answer in progress is saved this often, so that a crash loses a second of it at most."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a new conversation starts with."""

    model: str = ""
    system_prompt: str = ""
    mode: CacheMode = CacheMode.ON
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(slots=True)
class PendingTurn:
    """The turn that is being answered; it outlives a switch to another conversation."""

    turn: str
    conversation: str
    asked: int
    """Id of the message that is being answered."""
    reply: Message | None = None
    text: str = ""
    ids: list[int] = field(default_factory=list)
    saved_at: float = 0.0
    tokenizer: str = ""


class Session:
    """The open conversation and the turn under way."""

    def __init__(self, store: "Store", defaults: Defaults) -> None:
        self._store = store
        self.defaults = defaults
        self.current = self._blank()
        self.pending: PendingTurn | None = None

    def conversations(self) -> list[Summary]:
        """Saved conversations, the last used first."""
        return self._store.summaries()

    def new(self) -> Conversation:
        """Opens an empty conversation; it is saved with its first message."""
        self.current = self._blank()
        return self.current

    def open(self, conversation: str) -> Conversation:
        """Opens a saved conversation by id or by the beginning of its id.

        Raises:
            KvchatError: there is none, or several begin so.
        """
        self.current = self._store.load(self._store.find(conversation))
        return self.current

    def open_latest(self) -> Conversation:
        """Opens the conversation used last, or an empty one."""
        latest = next(iter(self.conversations()), None)
        return self.open(latest.id) if latest else self.new()

    def rename(self, conversation: str, title: str) -> None:
        """Gives a conversation another title; an empty one changes nothing."""
        if title := " ".join(title.split()):
            self._store.save_settings(replace(self._store.load(conversation), title=title))
            if conversation == self.current.id:
                self.current = replace(self.current, title=title)

    def delete(self, conversation: str) -> None:
        """Deletes a conversation for good; an answer under way in it is abandoned."""
        if self.pending and self.pending.conversation == conversation:
            self.pending = None
        self._store.delete(conversation)
        if conversation == self.current.id:
            self.new()

    def configure(
        self,
        *,
        mode: CacheMode | None = None,
        system_prompt: str | None = None,
        sampling: Sampling | None = None,
        model: str | None = None,
    ) -> None:
        """Changes settings of the open conversation; they hold from the next turn on."""
        given = {"mode": mode, "system_prompt": system_prompt, "sampling": sampling, "model": model}
        changes = {name: value for name, value in given.items() if value is not None}
        self.current = replace(self.current, **changes)  # type: ignore[arg-type]
        if self._saved():
            self._store.save_settings(self.current)

    def clear(self) -> None:
        """Empties the open conversation; its old messages stay in the file as another branch.

        An answer under way in it is abandoned.
        """
        if self.pending and self.pending.conversation == self.current.id:
            self.abandon_turn()
        self.current = replace(self.current, messages=())
        if self._saved():
            self._store.set_head(self.current.id, None)

    def begin_turn(self, text: str) -> TurnRequest:
        """Saves the user's message and asks for its answer.

        Raises:
            KvchatError: an answer is still under way, or another process deleted the conversation.
        """
        self._refuse_while_answering()
        if not self._saved():
            self._refuse_what_was_deleted()
            self.current = replace(self.current, title=self.current.title or title_from(text))
            self._store.create(self.current)
        self._append(Message(0, self._head_id(), "user", text, ""))
        return self._request()

    def regenerate(self) -> TurnRequest:
        """Asks for the last answer again, on a new branch beside the old one.

        Raises:
            KvchatError: there is nothing to answer, an answer is under way, or another process deleted the
                conversation.
        """
        self._refuse_while_answering()
        if not self._saved():
            self._refuse_what_was_deleted()
        messages = self.current.messages
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        if not messages:
            raise KvchatError("There is no answer to write again yet.")
        self.current = replace(self.current, messages=messages)
        self._store.set_head(self.current.id, messages[-1].id)
        return self._request()

    def keep_partial(self, tokens: Tokens) -> None:
        """Notes a piece of the answer, and saves what there is once a second."""
        if (pending := self._pending(tokens.turn)) is None:
            return
        pending.text += tokens.text
        pending.ids.extend(tokens.token_ids)
        pending.tokenizer = tokens.tokenizer
        if time.monotonic() - pending.saved_at >= PARTIAL_EVERY_S:
            pending.saved_at = time.monotonic()
            self._save_reply(pending, None)

    def finish_turn(self, finished: TurnFinished) -> Message | None:
        """Saves the whole answer and its figures; None if its conversation was deleted meanwhile."""
        if (pending := self._pending(finished.turn)) is None:
            return None
        self.pending = None
        pending.text, pending.ids = finished.text, list(finished.token_ids)
        pending.tokenizer = finished.tokenizer
        message = self._save_reply(pending, finished.stats.finish_reason)
        message = replace(message, stats=finished.stats)
        self._store.update_message(message)
        self._replace_reply(pending, message)
        return message

    def fail_turn(self, turn: str) -> None:
        """Ends a turn that failed: what was written of the answer stays, the question stays too."""
        if (pending := self._pending(turn)) is None:
            return
        self.pending = None
        if pending.text:
            self._save_reply(pending, FinishReason.ERROR.value)

    def abandon_turn(self) -> None:
        """Ends the turn under way because the program ends: what was written stays, as after a stop."""
        pending = self._pending(self.pending.turn) if self.pending else None
        self.pending = None
        if pending and pending.text:
            self._save_reply(pending, FinishReason.CANCELLED.value)

    def draft(self) -> str:
        """The unsent prompt of the open conversation."""
        return self._store.draft(self._draft_key())

    def save_draft(self, text: str) -> None:
        """Remembers the unsent prompt of the open conversation."""
        if text != self.draft():
            self._store.save_draft(self._draft_key(), text)

    def _blank(self) -> Conversation:
        given = self.defaults
        return Conversation(
            secrets.token_hex(4), "", given.system_prompt, given.mode, given.sampling, given.model
        )

    def _saved(self) -> bool:
        return self._store.exists(self.current.id)

    def _draft_key(self) -> str:
        return self.current.id if self._saved() else UNSAVED

    def _head_id(self) -> int | None:
        return self.current.head.id if self.current.head else None

    def _append(self, message: Message) -> Message:
        saved = self._store.add_message(self.current.id, message)
        self.current = replace(self.current, messages=(*self.current.messages, saved))
        return saved

    def _request(self) -> TurnRequest:
        asked = self.current.messages[-1]
        self.pending = PendingTurn(secrets.token_hex(8), self.current.id, asked.id, saved_at=time.monotonic())
        return TurnRequest(
            self.pending.turn,
            self.current.id,
            self.current.prompt(),
            self.current.mode,
            self.current.sampling,
        )

    def _pending(self, turn: str) -> PendingTurn | None:
        """The turn under way, if it is that one; a conversation that is gone has none."""
        if self.pending and not self._store.exists(self.pending.conversation):
            self.pending = None
        return self.pending if self.pending and self.pending.turn == turn else None

    def _refuse_while_answering(self) -> None:
        if self.pending:
            raise KvchatError("An answer is still being written. Esc stops it.")

    def _refuse_what_was_deleted(self) -> None:
        """Messages without a saved conversation: another process deleted it."""
        if self.current.messages:
            raise KvchatError("This conversation was deleted by another kvchat. Start a new one.")

    def _save_reply(self, pending: PendingTurn, finish: str | None) -> Message:
        """Saves what there is of the answer, as a child of the message it answers."""
        ids = tuple(pending.ids)
        if pending.reply is None:
            blank = Message(0, pending.asked, "assistant", pending.text, "", ids, pending.tokenizer, finish)
            pending.reply = self._store.add_message(pending.conversation, blank)
            self._replace_reply(pending, pending.reply)
        else:
            pending.reply = replace(
                pending.reply,
                text=pending.text,
                token_ids=ids,
                tokenizer=pending.tokenizer,
                finish_reason=finish,
            )
            self._store.update_message(pending.reply)
            self._replace_reply(pending, pending.reply)
        return pending.reply

    def _replace_reply(self, pending: PendingTurn, reply: Message) -> None:
        """Shows the reply in the open conversation, if that is the one it belongs to."""
        if self.current.id != pending.conversation:
            return
        before = tuple(m for m in self.current.messages if m.id != reply.id)
        if before and before[-1].id == pending.asked:
            self.current = replace(self.current, messages=(*before, reply))
