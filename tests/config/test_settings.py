"""The configuration file, and precedence and validation of settings."""

from pathlib import Path

import pytest

from kvchat.cli.main import cli
from kvchat.config.file import Config, read_config, write_setting
from kvchat.config.settings import SETTINGS, changed, effective, find_setting, sampling_of
from kvchat.contract import Sampling
from kvchat.errors import KvchatError
from kvchat.models.cards import DEFAULT_MODEL, find_card


def config(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_file_sets_settings_by_the_name_of_their_long_flag(tmp_path: Path) -> None:
    path = config(tmp_path, 'max-tokens = 7\ntemperature = 0.5\nmodel = "maker/model"\n')
    assert read_config(path).values == {"max_tokens": 7, "temperature": 0.5, "model": "maker/model"}


def test_names_may_use_underscores(tmp_path: Path) -> None:
    assert read_config(config(tmp_path, "max_tokens = 7")).values == {"max_tokens": 7}


def test_a_missing_file_is_empty(tmp_path: Path) -> None:
    assert read_config(tmp_path / "none.toml") == Config()


def test_an_unknown_name_is_ignored_and_reported_with_its_line(tmp_path: Path) -> None:
    path = config(tmp_path, "temprature = 1\nmax-tokens = 3\n[xyz]\na = 1")
    found = read_config(path)
    assert found.values == {"max_tokens": 3}
    assert found.unknown == (
        f"{path}, line 1: temprature is not a setting and is ignored. Did you mean temperature?",
        f"{path}, line 3: xyz is not a setting and is ignored. `kvchat config list` lists all settings.",
    )


@pytest.mark.parametrize(
    "line",
    [
        *("max-tokens = [1]", "max-tokens = 0", "max-tokens = 1.5", "max-tokens = true", "threads = 'x'"),
        *("temperature = nan", "temperature = inf", "temperature = 1979-05-27", "top-p = 2"),
        *("model = 3", "system = {a = 1}", "data-dir = 5", "theme = false", "cache = 'ON'", "kv = 8"),
        *("private = 1", "private = 'perhaps'", "kv-budget = -1", "kv-budget = nan", "kv-disk = true"),
    ],
)
def test_an_invalid_value_is_ignored_and_reported_with_its_line(tmp_path: Path, line: str) -> None:
    found = read_config(config(tmp_path, f"seed = 4\n{line}"))
    assert found.values == {"seed": 4}
    ((key, sentence),) = found.wrong.items()
    assert f"line 2: {key.replace('_', '-')} is " in sentence
    assert found.problems == (sentence,)


@pytest.mark.parametrize("text", ["max-tokens = ", "[unclosed", b"model = '\xff'"])
def test_invalid_toml_is_an_error_with_the_path(tmp_path: Path, text: str | bytes) -> None:
    path = config(tmp_path, text)
    with pytest.raises(KvchatError, match="can't be read") as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_a_folder_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KvchatError, match="can't be read"):
        read_config(tmp_path)


def test_sampling_defaults_come_from_the_model_card() -> None:
    card = find_card(DEFAULT_MODEL)
    assert sampling_of(card) == Sampling(temperature=0.2, top_p=0.9, max_tokens=512)
    assert sampling_of(None) == Sampling(temperature=0.0)


def test_changed_applies_every_value_but_none() -> None:
    before = Sampling(temperature=0.7, top_k=40, seed=1)
    given = {"temperature": 0.0, "top_k": 0, "seed": None, "model": "not of sampling"}
    assert changed(before, given) == Sampling(temperature=0.0, top_k=0, seed=1)
    assert changed(before, {}) == before


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max-tokens", " 7 ", 7),
        ("max_tokens", "7", 7),
        ("temperature", "0", 0.0),
        ("top-p", "1", 1.0),
        ("kv-budget", "2GB", "2GB"),
        ("reduced-motion", "On", True),
        ("private", "false", False),
        ("cache", "turn", "turn"),
        ("system", "Be brief.", "Be brief."),
    ],
)
def test_parse_converts_text_to_the_type_of_the_setting(name: str, text: str, value: object) -> None:
    assert find_setting(name).parse(text) == value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("temperature", "nan", "temperature is a number from 0 to 5; 'nan' is not"),
        ("temperature", "inf", "temperature is a number from 0 to 5; 'inf' is not"),
        ("seed", "18446744073709551616", "seed is a whole number from 0 to 9,223,372,036,854,775,807"),
        ("unload-after", "1e300", "unload-after is a number from 0 to 525,600"),
        ("max-tokens", "0", "max-tokens is a whole number from 1 to 10,000,000; '0' is not"),
        ("max-tokens", "many", "'many' is not"),
        ("temperature", "-1", "temperature is a number from 0 to 5"),
        ("top-p", "0", "top-p is a number above 0 to 1; '0' is not"),
        ("repeat-penalty", "0", "repeat-penalty is a number above 0 to 100"),
        ("kv-budget", "much", "kv-budget is a size, such as 2GB or 512MB"),
        ("reduced-motion", "maybe", "reduced-motion is true or false"),
        ("cache", "ON", "cache is on, turn or off; 'ON' is not"),
    ],
)
def test_parse_rejects_invalid_text_and_describes_valid_values(name: str, text: str, words: str) -> None:
    with pytest.raises(KvchatError, match=words):
        find_setting(name).parse(text)


