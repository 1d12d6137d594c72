"""Conversations of other programs, and our own exports: files in, conversations out.

It knows kvchat's Markdown and JSON, ChatGPT's `conversations.json` (also inside its zip), and the database of
the `llm` command. It writes nothing; every text in a file is taken as text.
"""

import hashlib
import json
import re
import sqlite3
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from kvchat.chat.conversation import Conversation, Message, title_from
from kvchat.chat.exporters import VERSION
from kvchat.chat.reasoning import split_thinking
from kvchat.contract import CacheMode, EvictionPolicy, KVPrecision, Sampling, TurnStats
from kvchat.errors import KvchatError, reason
from kvchat.text import one_line

KNOWN = "kvchat's own Markdown or JSON, ChatGPT's conversations.json or its zip, or llm's logs.db"
MARKED = re.compile(r"^<!-- kvchat:(conversation|user|assistant) (\{.*\}) -->\r?$", re.MULTILINE)
ESCAPED_MARKER = re.compile(r"<!-- \\(\\*)kvchat:")
HEADING = re.compile(r"\A\r?\n### [^\n]*\n\r?\n")


def read_conversations(file: str | Path) -> list[Conversation]:
    """Every conversation in a file that has messages; each has an id that follows from what it says.

    Raises:
        KvchatError: it can't be read, or is no export that kvchat knows.
    """
    name = one_line(str(file))
    try:
        found = list(_read(Path(file).expanduser()))
    except (OSError, sqlite3.Error, zipfile.BadZipFile) as error:
        raise KvchatError(f"{name} can't be read: {reason(error)}.") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise KvchatError(f"{name} is damaged, or no export that kvchat knows ({KNOWN}).") from error
    return [replace(each, id=_id(each)) for each in found if each.messages or each.other_branches]


def _read(path: Path) -> Iterable[Conversation]:
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"SQLite format 3\0"):
        return _llm(path)
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            return _chatgpt(json.loads(archive.read("conversations.json")))
    text = path.read_bytes().decode("utf-8-sig", errors="surrogatepass")
    if start.lstrip()[:1] not in (b"{", b"["):
        return _markdown(text)
    data = json.loads(text)
    return _ours(data) if isinstance(data, dict) and "kvchat" in data else _chatgpt(data)


def _id(conversation: Conversation) -> str:
    """The same conversation gets the same id, so that importing a file twice adds nothing."""
    said = [
        conversation.title,
        conversation.system_prompt,
        *(f"{m.role}\0{m.raw}" for m in conversation.messages),
        *(f"{m.parent_id}\0{m.role}\0{m.raw}" for m in conversation.other_branches),
    ]
    return hashlib.sha256("\0\0".join(said).encode(errors="surrogatepass")).hexdigest()[:12]


def _chain(messages: Iterable[Message]) -> tuple[Message, ...]:
    """Messages numbered from 1, each the child of the one before."""
    return tuple(replace(m, id=n, parent_id=n - 1 or None) for n, m in enumerate(messages, start=1))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _said(role: str, raw: str, created_at: str, finish: str | None = None) -> Message:
    """A message out of its whole text."""
    thinking, text = split_thinking(raw) if role == "assistant" else ("", raw)
    ending = finish or ("stop" if role == "assistant" else None)
    return Message(0, None, role, text, created_at, finish_reason=ending, thinking=thinking)


# --- kvchat's own ----------------------------------------------------------------------------------------


def _settings(given: Mapping[str, Any]) -> Conversation:
    known = {field.name for field in fields(Sampling)}
    return Conversation(
        "",
        _text(given["title"]),
        _text(given["system_prompt"]),
        CacheMode(given["mode"]),
        Sampling(**{name: value for name, value in given["sampling"].items() if name in known}),
        _text(given["model"]),
        KVPrecision(given["kv"]),
        EvictionPolicy(given["policy"]),
        int(given["left_out"]),
        _text(given["created_at"]),
    )


def _ours(data: Mapping[str, Any]) -> Iterator[Conversation]:
    if data["kvchat"] != VERSION:
        raise KvchatError("This file was written by a newer kvchat; that one reads it.")
    for given in data["conversations"]:
        shown, others = _our_tree(given["messages"], given.get("other_branches", ()))
        yield replace(_settings(given), messages=shown, other_branches=others)


