"""Exports and their import: JSON and Markdown are lossless, HTML is escaped."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from kvchat.chat.conversation import Conversation, Message, new_id
from kvchat.chat.exporters import FORMATS, export, file_name, to_html, to_json, to_markdown
from kvchat.chat.importers import read_import
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


def read_conversations(file: Path) -> list[Conversation]:
    """The conversations of a file, imported without problems."""
    found = read_import(file)
    assert not found.problems
    return list(found.conversations)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode(errors="surrogatepass"))
    return path


# --- our own ---------------------------------------------------------------------------------------------


def test_json_export_is_lossless(tmp_path: Path) -> None:
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


def test_json_round_trip_preserves_all_branches(tmp_path: Path) -> None:
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
def test_not_sent_survives_a_round_trip(tmp_path: Path, ending: str) -> None:
    talk = replace(TALK, messages=(*TALK.messages, LOST))
    (back,) = read_conversations(export(talk, f"talk.{ending}", tmp_path))
    assert [m.not_sent for m in back.messages] == [False, False, True]
    assert back.messages[-1] == LOST
    store = Store(None)
    assert [m.text for m in store.add(back).prompt()[1:]] == [m.raw for m in TALK.messages]


def test_not_sent_on_another_branch_survives_a_round_trip(tmp_path: Path) -> None:
    talk = replace(BRANCHED, other_branches=(*BRANCHED.other_branches, replace(LOST, id=6, parent_id=2)))
    (back,) = read_conversations(export(talk, "talk.json", tmp_path))
    assert replace(back, id=TALK.id) == talk


def test_not_sent_is_ignored_for_answered_questions(tmp_path: Path) -> None:
    given = json.loads(to_json(TALK))
    for message in given["conversations"][0]["messages"]:
        message["not_sent"] = True
    (back,) = read_conversations(written(tmp_path, "talk.json", json.dumps(given)))
    assert [m.not_sent for m in back.messages] == [False, False]


@pytest.mark.parametrize(
    ("write", "words"), [(to_html, "you · not sent"), (to_markdown, "### You (not sent)")]
)
def test_readable_exports_label_questions_that_were_not_sent(
    write: Callable[[Conversation], str], words: str
) -> None:
    assert words not in write(TALK)
    assert write(replace(TALK, messages=(*TALK.messages, LOST))).count(words) == 1


def test_json_exports_without_branches_are_read(tmp_path: Path) -> None:
    old = json.loads(to_json(TALK))
    del old["conversations"][0]["other_branches"]
    (back,) = read_conversations(written(tmp_path, "old.json", json.dumps(old)))
    assert replace(back, id=TALK.id) == TALK
    assert back.id == read_conversations(export(TALK, "new.json", tmp_path))[0].id


def test_the_content_id_includes_other_branches(tmp_path: Path) -> None:
    fewer = replace(BRANCHED, other_branches=BRANCHED.other_branches[:1])
    ids = {read_conversations(export(t, "json", tmp_path))[0].id for t in (TALK, fewer, BRANCHED)}
    assert len(ids) == 3


def test_a_cleared_conversation_keeps_its_branches(tmp_path: Path) -> None:
    everything = (*BRANCHED.messages, *BRANCHED.other_branches)
    cleared = replace(TALK, messages=(), other_branches=tuple(sorted(everything, key=lambda m: m.id)))
    (back,) = read_conversations(export(cleared, "talk.json", tmp_path))
    store = Store(None)
    store.import_all([back])
    assert replace(store.whole(store.load(back.id)), id=TALK.id) == cleared


@pytest.mark.parametrize("ending", ["md", "html"])
def test_exports_of_one_branch_count_the_missing_messages(tmp_path: Path, ending: str) -> None:
    text = export(BRANCHED, f"talk.{ending}", tmp_path).read_text()
    assert "3 messages on other branches are not in this file" in text
    assert "An older answer" not in text
    one = FORMATS[ending](replace(BRANCHED, other_branches=BRANCHED.other_branches[:1]))
    assert "1 message on another branch is not in this file" in one
    assert "branch" not in FORMATS[ending](TALK)


def test_the_markdown_note_about_branches_is_not_imported(tmp_path: Path) -> None:
    (back,) = read_conversations(export(BRANCHED, "talk.md", tmp_path))
    assert said(back) == said(BRANCHED)
    assert back.other_branches == ()


def test_markdown_round_trip_preserves_text_and_settings(tmp_path: Path) -> None:
    (back,) = read_conversations(export(TALK, "talk.md", tmp_path))
    assert said(back) == said(TALK)
    assert replace(back, id=TALK.id, messages=()) == replace(TALK, messages=())
    assert back.messages[1].thinking == "<think>\nMay.\n</think>\n\n"


@given(question=TEXTS, reply=TEXTS, title=TEXTS)
def test_any_message_text_survives_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, question: str, reply: str, title: str
) -> None:
    folder = tmp_path_factory.mktemp("exports")
    messages = (replace(TALK.messages[0], text=question), replace(TALK.messages[1], text=reply, thinking=""))
    talk = replace(TALK, title=title, system_prompt=reply, messages=messages)
    for ending in ("md", "json"):
        (back,) = read_conversations(written(folder, f"talk.{ending}", FORMATS[ending](talk)))
        assert said(back) == said(talk)
        assert (back.title, back.system_prompt) == (title, reply)


def test_a_second_import_adds_nothing_and_an_edited_file_is_new(tmp_path: Path) -> None:
    store = Store(None)
    path = export(TALK, "talk.md", tmp_path)
    assert store.import_all(read_conversations(path)) == 1
    assert store.import_all(read_conversations(path)) == 0
    path.write_text(path.read_text().replace("Brenner", "Reschen"))
    assert store.import_all(read_conversations(path)) == 1
    assert {s.updated_at for s in store.summaries()} == {"2026-05-17T20:15:02+00:00"}
    assert said(store.load(store.summaries()[0].id))[0] == said(TALK)[0]


def test_a_format_alone_takes_the_title_as_name_and_overwrites_nothing(tmp_path: Path) -> None:
    names = [export(TALK, "md", tmp_path).name for _ in range(3)]
    assert names == ["trip-b.md", "trip-b-2.md", "trip-b-3.md"]
    assert file_name("../../etc/passwd") == "etc-passwd"
    assert file_name("🏔️") == "conversation"


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("talk.pdf", "has no known extension"),
        ("there.md", "exists already"),
        ("no/folder.md", "can't be written"),
    ],
)
def test_export_errors_are_sentences(tmp_path: Path, where: str, sentence: str) -> None:
    (tmp_path / "there.md").write_text("mine")
    with pytest.raises(KvchatError, match=sentence):
        export(TALK, where, tmp_path)
    assert (tmp_path / "there.md").read_text() == "mine"


class Tags(HTMLParser):
    """The elements of a page, as a browser parses it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_html_escapes_all_text(text: str) -> None:
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


