"""Stores conversations in SQLite through sqlite-utils.

A `Store` is used by one thread. Several processes may share the file: opening and migrating are under a file
lock, and every change is one `BEGIN IMMEDIATE` transaction, so that its reads are still valid when it writes.
Must not depend on engines or the screen.
"""

import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from sqlite_utils import Database

from kvchat.chat.conversation import (
    Conversation,
    Hit,
    Message,
    Preset,
    Summary,
    newest_leaf,
    now,
    one_id,
    path_to,
)
from kvchat.chat.migrations import open_database
from kvchat.chat.token_status import TokenStatuses
from kvchat.contract import CacheEvent, Sampling, TokenStatus, TurnStats
from kvchat.errors import KvchatError, owner_hint, reason
from kvchat.validation.checks import InvalidError, checked, with_defaults
from kvchat.validation.plain_json import read_json, write_json

Value = TypeVar("Value")
FLAGS = [name for name, kind in get_type_hints(Message).items() if kind is bool]
LastTurn = dict[int, dict[TokenStatus, int]]

TRIGRAM = 3
"""Characters of the shortest word in the search index; shorter words need a scan of all messages."""
LIKE_SPECIAL, ESCAPED = re.compile(r"[\\%_]"), r"\\\g<0>"
SEARCH = """
with recursive found(id) as ({found}),
shown(id, parent_id) as (
    select m.id, m.parent_id from conversations c join messages m on m.id = c.head
    where c.id in (select conversation from messages where id in (select id from found))
    union all
    select m.id, m.parent_id from shown join messages m on m.id = shown.parent_id
)
select m.conversation, c.title, m.id as message, m.role, m.text, m.created_at,
    m.id not in (select id from shown) as other_branch, m.not_sent
from messages m join conversations c on c.id = m.conversation where m.id in (select id from found)
order by m.created_at desc, m.id desc limit {limit}
"""
"""Hits on every branch; `other_branch` is true for those not on the path to the conversation's head."""
TURN_COLUMNS = ", ".join(f"turns.{field.name} as turn_{field.name}" for field in fields(TurnStats))
# prefixed, because messages and turns both have a finish reason
SELECT_MESSAGES = (
    f"select messages.*, turns.message as turn, {TURN_COLUMNS} "
    "from messages left join turns on turns.message = messages.id"
)


