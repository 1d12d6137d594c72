"""The store: round trips, migrations, concurrent processes, crashes and damaged rows."""

import json
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
from sqlite_utils import Database

from kvchat.chat import store as store_module
from kvchat.chat.conversation import Conversation, Message, Summary
from kvchat.chat.migrations import migrations
from kvchat.chat.session import UNSAVED
from kvchat.chat.store import Store
from kvchat.contract import (
    CacheEvent,
    CacheEventKind,
    CacheMode,
    EvictionPolicy,
    KVPrecision,
    Sampling,
    TokenStatus,
    TurnStats,
)
from kvchat.errors import KvchatError
from tests.support import samples
from tests.support.samples import TOKENIZER

FIGURES = replace(
    samples.FIGURES,
    evicted_tokens=7,
    restored_tokens=9,
    restore_s=0.025,
    drafted_tokens=16,
    accepted_tokens=12,
)
SAMPLING = Sampling(0.7, 0.9, 40, 0.05, 1.1, 1234, 99)
TALK = Conversation(
    "abcd1234",
    "Trip — 旅行",
    "Be brief.\n“Now”",
    CacheMode.TURN,
    SAMPLING,
    "maker/model",
    KVPrecision.INT4,
    EvictionPolicy.SNAPKV,
    3,
    "2026-01-02T03:04:05.000006+00:00",
)
MIGRATIONS = [
    "m001_conversations",
    "m002_turns",
    "m003_cache",
    "m004_search_and_presets",
    "m005_drafting",
    "m006_last_turn",
    "m007_not_sent",
    "m008_evicted_messages",
    "m009_shared_prefixes",
]
EVENTS = tuple(
    CacheEvent(TALK.id, kind, 10 * n, 1000 * n, n / 8, f"Note {n} — 旅行\n\x1b[31m", 1_700_000_000.25 + n)
    for n, kind in enumerate(CacheEventKind)
)
"""One of each kind."""
OPENERS, WRITERS, MESSAGES = 6, 4, 25


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "kvchat.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path)) as opened:
        yield opened


def user(text: str, parent: int | None = None) -> Message:
    return Message(0, parent, "user", text, "")


def answer(text: str, parent: int) -> Message:
    return Message(0, parent, "assistant", text, "", (1, 2), TOKENIZER, "stop")


def ask(store: Store, conversation: str = TALK.id, parent: int | None = None) -> tuple[Message, Message]:
    """A question and its answer."""
    question = store.add_message(conversation, user("Which pass?", parent))
    return question, store.add_message(conversation, answer("The Brenner.", question.id))


def rows(path: Path, query: str) -> list[tuple[object, ...]]:
    """Rows read through a separate connection."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def reopened(path: Path, conversation: str = TALK.id) -> Conversation:
    """The conversation as a new store loads it."""
    with closing(Store(path)) as store:
        return store.load(conversation)


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    """A process that runs `script` after a signal to start."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def let_go_together(processes: "list[subprocess.Popen[str]]") -> list[str]:
    """Starts all scripts at the same time, when all are ready; returns their last lines."""
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return said


def test_all_conversation_fields_are_stored(store: Store, path: Path) -> None:
    store.create(TALK)
    assert reopened(path) == TALK


def test_all_message_fields_are_stored(store: Store, path: Path) -> None:
    store.create(TALK)
    question = store.add_message(TALK.id, user("Which\x1b[31m pass\0? 🏔"))
    reply = Message(
        0, question.id, "assistant", "The Brenner.", "2026-01-02T03:04:05", (0, 7, 151_643), TOKENIZER
    )
    reply = store.add_message(TALK.id, reply)
    reply = replace(reply, finish_reason="length", stats=FIGURES, text="The Brenner, all year.")
    store.update_message(reply)
    assert reopened(path).messages == (question, reply)
    assert question.created_at.endswith("+00:00")
    assert (reply.parent_id, reply.created_at) == (question.id, "2026-01-02T03:04:05")


def test_statistics_are_updated_with_the_message(store: Store) -> None:
    store.create(TALK)
    _, reply = ask(store)
    for kv_tokens in (10, 20):
        store.update_message(replace(reply, stats=replace(FIGURES, kv_tokens=kv_tokens)))
    (saved,) = [message.stats for message in store.load(TALK.id).messages if message.stats]
    assert saved == replace(FIGURES, kv_tokens=20)


