"""Conversations into files and back: our own formats lose nothing, and others' are read as far as they go."""

import json
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.chat.conversation import Conversation, Message
from kvchat.chat.exporters import FORMATS, export, file_name, to_html, to_json, to_markdown
from kvchat.chat.importers import read_conversations
from kvchat.chat.store import Store
from kvchat.contract import CacheMode, EvictionPolicy, KVPrecision, Sampling
from kvchat.errors import KvchatError
from tests.support.samples import FIGURES
from tests.ui.test_hostile import HOSTILE

TALK = Conversation(
    "abcd1234",
    "Trip --> <b>",
    "Be brief.\n<!-- kvchat:user {} -->",
    CacheMode.TURN,
    Sampling(temperature=0.5, seed=3),
    "maker/model",
    KVPrecision.INT8,
    EvictionPolicy.SINKS,
    1,
    "2026-05-17T20:15:00.000000+00:00",
    (
        Message(1, None, "user", "Which pass?\n\n### You\n\nyes", "2026-05-17T20:15:01+00:00"),
        Message(
            2,
            1,
            "assistant",
            "The **Brenner**.\n\n<!-- kvchat:user {} -->\n",
            "2026-05-17T20:15:02+00:00",
            (1, 2, 3),
            "0123456789abcdef",
            "length",
            FIGURES,
            "<think>\nMay.\n</think>\n\n",
        ),
    ),
)
TEXTS = st.text() | st.sampled_from(
    [
        "",
        "\n",
        "<!-- kvchat:user {} -->",
        "<!-- \\kvchat:x",
        "### You\n\n",
        "\r\n",
        "\ufeff",
        *HOSTILE.values(),
    ]
)


def said(conversation: Conversation) -> list[tuple[str, str, str, str | None]]:
    return [(m.role, m.raw, m.created_at, m.finish_reason) for m in conversation.messages]


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode(errors="surrogatepass"))
    return path


# --- our own ---------------------------------------------------------------------------------------------


def test_json_loses_nothing(tmp_path: Path) -> None:
    (back,) = read_conversations(export(TALK, "talk.json", tmp_path))
    assert replace(back, id=TALK.id) == TALK


BRANCHED = replace(
    TALK,
    messages=(TALK.messages[0], replace(TALK.messages[1], id=4)),
    other_branches=(
        replace(TALK.messages[1], id=2, text="An older answer.", thinking=""),
        Message(3, 2, "user", "And then?", "2026-05-17T20:15:03+00:00"),
        Message(5, None, "user", "Which lake?", "2026-05-17T20:15:04+00:00"),
    ),
)
"""Two answers to a question, and another question in its place."""


def test_json_has_all_branches_and_an_import_brings_them_back(tmp_path: Path) -> None:
    (back,) = read_conversations(export(BRANCHED, "talk.json", tmp_path))
    assert replace(back, id=TALK.id) == BRANCHED
    store = Store(None)
    store.add(TALK)  # so that the numbers are others there
    assert (store.import_all([back]), store.import_all([back])) == (1, 0)
    whole = store.whole(store.load(back.id))
    assert {m.id for m in whole.messages}.isdisjoint(m.id for m in BRANCHED.messages)
    (again,) = read_conversations(export(whole, "again.json", tmp_path))
    assert again == back


LOST = Message(3, 2, "user", "Too long", "2026-05-17T20:15:03+00:00", not_sent=True)


@pytest.mark.parametrize("ending", ["json", "md"])
def test_what_was_not_sent_stays_so_in_a_file_and_back(tmp_path: Path, ending: str) -> None:
    talk = replace(TALK, messages=(*TALK.messages, LOST))
    (back,) = read_conversations(export(talk, f"talk.{ending}", tmp_path))
    assert [m.not_sent for m in back.messages] == [False, False, True]
    assert back.messages[-1] == LOST
    store = Store(None)
    assert [m.text for m in store.add(back).prompt()[1:]] == [m.raw for m in TALK.messages]


