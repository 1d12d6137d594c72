"""Turns parsed files into validated conversations; shared by all formats.

A format's module makes a `ParsedConversation` of each record, without checking types. `build` validates the
values, builds the message tree and numbers the messages. Invalid fields get their defaults, invalid messages
are dropped and their children get the parent; everything is reported.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from heapq import heappop, heappush

from kvchat.chat.conversation import ID_LENGTH, Conversation, Message, now, title_from
from kvchat.chat.importers.report import Report
from kvchat.chat.reasoning import split_thinking
from kvchat.contract import Sampling
from kvchat.text import shortened
from kvchat.validation.checks import InvalidError, with_defaults

SURROGATE = re.compile("[\ud800-\udfff]")
BACKTICKS = re.compile("`{3,}")
LATEST_SECONDS = 1e11
"""The year 5138; larger numbers are in milliseconds or smaller units."""


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """One message from a file, not validated."""

    key: object
    """Unique within the conversation."""
    parent: object
    """Key of the parent message; None for a root."""
    role: object
    """None for a message to skip: its children get its parent."""
    text: object = ""
    thinking: object = ""
    """With its tags."""
    created: object = None
    """Seconds since 1970, or ISO 8601."""
    more: Mapping[str, object] = field(default_factory=dict)
    """Other fields of `Message`."""


@dataclass(frozen=True, slots=True)
class ParsedConversation:
    """One conversation from a file, not validated."""

    messages: Sequence[ParsedMessage]
    title: object = None
    """None takes the title from the first message."""
    system_prompt: object = ""
    created: object = None
    head: object = None
    """Key of the last message that is shown; None for the newest leaf."""
    shown: bool = True
    """False for a cleared conversation: all its messages are on other branches."""
    joins: bool = True
    """Whether to join consecutive answers: in some formats reasoning and answer are two messages."""
    more: Mapping[str, object] = field(default_factory=dict)
    """Other fields of `Conversation`."""


@dataclass(eq=False, slots=True)
class _Node:
    """A message in the tree."""

    message: Message
    parent: "_Node | None"
    extended: bool = False
    """Whether a later answer was joined to it."""


def build(parsed: ParsedConversation, report: Report) -> Conversation | None:
    """The validated conversation; None, reported as skipped, if it has no messages."""
    keyed = [replace(m, key=_key(m.key), parent=_key(m.parent)) for m in parsed.messages]
    parsed = replace(parsed, messages=keyed)
    created = _timestamp_or(parsed.created, "", report, "its date")
    messages = {}
    for number, each in enumerate(parsed.messages, start=1):
        if each.key in messages:
            report.note("has the id of an earlier message; it was left out", number)
        else:
            messages[each.key] = _message(each, created, report, number)
    nodes = _nodes(parsed, messages, report)
    leaves = _leaves(parsed, nodes)
    if not leaves:
        report.skip("has no messages")
        return None
    head = nodes.get(_key(parsed.head)) if parsed.head is not None else None
    if head is None and parsed.shown:
        if parsed.head is not None:
            report.note(f"its last message {_short(parsed.head)} is missing; the newest one is shown")
        head = max(leaves, key=lambda node: node.message.created_at)
    shown, others = _numbered(nodes.values(), [*leaves, *([head] if head else [])], head)
    settings = _settings(parsed, report, created or (shown or others)[0].created_at)
    if not settings.title and parsed.title != "":
        settings = replace(settings, title=title_from((shown or others)[0].text))
    whole = replace(settings, messages=shown, other_branches=others)
    return replace(whole, id=content_id(whole))


def content_id(conversation: Conversation) -> str:
    """An id from the content: importing a file twice adds nothing."""
    content = [
        conversation.title,
        conversation.system_prompt,
        *(f"{m.role}\0{m.raw}" for m in conversation.messages),
        *(f"{m.parent_id}\0{m.role}\0{m.raw}" for m in conversation.other_branches),
    ]
    return hashlib.sha256("\0\0".join(content).encode()).hexdigest()[:ID_LENGTH]


def chained(messages: Iterable[ParsedMessage]) -> list[ParsedMessage]:
    """The messages as one branch in this order, with new keys."""
    return [replace(each, key=n, parent=n - 1 or None) for n, each in enumerate(messages, start=1)]


def as_mapping(value: object) -> Mapping[str, object]:
    """A dict unchanged; an empty one for any other type."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> Sequence[object]:
    """A list unchanged; an empty one for any other type."""
    return value if isinstance(value, list) else ()