def test_the_turns_table_matches_turn_stats(store: Store, path: Path) -> None:
    columns = {str(name): kind for _, name, kind, *_ in rows(path, "pragma table_info(turns)")}
    assert set(columns) == {"message"} | {field.name for field in fields(TurnStats)}
    kinds = {str: "TEXT", int: "INTEGER", float: ("FLOAT", "REAL")}
    types = get_type_hints(TurnStats)
    for field in fields(TurnStats):
        assert columns[field.name] in kinds[types[field.name]], field.name


def test_created_at_is_set_by_the_first_save_only(store: Store) -> None:
    store.create(replace(TALK, created_at=""))
    created_at = store.load(TALK.id).created_at
    assert created_at.endswith("+00:00")
    store.save_settings(replace(TALK, created_at="1999-01-01"))
    assert store.load(TALK.id).created_at == created_at


def test_saving_settings_changes_nothing_else(store: Store) -> None:
    store.create(TALK)
    store.create(replace(TALK, id="other"))
    _, reply = ask(store)
    changed = Conversation(
        TALK.id,
        "Pass",
        "",
        CacheMode.OFF,
        Sampling(seed=3),
        "other/model",
        KVPrecision.BF16,
        EvictionPolicy.NONE,
        4,
        TALK.created_at,
    )
    store.save_settings(changed)
    loaded = store.load(TALK.id)
    assert replace(loaded, messages=()) == changed
    assert loaded.head == reply
    assert store.load("other") == replace(TALK, id="other")


def test_a_second_answer_is_a_new_branch(store: Store, path: Path) -> None:
    store.create(TALK)
    question, first = ask(store)
    second = store.add_message(TALK.id, answer("The Gotthard.", question.id))
    assert store.load(TALK.id).messages == (question, second)
    store.set_head(TALK.id, first.id)
    assert reopened(path).messages == (question, first)
    store.set_head(TALK.id, None)
    assert reopened(path).messages == ()
    assert rows(path, "select count(*) from messages") == [(3,)]


def test_a_long_path_is_loaded_in_order(store: Store) -> None:
    store.create(TALK)
    parent = None
    for _ in range(50):
        _, last = ask(store, parent=parent)
        parent = last.id
    path = store.load(TALK.id).messages
    assert [message.parent_id for message in path] == [None, *(message.id for message in path[:-1])]
    assert [message.role for message in path] == ["user", "assistant"] * 50


def test_summaries_are_sorted_by_last_use(store: Store) -> None:
    for name in ("first", "second", "third"):
        store.create(replace(TALK, id=name, title=name.title()))
    ask(store, "first")
    found = store.summaries()
    assert [(s.id, s.title, s.messages) for s in found] == [
        ("first", "First", 2),
        ("third", "Third", 0),
        ("second", "Second", 0),
    ]
    assert [s.updated_at for s in found] == sorted((s.updated_at for s in found), reverse=True)


def test_delete_removes_all_rows_of_one_conversation(store: Store, path: Path) -> None:
    for name in ("gone", "stays"):
        store.create(replace(TALK, id=name))
        _, reply = ask(store, name)
        store.update_message(replace(reply, stats=FIGURES))
        store.save_draft(name, f"draft of {name}")
        store.add_events([replace(event, conversation=name) for event in EVENTS])
    stays = store.load("stays")
    store.delete("gone")
    assert not store.exists("gone")
    assert store.exists("stays")
    assert (store.draft("gone"), store.draft("stays")) == ("", "draft of stays")
    assert store.load("stays") == stays
    assert (store.events("gone"), len(store.events("stays"))) == ([], len(EVENTS))
    assert rows(path, "select distinct conversation from cache_events") == [("stays",)]
    assert rows(path, "select distinct conversation from messages") == [("stays",)]
    assert rows(path, "select message from turns") == [(stays.messages[-1].id,)]
    assert rows(path, "select conversation from drafts") == [("stays",)]


def test_adding_to_a_deleted_conversation_is_an_error(store: Store, path: Path) -> None:
    store.create(TALK)
    store.delete(TALK.id)
    with pytest.raises(KvchatError, match="'abcd1234' was deleted"):
        store.add_message(TALK.id, user("Still there?"))
    assert rows(path, "select count(*) from messages") == [(0,)]


