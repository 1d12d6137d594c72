"""Imports from other programs and of damaged files: each record is imported, or reported with its place."""

import json
import sqlite3
import zipfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvchat.chat.conversation import Conversation
from kvchat.chat.exporters import to_json, to_markdown
from kvchat.chat.importers import Import, read_import
from kvchat.chat.importers.page import markdown_of
from kvchat.chat.importers.parsed import timestamp
from kvchat.chat.store import Store
from kvchat.errors import KvchatError
from tests.chat.test_exchange import BRANCHED, TALK, said, written


def read(folder: Path, document: object) -> Import:
    """A JSON document as an import reads it."""
    return read_import(written(folder, "file.json", json.dumps(document)))


def one(folder: Path, document: object) -> Conversation:
    """The only conversation of a document, imported without problems."""
    found = read(folder, document)
    assert found.problems == ()
    (talk,) = found.conversations
    return talk


def words(talk: Conversation) -> list[tuple[str, str]]:
    return [(m.role, m.raw) for m in talk.messages]


def problems(found: Import) -> list[str]:
    return [str(each) for each in found.problems]


# --- ChatGPT ---------------------------------------------------------------------------------------------

CREATED = 1779048900.5


def node(
    parent: str | None, role: str, *parts: object, kind: str = "text", **more: object
) -> dict[str, object]:
    content: dict[str, object] = {"content_type": kind, "parts": list(parts)}
    if kind == "thoughts":
        content = {"content_type": kind, "thoughts": [{"summary": "s", "content": p} for p in parts]}
    message = {"author": {"role": role}, "content": content, "create_time": CREATED, **more}
    return {"parent": parent, "message": message}


def chatgpt(mapping: object, current: object = None, title: object = "Passes") -> dict[str, object]:
    return {"title": title, "create_time": CREATED, "mapping": mapping, "current_node": current}


PASSES = chatgpt(
    {
        "root": {"parent": None, "message": None},
        "s": node("root", "system", "hidden"),
        "a": node("s", "user", "Which?", "Now?"),
        "other": node("a", "assistant", "An older answer."),
        "b": node("a", "assistant", "May, so the lower ones.", kind="thoughts"),
        "t": node("b", "tool", "searched"),
        "c": node("t", "assistant", "The Brenner.", recipient="all"),
        "d": node("c", "assistant", "And the Reschen."),
        "e": node("d", "user", "Thanks."),
    },
    "e",
)
SHORT = {"a": node(None, "user", "Which?"), "b": node("a", "assistant", "The Brenner.")}


def test_chatgpt_conversations_have_all_branches(tmp_path: Path) -> None:
    talk = one(tmp_path, [PASSES])
    assert talk.title == "Passes"
    assert talk.created_at.startswith("2026-05-17T")
    assert [(m.role, m.text) for m in talk.messages] == [
        ("user", "Which?\n\nNow?"),
        ("assistant", "The Brenner.\n\nAnd the Reschen."),
        ("user", "Thanks."),
    ]
    assert talk.messages[1].thinking == "<think>\nMay, so the lower ones.\n</think>\n\n"
    (other,) = talk.other_branches
    assert (other.text, other.parent_id) == ("An older answer.", talk.messages[0].id)
    store = Store(None)
    assert store.import_all([talk]) == 1
    assert words(store.load(talk.id)) == words(talk)