def as_text(value: object) -> str:
    """A str unchanged; an empty one for any other type."""
    return value if isinstance(value, str) else ""


def paragraphs(texts: Iterable[object]) -> str:
    """The non-empty texts among these values, joined by blank lines."""
    return "\n\n".join(text for text in texts if isinstance(text, str) and text)


def thought(text: str) -> str:
    """Reasoning with the tags of `Message.thinking`; empty for empty text."""
    return f"<think>\n{text}\n</think>\n\n" if text else ""


def split(text: object) -> tuple[object, object]:
    """(thinking, text) of an answer with both in one text."""
    return split_thinking(text) if isinstance(text, str) else ("", text)


def fenced(code: str, language: str = "") -> str:
    """Code as a Markdown block with a fence longer than any in the code."""
    fence = "`" * max([3, *(len(run) + 1 for run in BACKTICKS.findall(code))])
    return f"{fence}{language}\n{code}\n{fence}"


def timestamp(value: object) -> str:
    """A time as UTC in ISO 8601.

    Raises:
        InvalidError: it is not a time.
    """
    try:
        if isinstance(value, str):
            parsed = datetime.fromisoformat(value)
            # UTC timestamps stay as written, so that kvchat's own exports are imported unchanged
            if value.endswith("+00:00"):
                return value
            aware = parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
            return aware.astimezone(UTC).isoformat(timespec="microseconds")
        if isinstance(value, int | float) and not isinstance(value, bool):
            seconds = float(value)
            while LATEST_SECONDS < seconds < LATEST_SECONDS * 1e9:
                seconds /= 1000
            return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")
    except (ValueError, OverflowError, OSError):
        pass
    raise InvalidError("", f"must be seconds since 1970 or a date, not {_short(value)}")


def _timestamp_or(value: object, otherwise: str, report: Report, name: str, number: int = 0) -> str:
    if not value:
        return otherwise
    try:
        return timestamp(value)
    except InvalidError as error:
        report.note(f"{name} {error.why}; it was replaced", number)
        return otherwise


def _message(parsed: ParsedMessage, created: str, report: Report, number: int) -> Message | None:
    """A validated message without id and parent; None if it is skipped."""
    if parsed.role is None:
        return None
    more = dict(parsed.more)
    if parsed.role == "assistant":
        more.setdefault("finish_reason", "stop")
    elif parsed.role == "user" and more.get("token_ids"):
        report.note("token_ids belong to answers only; they were left out", number)
        more |= {"token_ids": (), "tokenizer": ""}
    given = more | {
        "id": 0,
        "parent_id": None,
        "role": parsed.role,
        "text": _repaired(parsed.text, report, "text", number),
        "thinking": _repaired(parsed.thinking, report, "thinking", number),
        "created_at": _timestamp_or(parsed.created, created or now(), report, "its date", number),
    }
    try:
        message, wrong = with_defaults(Message, given)
    except InvalidError as error:
        report.note(f"{error}; the message was left out", number)
        return None
    for each in wrong:
        report.note(f"{each}; the field was left out", number)
    return message


