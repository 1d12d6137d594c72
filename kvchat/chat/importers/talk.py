"""From what a file says to a checked conversation: the part that all formats share.

A reader makes a `Talk` of one record, without looking at types; `build` checks every value, lays out the
tree of messages and numbers them. A wrong field with a default gets the default, a wrong message is left out
and what followed it follows its parent; each is reported.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from heapq import heappop, heappush

from kvchat.chat.conversation import ID_LENGTH, Conversation, Message, title_from
from kvchat.chat.importers.report import Report
from kvchat.chat.reasoning import split_thinking
from kvchat.contract import Sampling
from kvchat.validation.checks import InvalidError, with_defaults

SURROGATE = re.compile("[\ud800-\udfff]")
BACKTICKS = re.compile("`{3,}")
LATEST_SECONDS = 1e11
"""The year 5138; a larger number counts milliseconds, or even smaller units."""


@dataclass(frozen=True, slots=True)
class Said:
    """One message as a file has it; nothing of it is checked."""

    key: object
    """Names it among the messages of the talk."""
    parent: object
    """Key of the message before it; None for a first one."""
    role: object
    """None for a message that is not shown: the ones after it follow the one before it."""
    text: object = ""
    thinking: object = ""
    """With its tags."""
    created: object = None
    """Seconds since 1970, or ISO 8601."""
    more: Mapping[str, object] = field(default_factory=dict)
    """Other fields of `Message`."""


@dataclass(frozen=True, slots=True)
class Talk:
    """One conversation as a file has it; nothing of it is checked."""

    said: Sequence[Said]
    title: object = None
    """None for one that has none: then its first message names it."""
    system_prompt: object = ""
    created: object = None
    head: object = None
    """Key of the last message that is shown; None for the newest."""
    shown: bool = True
    """False for a conversation that was cleared: all its messages are on other branches."""
    joins: bool = True
    """Whether answers in a row are one: a thought and the answer after it are two messages in some files."""
    more: Mapping[str, object] = field(default_factory=dict)
    """Other fields of `Conversation`."""


@dataclass(eq=False, slots=True)
class _Place:
    """A message in the tree."""

    message: Message
    above: "_Place | None"
    extended: bool = False
    """Whether an answer after it was joined to it."""


def build(talk: Talk, report: Report) -> Conversation | None:
    """The conversation of a talk; None where it has no messages, which is reported as skipped."""
    talk = replace(talk, said=[replace(s, key=_key(s.key), parent=_key(s.parent)) for s in talk.said])
    created = _moment_or(talk.created, "", report, "its date")
    messages = {}
    for number, said in enumerate(talk.said, start=1):
        if said.key in messages:
            report.note("has the id of an earlier message; it was left out", number)
        else:
            messages[said.key] = _message(said, created, report, number)
    places = _places(talk, messages, report)
    leaves = _leaves(talk, places)
    if not leaves:
        report.skip("has no messages")
        return None
    head = places.get(_key(talk.head)) if talk.head is not None else None
    if head is None and talk.shown:
        if talk.head is not None:
            report.note(f"its last message {_short(talk.head)} is not there; the newest one is shown")
        head = max(leaves, key=lambda place: place.message.created_at)
    shown, others = _numbered(places.values(), [*leaves, *([head] if head else [])], head)
    settings = _settings(talk, report, created or (shown or others)[0].created_at)
    if not settings.title and talk.title != "":
        settings = replace(settings, title=title_from((shown or others)[0].text))
    whole = replace(settings, messages=shown, other_branches=others)
    return replace(whole, id=content_id(whole))


def content_id(conversation: Conversation) -> str:
    """The same conversation gets the same id, so that importing a file twice adds nothing."""
    said = [
        conversation.title,
        conversation.system_prompt,
        *(f"{m.role}\0{m.raw}" for m in conversation.messages),
        *(f"{m.parent_id}\0{m.role}\0{m.raw}" for m in conversation.other_branches),
    ]
    return hashlib.sha256("\0\0".join(said).encode()).hexdigest()[:ID_LENGTH]


def chained(said: Iterable[Said]) -> list[Said]:
    """Messages that follow each other in this order, with new keys."""
    return [replace(each, key=n, parent=n - 1 or None) for n, each in enumerate(said, start=1)]


def as_mapping(value: object) -> Mapping[str, object]:
    """A mapping as it is; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> Sequence[object]:
    """A list as it is; an empty one for anything else."""
    return value if isinstance(value, list) else ()


def as_text(value: object) -> str:
    """A text as it is; an empty one for anything else."""
    return value if isinstance(value, str) else ""


def paragraphs(texts: Iterable[object]) -> str:
    """The texts among these values, with blank lines between them."""
    return "\n\n".join(text for text in texts if isinstance(text, str) and text)


def thought(text: str) -> str:
    """A thought with the tags that messages here keep it in; nothing for nothing."""
    return f"<think>\n{text}\n</think>\n\n" if text else ""


def split(text: object) -> tuple[object, object]:
    """(thinking, text) of an answer that has both in one text."""
    return split_thinking(text) if isinstance(text, str) else ("", text)


def fenced(code: str, language: str = "") -> str:
    """Code as a Markdown block, whose fence is longer than any in the code."""
    fence = "`" * max([3, *(len(run) + 1 for run in BACKTICKS.findall(code))])
    return f"{fence}{language}\n{code}\n{fence}"