@pytest.mark.parametrize("prefix", ["", "export-2026/"])
def test_numbered_files_of_a_zip_are_read_in_numeric_order(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in (10, 2):
            named = json.dumps([chatgpt(SHORT, "b", f"Number {number}")])
            archive.writestr(f"{prefix}conversations-{number}.json", named)
        archive.writestr(f"{prefix}user.json", "{}")
        archive.writestr(f"{prefix}conversations-3.json", "[{")
        archive.writestr("__MACOSX/._conversations-2.json", "\0")
    found = read_import(path)
    assert [talk.title for talk in found.conversations] == ["Number 2", "Number 10"]
    assert problems(found) == [f"{prefix}conversations-3.json is damaged: no JSON; it was skipped"]


def test_an_unpacked_folder_is_read_like_the_zip(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "user.json").write_text("{}")
    (tmp_path / "deep" / "conversations-000.json").write_text(json.dumps([chatgpt(SHORT, "b"), {"id": "x"}]))
    found = read_import(tmp_path)
    assert [talk.title for talk in found.conversations] == ["Passes"]
    assert problems(found) == [
        "deep/conversations-000.json, conversation 2: has no messages (no field `mapping`); it was skipped"
    ]


def test_records_that_are_not_conversations_are_counted_and_reported(tmp_path: Path) -> None:
    folder = {"id": "g", "name": "My project", "type": "folder"}
    found = read(tmp_path, [folder, chatgpt(SHORT, "b"), 5, chatgpt({}, None, "Empty")])
    assert [talk.title for talk in found.conversations] == ["Passes"]
    assert found.skipped == 3
    assert problems(found) == [
        'conversation 1 "My project": is a folder, no conversation; it was skipped',
        "conversation 3: must be a table of fields; it was skipped",
        'conversation 4 "Empty": has no messages; it was skipped',
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"content_type": "code", "language": "python", "text": "print(1)"}, "```python\nprint(1)\n```"),
        ({"content_type": "code", "language": "unknown", "text": "a```b"}, "````\na```b\n````"),
        (
            {
                "content_type": "multimodal_text",
                "parts": [{"content_type": "audio_transcription", "text": "Hello.", "direction": "out"}],
            },
            "Hello.",
        ),
    ],
)
def test_chatgpt_content_types_become_text(tmp_path: Path, content: object, text: str) -> None:
    answer = node("a", "assistant") | {
        "message": {"author": {"role": "assistant"}, "content": content, "create_time": None}
    }
    talk = one(tmp_path, [chatgpt(SHORT | {"b": answer}, "b")])
    assert talk.messages[1].text == text


def test_parts_without_text_are_counted(tmp_path: Path) -> None:
    picture = {"content_type": "image_asset_pointer", "asset_pointer": "file://x"}
    asked = node(None, "user", picture, "What is it?", picture)
    found = read(tmp_path, [chatgpt(SHORT | {"a": asked}, "b")])
    assert words(found.conversations[0])[0] == ("user", "What is it?")
    assert problems(found) == [
        'conversation 1 "Passes": 2 parts without text (image_asset_pointer) were left out'
    ]


def test_without_a_current_node_the_newest_branch_is_shown(tmp_path: Path) -> None:
    older = node("a", "assistant", "Older.") | {}
    newer = node("a", "assistant", "Newer.", create_time=CREATED + 9)
    tree = {"a": SHORT["a"], "n": newer, "o": older}
    talk = one(tmp_path, [chatgpt(tree, None)])
    assert words(talk) == [("user", "Which?"), ("assistant", "Newer.")]
    assert [m.text for m in talk.other_branches] == ["Older."]
    dangling = read(tmp_path, [chatgpt(tree, "zz")])
    assert words(dangling.conversations[0]) == words(talk)
    assert problems(dangling) == [
        "conversation 1 \"Passes\": its last message 'zz' is missing; the newest one is shown"
    ]


def test_messages_in_a_cycle_are_dropped_and_reported(tmp_path: Path) -> None:
    tree = SHORT | {"x": node("y", "user", "One"), "y": node("x", "assistant", "Two")}
    found = read(tmp_path, [chatgpt(tree, "b")])
    assert words(found.conversations[0]) == [("user", "Which?"), ("assistant", "The Brenner.")]
    assert problems(found) == ['conversation 1 "Passes": 2 of its messages form a cycle; they were left out']


def test_children_of_a_message_without_content_are_kept(tmp_path: Path) -> None:
    broken = {"parent": None, "message": {"author": {"role": "user"}, "content": None}}
    found = read(tmp_path, [chatgpt(SHORT | {"a": broken}, "b")])
    assert words(found.conversations[0]) == [("assistant", "The Brenner.")]
    assert problems(found) == ['conversation 1 "Passes", message 1: has no content; the message was left out']