def _nodes(
    parsed: ParsedConversation, messages: Mapping[object, Message | None], report: Report
) -> dict[object, "_Node | None"]:
    """Key → node, parents first; a skipped message gets the node of its parent."""
    parents = {each.key: each.parent for each in reversed(parsed.messages)}
    order = {key: n for n, key in enumerate(messages)}
    children: dict[object, list[object]] = {}
    queue: list[tuple[int, object]] = []
    for key in messages:
        parent = parents[key]
        if parent in messages:
            children.setdefault(parent, []).append(key)
        else:
            heappush(queue, (order[key], key))
    nodes: dict[object, _Node | None] = {}
    while queue:
        _, key = heappop(queue)
        nodes[key] = _node(messages[key], nodes.get(parents[key]), joins=parsed.joins)
        for child in children.get(key, ()):
            heappush(queue, (order[child], child))
    if lost := len(messages) - len(nodes):
        report.note(f"{lost:,} of its messages form a cycle; they were left out")
    return nodes


def _node(message: Message | None, parent: "_Node | None", *, joins: bool) -> "_Node | None":
    if message is None:
        return parent
    if joins and parent and message.role == parent.message.role == "assistant":
        parent.extended = True
        text = "\n\n".join(filter(None, (parent.message.text, message.text)))
        whole = replace(parent.message, text=text, thinking=parent.message.thinking + message.thinking)
        return _Node(whole, parent.parent)
    return _Node(message, parent)


def _leaves(parsed: ParsedConversation, nodes: Mapping[object, "_Node | None"]) -> list["_Node"]:
    """The last messages of all branches."""
    with_children = {each.parent for each in parsed.messages if each.key in nodes}
    leaves = [node for key, node in nodes.items() if key not in with_children and node]
    # a skipped leaf has the node of its parent, which may be part of a joined answer on another branch
    return [node for node in dict.fromkeys(leaves) if not node.extended]


def _numbered(
    nodes: Iterable["_Node | None"], leaves: Iterable["_Node"], head: "_Node | None"
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(the messages on the path to `head`, all others), numbered from 1, parents first."""
    needed = {ancestor for leaf in leaves for ancestor in _path(leaf)}
    numbers = {node: n for n, node in enumerate((p for p in dict.fromkeys(nodes) if p in needed), 1) if node}
    answered = {node.parent for node in numbers if node.message.role == "assistant"}
    messages = {
        node: replace(
            node.message,
            id=n,
            parent_id=numbers[node.parent] if node.parent else None,
            # a question with an answer was sent, whatever the file says
            not_sent=node.message.not_sent and node.message.role == "user" and node not in answered,
        )
        for node, n in numbers.items()
    }
    path = set(_path(head))
    shown = tuple(message for node, message in messages.items() if node in path)
    return shown, tuple(message for node, message in messages.items() if node not in path)


def _path(node: "_Node | None") -> Iterator["_Node"]:
    """The node and its ancestors."""
    while node:
        yield node
        node = node.parent


def _key(value: object) -> object:
    """A hashable key; None for a list or a dict."""
    return value if isinstance(value, str | int | float) else None


def _settings(parsed: ParsedConversation, report: Report, created: str) -> Conversation:
    more = dict(parsed.more)
    if "sampling" in more:
        sampling, wrong = with_defaults(Sampling, as_mapping(more["sampling"]))
        for each in wrong:
            report.note(f"sampling.{each}; the field was left out")
        more["sampling"] = sampling
    title = "" if parsed.title is None else _repaired(parsed.title, report, "title")
    given = more | {
        "id": "",
        "title": title,
        "system_prompt": _repaired(parsed.system_prompt, report, "system_prompt"),
        "created_at": created,
    }
    settings, wrong = with_defaults(Conversation, given)
    for each in wrong:
        report.note(f"{each}; the field was left out")
    return settings


def _repaired(value: object, report: Report, name: str, number: int = 0) -> object:
    """A text with its lone surrogates joined or replaced; any other value unchanged."""
    if not isinstance(value, str) or not SURROGATE.search(value):
        return value
    text = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if "\ufffd" in text:
        report.note(f"{name} has a lone surrogate (half a character); it was replaced", number)
    return text


def _short(value: object) -> str:
    return shortened(repr(value), 40)