class Store:
    """The database of conversations."""

    def __init__(self, path: Path | None) -> None:
        """Opens or creates the database; None opens one in memory.

        Raises:
            KvchatError: the file can't be opened, or is not a kvchat database.
        """
        self._path = path
        self._listed: tuple[int, list[Summary]] | None = None
        """What `summaries` returned, and the version of the file that it was read from."""
        try:
            self._db = open_database(path)
        except (sqlite3.Error, OSError) as error:
            raise KvchatError(
                f"The conversations in {path} can't be opened: {reason(error)}{self._hint(error)}. "
                "Make the file accessible, or choose another folder with --data-dir."
            ) from error

    @property
    def file(self) -> Path | None:
        """The database file; None for a database in memory."""
        return self._path

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    @contextmanager
    def _writing(self, *, lists: bool = True) -> Iterator[Database]:
        """A transaction with the write lock from the start; with `lists` false, `summaries` stays the same.

        Raises:
            KvchatError: SQLite failed; the transaction is rolled back.
        """
        if lists:
            self._listed = None
        try:
            self._db.conn.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.conn.commit()
            except BaseException:
                self._db.conn.rollback()
                raise
        except sqlite3.Error as error:
            raise KvchatError(f"The conversations can't be saved: {error}{self._hint(error)}.") from error

    def _hint(self, error: Exception) -> str:
        """A hint about the owner of the file or folder, if that is another user; else empty."""
        if self._path is None:
            return ""
        refused = error.filename if isinstance(error, OSError) and error.filename else self._path
        return owner_hint(Path(refused)) or owner_hint(self._path.parent)

    def summaries(self) -> list[Summary]:
        """All conversations, most recently used first; read again only after a write that changes them."""
        # changes when another connection commits, of this process or of another one
        (version,) = self._db.conn.execute("PRAGMA data_version").fetchone()
        if self._listed is None or self._listed[0] != version:
            self._listed = version, self._read_summaries()
        return list(self._listed[1])

    def _read_summaries(self) -> list[Summary]:
        rows = self._db.query(
            "select c.id, c.title, c.updated_at, count(m.id) as messages from conversations c "
            "left join messages m on m.conversation = c.id group by c.id "
            "order by c.updated_at desc, c.rowid desc"
        )
        return [_summary(row) for row in rows if isinstance(row["id"], str)]

    def history(self, limit: int) -> list[str]:
        """The user's last distinct messages in all conversations, newest last."""
        rows = self._db.query(
            "select text from messages where role = 'user' order by created_at desc, id desc limit ?",
            [2 * limit],
        )
        latest = list(dict.fromkeys(row["text"] for row in rows))[:limit]
        return latest[::-1]

    def load(self, conversation: str) -> Conversation:
        """A conversation with the messages up to its head; damaged settings get their defaults.

        Raises:
            KvchatError: there is no such conversation.
        """
        row = self._row(conversation)
        messages = {message.id: message for message in self._messages(conversation)}
        head = row.pop("head")
        given = {key: value for key, value in row.items() if value is not None}  # older rows have no kv
        settings, _wrong = with_defaults(Conversation, given | {"sampling": _sampling(row["sampling"])})
        if head is not None and head not in messages:  # damaged: use the newest readable message
            head = max(messages, default=None)
        return replace(settings, messages=path_to(messages, head))

    def whole(self, conversation: Conversation) -> Conversation:
        """The conversation with `other_branches` loaded."""
        shown = {message.id for message in conversation.messages}
        others = [message for message in self._messages(conversation.id) if message.id not in shown]
        return replace(conversation, other_branches=tuple(sorted(others, key=lambda each: each.id)))

    def branch(self, conversation: str, message: int) -> tuple[Message, ...]:
        """The path to the newest descendant of a message; empty if the message is gone."""
        messages = {each.id: each for each in self._messages(conversation)}
        return path_to(messages, newest_leaf(messages, message)) if message in messages else ()

    def path(self, conversation: str, message: int) -> tuple[Message, ...]:
        """The path from the first message to this one; empty if the message is gone."""
        messages = {each.id: each for each in self._messages(conversation)}
        return path_to(messages, message) if message in messages else ()

    def find(self, prefix: str) -> str:
        """The id that starts with `prefix`.

        Raises:
            KvchatError: none does, or several do.
        """
        return one_id([each.id for each in self.summaries()], prefix)

    def exists(self, conversation: str) -> bool:
        """Whether the conversation is in the database."""
        return any(self._db.query("select 1 from conversations where id = ?", [conversation]))

    def create(self, conversation: Conversation) -> None:
        """Saves a new conversation, without messages."""
        with self._writing() as db:
            _insert(db, conversation)

    def save_settings(self, conversation: Conversation) -> None:
        """Saves title and settings of a conversation."""
        changed = {"title": conversation.title, **_settings(conversation)}
        with self._writing() as db:
            assignments = ", ".join(f"{name} = :{name}" for name in changed)
            db.execute(
                f"update conversations set {assignments} where id = :id", changed | {"id": conversation.id}
            )

    def add(self, conversation: Conversation) -> Conversation:
        """Saves a new conversation with copies of its messages on all branches.

        Returns it as `load` does, with new message ids.
        """
        with self._writing() as db:
            _insert_whole(db, conversation)
        return self.load(conversation.id)

    def put(self, conversation: Conversation) -> None:
        """Saves a conversation with copies of all its messages, in the place of one with the same id."""
        with self._writing() as db:
            _delete(db, conversation.id)
            _insert_whole(db, conversation)

    def import_all(self, conversations: Sequence[Conversation]) -> int:
        """Saves conversations with unknown ids, in one transaction; returns their number.

        `updated_at` becomes the time of the last message.
        """
        with self._writing() as db:
            known = {row["id"] for row in db.query("select id from conversations")}
            new = {each.id: each for each in conversations if each.id not in known}
            for each in new.values():
                _insert_whole(db, each)
                last = each.messages[-1].created_at if each.messages else each.created_at
                db.execute("update conversations set updated_at = ? where id = ?", [last, each.id])
        return len(new)

    def search(self, words: Sequence[str], limit: int) -> list[Hit]:
        """Titles, then messages on every branch, with all these words; newest first."""
        if not words:
            return []
        likes = {f"like{n}": f"%{LIKE_SPECIAL.sub(ESCAPED, word)}%" for n, word in enumerate(words)}
        long = [word for word in words if len(word) >= TRIGRAM]
        match = {"match": " ".join('"' + word.replace('"', '""') + '"' for word in long)}
        indexed = "select rowid from messages_fts where messages_fts match :match intersect " if long else ""
        found = f"{indexed}select id from messages where {_all_like('text', likes)}"
        if len(long) == len(words):  # the index ignores case for more letters than LIKE does
            found = indexed.removesuffix(" intersect ")
        titles = self._db.query(
            "select id as conversation, title, null as message, '' as role, title as text, created_at, "
            f"false as other_branch, false as not_sent from conversations where {_all_like('title', likes)} "
            f"order by updated_at desc limit {limit}",
            likes,
        )
        messages = self._db.query(SEARCH.format(found=found, limit=limit), likes | match)
        rows = [*titles, *messages][:limit]
        flags = ("other_branch", "not_sent")
        return [Hit(**{**row, **{flag: bool(row[flag]) for flag in flags}}) for row in rows]

    def presets(self) -> list[Preset]:
        """All presets, sorted by name."""
        rows = self._db.query("select * from presets order by name")
        return [Preset(r["name"], r["system_prompt"], _sampling(r["sampling"])) for r in rows]

    def save_preset(self, preset: Preset) -> None:
        """Saves a preset; replaces one with the same name."""
        row = {"system_prompt": preset.system_prompt, "sampling": write_json(asdict(preset.sampling))}
        with self._writing(lists=False) as db:
            db.table("presets").upsert({"name": preset.name, **row}, pk="name")

    def delete_preset(self, name: str) -> None:
        """Deletes a preset; an unknown one is no error."""
        with self._writing(lists=False) as db:
            db.execute("delete from presets where name = ?", [name])

    def add_events(self, events: Sequence[CacheEvent]) -> None:
        """Saves cache events; ignores those of unknown conversations."""
        with self._writing(lists=False) as db:
            known = {row["id"] for row in db.query("select id from conversations")}
            db.table("cache_events").insert_all(
                asdict(event) for event in events if event.conversation in known
            )

    def events(self, conversation: str) -> list[CacheEvent]:
        """The cache events of a conversation, oldest first."""
        rows = self._db.query(
            "select conversation, kind, tokens, bytes, seconds, note, at from cache_events "
            "where conversation = ? order by at, id",
            [conversation],
        )
        return _valid(CacheEvent, rows)

    def last_turn(self, conversation: str) -> TokenStatuses:
        """The token statuses of a conversation's last turn; empty without one."""
        rows = self._db.query("select last_turn from conversations where id = ?", [conversation])
        try:
            return checked(LastTurn, read_json(next((row["last_turn"] for row in rows), "{}")))
        except (ValueError, TypeError, RecursionError):  # damaged; used for display only
            return {}

    def save_last_turn(self, conversation: str, statuses: TokenStatuses) -> None:
        """Saves the token statuses of the last turn."""
        with self._writing(lists=False) as db:
            db.execute(
                "update conversations set last_turn = ? where id = ?", [write_json(statuses), conversation]
            )

    def set_head(self, conversation: str, head: int | None) -> None:
        """Sets the head: the last message that is shown. Deletes nothing."""
        with self._writing() as db:
            _set_head(db, conversation, head)

    def add_message(
        self, conversation: str, message: Message, *, shown: bool = True, evicted_messages: int | None = None
    ) -> Message:
        """Saves a message; with `shown` it becomes the head. Returns it with its id.

        An answer clears `not_sent` of its question. Also saves `evicted_messages`, if given.

        Raises:
            KvchatError: the conversation was deleted, perhaps by another process.
        """
        row = {**_message_row(message), "conversation": conversation, "parent_id": message.parent_id}
        row |= {"role": message.role, "created_at": message.created_at or now()}
        with self._writing() as db:
            if not self.exists(conversation):
                raise KvchatError(f"The conversation {conversation!r} was deleted.")
            number = cast(int, db.table("messages").insert(row).last_pk)
            if message.role == "assistant":
                db.execute("update messages set not_sent = 0 where id = ?", [message.parent_id])
            if shown:
                _set_head(db, conversation, number)
            if evicted_messages is not None:
                db.execute(
                    "update conversations set evicted_messages = ? where id = ?",
                    [evicted_messages, conversation],
                )
        return self._message(number)

    def update_message(self, message: Message) -> None:
        """Saves text, token ids, finish reason and statistics of a message."""
        with self._writing(lists=False) as db:
            db.table("messages").update(message.id, _message_row(message))
            if message.stats is not None:
                db.table("turns").upsert({"message": message.id, **asdict(message.stats)}, pk="message")

    def delete(self, conversation: str) -> None:
        """Deletes a conversation with its messages, statistics, cache events and draft."""
        with self._writing() as db:
            _delete(db, conversation)

    def draft(self, conversation: str) -> str:
        """The unsent prompt of a conversation."""
        rows = self._db.query("select text from drafts where conversation = ?", [conversation])
        return next((row["text"] for row in rows), "")

    def save_draft(self, conversation: str, text: str) -> None:
        """Saves an unsent prompt; deletes it if it is empty."""
        with self._writing(lists=False) as db:
            if text:
                db.table("drafts").upsert({"conversation": conversation, "text": text}, pk="conversation")
            else:
                db.execute("delete from drafts where conversation = ?", [conversation])

    def _row(self, conversation: str) -> dict[str, Any]:
        rows = self._db.query("select * from conversations where id = ?", [conversation])
        if (row := next(rows, None)) is None:
            raise KvchatError(f"There is no conversation {conversation!r}. `kvchat sessions` lists them.")
        return row

    def _messages(self, conversation: str) -> list[Message]:
        rows = self._db.query(f"{SELECT_MESSAGES} where conversation = ?", [conversation])
        return _readable(rows)

    def _message(self, number: int) -> Message:
        row = next(iter(self._db.query(f"{SELECT_MESSAGES} where id = ?", [number])))
        try:
            return _message(row)
        except InvalidError as error:
            raise KvchatError(f"Message {number} in the database is damaged: {error}.") from error