# --- dates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.5, "1970-01-01T00:00:00.500000+00:00"),
        (1779048900, "2026-05-17T20:15:00.000000+00:00"),
        (1779048900000, "2026-05-17T20:15:00.000000+00:00"),
        (1779048900000000000, "2026-05-17T20:15:00.000000+00:00"),
        ("2026-05-17T20:15:00Z", "2026-05-17T20:15:00.000000+00:00"),
        ("2026-05-17T22:15:00+02:00", "2026-05-17T20:15:00.000000+00:00"),
        ("2026-05-17T20:15:00+00:00", "2026-05-17T20:15:00+00:00"),
    ],
)
def test_timestamps_become_utc(given: object, expected: str) -> None:
    assert timestamp(given) == expected


@pytest.mark.parametrize(
    "given",
    [1e20, 1e300, -1e20, float("nan"), float("inf"), "yesterday", "", True, [], "0001-01-01T00:00:00+14:00"],
)
def test_an_invalid_date_is_replaced_and_reported(tmp_path: Path, given: object) -> None:
    with pytest.raises(ValueError, match="must be seconds since 1970 or a date"):
        timestamp(given)
    if given:
        found = read(tmp_path, [chatgpt(SHORT, "b") | {"create_time": given}])
        assert found.conversations[0].created_at.startswith("2026-05-17T20:15:00")
        assert "its date must be seconds since 1970 or a date" in problems(found)[0]


# --- Claude ----------------------------------------------------------------------------------------------


def test_claude_blocks_and_attachments_are_read(tmp_path: Path) -> None:
    talk = one(
        tmp_path,
        [
            {
                "uuid": "u",
                "name": "Tea",
                "created_at": "2026-01-01T00:00:00Z",
                "chat_messages": [
                    {
                        "uuid": "m",
                        "sender": "human",
                        "text": "Which?",
                        "content": [{"type": "text", "text": "Which?"}],
                        "attachments": [{"file_name": "a.txt", "extracted_content": "Assam"}],
                    },
                    {
                        "uuid": "n",
                        "sender": "assistant",
                        "text": "ignored, as the blocks have it",
                        "content": [
                            {"type": "thinking", "thinking": "Hm."},
                            {"type": "text", "text": "Assam."},
                        ],
                    },
                ],
            }
        ],
    )
    assert (talk.title, talk.created_at) == ("Tea", "2026-01-01T00:00:00.000000+00:00")
    assert words(talk) == [
        ("user", 'Which?\n\n<file name="a.txt">\nAssam\n</file>'),
        ("assistant", "<think>\nHm.\n</think>\n\nAssam."),
    ]


def test_claude_branches_and_older_exports_are_read(tmp_path: Path) -> None:
    root = "00000000-0000-4000-8000-000000000000"
    messages = [
        {"uuid": "a", "parent_message_uuid": root, "sender": "human", "text": "Which?"},
        {"uuid": "b", "parent_message_uuid": "a", "sender": "assistant", "text": "Assam."},
        {"uuid": "c", "parent_message_uuid": "a", "sender": "assistant", "text": "Darjeeling."},
    ]
    talk = one(tmp_path, [{"name": "", "chat_messages": messages, "current_leaf_message_uuid": "b"}])
    assert talk.title == "Which?"
    assert words(talk) == [("user", "Which?"), ("assistant", "Assam.")]
    assert [m.text for m in talk.other_branches] == ["Darjeeling."]


def test_claude_tool_blocks_and_unknown_senders_are_reported(tmp_path: Path) -> None:
    tools = [{"type": "tool_use"}, {"type": "tool_result"}, {"type": "text", "text": "Done."}]
    messages = [
        {"sender": "human", "text": "Search."},
        {"sender": "robot", "text": "Beep."},
        {"sender": "assistant", "content": tools},
    ]
    found = read(tmp_path, [{"name": "Tools", "chat_messages": messages}])
    assert words(found.conversations[0]) == [("user", "Search."), ("assistant", "Done.")]
    assert problems(found) == [
        'conversation 1 "Tools": 1 blocks without text (tool_use) were left out',
        'conversation 1 "Tools": 1 blocks without text (tool_result) were left out',
        "conversation 1 \"Tools\", message 2: role must be user or assistant, not 'robot'; "
        "the message was left out",
    ]


# --- Open WebUI, Gemini, OpenAI --------------------------------------------------------------------------