def test_find_accepts_a_unique_prefix(store: Store) -> None:
    for name in ("abcd1234", "abff0000", "1234abcd"):
        store.create(replace(TALK, id=name))
    assert store.find("1") == "1234abcd"
    assert store.find("abc") == store.find("abcd1234") == "abcd1234"


@pytest.mark.parametrize(
    ("prefix", "sentence"),
    [
        ("ab", "2 conversations start with 'ab'"),
        ("x", "No conversation starts with 'x'"),
        ("", "No conversation starts with ''"),
        ("%", "No conversation starts with '%'"),
        ("abcd12345", "No conversation starts with"),
    ],
)
def test_find_rejects_ambiguous_and_unknown_prefixes(store: Store, prefix: str, sentence: str) -> None:
    store.create(TALK)
    store.create(replace(TALK, id="abff0000"))
    with pytest.raises(KvchatError, match=sentence):
        store.find(prefix)


def test_loading_an_unknown_conversation_is_an_error(store: Store) -> None:
    with pytest.raises(KvchatError, match="There is no conversation 'nothing'"):
        store.load("nothing")


def test_drafts_are_stored_per_conversation(store: Store) -> None:
    assert store.draft(UNSAVED) == ""
    store.save_draft(UNSAVED, "begun\n")
    store.save_draft("a", "one")
    store.save_draft("a", "two")
    assert (store.draft(UNSAVED), store.draft("a"), store.draft("b")) == ("begun\n", "two", "")
    store.save_draft("a", "")
    assert (store.draft(UNSAVED), store.draft("a")) == ("begun\n", "")


def test_file_and_folder_are_private(path: Path) -> None:
    before = os.umask(0)
    try:
        with closing(Store(path)) as store:
            store.create(TALK)
            files = [file for file in path.parent.iterdir() if file.suffix != ".lock"]
            assert {file.name for file in files} == {"kvchat.db", "kvchat.db-wal", "kvchat.db-shm"}
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_file_uses_wal_and_records_migrations(store: Store, path: Path) -> None:
    assert rows(path, "pragma journal_mode") == [("wal",)]
    applied = rows(path, "select migration_set, name from _sqlite_migrations order by id")
    assert applied == [("kvchat", name) for name in MIGRATIONS]
    with closing(Store(path)):
        assert rows(path, "select count(*) from _sqlite_migrations") == [(len(MIGRATIONS),)]


OLD_ROWS = """
insert into conversations
    (id, title, system_prompt, model, mode, sampling, head, created_at, updated_at)
values
    ('abcd1234', 'Trip', 'Be brief.', 'maker/model', 'turn', '{"seed": 3}', 2, '2026-01-02', '2026-01-03');
insert into messages
    (id, conversation, parent_id, role, text, thinking, token_ids, tokenizer, finish_reason, created_at)
values
    (1, 'abcd1234', null, 'user', 'Which pass?', '', '[]', '', null, '2026-01-02'),
    (2, 'abcd1234', 1, 'assistant', 'The Brenner.', '', '[1, 2]', '0123456789abcdef', 'stop', '2026-01-03');
insert into drafts (conversation, text) values ('abcd1234', 'begun');
"""
OLD_FIGURES = replace(
    FIGURES, evicted_tokens=0, restored_tokens=0, restore_s=0.0, drafted_tokens=0, accepted_tokens=0
)
"""Statistics of a turn in a file without columns for evictions and restores."""


def old_file(path: Path, first_missing: str) -> Database:
    """A database with the migrations before that one only, with a conversation."""
    path.parent.mkdir()
    db = Database(sqlite3.connect(path))
    migrations.apply(db, stop_before=first_missing)
    db.executescript(OLD_ROWS)
    return db


def check_old_conversation(store: Store, stats: TurnStats | None) -> None:
    """Checks that the conversation is unchanged, with defaults for new settings."""
    question = Message(1, None, "user", "Which pass?", "2026-01-02")
    reply = Message(
        2, 1, "assistant", "The Brenner.", "2026-01-03", (1, 2), "0123456789abcdef", "stop", stats
    )
    assert store.load(TALK.id) == Conversation(
        TALK.id,
        "Trip",
        "Be brief.",
        CacheMode.TURN,
        Sampling(seed=3),
        "maker/model",
        KVPrecision.AUTO,
        EvictionPolicy.TURNS,
        0,
        "2026-01-02",
        (question, reply),
    )
    assert (store.draft(TALK.id), store.events(TALK.id)) == ("begun", [])
    assert store.last_turn(TALK.id) == {}