def _all_like(column: str, parameters: Iterable[str]) -> str:
    return " and ".join(f"{column} like :{name} escape '\\'" for name in parameters)


def _insert(db: Database, conversation: Conversation) -> None:
    row = {"id": conversation.id, "title": conversation.title, "head": None, "updated_at": now()}
    row["created_at"] = conversation.created_at or now()
    db.table("conversations").insert(row | _settings(conversation))


def _set_head(db: Database, conversation: str, head: int | None) -> None:
    db.execute("update conversations set head = ?, updated_at = ? where id = ?", [head, now(), conversation])


def _settings(conversation: Conversation) -> dict[str, str | int]:
    return {
        "system_prompt": conversation.system_prompt,
        "model": conversation.model,
        "mode": conversation.mode.value,
        "sampling": write_json(asdict(conversation.sampling)),
        "kv": conversation.kv.value,
        "policy": conversation.policy.value,
        "evicted_messages": conversation.evicted_messages,
    }


def _message_row(message: Message) -> dict[str, Any]:
    return {
        "text": message.text,
        "thinking": message.thinking,
        "token_ids": write_json(message.token_ids),
        "tokenizer": message.tokenizer,
        "finish_reason": message.finish_reason,
        "not_sent": int(message.not_sent),
    }


def _delete(db: Database, conversation: str) -> None:
    of_it = "in (select id from messages where conversation = ?)"
    db.execute(f"delete from turns where message {of_it}", [conversation])
    db.execute("update conversations set head = null where id = ?", [conversation])
    db.execute("delete from messages where conversation = ?", [conversation])
    db.execute("delete from cache_events where conversation = ?", [conversation])
    db.execute("delete from drafts where conversation = ?", [conversation])
    db.execute("delete from conversations where id = ?", [conversation])