def test_an_unknown_setting_is_an_error_that_lists_all_names() -> None:
    with pytest.raises(KvchatError, match=r"no setting colour\. Settings: model, precision"):
        find_setting("colour")


def test_precedence_is_variable_then_file_then_default() -> None:
    temperature = find_setting("temperature")
    assert effective(temperature, {}, {}) == ("the model card's", "default")
    assert effective(temperature, {"temperature": 0.5}, {}) == ("0.5", "file")
    given = effective(temperature, {"temperature": 0.5}, {"KVCHAT_TEMPERATURE": "1"})
    assert given == ("1", "KVCHAT_TEMPERATURE")


def test_every_setting_is_a_chat_flag_with_an_environment_variable() -> None:
    flags = {param.name: param for param in cli.commands["chat"].params}
    for setting in SETTINGS:
        assert flags[setting.key].envvar == setting.variable
        assert f"--{setting.name}" in flags[setting.key].opts
        assert setting.help
        assert setting.unset


WITH_COMMENTS = """\
# how I like it
temperature = 0.5  # not too wild

# only while it is cold
max_tokens = 64

[keys]
panel = "f9"  # my thumb
"""


def test_writing_a_setting_preserves_comments_keys_and_spelling(tmp_path: Path) -> None:
    path = config(tmp_path, WITH_COMMENTS)
    write_setting(path, find_setting("max-tokens"), 128)
    assert path.read_text() == WITH_COMMENTS.replace("64", "128")
    write_setting(path, find_setting("theme"), "nord")
    text = path.read_text()
    assert read_config(path).values == {"temperature": 0.5, "max_tokens": 128, "theme": "nord"}
    assert read_config(path).keys == {"panel": "f9"}
    assert all(line in text for line in ("# how I like it", "# not too wild", "# my thumb"))


def test_removing_a_setting_preserves_the_rest(tmp_path: Path) -> None:
    path = config(tmp_path, WITH_COMMENTS)
    write_setting(path, find_setting("max-tokens"), None)
    write_setting(path, find_setting("theme"), None)
    assert read_config(path).values == {"temperature": 0.5}
    assert "# how I like it" in path.read_text()


def test_writing_creates_the_file_and_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.toml"
    write_setting(path, find_setting("reduced-motion"), True)
    assert read_config(path).values == {"reduced_motion": True}
    assert path.read_text().startswith("# kvchat's settings")
    assert [each.name for each in path.parent.iterdir()] == ["config.toml"]


def test_writing_follows_symlinks_and_preserves_the_mode(tmp_path: Path) -> None:
    real = config(tmp_path, "threads = 1\n")
    real.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(real)
    write_setting(link, find_setting("threads"), 2)
    assert link.is_symlink()
    assert read_config(real).values == {"threads": 2}
    assert real.stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_written_is_an_error_with_the_path(tmp_path: Path) -> None:
    broken = config(tmp_path, "max-tokens = ")
    with pytest.raises(KvchatError, match="can't be changed") as caught:
        write_setting(broken, find_setting("threads"), 2)
    assert str(broken) in str(caught.value)
    assert broken.read_text() == "max-tokens = "
    with pytest.raises(KvchatError, match="can't be changed"):
        write_setting(broken / "below" / "config.toml", find_setting("threads"), 2)


def test_the_keys_table_is_not_a_setting(tmp_path: Path) -> None:
    path = config(tmp_path, 'threads = 2\n[keys]\nnonsense = "f9"\n')
    assert read_config(path) == Config({"threads": 2}, {"nonsense": "f9"})