def test_what_was_not_sent_on_another_branch_stays_so(tmp_path: Path) -> None:
    talk = replace(BRANCHED, other_branches=(*BRANCHED.other_branches, replace(LOST, id=6, parent_id=2)))
    (back,) = read_conversations(export(talk, "talk.json", tmp_path))
    assert replace(back, id=TALK.id) == talk


def test_a_mark_that_an_answer_contradicts_is_not_believed(tmp_path: Path) -> None:
    given = json.loads(to_json(TALK))
    for message in given["conversations"][0]["messages"]:
        message["not_sent"] = True
    (back,) = read_conversations(written(tmp_path, "talk.json", json.dumps(given)))
    assert [m.not_sent for m in back.messages] == [False, False]


@pytest.mark.parametrize(
    ("write", "words"), [(to_html, "you · not sent"), (to_markdown, "### You (not sent)")]
)
def test_what_is_read_says_what_was_not_sent(write: Callable[[Conversation], str], words: str) -> None:
    assert words not in write(TALK)
    assert write(replace(TALK, messages=(*TALK.messages, LOST))).count(words) == 1


def test_a_json_export_from_before_branches_is_read_as_it_was(tmp_path: Path) -> None:
    old = json.loads(to_json(TALK))
    del old["conversations"][0]["other_branches"]
    (back,) = read_conversations(written(tmp_path, "old.json", json.dumps(old)))
    assert replace(back, id=TALK.id) == TALK
    assert back.id == read_conversations(export(TALK, "new.json", tmp_path))[0].id


def test_files_that_differ_in_other_branches_only_are_two_conversations(tmp_path: Path) -> None:
    fewer = replace(BRANCHED, other_branches=BRANCHED.other_branches[:1])
    ids = {read_conversations(export(t, "json", tmp_path))[0].id for t in (TALK, fewer, BRANCHED)}
    assert len(ids) == 3


def test_a_conversation_that_was_cleared_keeps_its_branches(tmp_path: Path) -> None:
    everything = (*BRANCHED.messages, *BRANCHED.other_branches)
    cleared = replace(TALK, messages=(), other_branches=tuple(sorted(everything, key=lambda m: m.id)))
    (back,) = read_conversations(export(cleared, "talk.json", tmp_path))
    store = Store(None)
    store.import_all([back])
    assert replace(store.whole(store.load(back.id)), id=TALK.id) == cleared


@pytest.mark.parametrize("ending", ["md", "html"])
def test_a_file_with_one_branch_says_how_much_is_on_others(tmp_path: Path, ending: str) -> None:
    text = export(BRANCHED, f"talk.{ending}", tmp_path).read_text()
    assert "3 messages on other branches are not in this file" in text
    assert "An older answer" not in text
    one = FORMATS[ending](replace(BRANCHED, other_branches=BRANCHED.other_branches[:1]))
    assert "1 message on another branch is not in this file" in one
    assert "branch" not in FORMATS[ending](TALK)


def test_what_markdown_says_of_branches_is_no_message(tmp_path: Path) -> None:
    (back,) = read_conversations(export(BRANCHED, "talk.md", tmp_path))
    assert said(back) == said(BRANCHED)
    assert back.other_branches == ()


def test_markdown_loses_no_text_and_no_setting(tmp_path: Path) -> None:
    (back,) = read_conversations(export(TALK, "talk.md", tmp_path))
    assert said(back) == said(TALK)
    assert replace(back, id=TALK.id, messages=()) == replace(TALK, messages=())
    assert back.messages[1].thinking == "<think>\nMay.\n</think>\n\n"


@given(question=TEXTS, reply=TEXTS, title=TEXTS)
def test_whatever_a_message_says_comes_back(
    tmp_path_factory: pytest.TempPathFactory, question: str, reply: str, title: str
) -> None:
    folder = tmp_path_factory.mktemp("exports")
    messages = (replace(TALK.messages[0], text=question), replace(TALK.messages[1], text=reply, thinking=""))
    talk = replace(TALK, title=title, system_prompt=reply, messages=messages)
    for ending in ("md", "json"):
        (back,) = read_conversations(written(folder, f"talk.{ending}", FORMATS[ending](talk)))
        assert said(back) == said(talk)
        assert (back.title, back.system_prompt) == (title, reply)