def test_migration_from_before_statistics_preserves_data(path: Path) -> None:
    old_file(path, "m002_turns").close()
    with closing(Store(path)) as migrated:
        check_old_conversation(migrated, None)
        reply = migrated.load(TALK.id).messages[-1]
        migrated.update_message(replace(reply, stats=FIGURES))
        check_old_conversation(migrated, FIGURES)


def test_migration_from_before_saved_caches_preserves_data(path: Path) -> None:
    with closing(old_file(path, "m003_cache")) as old, old.conn:
        figures = {n: v for n, v in asdict(FIGURES).items() if n in old.table("turns").columns_dict}
        later = {"evicted_tokens", "restored_tokens", "restore_s", "drafted_tokens", "accepted_tokens"}
        assert set(asdict(FIGURES)) - set(figures) == later
        old.table("turns").insert({"message": 2} | figures)
    for _ in range(2):
        with closing(Store(path)) as migrated:
            check_old_conversation(migrated, OLD_FIGURES)
    assert rows(path, "select name from _sqlite_migrations order by id") == [(name,) for name in MIGRATIONS]


def test_shared_prefixes_of_an_older_file_have_their_new_name(path: Path) -> None:
    with closing(old_file(path, "m009_shared_prefixes")) as old, old.conn:
        for kind in ("lend", "fork"):
            old.table("cache_events").insert(asdict(EVENTS[0]) | {"kind": kind})
    with closing(Store(path)) as migrated:
        assert [e.kind for e in migrated.events(TALK.id)] == [CacheEventKind.SHARE, CacheEventKind.FORK]


def test_a_migrated_file_stores_everything_that_a_new_one_does(path: Path) -> None:
    old_file(path, "m003_cache").close()
    with closing(Store(path)) as migrated:
        migrated.save_settings(TALK)
        question, reply = ask(migrated)
        migrated.update_message(replace(reply, stats=FIGURES))
        migrated.add_events(EVENTS)
        migrated.save_last_turn(TALK.id, {reply.id: {TokenStatus.WRITTEN: 2}})
        assert migrated.last_turn(TALK.id) == {reply.id: {TokenStatus.WRITTEN: 2}}
        loaded = migrated.load(TALK.id)
        assert (loaded.kv, loaded.policy, loaded.evicted_messages) == (
            TALK.kv,
            TALK.policy,
            TALK.evicted_messages,
        )
        assert loaded.messages == (question, replace(reply, stats=FIGURES))
        assert migrated.events(TALK.id) == list(EVENTS)


def test_only_the_last_turns_token_statuses_are_stored(store: Store, path: Path) -> None:
    store.create(TALK)
    store.save_last_turn(TALK.id, {1: {TokenStatus.READ: 5}})
    told = {2: {fate: n for n, fate in enumerate(TokenStatus)}, 3: {TokenStatus.WRITTEN: 7}}
    store.save_last_turn(TALK.id, told)
    with closing(Store(path)) as again:
        assert again.last_turn(TALK.id) == told
    store.save_settings(TALK)
    assert store.last_turn(TALK.id) == told
    assert store.last_turn(store.add(replace(TALK, id="forked00")).id) == store.last_turn("another") == {}


def test_cache_events_are_loaded_in_order(store: Store, path: Path) -> None:
    store.create(TALK)
    first, second, *later = EVENTS
    store.add_events([*later, second])
    store.add_events([first])
    with closing(Store(path)) as again:
        assert again.events(TALK.id) == list(EVENTS)
        assert again.events("another") == []


def test_events_with_equal_time_keep_insertion_order(store: Store) -> None:
    store.create(TALK)
    events = [CacheEvent(TALK.id, CacheEventKind.SHARE, tokens, at=5.0) for tokens in (3, 1, 2)]
    store.add_events(events)
    assert store.events(TALK.id) == events


