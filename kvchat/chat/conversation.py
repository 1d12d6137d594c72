"""Messages and conversations as pure values, and the path through their tree.

Messages form a tree by `parent_id`: regenerating or editing starts a new branch beside the old one, and the
conversation's `head` says which leaf is shown. It knows no storage and no engine.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvchat.chat.attachments import parse_attachments
from kvchat.contract import CacheMode, EvictionPolicy, KVPrecision, PromptMessage, Sampling, TurnStats
from kvchat.validation import bounds

TITLE_LENGTH = 48
ID_LENGTH = 12


@dataclass(frozen=True, slots=True)
class Message:
    """One node of a conversation's tree."""

    id: int
    parent_id: int | None
    role: bounds.Role
    text: bounds.Text
    """Of an answer, what comes after the thinking."""
    created_at: str
    """UTC, ISO 8601."""
    token_ids: tuple[bounds.TokenId, ...] = ()
    tokenizer: bounds.Text = ""
    finish_reason: bounds.Finish | None = None
    """Of an answer; None while it is being written, or where writing it was cut off by a crash."""
    stats: TurnStats | None = None
    thinking: bounds.Text = ""
    """What the model thought before it answered, with its tags."""
    not_sent: bool = False
    """Of a question: its turn ended before the first token of an answer, so no later prompt has it."""

    @property
    def raw(self) -> str:
        """The whole text, for which `token_ids` stand."""
        return self.thinking + self.text


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation with the messages on the path to its head, oldest first."""

    id: str
    title: bounds.Text = ""
    system_prompt: bounds.Text = ""
    mode: CacheMode = CacheMode.ON
    sampling: Sampling = field(default_factory=Sampling)
    model: bounds.Text = ""
    kv: KVPrecision = KVPrecision.AUTO
    policy: EvictionPolicy = EvictionPolicy.TURNS
    evicted_messages: bounds.MessageCount = 0
    """The oldest messages that an eviction left out; they stay in the file and on the screen."""
    created_at: str = ""
    """UTC, ISO 8601; the date that chat templates see."""
    messages: tuple[Message, ...] = ()
    other_branches: tuple[Message, ...] = ()
    """Messages that are not shown, oldest first; loaded only for those who ask (`Store.whole`)."""

    @property
    def head(self) -> Message | None:
        """The last message shown."""
        return self.messages[-1] if self.messages else None

    @property
    def sent(self) -> tuple[Message, ...]:
        """The messages that prompts are made of, oldest first: those without an answer are none of them."""
        return tuple(message for message in self.messages if not message.not_sent)

    @property
    def unseen(self) -> int:
        """The oldest messages that the model doesn't see any more, because an eviction left them out."""
        read, before = 0, ""
        for index, message in enumerate(self.messages):
            if message.not_sent:
                continue
            # questions in a row are read as one
            read += not (message.role == before == "user")
            before = message.role
            if read > self.evicted_messages:
                return index
        return len(self.messages) if self.evicted_messages else 0

    def showing(self, messages: tuple[Message, ...]) -> "Conversation":
        """This conversation on another branch.

        What was left out stays so, unless that would leave nothing. It is counted as an engine counts:
        unanswered questions in a row are one message.
        """
        other = replace(self, messages=messages)
        read = replace(other, system_prompt="").prompt()
        return replace(
            other, evicted_messages=self.evicted_messages if len(read) > self.evicted_messages else 0
        )

    def question(self, number: str) -> Message | None:
        """A question by its number, from 1; the last one for an empty `number`.

        Questions that were not sent have no number.
        """
        questions = [message for message in self.sent if message.role == "user"]
        numbered = {str(n): question for n, question in enumerate(questions, start=1)}
        return numbered.get(number or str(len(numbered)))

    def answer_to(self, question: Message) -> Message:
        """The answer to a question; the question itself where there is none."""
        answers = (m for m in self.messages if m.role == "assistant" and m.parent_id == question.id)
        return next(answers, question)

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """Ids of the messages at each place of `prompt()`.

        None at that of the system prompt, several where questions in a row are read as one.
        """
        places: list[tuple[int, ...]] = [()] if self.system_prompt else []
        before = ""
        for message in self.sent:
            joined = places.pop() if message.role == before == "user" else ()
            places.append((*joined, message.id))
            before = message.role
        return tuple(places)

    def prompt(self) -> tuple[PromptMessage, ...]:
        """The messages as an engine reads them.

        User messages that follow each other (the first was never answered) become one, since many chat
        templates insist on alternation. Questions that were not sent are left out.
        """
        prompt = [PromptMessage("system", self.system_prompt)] if self.system_prompt else []
        for message in self.sent:
            if message.role == "user" and prompt and prompt[-1].role == "user":
                prompt[-1] = PromptMessage("user", f"{prompt[-1].text}\n\n{message.text}")
            else:
                ids = message.token_ids if message.role == "assistant" else ()
                prompt.append(PromptMessage(message.role, message.raw, ids, message.tokenizer))
        return tuple(prompt)


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation as a list shows it."""

    id: str
    title: str
    updated_at: str
    messages: int
    private: bool = False
    """Whether it is gone when kvchat ends."""


@dataclass(frozen=True, slots=True)
class Hit:
    """Where searched words stand."""

    conversation: str
    title: str
    message: int | None
    """None where they stand in the title."""
    role: str
    text: str
    created_at: str
    other_branch: bool = False
    """Whether the message is on another branch than the one that is shown."""
    not_sent: bool = False
    """Whether it is a question that was not sent."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A named way of answering."""

    name: str
    system_prompt: str
    sampling: Sampling


def new_id() -> str:
    """An id for a new conversation, in the form that all of them have: 12 hex digits."""
    return secrets.token_hex(ID_LENGTH // 2)


def title_from(text: str) -> str:
    """A title out of the first message: its first line, cut at a word; without words, the attached files."""
    written, attached = parse_attachments(text)
    written = written if written.strip() else ", ".join(each.name for each in attached)
    line = next((line for line in written.splitlines() if line.strip()), "").strip()
    if len(line) <= TITLE_LENGTH:
        return line
    return line[:TITLE_LENGTH].rsplit(" ", 1)[0].rstrip(" ,;:") + "…"


def path_to(messages: Mapping[int, Message], head: int | None) -> tuple[Message, ...]:
    """The messages from the root down to `head`; where a parent is gone, or is met again, it begins there."""
    path: dict[int, Message] = {}
    while head is not None and head in messages and head not in path:
        path[head] = messages[head]
        head = messages[head].parent_id
    return tuple(reversed(path.values()))


def newest_leaf(messages: Mapping[int, Message], start: int) -> int:
    """The youngest message below `start`, or that one where nothing follows it."""
    below = {start}
    for number in sorted(messages):  # parents are older than their children, and so are their numbers
        if messages[number].parent_id in below:
            below.add(number)
    return max(below)