def _insert_whole(db: Database, conversation: Conversation) -> None:
    """Saves a conversation with copies of its messages on all branches, with new ids."""
    _insert(db, conversation)
    numbers: dict[int | None, int | None] = {None: None}
    # sorted by id, which puts parents first and preserves the order of age
    for message in sorted((*conversation.messages, *conversation.other_branches), key=lambda m: m.id):
        row = {**_message_row(message), "conversation": conversation.id}
        row |= {"role": message.role, "created_at": message.created_at}
        row["parent_id"] = numbers[message.parent_id]
        number = cast(int, db.table("messages").insert(row).last_pk)
        if message.stats:
            db.table("turns").insert({"message": number, **asdict(message.stats)})
        numbers[message.id] = number
    _set_head(db, conversation.id, numbers[conversation.head.id if conversation.head else None])


def import_into(path: Path, conversations: Sequence[Conversation]) -> int:
    """`Store.import_all` with its own connection, for use in another thread."""
    store = Store(path)
    try:
        return store.import_all(conversations)
    finally:
        store.close()


def _readable(rows: Iterable[Mapping[str, Any]]) -> list[Message]:
    """The messages of these rows without damaged ones, whose children get the next readable ancestor."""
    found, parents = list[Message](), dict[int, int | None]()
    for row in rows:
        try:
            found.append(_message(row))
        except InvalidError:
            parents[row["id"]] = row["parent_id"]
    return [_below_readable(message, parents) for message in found] if parents else found