def _our_tree(
    shown: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The branch that is shown and the messages on others, numbered from 1 in the order they were written."""
    if not others:
        return _answered_is_sent(_chain(map(_our_message, shown))), ()
    numbers: dict[int | None, int | None] = {None: None}
    made: dict[int, Message] = {}
    for number, given in enumerate(sorted((*shown, *others), key=itemgetter("id")), start=1):
        # a parent that isn't older is none
        made[given["id"]] = replace(_our_message(given), id=number, parent_id=numbers[given["parent_id"]])
        numbers[given["id"]] = number
    path = tuple(made[given["id"]] for given in shown)
    above = [None, *(message.id for message in path)]
    if len(made) < len(shown) + len(others) or [m.parent_id for m in path] != above[: len(path)]:
        raise ValueError("branches")
    everything = _answered_is_sent((*path, *(made[given["id"]] for given in others)))
    return everything[: len(path)], everything[len(path) :]


def _answered_is_sent(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages; a question that has an answer was sent, whatever the file says."""
    answered = {message.parent_id for message in messages if message.role == "assistant"}
    return tuple(replace(m, not_sent=m.not_sent and m.id not in answered) for m in messages)


def _our_message(given: Mapping[str, Any]) -> Message:
    if given["role"] not in ("user", "assistant"):
        raise ValueError(given["role"])
    ids = tuple(given["token_ids"])
    if not all(isinstance(each, int) and each >= 0 for each in ids):
        raise ValueError("token ids")
    return Message(
        0,
        None,
        given["role"],
        _text(given["text"]),
        _text(given["created_at"]),
        ids,
        _text(given["tokenizer"]),
        given["finish_reason"],
        TurnStats(**given["stats"]) if given["stats"] else None,
        _text(given["thinking"]),
        _not_sent(given),
    )


def _not_sent(given: Mapping[str, Any]) -> bool:
    """Whether a message is marked as a question that was not sent; files of older versions have no mark."""
    return given.get("not_sent", False) is True and given.get("role", "user") == "user"


def _markdown(text: str) -> Iterator[Conversation]:
    """What stands between two markers is a message; without a marker at the top it is no export."""
    marks = list(MARKED.finditer(text))
    if not marks or marks[0][1] != "conversation":
        raise ValueError("no marker")
    ends = [mark.start() for mark in marks[1:]] + [len(text) + 1]
    messages = [
        _marked(mark, text[mark.end() + 1 : end - 1]) for mark, end in zip(marks[1:], ends[1:], strict=True)
    ]
    yield replace(_settings(json.loads(marks[0][2])), messages=_answered_is_sent(_chain(messages)))


def _marked(mark: re.Match[str], body: str) -> Message:
    about = json.loads(mark[2])
    body = HEADING.sub("", "\n" + body).removesuffix("\n")
    raw = ESCAPED_MARKER.sub(r"<!-- \1kvchat:", body)
    said = _said(mark[1], raw, _text(about["created_at"]), about.get("finish_reason"))
    return replace(said, not_sent=_not_sent({**about, "role": mark[1]}))


# --- ChatGPT ---------------------------------------------------------------------------------------------


def _chatgpt(data: Sequence[Mapping[str, Any]]) -> Iterator[Conversation]:
    for given in data:
        path: list[Mapping[str, Any]] = []
        nodes, place = given["mapping"], given.get("current_node")
        while place is not None and len(path) <= len(nodes):
            path.append(nodes[place])
            place = nodes[place].get("parent")
        messages = _joined(filter(None, (_chatgpt_message(node.get("message")) for node in reversed(path))))
        created = _moment(given.get("create_time"))
        title = given.get("title") or (title_from(messages[0].text) if messages else "")
        yield Conversation("", _text(title), created_at=created, messages=_chain(messages))


def _chatgpt_message(given: Mapping[str, Any] | None) -> Message | None:
    """A message that was shown; None for the system's, for tools' and for empty ones."""
    if not given or given["author"]["role"] not in ("user", "assistant"):
        return None
    hidden = (given.get("metadata") or {}).get("is_visually_hidden_from_conversation")
    content = given["content"]
    if hidden or given.get("recipient", "all") != "all":
        return None
    moment = _moment(given.get("create_time"))
    if content.get("content_type") == "thoughts":
        thought = "\n\n".join(_text(each.get("content") or "") for each in content.get("thoughts") or ())
        return replace(_said("assistant", "", moment), thinking=f"<think>\n{thought}\n</think>\n\n")
    parts = content.get("parts") or ()
    text = "\n\n".join(part for part in parts if isinstance(part, str) and part)
    return replace(_said("assistant", "", moment), role=given["author"]["role"], text=text) if text else None


def _joined(messages: Iterable[Message]) -> list[Message]:
    """Answers in a row as one: a thought and the answer after it are two messages there."""
    joined: list[Message] = []
    for message in messages:
        if message.role == "user":
            joined.append(replace(message, finish_reason=None))
        elif joined and joined[-1].role == "assistant":
            last = joined.pop()
            text = "\n\n".join(filter(None, (last.text, message.text)))
            joined.append(replace(last, text=text, thinking=last.thinking + message.thinking))
        else:
            joined.append(message)
    return joined


def _moment(seconds: float | None) -> str:
    moment = datetime.fromtimestamp(seconds, UTC) if seconds else datetime.now(UTC)
    return moment.isoformat(timespec="microseconds")


# --- llm -------------------------------------------------------------------------------------------------


def _llm(path: Path) -> Iterable[Conversation]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        tables = {row["name"] for row in db.execute("select name from sqlite_master where type = 'table'")}
        readers: dict[str, Callable[[sqlite3.Connection], Iterator[Conversation]]] = {
            "responses": _llm_responses,
            "threads": _llm_threads,
        }
        found = [reader(db) for table, reader in readers.items() if table in tables]
        if not found:
            raise ValueError("another database")
        return [conversation for each in found for conversation in each]


def _llm_responses(db: sqlite3.Connection) -> Iterator[Conversation]:
    """The older tables: a row is a prompt and its response."""
    names: dict[str, str] = {}
    turns: dict[str, list[sqlite3.Row]] = {}
    for row in db.execute("select id, name from conversations"):
        names[row["id"]] = row["name"] or ""
    for row in db.execute("select * from responses order by datetime_utc, id"):
        turns.setdefault(row["conversation_id"] or row["id"], []).append(row)
    for conversation, rows in turns.items():
        messages: list[Message] = []
        for row in rows:
            reasoning = row["reasoning"] if "reasoning" in row.keys() else ""  # noqa: SIM118 - a Row, no dict
            thinking = f"<think>\n{reasoning}\n</think>\n\n" if reasoning else ""
            moment = _utc(row["datetime_utc"])
            messages.append(_said("user", row["prompt"] or "", moment))
            messages.append(_said("assistant", thinking + (row["response"] or ""), moment))
        yield _of_llm(names.get(conversation, ""), rows[0]["system"] or "", messages)


def _llm_threads(db: sqlite3.Connection) -> Iterator[Conversation]:
    """The newer tables: a tree of messages, each in parts."""
    for thread in db.execute("select name, tip_message_hash, datetime_utc from threads"):
        messages, system, place = list[Message](), "", thread["tip_message_hash"]
        seen: set[str] = set()
        while place and place not in seen:
            seen.add(place)
            message = db.execute("select role, parent_hash from messages where hash = ?", [place]).fetchone()
            parts = db.execute(
                "select type, text from parts where message_hash = ? order by position", [place]
            ).fetchall()
            text = "\n\n".join(part["text"] for part in parts if part["type"] == "text" and part["text"])
            thought = "\n\n".join(p["text"] for p in parts if p["type"] == "reasoning" and p["text"])
            if message["role"] == "system":
                system = text
            elif message["role"] in ("user", "assistant") and (text or thought):
                thinking = f"<think>\n{thought}\n</think>\n\n" if thought else ""
                messages.append(_said(message["role"], thinking + text, _utc(thread["datetime_utc"])))
            place = message["parent_hash"]
        yield _of_llm(thread["name"] or "", system, _joined(reversed(messages)))


def _of_llm(name: str, system: str, messages: Sequence[Message]) -> Conversation:
    created = messages[0].created_at if messages else ""
    title = name or (title_from(messages[0].text) if messages else "")
    return Conversation("", title, system, created_at=created, messages=_chain(messages))


def _utc(moment: str | None) -> str:
    parsed = datetime.fromisoformat(moment) if moment else datetime.now(UTC)
    parsed = parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
    return parsed.astimezone(UTC).isoformat(timespec="microseconds")