def test_open_webui_tree_system_prompt_and_reasoning_are_read(tmp_path: Path) -> None:
    reasoning = (
        '<details type="reasoning" done="true" duration="2">\n<summary>Thought for 2 seconds</summary>\n'
        "&gt; 1 &lt; 2\n</details>\nYes."
    )
    messages = {
        "a": {"id": "a", "parentId": None, "role": "user", "content": "Sure?", "timestamp": 1779048900},
        "b": {"id": "b", "parentId": "a", "role": "assistant", "content": "No.", "timestamp": 1779048901},
        "c": {"id": "c", "parentId": "a", "role": "assistant", "content": reasoning, "timestamp": 1779048902},
    }
    chat = {
        "title": "Less",
        "params": {"system": "Be brief."},
        "history": {"currentId": "c", "messages": messages},
    }
    talk = one(
        tmp_path, [{"id": "1", "user_id": "2", "title": "Less", "chat": chat, "created_at": 1779048899}]
    )
    assert (talk.title, talk.system_prompt) == ("Less", "Be brief.")
    assert words(talk) == [("user", "Sure?"), ("assistant", "<think>\n> 1 < 2\n</think>\n\nYes.")]
    assert [m.text for m in talk.other_branches] == ["No."]
    assert words(one(tmp_path, chat)) == words(talk)


def test_a_gemini_activity_is_a_question_and_an_answer(tmp_path: Path) -> None:
    entry = {
        "header": "Gemini Apps",
        "title": "Prompted Which pass?",
        "time": "2026-05-17T20:15:00.123Z",
        "products": ["Gemini Apps"],
        "safeHtmlItem": [{"html": "<p>The <b>Brenner</b> &amp; others.</p>"}],
    }
    found = read(
        tmp_path, [entry, {"header": "Gemini Apps", "title": "Used an Assistant feature", "time": "x"}]
    )
    assert words(found.conversations[0]) == [
        ("user", "Which pass?"),
        ("assistant", "The **Brenner** & others."),
    ]
    assert found.conversations[0].created_at == "2026-05-17T20:15:00.123000+00:00"
    assert problems(found) == [
        'conversation 2 "Used an Assistant feature": is no question; it was skipped',
    ]


def test_html_answers_become_markdown() -> None:
    html = (
        "<h3>Passes</h3><p>Two:</p><ol><li><p>Brenner</p></li><li>Reschen</li></ol>"
        "<pre><code>a\n\n  b</code></pre><p>one<br>two <code>x</code></p><script>alert(1)</script>"
    )
    assert markdown_of(html) == (
        "### Passes\n\nTwo:\n\n1. Brenner\n2. Reschen\n\n```\na\n\n  b\n```\n\none\ntwo `x`"
    )


@pytest.mark.parametrize(
    "document",
    [
        {
            "runSettings": {"model": "models/gemini"},
            "systemInstruction": {"text": "Be brief."},
            "chunkedPrompt": {
                "chunks": [
                    {"role": "user", "text": "Which?"},
                    {"role": "model", "text": "Hm.", "isThought": True},
                    {"role": "model", "text": "The Brenner."},
                ]
            },
        },
        {
            "system_instruction": {"parts": [{"text": "Be brief."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "Which?"}]},
                {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": "The Brenner."}]},
            ],
        },
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Which?"}]},
                {"role": "assistant", "content": "The Brenner.", "reasoning_content": "Hm."},
            ]
        },
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Which?"},
            {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nThe Brenner."},
        ],
    ],
    ids=["AI Studio", "contents", "messages", "a list of messages"],
)
def test_gemini_chats_and_openai_messages_give_equal_conversations(tmp_path: Path, document: object) -> None:
    talk = one(tmp_path, document)
    assert (talk.title, talk.system_prompt) == ("Which?", "Be brief.")
    assert words(talk) == [("user", "Which?"), ("assistant", "<think>\nHm.\n</think>\n\nThe Brenner.")]


