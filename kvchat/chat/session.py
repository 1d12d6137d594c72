"""The open conversation and the turn under way: begins a turn, finishes it, undoes it.

Everything is saved before anything happens with it: the user's message before the engine sees it, the answer
while it is being written. A question is saved as not sent until its answer begins: a turn that ends before
that, for any reason, changes no later prompt. Must not depend on torch, textual or processes.
"""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kvchat.chat.active_turn import ActiveTurn, NotSent
from kvchat.chat.conversation import (
    Conversation,
    Hit,
    Message,
    Preset,
    Summary,
    new_id,
    one_id,
    title_from,
)
from kvchat.chat.state import largest_prefill
from kvchat.chat.token_status import ANSWER, TokenStatuses, token_statuses
from kvchat.contract import (
    CacheEvent,
    CacheMode,
    EvictionPolicy,
    FinishReason,
    KVPrecision,
    Sampling,
    Tokens,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    TurnStats,
)
from kvchat.errors import KvchatError

if TYPE_CHECKING:  # sqlite-utils takes a fifth of a second to import: the first paint must not wait for it
    from kvchat.chat.store import Store

UNSAVED = ""
"""Key of the draft that belongs to no conversation yet."""
MOST_HITS = 100
"""Of one search."""
HISTORY_LENGTH = 300
"""Messages that can be brought back into the prompt."""
PARTIAL_EVERY_S = 1.0
"""An answer in progress is saved this often, so that a crash loses a second of it at most."""


@dataclass(frozen=True, slots=True)
class ConversationDefaults:
    """What a new conversation starts with."""

    model: str = ""
    system_prompt: str = ""
    mode: CacheMode = CacheMode.ON
    sampling: Sampling = field(default_factory=Sampling)
    kv: KVPrecision = KVPrecision.AUTO
    policy: EvictionPolicy = EvictionPolicy.TURNS
    private: bool = False
    """Nothing is written, of the text or of the cache."""


def known_rate(turns: Iterable[TurnStats]) -> float:
    """Tokens a second that the model read in these turns; 0 where no prefill was long enough to tell."""
    largest = largest_prefill(turns)
    return largest.prefill_tok_s if largest else 0.0


