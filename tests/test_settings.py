"""The configuration file, and how settings combine."""

from pathlib import Path

import pytest

from kvchat.catalog import DEFAULT_MODEL, find_card
from kvchat.config_file import Config, read_config
from kvchat.contract import Sampling
from kvchat.errors import KvchatError
from kvchat.settings import changed, sampling_of


def config(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_sets_what_the_long_flags_set(tmp_path: Path) -> None:
    path = config(tmp_path, 'max-tokens = 7\ntemperature = 0.5\nmodel = "maker/model"\n')
    assert read_config(path).values == {"max_tokens": 7, "temperature": 0.5, "model": "maker/model"}


def test_underscores_do_as_well(tmp_path: Path) -> None:
    assert read_config(config(tmp_path, "max_tokens = 7")).values == {"max_tokens": 7}


def test_no_file_sets_nothing(tmp_path: Path) -> None:
    assert read_config(tmp_path / "none.toml") == Config()


def test_an_unknown_name_is_named_with_the_known_ones(tmp_path: Path) -> None:
    path = config(tmp_path, "temprature = 1\nmodle = 2\nmax-tokens = 3")
    with pytest.raises(KvchatError) as caught:
        read_config(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "sets modle, temprature, which" in sentence
    assert "max_tokens, min_p, model" in sentence


@pytest.mark.parametrize("text", ["max-tokens = ", "[unclosed", b"model = '\xff'"])
def test_a_broken_file_is_named(tmp_path: Path, text: str | bytes) -> None:
    path = config(tmp_path, text)
    with pytest.raises(KvchatError, match="can't be read") as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(KvchatError, match="can't be read"):
        read_config(tmp_path)


def test_a_card_recommends_how_to_sample() -> None:
    card = find_card(DEFAULT_MODEL)
    assert sampling_of(card) == Sampling(temperature=0.2, top_p=0.9, max_tokens=512)
    assert sampling_of(None) == Sampling(temperature=0.0)


def test_given_values_win_zero_counts_and_none_does_not() -> None:
    before = Sampling(temperature=0.7, top_k=40, seed=1)
    given = {"temperature": 0.0, "top_k": 0, "seed": None, "model": "not of sampling"}
    assert changed(before, given) == Sampling(temperature=0.0, top_k=0, seed=1)
    assert changed(before, {}) == before