def test_json_lines_are_one_conversation_each(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": [{"role": "user", "content": f"Number {n}"}]}) for n in (1, 2)]
    found = read_import(written(tmp_path, "file.jsonl", "\n".join(lines) + "\n"))
    assert [talk.title for talk in found.conversations] == ["Number 1", "Number 2"]


# --- llm -------------------------------------------------------------------------------------------------

LLM = """
create table conversations (id text primary key, name text, model text);
create table responses (id text primary key, model text, prompt text, system text, response text,
    conversation_id text, datetime_utc text, reasoning text);
insert into conversations values ('c1', 'Passes', 'm');
insert into responses values
    ('r2', 'm', 'And?', null, 'The Reschen.', 'c1', '2026-05-17T20:16:00', ''),
    ('r1', 'm', 'Which?', 'Be brief.', 'The Brenner.', 'c1', '2026-05-17T20:15:00', 'May.'),
    ('r3', 'm', 'Alone', null, 'Yes.', null, '2026-05-18T20:15:00', null);
"""
LLM_THREADS = """
create table threads (id text primary key, name text, tip_message_hash text, forked_from text,
    datetime_utc text);
create table messages (hash text primary key, parent_hash text, role text);
create table parts (id integer primary key, message_hash text, position int, type text, text text);
insert into threads values ('t', 'Passes', 'h3', null, '2026-05-17T20:15:00+00:00');
insert into messages values ('h1', null, 'system'), ('h2', 'h1', 'user'), ('h3', 'h2', 'assistant');
insert into parts (message_hash, position, type, text) values
    ('h1', 0, 'text', 'Be brief.'), ('h2', 0, 'text', 'Which?'),
    ('h3', 0, 'reasoning', 'May.'), ('h3', 1, 'text', 'The Brenner.');
"""


def test_llm_logs_with_old_tables_are_read(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "logs.db")) as db:
        db.executescript(LLM)
    talk, alone = read_import(tmp_path / "logs.db").conversations
    assert (talk.title, talk.system_prompt) == ("Passes", "Be brief.")
    assert [m.text for m in talk.messages] == ["Which?", "The Brenner.", "And?", "The Reschen."]
    assert talk.messages[1].thinking == "<think>\nMay.\n</think>\n\n"
    assert (alone.title, len(alone.messages)) == ("Alone", 2)
    assert talk.created_at == "2026-05-17T20:15:00.000000+00:00"


def test_llm_logs_with_new_tables_are_read(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "logs.db")) as db:
        db.executescript(LLM_THREADS)
    (talk,) = read_import(tmp_path / "logs.db").conversations
    assert (talk.title, talk.system_prompt) == ("Passes", "Be brief.")
    assert [(m.role, m.raw) for m in talk.messages] == [
        ("user", "Which?"),
        ("assistant", "<think>\nMay.\n</think>\n\nThe Brenner."),
    ]


# --- damaged ---------------------------------------------------------------------------------------------

UNKNOWN = {
    "nothing": "",
    "other Markdown": "# Notes\n\n## You\n\ntext\n",
    "no JSON": "{",
    "other JSON": '{"a": 1}',
    "a number": "[1]",
    "bytes": "\ud800",
}