def _below_readable(message: Message, damaged: Mapping[int, int | None]) -> Message:
    parent, seen = message.parent_id, set[int]()
    while parent is not None and parent in damaged and parent not in seen:
        seen.add(parent)
        parent = damaged[parent]
    return replace(message, parent_id=parent)


def _summary(row: Mapping[str, Any]) -> Summary:
    """A summary; a damaged title or date becomes empty."""
    texts = {key: row[key] if isinstance(row[key], str) else "" for key in ("title", "updated_at")}
    return Summary(**{**row, **texts})


def _message(row: Mapping[str, Any]) -> Message:
    """A message; damaged fields get their defaults.

    Raises:
        InvalidError: a damaged field has no default.
    """
    given = dict(row)
    given["token_ids"] = _object(row["token_ids"])
    given |= {flag: bool(row[flag]) for flag in FLAGS}  # numbers in SQLite
    if row["turn"] is not None:
        given["stats"] = {field.name: row[f"turn_{field.name}"] for field in fields(TurnStats)}
    message, _wrong = with_defaults(Message, given)
    return message


def _sampling(text: object) -> Sampling:
    """Saved sampling; damaged fields get their defaults."""
    given = _object(text)
    sampling, _wrong = with_defaults(Sampling, given if isinstance(given, dict) else {})
    return sampling


def _object(text: object) -> object:
    """The value of a JSON column; None if it is damaged."""
    try:
        return read_json(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def _valid(kind: type[Value], rows: Iterable[Mapping[str, Any]]) -> list[Value]:
    """Rows as values, without damaged ones."""
    found = list[Value]()
    for row in rows:
        with suppress(InvalidError):
            found.append(checked(kind, row))
    return found