class Session:
    """The open conversation and the turn under way."""

    def __init__(self, store: "Store", defaults: ConversationDefaults) -> None:
        self._store = store
        self._secret: Store | None = None
        """In memory; made for the first private conversation."""
        self._private: set[str] = set()
        """Ids of private conversations."""
        self.defaults = defaults
        self.current = self._blank()
        self.pending: ActiveTurn | None = None
        self._told: tuple[str, TokenStatuses] = ("", {})
        """A conversation, and what its last turn did: read once, for whoever draws it asks often."""
        self._outside: tuple[Store, Conversation] | None = None
        """The file, and the conversation that was open, while they are left alone."""

    def conversations(self) -> list[Summary]:
        """Saved conversations and private ones, the last used first."""
        secret = self._secret.summaries() if self._secret else []
        found = [*self._store.summaries(), *(replace(each, private=True) for each in secret)]
        return sorted(found, key=lambda each: each.updated_at, reverse=True) if secret else found

    def history(self) -> list[str]:
        """What the user sent, the latest last; what is private of this run comes after the rest."""
        sent = [text for store in self._stores for text in store.history(HISTORY_LENGTH)]
        return sent[-HISTORY_LENGTH:]

    def search(self, words: Sequence[str]) -> list[Hit]:
        """Where all these words stand, in every conversation."""
        return [hit for store in self._stores for hit in store.search(words, MOST_HITS)]

    def import_all(self, conversations: Sequence[Conversation]) -> int:
        """Saves those that aren't here yet, all or none; returns how many."""
        return self._store.import_all(self.without_private(conversations))

    def without_private(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Those that are not here as private ones: one id is never in both stores."""
        return [each for each in conversations if each.id not in self._private]

    @property
    def file(self) -> Path | None:
        """The database; None where everything is in memory."""
        return self._store.file

    def presets(self) -> list[Preset]:
        """Named system prompts with their sampling."""
        return self._store.presets()

    def save_preset(self, preset: Preset) -> None:
        """Remembers a way of answering by its name."""
        self._store.save_preset(preset)

    def delete_preset(self, name: str) -> None:
        """Forgets a name."""
        self._store.delete_preset(name)

    def is_private(self, conversation: str) -> bool:
        """Whether nothing of it is written."""
        return self.defaults.private or conversation in self._private

    def new(self) -> Conversation:
        """Opens an empty conversation; it is saved with its first message."""
        self.current = self._blank()
        return self.current

    def new_private(self) -> Conversation:
        """Opens an empty conversation of which nothing is ever written; it is gone when kvchat ends."""
        if self._secret is None:
            from kvchat.chat.store import Store

            self._secret = Store(None)
        self.current = self._blank()
        self._private.add(self.current.id)
        return self.current

    def open(self, conversation: str) -> Conversation:
        """Opens a saved conversation by id or by the beginning of its id.

        Raises:
            KvchatError: there is none, or several begin so.
        """
        self.current = self._loaded(one_id([each.id for each in self.conversations()], conversation))
        return self.current

    def open_at(self, conversation: str, message: int) -> bool:
        """Opens a saved conversation on a branch that has this message: the newest, unless it is shown.

        Returns whether that is another branch than the one that was shown.

        Raises:
            KvchatError: there is no such conversation or message, or its conversation is being answered
                on another branch.
        """
        here = conversation == self.current.id
        found = self.current if here else self._loaded(conversation)
        switches = all(each.id != message for each in found.messages)
        branch = self._store_of(conversation).branch(conversation, message) if switches else found.messages
        if not branch:
            raise KvchatError("That message is not there any more.")
        if switches and self.pending and self.pending.conversation == conversation:
            raise KvchatError(
                "It is on another branch than the answer that is being written. Esc stops that."
            )
        self.current = found
        if switches:
            self._go_to(branch)
        return switches

    def open_latest(self) -> Conversation:
        """Opens the conversation used last, or an empty one."""
        latest = next(iter(self.conversations()), None)
        return self.open(latest.id) if latest else self.new()

    def aside(self) -> None:
        """Leaves the file alone until `back`: conversations from here on are in memory only.

        Raises:
            KvchatError: an answer is still under way.
        """
        from kvchat.chat.store import Store

        self._refuse_what_cannot_be_changed()
        self._outside = (self._store, self.current)
        self._store = Store(None)
        self.new()

    @property
    def is_aside(self) -> bool:
        """Whether the file is left alone now."""
        return self._outside is not None

    def back(self) -> str:
        """Goes back to the file and the conversation that was open; returns the one that is gone now."""
        gone = self.current.id
        self.abandon_turn()
        if self._outside:
            (self._store, self.current), self._outside = self._outside, None
            if self._saved():
                self.open(self.current.id)
            elif self.current.id in self._private:
                self.new_private()
            else:
                self.new()
        return gone

    def rename(self, conversation: str, title: str) -> None:
        """Gives a conversation another title; an empty one changes nothing."""
        if title := " ".join(title.split()):
            store = self._store_of(conversation)
            store.save_settings(replace(store.load(conversation), title=title))
            if conversation == self.current.id:
                self.current = replace(self.current, title=title)

    def delete(self, conversation: str) -> None:
        """Deletes a conversation for good; an answer under way in it is abandoned."""
        if self.pending and self.pending.conversation == conversation:
            self.pending = None
        self._store_of(conversation).delete(conversation)
        if conversation == self.current.id:
            self.new()

    def configure(
        self,
        *,
        mode: CacheMode | None = None,
        system_prompt: str | None = None,
        sampling: Sampling | None = None,
        model: str | None = None,
        kv: KVPrecision | None = None,
        policy: EvictionPolicy | None = None,
    ) -> None:
        """Changes settings of the open conversation; they hold from the next turn on."""
        given = {
            "mode": mode,
            "system_prompt": system_prompt,
            "sampling": sampling,
            "model": model,
            "kv": kv,
            "policy": policy,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        self.current = replace(self.current, **changes)  # type: ignore[arg-type]
        if self._saved():
            self._here.save_settings(self.current)

    def clear(self) -> None:
        """Empties the open conversation; its old messages stay in the file as another branch.

        An answer under way in it is abandoned.
        """
        if self.pending and self.pending.conversation == self.current.id:
            self.abandon_turn()
        self._go_to(())

    def begin_turn(self, text: str) -> TurnRequest:
        """Saves the user's message and asks for its answer.

        Raises:
            KvchatError: an answer is still under way, or another process deleted the conversation.
        """
        self._refuse_what_cannot_be_changed()
        if not self._saved():
            self.current = replace(self.current, title=self.current.title or title_from(text))
            self._here.create(self.current)
        elif self._is_titled_by_what_was_not_sent():
            self.rename(self.current.id, title_from(text))
        self._append(text)
        return self._request()

    def regenerate(self) -> TurnRequest:
        """Asks for the last answer again, on a new branch beside the old one; or sends what was not sent.

        Raises:
            KvchatError: there is nothing to answer, an answer is under way, or another process deleted the
                conversation.
        """
        self._refuse_what_cannot_be_changed()
        before, messages = self.current, self.current.messages
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        if not messages:
            raise KvchatError("There is no answer to write again yet.")
        # the file shows the old answer until the new one begins
        self.current = before.showing((*messages[:-1], replace(messages[-1], not_sent=False)))
        return self._request(before=before)

    def undo(self) -> str:
        """Takes the last question and its answer back, and returns the question's text.

        Both stay in the file as another branch.

        Raises:
            KvchatError: there is none, an answer is under way, or another process deleted the conversation.
        """
        self._refuse_what_cannot_be_changed()
        asked = next((i for i in reversed(range(len(self.current.messages))) if self._is_question(i)), None)
        if asked is None:
            raise KvchatError("There is no question to take back.")
        text = self.current.messages[asked].text
        self._go_to(self.current.messages[:asked])
        return text

    def edit(self, message: int, text: str) -> TurnRequest:
        """Asks another question in the place of an earlier one, on a new branch beside the old one.

        Raises:
            KvchatError: it is no question of this conversation, an answer is under way, or another process
                deleted the conversation.
        """
        self._refuse_what_cannot_be_changed()
        messages = self.current.messages
        place = next((i for i, m in enumerate(messages) if m.id == message and self._is_question(i)), None)
        if place is None:
            raise KvchatError("Only a question of this conversation can be edited.")
        before = self.current
        self.current = before.showing(messages[:place])
        try:
            self._append(text, shown=False)
        except KvchatError:
            self.current = before  # the old question stays where the new one can't be saved
            raise
        return self._request(before=before, edited=message)

    def continue_answer(self) -> TurnRequest:
        """Asks the model to go on with the last answer, which was stopped or reached its limit.

        Raises:
            KvchatError: there is no such answer, an answer is under way, or another process
                deleted the conversation.
        """
        self._refuse_what_cannot_be_changed()
        head = self.current.sent[-1] if self.current.sent else None
        if head is None or head.role != "assistant" or not head.raw:
            raise KvchatError("There is no answer to go on with.")
        if head.finish_reason == FinishReason.STOP:
            raise KvchatError("The model ended this answer itself; ask something.")
        if head != self.current.head:  # what was not sent stays as another branch
            self._go_to(self.current.messages[: self.current.messages.index(head) + 1])
        request = self._request()
        pending = self.pending
        assert pending is not None
        pending.asked, pending.reply, pending.begun, pending.text = head.parent_id or 0, head, head, head.raw
        return request

    def fork(self, message: int | None = None) -> Conversation:
        """Opens a new conversation with the messages up to `message`, or with all of them.

        Raises:
            KvchatError: there is nothing to fork, an answer is under way, or another process
                deleted the conversation.
        """
        self._refuse_what_cannot_be_changed()
        messages = self.current.messages
        ends = [i + 1 for i, m in enumerate(messages) if message in (None, m.id)]
        if not ends or not self._saved():
            raise KvchatError("There is nothing to fork there.")
        end = ends[-1]
        title = f"{self.current.title} (fork)"
        copy = replace(self.current.showing(messages[:end]), id=new_id(), title=title)
        store = self._here
        if self.current.id in self._private:
            self._private.add(copy.id)
        self.current = store.add(copy)
        return self.current

    def note_events(self, events: Sequence[CacheEvent]) -> None:
        """Saves what happened to caches, each event in the store that has its conversation.

        Also in the file while it is left alone: a cache of before may still be on its way to disk.
        """
        outside = [self._outside[0]] if self._outside else []
        for store in (*outside, *self._stores) if events else ():
            store.add_events(events)

    def whole(self) -> Conversation:
        """The open conversation with the messages of its other branches too."""
        return self._here.whole(self.current)

    def events(self, conversation: str = "") -> list[CacheEvent]:
        """The timeline of a conversation's cache, oldest first; of the open one's without a name."""
        wanted = conversation or self.current.id
        return self._store_of(wanted).events(wanted)

    def request_as_if(self, **changes: object) -> TurnRequest:
        """What the next turn would ask, with some of its fields changed; to ask its price."""
        return replace(self._turn_request("price"), **changes)  # type: ignore[arg-type]

    @property
    def last_turn(self) -> TokenStatuses:
        """What the last turn of the open conversation did with its messages, or does that is under way."""
        pending = self.pending
        if pending and pending.conversation == self.current.id and pending.spans:
            return pending.statuses()
        if self._told[0] != self.current.id:
            self._told = (self.current.id, self._here.last_turn(self.current.id))
        return self._told[1]

    def note_started(self, started: TurnStarted) -> None:
        """Notes what the turn under way is going to do."""
        if pending := self._pending(started.turn):
            pending.spans = started.spans

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
        pending.text = pending.begun_text + finished.text
        pending.ids, pending.tokenizer = list(finished.token_ids), finished.tokenizer
        try:
            message = self._save_reply(pending, finished.stats.finish_reason)
        except KvchatError:
            self._take_back(pending)
            raise
        message = replace(message, stats=finished.stats)
        self._store_of(pending.conversation).update_message(message)
        self._replace_reply(pending, message)
        self._set_evicted(pending.conversation, finished.evicted_messages)
        self.note_events(finished.pool.events)
        self._save_last_turn(pending.conversation, token_statuses(finished.spans, pending.places, message.id))
        return message

    def fail_turn(self, turn: str) -> NotSent | None:
        """Ends a turn that failed: what was written of the answer stays.

        Where nothing was written, the question is shown as not sent, and no later prompt has it. One that
        replaced another question, or an answer that was to be written again, gives way to what was shown
        before. Returns the question, to be sent again.
        """
        pending = self._pending(turn)
        return self._break_off(pending, FinishReason.ERROR) if pending else None

    def abandon_turn(self) -> NotSent | None:
        """Ends the turn under way because the program ends: what was written stays, as after a stop.

        Without a token of an answer, it ends as one that failed.
        """
        pending = self._pending(self.pending.turn) if self.pending else None
        return self._break_off(pending, FinishReason.CANCELLED) if pending else None

    def keep_for_later(self, question: NotSent) -> None:
        """Puts a question before the draft of its conversation, which is not open."""
        store = self._store_of(question.conversation)
        draft = store.draft(question.conversation)
        if not draft.startswith(question.text):
            store.save_draft(question.conversation, "\n".join(filter(None, (question.text, draft))))

    def draft(self) -> str:
        """The unsent prompt of the open conversation."""
        return self._here.draft(self._draft_key())

    def save_draft(self, text: str) -> None:
        """Remembers the unsent prompt of the open conversation."""
        if text != self.draft():
            self._here.save_draft(self._draft_key(), text)

    def _blank(self) -> Conversation:
        given = self.defaults
        return Conversation(
            new_id(),
            "",
            given.system_prompt,
            given.mode,
            given.sampling,
            given.model,
            given.kv,
            given.policy,
            created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        )

    def _is_question(self, index: int) -> bool:
        return self.current.messages[index].role == "user"

    def _go_to(self, messages: tuple[Message, ...]) -> None:
        """Makes the last of `messages` the head; what came after stays in the file as another branch."""
        self.current = self.current.showing(messages)
        if self._saved():
            self._here.set_head(self.current.id, messages[-1].id if messages else None)
            self._here.save_settings(self.current)

    def _set_evicted(self, conversation: str, count: int) -> None:
        """Remembers how many of the oldest messages an eviction left out."""
        if conversation == self.current.id:
            if count != self.current.evicted_messages:
                self.current = replace(self.current, evicted_messages=count)
                self._here.save_settings(self.current)
        else:
            store = self._store_of(conversation)
            other = store.load(conversation)
            if count != other.evicted_messages:
                store.save_settings(replace(other, evicted_messages=count))

    def _loaded(self, conversation: str) -> Conversation:
        """A saved conversation; on the branch that is being answered, if one is."""
        store, pending = self._store_of(conversation), self.pending
        found = store.load(conversation)
        if pending is None or pending.conversation != conversation:
            return found
        last = pending.reply.id if pending.reply else pending.asked
        path = store.path(conversation, last)
        return found.showing(tuple(replace(m, not_sent=m.not_sent and m.id != pending.asked) for m in path))

    def _is_titled_by_what_was_not_sent(self) -> bool:
        """Whether nothing was sent yet, and the title comes from a question that could not be."""
        current = self.current
        return not current.sent and current.title in {title_from(m.text) for m in current.messages}

    @property
    def _here(self) -> "Store":
        """Where the open conversation is."""
        return self._store_of(self.current.id)

    @property
    def _stores(self) -> list["Store"]:
        """Where conversations are that can be opened: the private ones last."""
        return [self._store, *([self._secret] if self._secret else [])]

    def _store_of(self, conversation: str) -> "Store":
        secret = self._secret if conversation in self._private else None
        return secret or self._store

    def _saved(self) -> bool:
        return self._here.exists(self.current.id)

    def _draft_key(self) -> str:
        return self.current.id if self._saved() else UNSAVED

    def _head_id(self) -> int | None:
        return self.current.head.id if self.current.head else None

    def _append(self, text: str, *, shown: bool = True) -> None:
        """Saves a question as not sent: its answer's first save makes it a sent one."""
        question = Message(0, self._head_id(), "user", text, "", not_sent=True)
        saved = self._here.add_message(self.current.id, question, shown=shown)
        messages = (*self.current.messages, replace(saved, not_sent=False))
        self.current = replace(self.current, messages=messages)

    def _request(self, *, before: Conversation | None = None, edited: int | None = None) -> TurnRequest:
        asked = self.current.messages[-1]
        self.pending = ActiveTurn(
            secrets.token_hex(8),
            self.current.id,
            asked.id,
            self.current.places,
            saved_at=time.monotonic(),
            before=before,
            edited=edited,
            evicted_messages=self.current.evicted_messages,
        )
        return self._turn_request(self.pending.turn)

    def _turn_request(self, turn: str) -> TurnRequest:
        current = self.current
        return TurnRequest(
            turn,
            current.id,
            current.prompt(),
            current.mode,
            current.sampling,
            current.kv,
            current.policy,
            current.evicted_messages,
            current.created_at,
            persist=not self.is_private(current.id),
            known_prefill_tok_s=known_rate([m.stats for m in current.messages if m.stats]),
        )

    def _pending(self, turn: str) -> ActiveTurn | None:
        """The turn under way, if it is that one; a conversation that is gone has none."""
        if self.pending and not self._store_of(self.pending.conversation).exists(self.pending.conversation):
            self.pending = None
        return self.pending if self.pending and self.pending.turn == turn else None

    def _refuse_what_cannot_be_changed(self) -> None:
        """A conversation whose answer is under way, or that has messages and isn't saved any more."""
        if self.pending:
            raise KvchatError("An answer is still being written. Esc stops it.")
        if self.current.messages and not self._saved():
            raise KvchatError("This conversation was deleted by another kvchat. Start a new one.")

    def _break_off(self, pending: ActiveTurn, finish: FinishReason) -> NotSent | None:
        """Keeps what there is of a turn that ended before its time; returns a question that got no answer."""
        self.pending = None
        not_sent = None if pending.is_answered else self._take_back(pending)
        if pending.is_answered:
            self._save_reply(pending, finish.value)
        if pending.spans:
            told = {message: counts for message, counts in pending.statuses().items() if message != ANSWER}
            self._save_last_turn(pending.conversation, told)
        return not_sent

    def _take_back(self, pending: ActiveTurn) -> NotSent | None:
        """Shows the open conversation as the file has it without an answer to this question.

        Returns the question; None where it was answered before, or where a part of this answer is saved.
        """
        if pending.reply is not None:
            return None
        here = self.current.id == pending.conversation
        shown = (
            self.current.messages
            if here
            else self._store_of(pending.conversation).path(pending.conversation, pending.asked)
        )
        asked = next((m for m in shown if m.id == pending.asked), None)
        before = pending.before
        if here and before:
            self.current = replace(
                self.current, messages=before.messages, evicted_messages=before.evicted_messages
            )
        elif here:
            messages = tuple(replace(m, not_sent=m.not_sent or m.id == pending.asked) for m in shown)
            self.current = replace(self.current, messages=messages)
        again = (
            before is not None and pending.edited is None and before.head and before.head.role == "assistant"
        )
        return None if again or not asked else NotSent(pending.conversation, asked.text, pending.edited)

    def _save_last_turn(self, conversation: str, statuses: TokenStatuses) -> None:
        self._store_of(conversation).save_last_turn(conversation, statuses)
        if conversation == self._told[0]:
            self._told = (conversation, statuses)

    def _save_reply(self, pending: ActiveTurn, finish: str | None) -> Message:
        """Saves what there is of the answer, as a child of the message it answers."""
        reply = pending.answer(finish)
        if pending.reply is None:
            store = self._store_of(pending.conversation)
            reply = store.add_message(pending.conversation, reply, evicted_messages=pending.evicted_messages)
        else:
            self._store_of(pending.conversation).update_message(reply)
        pending.reply = reply
        self._replace_reply(pending, reply)
        return reply

    def _replace_reply(self, pending: ActiveTurn, reply: Message) -> None:
        """Shows the reply in the open conversation, if that is the one it belongs to."""
        if self.current.id != pending.conversation:
            return
        before = tuple(m for m in self.current.messages if m.id != reply.id)
        if before and before[-1].id == pending.asked:
            self.current = replace(self.current, messages=(*before, reply))
