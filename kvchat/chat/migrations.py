"""The database schema as a list of migrations, and opening of the database file.

A published migration never changes; add a new one. Must not depend on the classes stored in the tables.
"""

import sqlite3
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlite_utils import Database, Migrations

from kvchat.errors import KvchatError
from kvchat.system.ownership import make_private

BUSY_S = 30.0
"""Time a write waits for another process."""

migrations = Migrations("kvchat")


@migrations()
def m001_conversations(db: Database) -> None:
    db.create_table(
        "conversations",
        {
            "id": str,
            "title": str,
            "system_prompt": str,
            "model": str,
            "mode": str,
            "sampling": str,
            "head": int,
            "created_at": str,
            "updated_at": str,
        },
        pk="id",
    )
    db.create_table(
        "messages",
        {
            "id": int,
            "conversation": str,
            "parent_id": int,
            "role": str,
            "text": str,
            "thinking": str,
            "token_ids": str,
            "tokenizer": str,
            "finish_reason": str,
            "created_at": str,
        },
        pk="id",
        foreign_keys=[("conversation", "conversations", "id"), ("parent_id", "messages", "id")],
    )
    db.table("messages").create_index(["conversation"])
    db.create_table("drafts", {"conversation": str, "text": str}, pk="conversation")


@migrations()
def m002_turns(db: Database) -> None:
    texts = "cache_mode kv_dtype weights_dtype path finish_reason reuse_note"
    counts = "prompt_tokens reused_tokens prefilled_tokens generated_tokens evaluated_tokens"
    sizes = "kv_tokens kv_bytes kv_used_bytes weights_bytes rss_bytes context_limit"
    seconds = "ttft_s prefill_s decode_s prefill_tok_s decode_tok_s"
    columns: dict[str, type] = {"message": int}
    for names, kind in ((texts, str), (counts, int), (sizes, int), (seconds, float)):
        columns |= dict.fromkeys(names.split(), kind)
    db.create_table("turns", columns, pk="message", foreign_keys=[("message", "messages", "id")])


@migrations()
def m003_cache(db: Database) -> None:
    for column, kind in (("kv", str), ("policy", str), ("left_out", int)):
        db.table("conversations").add_column(column, kind)
    for column in ("evicted_tokens", "restored_tokens"):
        db.table("turns").add_column(column, int, not_null_default=0)
    db.table("turns").add_column("restore_s", float, not_null_default=0.0)
    db.create_table(
        "cache_events",
        {
            "id": int,
            "conversation": str,
            "kind": str,
            "tokens": int,
            "bytes": int,
            "seconds": float,
            "note": str,
            "at": float,
        },
        pk="id",
    )
    db.table("cache_events").create_index(["conversation"])


@migrations()
def m004_search_and_presets(db: Database) -> None:
    db.create_table("presets", {"name": str, "system_prompt": str, "sampling": str}, pk="name")
    # trigrams find parts of words, and words of scripts that are written without spaces
    db.table("messages").enable_fts(["text"], create_triggers=True, tokenize="trigram")


@migrations()
def m005_drafting(db: Database) -> None:
    for column in ("drafted_tokens", "accepted_tokens"):
        db.table("turns").add_column(column, int, not_null_default=0)


@migrations()
def m006_last_turn(db: Database) -> None:
    db.table("conversations").add_column("last_turn", str, not_null_default="{}")


@migrations()
def m007_not_sent(db: Database) -> None:
    """Marks questions without an answer below them on any branch: no answered prompt contained them.

    Not marked: a question followed by another question and an answer, because both were one prompt message.
    If the head is a question with an answer on another branch, regenerating failed; that answer becomes the
    head.
    """
    db.table("messages").add_column("not_sent", int, not_null_default=0)
    db.execute(
        """
        with recursive answered(id) as (
            select parent_id from messages where role = 'assistant'
            union
            select m.parent_id from answered join messages m on m.id = answered.id
        )
        update messages set not_sent = 1
        where role = 'user' and id not in (select id from answered where id is not null)
        """
    )
    answer = (
        "select max(a.id) from messages a where a.parent_id = conversations.head and a.role = 'assistant'"
    )
    db.execute(
        f"update conversations set head = ({answer}) "
        f"where head in (select id from messages where role = 'user') and ({answer}) is not null"
    )


@migrations()
def m008_evicted_messages(db: Database) -> None:
    db.execute("alter table conversations rename column left_out to evicted_messages")


@migrations()
def m009_shared_prefixes(db: Database) -> None:
    db.execute("update cache_events set kind = 'share' where kind = 'lend'")


class _Readable(Database):
    """A database that reports damage on reading: a file with one bad page can still be opened."""

    def query(
        self, sql: str, params: Sequence[Any] | dict[str, Any] | None = None
    ) -> Generator[dict[Any, Any], None, None]:
        """The rows.

        Raises:
            KvchatError: they can't be read.
        """
        try:
            yield from super().query(sql, params)
        except sqlite3.DatabaseError as error:
            raise KvchatError(
                f"The conversations can't be read: {error}. `kvchat paths` prints the path of the database; "
                "replace the file by a backup, or move it away to start with an empty one."
            ) from error


def open_database(path: Path | None) -> Database:
    """Opens the file and applies migrations; None opens a database in memory.

    Raises:
        sqlite3.Error, OSError: it can't be opened, or is not a database.
    """
    if path is None:
        db = _Readable(memory=True)
        migrations.apply(db)
        return db
    make_private(path.parent)
    with FileLock(f"{path}.lock"):
        path.touch(mode=0o600)
        db = _Readable(sqlite3.connect(path, timeout=BUSY_S))
        db.enable_wal()
        db.execute("pragma synchronous = normal")
        migrations.apply(db)
    return db
