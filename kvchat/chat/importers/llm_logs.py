"""The database `logs.db` of the `llm` command, with its old or new tables."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from kvchat.chat.importers.parsed import (
    ParsedConversation,
    ParsedMessage,
    as_text,
    chained,
    paragraphs,
    split,
    thought,
)


def read(path: Path) -> list[ParsedConversation] | None:
    """All conversations; None if it is another database.

    Raises:
        sqlite3.Error: it can't be read.
    """
    readers = {"responses": _responses, "threads": _threads}
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        db.text_factory = lambda raw: raw.decode(errors="replace")
        tables = {row["name"] for row in db.execute("select name from sqlite_master where type = 'table'")}
        if not tables & set(readers):
            return None
        return [
            conversation
            for table, reader in readers.items()
            if table in tables
            for conversation in reader(db)
        ]


def _responses(db: sqlite3.Connection) -> Iterator[ParsedConversation]:
    """The old tables: a row is a prompt and its response."""
    names = {row["id"]: row["name"] for row in db.execute("select id, name from conversations")}
    turns: dict[str, list[sqlite3.Row]] = {}
    for row in db.execute("select * from responses order by datetime_utc, id"):
        turns.setdefault(row["conversation_id"] or row["id"], []).append(row)
    for conversation, rows in turns.items():
        messages = list[ParsedMessage]()
        for row in rows:
            reasoning = row["reasoning"] if "reasoning" in row.keys() else ""  # noqa: SIM118 - a Row, no dict
            tagged, text = split(row["response"] or "")
            moment = row["datetime_utc"]
            messages.append(ParsedMessage(None, None, "user", row["prompt"] or "", "", moment))
            messages.append(
                ParsedMessage(None, None, "assistant", text, thought(as_text(reasoning)) or tagged, moment)
            )
        yield ParsedConversation(
            chained(messages),
            names.get(conversation) or None,
            rows[0]["system"] or "",
            rows[0]["datetime_utc"],
            joins=False,
        )


def _threads(db: sqlite3.Connection) -> Iterator[ParsedConversation]:
    """The new tables: a tree of messages with parts."""
    for thread in db.execute("select name, tip_message_hash, datetime_utc from threads"):
        messages, system, place = list[ParsedMessage](), "", thread["tip_message_hash"]
        seen: set[str] = set()
        while place and place not in seen:
            seen.add(place)
            message = db.execute("select role, parent_hash from messages where hash = ?", [place]).fetchone()
            if message is None:
                break
            parts = db.execute(
                "select type, text from parts where message_hash = ? order by position", [place]
            ).fetchall()
            text = paragraphs(part["text"] for part in parts if part["type"] == "text")
            thinking = thought(paragraphs(p["text"] for p in parts if p["type"] == "reasoning"))
            if message["role"] == "system":
                system = text
            elif message["role"] in ("user", "assistant") and (text or thinking):
                messages.append(
                    ParsedMessage(None, None, message["role"], text, thinking, thread["datetime_utc"])
                )
            place = message["parent_hash"]
        yield ParsedConversation(
            chained(reversed(messages)), thread["name"] or None, system, thread["datetime_utc"]
        )