def test_html_has_questions_answers_and_folded_thinking() -> None:
    page = to_html(TALK)
    assert "Which pass?" in page
    assert "<strong>Brenner</strong>" in page
    assert "<details><summary>thinking</summary>" in page


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("Look:\n```python\nprint(1)", True),
        ("~~~~\na\n~~~", True),
        ("```\n````text\n``` b", True),
        ("```", True),
        ("```\r\na", True),
        ("```\na\n```", False),
        ("```\na\n`````  \n", False),
        ("    ```\n", False),
        ("> ```\n> a", False),
        ("", False),
    ],
)
def test_an_open_code_fence_is_closed_in_markdown_and_restored(
    tmp_path: Path, text: str, closed: bool
) -> None:
    talk = replace(TALK, messages=(replace(TALK.messages[0], text=text), TALK.messages[1]))
    page = FORMATS["md"](talk)
    assert ("<!-- kvchat:closed -->" in page) is closed
    markers = [each.content for each in MarkdownIt().parse(page) if each.type == "html_block"]
    assert sum("kvchat:assistant" in each for each in markers) == 1
    (back,) = read_conversations(written(tmp_path, "talk.md", page))
    assert said(back) == said(talk)


def test_new_and_imported_ids_have_the_same_form(tmp_path: Path) -> None:
    (back,) = read_conversations(export(TALK, "json", tmp_path))
    for each in (new_id(), back.id):
        assert re.fullmatch("[0-9a-f]{12}", each)