def test_events_of_unknown_conversations_are_ignored(store: Store, path: Path) -> None:
    store.create(TALK)
    store.add_events([replace(EVENTS[0], conversation="unknown"), EVENTS[0]])
    assert rows(path, "select conversation from cache_events") == [(TALK.id,)]
    store.delete(TALK.id)
    store.add_events(EVENTS)
    assert rows(path, "select count(*) from cache_events") == [(0,)]


def test_an_added_copy_has_its_own_messages_and_statistics(store: Store, path: Path) -> None:
    store.create(TALK)
    question, reply = ask(store)
    reply = replace(reply, stats=FIGURES)
    store.update_message(reply)
    store.add_events(EVENTS)
    parent = store.load(TALK.id)
    fork = store.add(replace(parent, id="forked00", title="Fork"))
    assert fork == reopened(path, "forked00")
    copied, answered = fork.messages
    assert (copied.parent_id, answered.parent_id) == (None, copied.id)
    assert replace(copied, id=question.id) == question
    assert replace(answered, id=reply.id, parent_id=reply.parent_id) == reply
    assert store.events("forked00") == []
    store.update_message(replace(answered, text="Changed.", stats=OLD_FIGURES))
    assert store.load(TALK.id) == parent
    store.delete(TALK.id)
    assert [m.text for m in store.load("forked00").messages] == ["Which pass?", "Changed."]