def test_importing_twice_adds_nothing_and_an_edited_file_is_another_conversation(tmp_path: Path) -> None:
    store = Store(None)
    path = export(TALK, "talk.md", tmp_path)
    assert store.import_all(read_conversations(path)) == 1
    assert store.import_all(read_conversations(path)) == 0
    path.write_text(path.read_text().replace("Brenner", "Reschen"))
    assert store.import_all(read_conversations(path)) == 1
    assert {s.updated_at for s in store.summaries()} == {"2026-05-17T20:15:02+00:00"}
    assert said(store.load(store.summaries()[0].id))[0] == said(TALK)[0]


def test_a_file_of_the_format_alone_is_named_after_the_title_and_replaces_nothing(tmp_path: Path) -> None:
    names = [export(TALK, "md", tmp_path).name for _ in range(3)]
    assert names == ["trip-b.md", "trip-b-2.md", "trip-b-3.md"]
    assert file_name("../../etc/passwd") == "etc-passwd"
    assert file_name("🏔️") == "conversation"


@pytest.mark.parametrize(
    ("where", "sentence"),
    [("talk.pdf", "ends in no format"), ("there.md", "exists already"), ("no/folder.md", "can't be written")],
)
def test_an_export_that_cannot_be_written_says_why(tmp_path: Path, where: str, sentence: str) -> None:
    (tmp_path / "there.md").write_text("mine")
    with pytest.raises(KvchatError, match=sentence):
        export(TALK, where, tmp_path)
    assert (tmp_path / "there.md").read_text() == "mine"