@pytest.mark.parametrize("text", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_an_unknown_format_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(KvchatError, match="has an unknown format"):
        read_import(written(tmp_path, "file.md", text))


def test_a_file_with_nothing_to_import_is_an_error_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(KvchatError) as caught:
        read(tmp_path, [chatgpt({}, "x"), {"mapping": None}])
    assert str(caught.value).endswith(
        'conversation 1 "Passes": has no messages; it was skipped (and 1 more).'
    )


def test_unreadable_and_newer_files_are_errors(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("create table things (id)")
    (tmp_path / "no.zip").write_bytes(b"PK\3\4 no zip")
    for name, sentence in (
        ("other.db", "unknown format"),
        ("no.zip", "can't be read"),
        (".", "unknown format"),
        ("missing.md", "can't be read"),
    ):
        with pytest.raises(KvchatError, match=sentence):
            read_import(tmp_path / name)
    with pytest.raises(KvchatError, match="newer version of kvchat"):
        read_import(written(tmp_path, "new.json", to_json(TALK).replace('"kvchat": 1', '"kvchat": 2')))
    with pytest.raises(KvchatError, match="nested too deeply"):
        read_import(written(tmp_path, "deep.json", "[" * 100_000))


def changed(field: str, value: object, *, message: int | None = None) -> dict[str, object]:
    """An export of kvchat with one field changed."""
    document = json.loads(to_json(TALK))
    place = document["conversations"][0]
    *way, last = field.split(".")
    for step in (["messages", message] if message is not None else []) + way:
        place = place[step]
    place[last] = value
    return dict(document)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("evicted_messages", 10**30, "evicted_messages must be a whole number, not 1e+30"),
        ("evicted_messages", -1, "evicted_messages must be at least 0, not -1"),
        ("sampling.temperature", "0.5", "sampling.temperature must be a number, not '0.5'"),
        ("sampling.temperature", float("nan"), "sampling.temperature must be at least 0, not nan"),
        (
            "sampling.seed",
            2**63,
            "sampling.seed must be at most 9223372036854775807, not 9223372036854775808",
        ),
        ("sampling.max_tokens", 0, "sampling.max_tokens must be at least 1, not 0"),
        ("mode", "often", "mode must be on, turn or off, not 'often'"),
        ("title", 3, "title must be text, not 3"),
        ("model", None, "model must be text, not None"),
    ],
)
def test_an_invalid_setting_gets_its_default_and_is_reported(
    tmp_path: Path, field: str, value: object, what: str
) -> None:
    found = read(tmp_path, changed(field, value))
    (talk,) = found.conversations
    assert said(talk) == said(TALK)
    assert [each.what for each in found.problems] == [f"{what}; the field was left out"]
    wrong, _, _inner = field.partition(".")
    right = {"mode", "sampling", "evicted_messages", "system_prompt", "kv", "policy"} - {wrong}
    assert all(getattr(talk, name) == getattr(TALK, name) for name in right)
    if wrong == "sampling":
        assert talk.sampling.seed == (None if field.endswith("seed") else TALK.sampling.seed)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        (
            "finish_reason",
            "bored",
            "finish_reason must be stop, length, cancelled, context or error, not 'bored'",
        ),
        ("token_ids", [1, -5], "token_ids[1] must be at least 0, not -5"),
        ("token_ids", ["a"], "token_ids[0] must be a whole number, not 'a'"),
        ("stats.ttft_s", float("inf"), "stats.ttft_s must be at most 1e+18, not inf"),
        ("stats.kv_bytes", "many", "stats.kv_bytes must be a whole number, not 'many'"),
    ],
)
def test_an_invalid_message_field_gets_its_default_and_is_reported(
    tmp_path: Path, field: str, value: object, what: str
) -> None:
    found = read(tmp_path, changed(field, value, message=1))
    name = field.partition(".")[0]
    assert problems(found) == [f'conversation 1 "Trip --> <b>", message 2: {what}; the field was left out']
    answer = TALK.messages[1]
    without = {
        "finish_reason": replace(answer, finish_reason=None),
        "token_ids": replace(answer, token_ids=()),
        "stats": replace(answer, stats=None),
    }
    assert found.conversations[0].messages == (TALK.messages[0], without[name])


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("text", None, "text must be text, not None"),
        ("text", 5, "text must be text, not 5"),
        ("role", "system", "role must be user or assistant, not 'system'"),
    ],
)
def test_an_invalid_message_is_dropped_and_its_children_are_kept(
    tmp_path: Path, field: str, value: object, what: str
) -> None:
    found = read(tmp_path, changed(field, value, message=0))
    (talk,) = found.conversations
    assert problems(found) == [f'conversation 1 "Trip --> <b>", message 1: {what}; the message was left out']
    assert talk.messages == (replace(TALK.messages[1], id=1, parent_id=None),)


def test_token_ids_of_a_question_are_dropped(tmp_path: Path) -> None:
    document = changed("token_ids", [1, 2], message=0)
    found = read(tmp_path, document)
    assert found.conversations[0].messages == TALK.messages
    assert "message 1: token_ids belong to answers only" in problems(found)[0]


def test_lone_surrogates_are_replaced_and_pairs_are_joined(tmp_path: Path) -> None:
    found = read(tmp_path, changed("text", "a\ud83db \ud83d\ude42", message=0))
    (talk,) = found.conversations
    assert talk.messages[0].text == "a\ufffdb 🙂"
    assert "message 1: text has a lone surrogate" in problems(found)[0]
    assert one(tmp_path, changed("text", "\ud83d\ude42", message=0)).messages[0].text == "🙂"