def no_database(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("This is a letter, not a database. " * 50)


def another_database(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("create table conversations (of text)")


def a_folder_in_its_place(path: Path) -> None:
    path.mkdir(parents=True)


def a_file_for_a_folder(path: Path) -> None:
    path.parent.write_text("")


@pytest.mark.parametrize(
    "spoil",
    [no_database, another_database, a_folder_in_its_place, a_file_for_a_folder],
    ids=lambda f: f.__name__,
)
def test_a_file_that_cannot_be_opened_is_one_sentence(path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(KvchatError, match=r"can't be opened: .+ choose another folder") as caught:
        Store(path)
    assert str(path) in str(caught.value)
    if spoil is no_database:
        assert path.read_bytes() == before


def test_a_failed_write_is_one_sentence_and_the_next_works(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvchat.chat.migrations.BUSY_S", 0.0)
    with closing(Store(path)) as store, closing(sqlite3.connect(path)) as other:
        store.create(TALK)
        other.execute("begin immediate")
        with pytest.raises(KvchatError, match="can't be saved: database is locked"):
            store.add_message(TALK.id, user("Which pass?"))
        assert store.load(TALK.id) == TALK
        other.rollback()
        saved = store.add_message(TALK.id, user("Which pass?"))
        assert store.load(TALK.id).messages == (saved,)


def test_a_failed_transaction_is_rolled_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create(TALK)
    question, reply = ask(store)

    def break_down(*_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_set_head", break_down)
        with pytest.raises(OSError, match="the disk is gone"):
            store.add_message(TALK.id, user("Lost"))
    assert store.load(TALK.id).messages == (question, reply)
    assert store.summaries()[0].messages == 2


def test_a_store_in_memory_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(Store(None)) as store:
        store.create(TALK)
        question, reply = ask(store)
        store.save_draft(TALK.id, "begun")
        assert store.load(TALK.id).messages == (question, reply)
    assert list(tmp_path.iterdir()) == []


OPEN = """
import sys
from pathlib import Path
from typing import get_type_hints
from kvchat.chat.store import Store
print("ready", flush=True)
sys.stdin.readline()
store = Store(Path(sys.argv[1]))
print(len(store.summaries()))
"""

APPEND = """
import sys
from pathlib import Path
from typing import get_type_hints
from kvchat.chat.conversation import Message
from kvchat.chat.store import Store
path, talk, name, count = sys.argv[1:]
store = Store(Path(path))
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(count)):
    head = store.load(talk).head
    store.add_message(talk, Message(0, head.id if head else None, "user", f"{name} {number}", ""))
"""

CRASH = """
import os, signal, sys
from pathlib import Path
from typing import get_type_hints
from kvchat.chat.conversation import Message
from kvchat.chat.store import Store
path, talk, how = sys.argv[1:]
store = Store(Path(path))
head = store.load(talk).head
assert head
print("ready", flush=True)
sys.stdin.readline()
with store._writing() as db:
    db.execute("delete from messages")
    db.execute("update conversations set head = null, title = 'Half done'")
    os._exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
"""


def test_concurrent_first_opens_succeed(path: Path) -> None:
    assert let_go_together([start(OPEN, path) for _ in range(OPENERS)]) == ["0\n"] * OPENERS
    assert rows(path, "select count(*) from _sqlite_migrations") == [(len(MIGRATIONS),)]


def test_concurrent_writes_to_one_conversation_lose_nothing(store: Store, path: Path) -> None:
    store.create(TALK)
    let_go_together([start(APPEND, path, TALK.id, writer, MESSAGES) for writer in range(WRITERS)])
    saved = {
        int(str(i)): (parent, text)
        for i, parent, text in rows(path, "select id, parent_id, text from messages")
    }
    expected = sorted(f"{writer} {number}" for writer in range(WRITERS) for number in range(MESSAGES))
    assert sorted(str(text) for _, text in saved.values()) == expected
    for number, (parent, _) in saved.items():
        assert parent is None or (isinstance(parent, int) and parent in saved and parent < number)
    shown = store.load(TALK.id).messages
    assert shown[-1].id == max(saved)
    assert shown[0].parent_id is None
    for writer in range(WRITERS):
        mine = [text for _, text in (saved[i] for i in sorted(saved)) if str(text).startswith(f"{writer} ")]
        assert mine == [f"{writer} {number}" for number in range(MESSAGES)]


@pytest.mark.parametrize(("how", "code"), [("exit", 3), ("kill", -9)])
def test_a_crash_in_a_transaction_changes_nothing(store: Store, path: Path, how: str, code: int) -> None:
    store.create(TALK)
    ask(store)
    before = store.load(TALK.id)
    crashing = start(CRASH, path, TALK.id, how)
    crashing.communicate("go\n")
    assert crashing.returncode == code
    assert reopened(path) == before
    store.add_message(TALK.id, user("And on it goes", before.messages[-1].id))
    assert rows(path, "pragma integrity_check") == [("ok",)]


def test_token_ids_are_stored_as_json(store: Store, path: Path) -> None:
    store.create(TALK)
    ask(store)
    ((ids,),) = rows(path, "select token_ids from messages where role = 'assistant'")
    assert json.loads(str(ids)) == [1, 2]


UNANSWERED = """
insert into messages
    (id, conversation, parent_id, role, text, thinking, token_ids, tokenizer, finish_reason, created_at)
values
    (3, 'abcd1234', 2, 'user', 'Too long', '', '[]', '', null, '2026-01-04'),
    (4, 'abcd1234', 3, 'user', 'Refused too', '', '[]', '', null, '2026-01-05');
update conversations set head = 4;
"""
JOINED = """
insert into messages
    (id, conversation, parent_id, role, text, thinking, token_ids, tokenizer, finish_reason, created_at)
values
    (5, 'abcd1234', 4, 'user', 'Both, please', '', '[]', '', null, '2026-01-06'),
    (6, 'abcd1234', 5, 'assistant', 'Here.', '', '[3]', '', 'stop', '2026-01-07');
update conversations set head = 6;
"""


@pytest.mark.parametrize(
    ("later", "texts"),
    [
        (UNANSWERED, ["Which pass?", "The Brenner."]),
        (
            UNANSWERED + JOINED,
            ["Which pass?", "The Brenner.", "Too long\n\nRefused too\n\nBoth, please", "Here."],
        ),
        ("update conversations set head = 1;", ["Which pass?", "The Brenner."]),
    ],
    ids=["no answer follows", "read together with an answered one", "an answer that was not written again"],
)
def test_migration_marks_unanswered_questions_as_not_sent(path: Path, later: str, texts: list[str]) -> None:
    with closing(old_file(path, "m007_not_sent")) as old:
        old.executescript(later)
    with closing(Store(path)) as store:
        loaded = store.load(TALK.id)
        assert [m.text for m in loaded.prompt() if m.role != "system"] == texts
        assert [m.text for m in loaded.messages if m.not_sent] == (
            ["Too long", "Refused too"] if later == UNANSWERED else []
        )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("sampling = 'no json'", replace(TALK, sampling=Sampling())),
        ("""sampling = '{"temperature": "hot", "seed": 7}'""", replace(TALK, sampling=Sampling(seed=7))),
        ("mode = 'often'", replace(TALK, mode=CacheMode.ON)),
        ("evicted_messages = 99999999999999", replace(TALK, evicted_messages=0)),
        ("title = x'ff00'", replace(TALK, title="")),
        ("kv = null, policy = null", replace(TALK, kv=KVPrecision.AUTO, policy=EvictionPolicy.TURNS)),
    ],
)
def test_a_damaged_setting_gets_its_default(
    store: Store, path: Path, change: str, expected: Conversation
) -> None:
    store.create(TALK)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"update conversations set {change}")
    assert store.load(TALK.id) == expected
    assert [each.id for each in store.summaries()] == [TALK.id]


@pytest.mark.parametrize(
    "change",
    ["token_ids = '[1, -5]'", "token_ids = 'no json'", "finish_reason = 'bored'", "tokenizer = x'ff'"],
)
def test_a_damaged_message_field_gets_its_default(store: Store, path: Path, change: str) -> None:
    store.create(TALK)
    question, saved = ask(store)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"update messages set {change} where id = ?", [saved.id])
    name = change.partition(" ")[0]
    found = store.load(TALK.id).messages
    assert found[0] == question
    assert found[1].text == saved.text
    assert not getattr(found[1], name)
    assert all(
        getattr(found[1], field.name) == getattr(saved, field.name)
        for field in fields(Message)
        if field.name != name
    )


@pytest.mark.parametrize("change", ["role = 'robot'", "text = null", "text = x'ff'"])
def test_children_of_a_damaged_message_are_kept(store: Store, path: Path, change: str) -> None:
    store.create(TALK)
    first, answered = ask(store)
    second, last = ask(store, parent=answered.id)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"update messages set {change} where id = ?", [answered.id])
    assert store.load(TALK.id).messages == (first, replace(second, parent_id=first.id), last)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"update messages set {change} where id = ?", [last.id])
    assert store.load(TALK.id).messages == (first, replace(second, parent_id=first.id))