class Tags(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_html_runs_nothing_of_what_was_written(text: str) -> None:
    messages = (replace(TALK.messages[0], text=text), replace(TALK.messages[1], text=text, thinking=text))
    page = to_html(replace(TALK, title=text, system_prompt=text, model=text, messages=messages))
    tags = Tags()
    tags.feed(page)
    for tag, attributes in tags.found:
        assert tag not in ("script", "think", "iframe", "object", "link", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        address = attributes.get("href") or attributes.get("src") or ""
        assert not address.lower().startswith(("javascript:", "data:", "file:", "vbscript:"))
    assert "\x1b" not in page
    assert "default-src 'none'" in page


def test_html_shows_questions_answers_and_folded_thinking() -> None:
    page = to_html(TALK)
    assert "Which pass?" in page
    assert "<strong>Brenner</strong>" in page
    assert "<details><summary>thinking</summary>" in page


# --- others ----------------------------------------------------------------------------------------------


def node(
    parent: str | None, role: str, *parts: object, kind: str = "text", **more: object
) -> dict[str, object]:
    content: dict[str, object] = {"content_type": kind, "parts": list(parts)}
    if kind == "thoughts":
        content = {"content_type": kind, "thoughts": [{"summary": "s", "content": p} for p in parts]}
    message = {"author": {"role": role}, "content": content, "create_time": 1779048900.5, **more}
    return {"parent": parent, "message": message}


CHATGPT = [
    {
        "title": "Passes",
        "create_time": 1779048900.5,
        "current_node": "e",
        "mapping": {
            "root": {"parent": None, "message": None},
            "s": node("root", "system", "hidden"),
            "a": node("s", "user", "Which?", {"content_type": "image_asset_pointer"}, "Now?"),
            "other": node("a", "assistant", "An older answer."),
            "b": node("a", "assistant", "May, so the lower ones.", kind="thoughts"),
            "t": node("b", "tool", "searched"),
            "c": node("t", "assistant", "The Brenner.", recipient="all"),
            "d": node("c", "assistant", "And the Reschen."),
            "e": node("d", "user", "Thanks."),
        },
    },
    {"title": None, "mapping": {"x": {"parent": None, "message": None}}, "current_node": "x"},
]


@pytest.mark.parametrize("zipped", [False, True])
def test_a_chatgpt_export_is_read_along_its_open_branch(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / ("export.zip" if zipped else "conversations.json")
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("conversations.json", json.dumps(CHATGPT))
    else:
        path.write_text(json.dumps(CHATGPT))
    (talk,) = read_conversations(path)
    assert talk.title == "Passes"
    assert talk.created_at.startswith("2026-05-17T")
    assert [(m.role, m.text) for m in talk.messages] == [
        ("user", "Which?\n\nNow?"),
        ("assistant", "The Brenner.\n\nAnd the Reschen."),
        ("user", "Thanks."),
    ]
    assert talk.messages[1].thinking == "<think>\nMay, so the lower ones.\n</think>\n\n"
    assert [m.parent_id for m in talk.messages] == [None, 1, 2]


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


def test_the_logs_of_llm_are_read(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "logs.db")) as db:
        db.executescript(LLM)
    talk, alone = read_conversations(tmp_path / "logs.db")
    assert (talk.title, talk.system_prompt) == ("Passes", "Be brief.")
    assert [m.text for m in talk.messages] == ["Which?", "The Brenner.", "And?", "The Reschen."]
    assert talk.messages[1].thinking == "<think>\nMay.\n</think>\n\n"
    assert (alone.title, len(alone.messages)) == ("Alone", 2)
    assert talk.created_at == "2026-05-17T20:15:00.000000+00:00"


def test_the_newer_logs_of_llm_are_read(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "logs.db")) as db:
        db.executescript(LLM_THREADS)
    (talk,) = read_conversations(tmp_path / "logs.db")
    assert (talk.title, talk.system_prompt) == ("Passes", "Be brief.")
    assert [(m.role, m.raw) for m in talk.messages] == [
        ("user", "Which?"),
        ("assistant", "<think>\nMay.\n</think>\n\nThe Brenner."),
    ]


BROKEN = {
    "nothing": "",
    "other Markdown": "# Notes\n\n## You\n\ntext\n",
    "no JSON": "{",
    "other JSON": '{"a": 1}',
    "a number": "[1]",
    "a role": to_json(TALK).replace('"assistant"', '"system"'),
    "no ids": to_json(TALK).replace('"token_ids": [', '"token_ids": [-1,'),
    "a text": to_json(TALK).replace('"title": "Trip', '"title": 3, "x": "Trip'),
    "no parent": to_json(BRANCHED).replace('"parent_id": 2', '"parent_id": 9'),
    "a younger parent": to_json(BRANCHED).replace('"parent_id": 2', '"parent_id": 5'),
    "a number twice": to_json(BRANCHED).replace('"id": 5', '"id": 3'),
    "no path": to_json(BRANCHED)
    .replace('"id": 1,', '"id": 0.5,')
    .replace('"parent_id": 1', '"parent_id": null'),
    "no node": '[{"mapping": {}, "current_node": "x"}]',
    "cut": to_markdown(TALK).replace('"created_at"', '"created"'),
    "bytes": "\ud800",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_is_no_export_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(KvchatError, match="no export that kvchat knows"):
        read_conversations(written(tmp_path, "file.md", text))


def test_other_databases_a_folder_a_missing_file_and_a_newer_export(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("create table things (id)")
    (tmp_path / "no.zip").write_bytes(b"PK\3\4 no zip")
    for name, sentence in (
        ("other.db", "no export"),
        ("no.zip", "can't be read"),
        (".", "can't be read"),
        ("missing.md", "can't be read"),
    ):
        with pytest.raises(KvchatError, match=sentence):
            read_conversations(tmp_path / name)
    with pytest.raises(KvchatError, match="newer kvchat"):
        read_conversations(written(tmp_path, "new.json", to_json(TALK).replace('"kvchat": 1', '"kvchat": 2')))