def test_duplicate_ids_and_unknown_parents_are_handled(tmp_path: Path) -> None:
    document = json.loads(to_json(BRANCHED))
    others = document["conversations"][0]["other_branches"]
    others[0]["parent_id"] = 99
    others[2]["id"] = 3
    found = read(tmp_path, document)
    (talk,) = found.conversations
    assert said(talk) == said(BRANCHED)
    assert [(m.text, m.parent_id) for m in talk.other_branches] == [
        ("An older answer.", None),
        ("And then?", 2),
    ]
    assert "has the id of an earlier message" in problems(found)[0]


def test_a_damaged_markdown_comment_loses_its_fields_only(tmp_path: Path) -> None:
    text = to_markdown(TALK).replace('kvchat:user {"created_at"', "kvchat:user {created_at")
    found = read_import(written(tmp_path, "talk.md", text))
    assert [(m.role, m.raw) for m in found.conversations[0].messages] == [
        (m.role, m.raw) for m in TALK.messages
    ]
    assert problems(found) == [
        "conversation 1, message 1: the fields in its comment are no JSON; they were left out"
    ]


def test_duplicate_conversations_are_imported_once_and_reported(tmp_path: Path) -> None:
    document = json.loads(to_json(TALK))
    document["conversations"] *= 2
    document["conversations"].append(json.loads(to_json(BRANCHED))["conversations"][0])
    found = read(tmp_path, document)
    assert len(found.conversations) == 2
    assert problems(found) == ['conversation 2 "Trip --> <b>": is in the file already; it was skipped']
    store = Store(None)
    assert store.import_all([*found.conversations, *found.conversations]) == 2
    assert len(store.summaries()) == 2


def test_a_failed_import_saves_nothing(tmp_path: Path) -> None:
    good = one(tmp_path, json.loads(to_json(TALK)))
    bad = replace(good, id="bad", messages=(replace(good.messages[0], parent_id=77),))
    store = Store(tmp_path / "kvchat.db")
    with pytest.raises(KeyError):
        store.import_all([good, bad])
    assert store.summaries() == []
    assert store.import_all([good]) == 1


# --- hostile ---------------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, 1e20, float("nan"), float("inf"), -1, "\ud800", "user", "assistant", "a", "b"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
WHOLE = [
    json.loads(to_json(BRANCHED)),
    [PASSES],
    [
        {
            "name": "Tea",
            "chat_messages": [{"uuid": "a", "parent_message_uuid": None, "sender": "human", "text": "x"}],
        }
    ],
    [
        {
            "chat": {
                "title": "x",
                "history": {"currentId": "a", "messages": {"a": {"role": "user", "content": "x"}}},
            }
        }
    ],
    [{"header": "Gemini Apps", "title": "Prompted x", "time": "2026", "safeHtmlItem": [{"html": "y"}]}],
    {"chunkedPrompt": {"chunks": [{"role": "user", "text": "x"}]}, "systemInstruction": {"text": "y"}},
    {"messages": [{"role": "user", "content": [{"text": "x"}]}], "title": "y"},
]


def places(value: object, way: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The path of every value in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for key, each in inner for found in places(each, (*way, key)))]


def with_junk(document: object, way: tuple[object, ...], junk: object) -> object:
    if not way:
        return junk
    if isinstance(document, dict):
        return {k: with_junk(v, way[1:], junk) if k == way[0] else v for k, v in document.items()}
    assert isinstance(document, list)
    return [with_junk(v, way[1:], junk) if n == way[0] else v for n, v in enumerate(document)]


@settings(max_examples=60)
@given(data=st.data(), junk=JUNK)
def test_any_json_is_imported_or_rejected_and_imports_can_be_saved(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, junk: object
) -> None:
    document = data.draw(st.sampled_from(WHOLE))
    way = data.draw(st.sampled_from(places(document)))
    path = written(
        tmp_path_factory.mktemp("hostile"), "file.json", json.dumps(with_junk(document, way, junk))
    )
    try:
        found = read_import(path)
    except KvchatError:
        return
    store = Store(None)
    assert store.import_all(found.conversations) == len(found.conversations)
    for talk in found.conversations:
        assert store.whole(store.load(talk.id)).prompt() == talk.prompt()
        again = read_import(written(path.parent, "again.json", to_json(talk)))
        assert [each.id for each in again.conversations] == [talk.id]
        assert again.problems == ()