def test_a_cycle_of_messages_terminates(store: Store, path: Path) -> None:
    store.create(TALK)
    first, last = ask(store)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("update messages set parent_id = ? where id = ?", [last.id, first.id])
    assert [each.id for each in store.load(TALK.id).messages] == [first.id, last.id]


def test_damaged_token_statuses_are_empty(store: Store, path: Path) -> None:
    store.create(TALK)
    for damaged in ("no json", "[]", '{"a": 1}', '{"1": {"lost": 2}}'):
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("update conversations set last_turn = ?", [damaged])
        assert store.last_turn(TALK.id) == {}


def test_an_import_through_another_connection_is_visible(store: Store, path: Path) -> None:
    question = Message(1, None, "user", "Which?", TALK.created_at)
    assert store_module.import_into(path, [replace(TALK, messages=(question,))]) == 1
    assert store.load(TALK.id).messages[0].text == "Which?"


def test_the_list_is_read_again_only_where_something_of_it_changed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = list[None]()
    read = Store._read_summaries

    def counted(store: Store) -> list[Summary]:
        reads.append(None)
        return read(store)

    monkeypatch.setattr(Store, "_read_summaries", counted)
    with closing(Store(path)) as store, closing(Store(path)) as other:
        store.create(Conversation("a", "First"))
        answer = store.add_message("a", Message(0, None, "user", "Hi", ""))
        listed = store.summaries()
        listed.clear()  # a caller's own list
        store.add_events([CacheEvent("a", CacheEventKind.MISS, 1)])
        store.save_draft("a", "later")
        store.update_message(replace(answer, text="Ho"))
        assert [(each.title, each.messages) for each in store.summaries()] == [("First", 1)]
        assert len(reads) == 1
        for change, expected in (
            (lambda: store.save_settings(Conversation("a", "Second")), [("Second", 1)]),
            (lambda: store.add_message("a", Message(0, 1, "assistant", "Ho", "")), [("Second", 2)]),
            (lambda: other.create(Conversation("b", "Other")), [("Other", 0), ("Second", 2)]),
            (lambda: store.delete("b"), [("Second", 2)]),
        ):
            change()
            assert sorted((each.title, each.messages) for each in store.summaries()) == expected
