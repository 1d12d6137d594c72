"""Tokens are decoded as a stream: whole characters only, and no text is lost."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kvchat.contract import Sampling
from kvchat.engine.detokenizer import Detokenizer
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel
from tests.support.engine_driver import Chat, on_both_models, saying
from tests.support.tiny import END, tiny_chat

TEXTS = [
    "plain words",
    "🦙 llama 🦙🦙",
    "👩🏽‍🚀 and 🇪🇺 are several code points each",
    "雪が降る。雪山。",
    "naïve café — “quoted”…",
    "ひ\n\n  ら",
    "tabs\tand\r\nlines",
    "مرحبا",
]
HALF = "\ufffd"
"""What half a character decodes to."""


@cache
def tiny_tokenizer() -> Tokenizer:
    return tiny_chat().backend_tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.step(token) for token in ids]


@pytest.mark.parametrize("text", TEXTS)
@on_both_models
def test_pieces_are_whole_characters_and_join_to_the_text(loaded: LoadedModel, text: str) -> None:
    streamed = pieces(loaded.tokenizer, loaded.tokenizer.encode(text, add_special_tokens=False).ids)
    assert not any(HALF in piece for piece in streamed)
    assert "".join(streamed) == text


@on_both_models
def test_a_character_of_several_tokens_comes_with_its_last_one(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode("🦙", add_special_tokens=False).ids
    assert len(ids) > 1
    assert pieces(loaded.tokenizer, ids) == [""] * (len(ids) - 1) + ["🦙"]


@given(st.text(max_size=30).filter(lambda text: HALF not in text))
def test_any_text_comes_back_in_whole_characters(text: str) -> None:
    tokenizer = tiny_tokenizer()
    streamed = pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids)
    assert not any(HALF in piece for piece in streamed)
    assert "".join(streamed) == text


@given(st.lists(st.integers(0, 474), max_size=40))
def test_any_ids_stream_to_the_start_of_their_text(ids: list[int]) -> None:
    """Also ids that are no text at all: models do say them."""
    tokenizer = tiny_tokenizer()
    streamed = pieces(tokenizer, ids)
    assert tokenizer.decode(ids).startswith("".join(streamed))
    assert not any(piece.endswith(HALF) for piece in streamed)


def test_control_tokens_show_nothing() -> None:
    tokenizer = tiny_tokenizer()
    assert pieces(tokenizer, tokenizer.encode(f"a{END}b").ids) == ["a", "", "b"]


@on_both_models
def test_an_answer_streams_in_whole_characters(engine: LocalEngine, loaded: LoadedModel) -> None:
    text = "A 🦙 in the 雪."
    ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
    with saying(loaded.model, ids):
        played = Chat(engine, loaded, sampling=Sampling(max_tokens=len(ids))).ask("Draw something.")
    assert played.finished.text == text
    assert list(played.finished.token_ids) == ids