def moment(value: object) -> str:
    """A moment as UTC in ISO 8601.

    Raises:
        InvalidError: it is none.
    """
    try:
        if isinstance(value, str):
            parsed = datetime.fromisoformat(value)
            # what is in UTC already stays as it is written, so that our own files come back unchanged
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


def _moment_or(value: object, otherwise: str, report: Report, name: str, number: int = 0) -> str:
    if not value:
        return otherwise
    try:
        return moment(value)
    except InvalidError as error:
        report.note(f"{name} {error.why}; it was replaced", number)
        return otherwise


def _message(said: Said, created: str, report: Report, number: int) -> Message | None:
    """A checked message without a place; None where nothing of it is shown."""
    if said.role is None:
        return None
    more = dict(said.more)
    if said.role == "assistant":
        more.setdefault("finish_reason", "stop")
    elif said.role == "user" and more.get("token_ids"):
        report.note("token_ids belong to answers only; they were left out", number)
        more |= {"token_ids": (), "tokenizer": ""}
    given = more | {
        "id": 0,
        "parent_id": None,
        "role": said.role,
        "text": _repaired(said.text, report, "text", number),
        "thinking": _repaired(said.thinking, report, "thinking", number),
        "created_at": _moment_or(said.created, created or _now(), report, "its date", number),
    }
    try:
        message, wrong = with_defaults(Message, given)
    except InvalidError as error:
        report.note(f"{error}; the message was left out", number)
        return None
    for each in wrong:
        report.note(f"{each}; the field was left out", number)
    return message


def _places(
    talk: Talk, messages: Mapping[object, Message | None], report: Report
) -> dict[object, "_Place | None"]:
    """Where each message stands, parents first; a message that isn't shown stands where its parent does."""
    parents = {said.key: said.parent for said in reversed(talk.said)}
    order = {key: n for n, key in enumerate(messages)}
    below: dict[object, list[object]] = {}
    waiting: list[tuple[int, object]] = []
    for key in messages:
        parent = parents[key]
        if parent in messages:
            below.setdefault(parent, []).append(key)
        else:
            heappush(waiting, (order[key], key))
    places: dict[object, _Place | None] = {}
    while waiting:
        _, key = heappop(waiting)
        places[key] = _place(messages[key], places.get(parents[key]), joins=talk.joins)
        for child in below.get(key, ()):
            heappush(waiting, (order[child], child))
    if lost := len(messages) - len(places):
        report.note(f"{lost:,} of its messages follow each other in a circle; they were left out")
    return places


def _place(message: Message | None, above: "_Place | None", *, joins: bool) -> "_Place | None":
    if message is None:
        return above
    if joins and above and message.role == above.message.role == "assistant":
        above.extended = True
        text = "\n\n".join(filter(None, (above.message.text, message.text)))
        whole = replace(above.message, text=text, thinking=above.message.thinking + message.thinking)
        return _Place(whole, above.above)
    return _Place(message, above)


def _leaves(talk: Talk, places: Mapping[object, "_Place | None"]) -> list["_Place"]:
    """The last messages of all branches."""
    followed = {said.parent for said in talk.said if said.key in places}
    ends = [place for key, place in places.items() if key not in followed and place]
    # a hidden message may follow a part of an answer whose other parts come on another way
    return [place for place in dict.fromkeys(ends) if not place.extended]


def _numbered(
    places: Iterable["_Place | None"], ends: Iterable["_Place"], head: "_Place | None"
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(the branch that is shown, the messages on others), numbered from 1, parents first."""
    needed = set[_Place]()
    for end in ends:
        place: _Place | None = end
        while place and place not in needed:
            needed.add(place)
            place = place.above
    numbers = {
        place: n for n, place in enumerate((p for p in dict.fromkeys(places) if p in needed), 1) if place
    }
    answered = {place.above for place in numbers if place.message.role == "assistant"}
    made = {
        place: replace(
            place.message,
            id=n,
            parent_id=numbers[place.above] if place.above else None,
            # a question that has an answer was sent, whatever the file says
            not_sent=place.message.not_sent and place.message.role == "user" and place not in answered,
        )
        for place, n in numbers.items()
    }
    path = set[_Place]()
    while head:
        path.add(head)
        head = head.above
    shown = tuple(message for place, message in made.items() if place in path)
    return shown, tuple(message for place, message in made.items() if place not in path)


def _key(value: object) -> object:
    """A key that can be looked up; None for a list or a table."""
    return value if isinstance(value, str | int | float) else None


def _settings(talk: Talk, report: Report, created: str) -> Conversation:
    more = dict(talk.more)
    if "sampling" in more:
        sampling, wrong = with_defaults(Sampling, as_mapping(more["sampling"]))
        for each in wrong:
            report.note(f"sampling.{each}; the field was left out")
        more["sampling"] = sampling
    title = "" if talk.title is None else _repaired(talk.title, report, "title")
    given = more | {
        "id": "",
        "title": title,
        "system_prompt": _repaired(talk.system_prompt, report, "system_prompt"),
        "created_at": created,
    }
    settings, wrong = with_defaults(Conversation, given)
    for each in wrong:
        report.note(f"{each}; the field was left out")
    return settings


def _repaired(value: object, report: Report, name: str, number: int = 0) -> object:
    """A text with its lone surrogates replaced; anything else as it is."""
    if not isinstance(value, str) or not SURROGATE.search(value):
        return value
    text = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if "\ufffd" in text:
        report.note(f"{name} has half a character (a lone surrogate); it was replaced", number)
    return text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
