"""Messages and conversations as values, and the path through the message tree.

Messages form a tree by `parent_id`: regenerating or editing starts a new branch, and the `head` is the leaf
that is shown. Must not depend on storage or the engine.
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from kvchat.chat.attachments import parse_attachments
from kvchat.contract import CacheMode, EvictionPolicy, KVPrecision, PromptMessage, Sampling, TurnStats
from kvchat.errors import KvchatError
from kvchat.validation import bounds

TITLE_LENGTH = 48
ID_LENGTH = 12


@dataclass(frozen=True, slots=True)
class Message:
    """One node of the message tree."""

    id: int
    parent_id: int | None
    role: bounds.Role
    text: bounds.Text
    """For an answer: the text after the thinking."""
    created_at: str
    """UTC, ISO 8601."""
    token_ids: tuple[bounds.TokenId, ...] = ()
    tokenizer: bounds.Text = ""
    finish_reason: bounds.Finish | None = None
    """For an answer; None while it is generated, or after a crash during generation."""
    stats: TurnStats | None = None
    thinking: bounds.Text = ""
    """The model's reasoning before the answer, with its tags."""
    not_sent: bool = False
    """For a question: its turn ended before the first token of an answer; prompts don't contain it."""

    @property
    def raw(self) -> str:
        """The whole text, which `token_ids` encode."""
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
    """Number of oldest messages that were evicted from the context; they stay in the database."""
    created_at: str = ""
    """UTC, ISO 8601; chat templates get this date."""
    messages: tuple[Message, ...] = ()
    other_branches: tuple[Message, ...] = ()
    """Messages on other branches, oldest first; loaded by `Store.whole` only."""

    @property
    def head(self) -> Message | None:
        """The last message shown."""
        return self.messages[-1] if self.messages else None

    @property
    def sent(self) -> tuple[Message, ...]:
        """The messages of prompts, oldest first: all but those that were not sent."""
        return tuple(message for message in self.messages if not message.not_sent)

    @property
    def unseen(self) -> int:
        """Number of oldest messages that the model doesn't see any more, because they were evicted."""
        groups = self._groups
        if len(groups) > self.evicted_messages:
            return self.messages.index(groups[self.evicted_messages][0])
        return len(self.messages) if self.evicted_messages else 0

    @property
    def _groups(self) -> list[list[Message]]:
        """The messages of each prompt message.

        Consecutive questions (the first was never answered) are one: many chat templates require alternation.
        """
        groups: list[list[Message]] = []
        for message in self.sent:
            if groups and message.role == groups[-1][-1].role == "user":
                groups[-1].append(message)
            else:
                groups.append([message])
        return groups

    def showing(self, messages: tuple[Message, ...]) -> "Conversation":
        """This conversation on another branch.

        Keeps `evicted_messages`, unless nothing would remain. It counts prompt messages: consecutive
        questions are one.
        """
        other = replace(self, messages=messages)
        read = replace(other, system_prompt="").prompt()
        return replace(
            other, evicted_messages=self.evicted_messages if len(read) > self.evicted_messages else 0
        )

    def question(self, number: str) -> Message | None:
        """The question with a number, from 1; the last one for an empty `number`.

        Questions that were not sent are not counted.
        """
        questions = [message for message in self.sent if message.role == "user"]
        numbered = {str(n): question for n, question in enumerate(questions, start=1)}
        return numbered.get(number or str(len(numbered)))

    def answer_to(self, question: Message) -> Message:
        """The answer to a question; the question itself if there is none."""
        answers = (m for m in self.messages if m.role == "assistant" and m.parent_id == question.id)
        return next(answers, question)

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """Ids of the messages at each index of `prompt()`.

        Empty for the system prompt, several for consecutive questions.
        """
        places: list[tuple[int, ...]] = [()] if self.system_prompt else []
        return (*places, *(tuple(message.id for message in group) for group in self._groups))

    def prompt(self) -> tuple[PromptMessage, ...]:
        """The messages for the engine, with the system prompt and without questions that were not sent."""
        prompt = [PromptMessage("system", self.system_prompt)] if self.system_prompt else []
        for group in self._groups:
            first = group[0]
            if first.role == "user":
                prompt.append(PromptMessage("user", "\n\n".join(message.text for message in group)))
            else:
                prompt.append(PromptMessage(first.role, first.raw, first.token_ids, first.tokenizer))
        return tuple(prompt)


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation in a list."""

    id: str
    title: str
    updated_at: str
    messages: int
    private: bool = False
    """Whether it is in memory only."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A search result."""

    conversation: str
    title: str
    message: int | None
    """None for a match in the title."""
    role: str
    text: str
    created_at: str
    other_branch: bool = False
    """Whether the message is not on the branch that is shown."""
    not_sent: bool = False
    """Whether it is a question that was not sent."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A named combination of system prompt and sampling."""

    name: str
    system_prompt: str
    sampling: Sampling


def new_id() -> str:
    """A random id for a new conversation: 12 hex digits."""
    return secrets.token_hex(ID_LENGTH // 2)


def one_id(ids: Iterable[str], beginning: str) -> str:
    """The id that starts with `beginning`.

    Raises:
        KvchatError: none does, or several do.
    """
    found = [each for each in ids if each.startswith(beginning)] if beginning else []
    if len(found) != 1:
        words = f"{len(found)} conversations start" if found else "No conversation starts"
        raise KvchatError(f"{words} with {beginning!r}. `kvchat sessions` lists them.")
    return found[0]


def now() -> str:
    """The current time in UTC, ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def title_from(text: str) -> str:
    """A title from the first message: its first line, cut at a word; without text the names of its files."""
    written, attached = parse_attachments(text)
    written = written if written.strip() else ", ".join(each.name for each in attached)
    line = next((line for line in written.splitlines() if line.strip()), "").strip()
    if len(line) <= TITLE_LENGTH:
        return line
    return line[:TITLE_LENGTH].rsplit(" ", 1)[0].rstrip(" ,;:") + "…"


def path_to(messages: Mapping[int, Message], head: int | None) -> tuple[Message, ...]:
    """The messages from the root to `head`; starts below a missing parent or a cycle."""
    path: dict[int, Message] = {}
    while head is not None and head in messages and head not in path:
        path[head] = messages[head]
        head = messages[head].parent_id
    return tuple(reversed(path.values()))


def newest_leaf(messages: Mapping[int, Message], start: int) -> int:
    """The newest descendant of `start`, or `start` itself without descendants."""
    below = {start}
    for number in sorted(messages):  # parents have smaller ids than their children
        if messages[number].parent_id in below:
            below.add(number)
    return max(below)
