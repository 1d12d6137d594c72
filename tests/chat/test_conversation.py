"""The message tree, prompts and titles."""

from dataclasses import replace

import pytest

from kvchat.chat.conversation import TITLE_LENGTH, Conversation, Message, newest_leaf, path_to, title_from
from kvchat.contract import PromptMessage
from tests.support.samples import TOKENIZER


def message(number: int, parent: int | None, role: str = "user", text: str = "") -> Message:
    ids = (number,) if role == "assistant" else ()
    return Message(number, parent, role, text or f"text {number}", "", ids, TOKENIZER if ids else "")


def test_path_to_has_only_the_branch_of_the_head() -> None:
    question, first, second = message(1, None), message(2, 1, "assistant"), message(3, 1, "assistant")
    later, other_root = message(5, 3), message(4, None)
    tree = {m.id: m for m in (question, first, second, later, other_root)}
    assert path_to(tree, 5) == (question, second, later)
    assert path_to(tree, 2) == (question, first)
    assert path_to(tree, 4) == (other_root,)
    assert path_to(tree, None) == ()


def test_newest_leaf_follows_the_newest_branch() -> None:
    parents = {1: None, 2: 1, 3: 2, 4: 1, 5: 4, 6: 2, 7: None}
    tree = {number: message(number, parent) for number, parent in parents.items()}
    assert {number: newest_leaf(tree, number) for number in tree} == {
        1: 6,
        2: 6,
        3: 3,
        4: 5,
        5: 5,
        6: 6,
        7: 7,
    }


def test_the_prompt_has_system_prompt_texts_and_token_ids() -> None:
    talk = Conversation(
        "c", system_prompt="Be brief.", messages=(message(1, None), message(2, 1, "assistant"))
    )
    assert talk.prompt() == (
        PromptMessage("system", "Be brief."),
        PromptMessage("user", "text 1"),
        PromptMessage("assistant", "text 2", (2,), TOKENIZER),
    )


def test_an_empty_system_prompt_adds_no_message() -> None:
    assert Conversation("c", messages=(message(1, None),)).prompt() == (PromptMessage("user", "text 1"),)
    assert Conversation("c").prompt() == ()


def test_consecutive_questions_become_one_prompt_message() -> None:
    path = (message(1, None), message(2, 1), message(3, 2), message(4, 3, "assistant"), message(5, 4))
    assert Conversation("c", messages=path).prompt() == (
        PromptMessage("user", "text 1\n\ntext 2\n\ntext 3"),
        PromptMessage("assistant", "text 4", (4,), TOKENIZER),
        PromptMessage("user", "text 5"),
    )


def test_the_system_prompt_is_not_merged_with_a_question() -> None:
    talk = Conversation("c", system_prompt="Be brief.", messages=(message(1, None), message(2, 1)))
    assert [m.role for m in talk.prompt()] == ["system", "user"]


@pytest.mark.parametrize(
    ("path", "system", "places"),
    [
        ((), "", ()),
        ((message(1, None), message(2, 1, "assistant"), message(5, 2)), "", ((1,), (2,), (5,))),
        ((message(1, None), message(2, 1, "assistant")), "Be brief.", ((), (1,), (2,))),
        ((message(1, None), message(3, 1), message(4, 3, "assistant")), "", ((1, 3), (4,))),
    ],
)
def test_places_map_prompt_indices_to_message_ids(
    path: tuple[Message, ...], system: str, places: tuple[tuple[int, ...], ...]
) -> None:
    talk = Conversation("c", system_prompt=system, messages=path)
    assert talk.places == places
    assert len(talk.places) == len(talk.prompt())


def test_head_is_the_last_message() -> None:
    last = message(2, 1)
    assert Conversation("c", messages=(message(1, None), last)).head == last
    assert Conversation("c").head is None


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("Which pass is open?", "Which pass is open?"),
        ("\n \n  Which pass?  \nMore of it", "Which pass?"),
        ("", ""),
        (" \n\t\n", ""),
        ("x" * TITLE_LENGTH, "x" * TITLE_LENGTH),
        ("word " * 20, "word " * 8 + "word…"),
        ("one, " + "two, " * 20, "one, " + "two, " * 7 + "two…"),
        ("山" * 60, "山" * TITLE_LENGTH + "…"),
        ("5月に開いている峠はどれですか。", "5月に開いている峠はどれですか。"),
    ],
)
def test_the_title_is_the_first_line_cut_at_a_word(text: str, title: str) -> None:
    assert title_from(text) == title


@pytest.mark.parametrize("text", ["word " * 30, "山" * 90, "a" * 49, "a " + "b" * 90, "é" * 200])
def test_the_title_has_a_maximum_length(text: str) -> None:
    assert 1 < len(title_from(text)) <= TITLE_LENGTH + 1


def test_questions_that_were_not_sent_are_not_in_the_prompt() -> None:
    lost = Message(3, 2, "user", "Lost", "", not_sent=True)
    messages = (message(1, None), message(2, 1, "assistant"), lost, message(4, 3), message(5, 4, "assistant"))
    talk = Conversation("a", system_prompt="Be brief.", messages=messages)
    assert talk.places == ((), (1,), (2,), (4,), (5,))
    assert len(talk.prompt()) == len(talk.places)
    assert talk.question("2") == talk.question("") == messages[3]
    assert talk.answer_to(lost) == lost
    assert [replace(talk, evicted_messages=count).unseen for count in (0, 1, 2, 3)] == [0, 1, 3, 4]
    assert Conversation("a", messages=(lost,)).unseen == 0
