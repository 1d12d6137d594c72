"""`kvchat config`: settings from the command line."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvchat.chat.commands import COMMANDS
from kvchat.cli.main import cli
from kvchat.config.settings import SETTINGS
from kvchat.errors import KvchatError
from kvchat.ui.help_text import table


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)


def kvchat(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["config", *arguments], prog_name="kvchat")


def sentence(*arguments: str) -> str:
    """The error message of a command that fails."""
    result = kvchat(*arguments)
    assert isinstance(result.exception, KvchatError)
    return str(result.exception)


def test_set_get_list_and_unset_are_consistent(tmp_path: Path) -> None:
    assert kvchat("path").stdout.strip() == str(tmp_path / "kvchat" / "config.toml")
    assert kvchat("get", "max-tokens").stdout == "the model card's\n"
    assert "from the next start" in kvchat("set", "threads", "2").stderr
    assert kvchat("set", "max-tokens", "64").stderr == "max-tokens = 64, for new conversations.\n"
    assert kvchat("get", "max_tokens").stdout == "64\n"
    assert (tmp_path / "kvchat" / "config.toml").read_text().endswith("threads = 2\nmax-tokens = 64\n")
    listed = {row["name"]: row for row in json.loads(kvchat("list", "--json").stdout)}
    assert list(listed) == [setting.name for setting in SETTINGS]
    assert (listed["max-tokens"]["value"], listed["max-tokens"]["source"]) == ("64", "file")
    assert (listed["kv-disk"]["value"], listed["kv-disk"]["source"]) == ("4GB", "default")
    assert "max-tokens is the model card's again" in kvchat("unset", "max-tokens").stderr
    assert kvchat("get", "max-tokens").stdout == "the model card's\n"


def test_list_has_value_source_and_help_of_each_setting() -> None:
    kvchat("set", "threads", "2")
    lines = kvchat("list").stdout.splitlines()
    assert any(line.split()[:3] == ["threads", "2", "[file]"] for line in lines)
    for setting in SETTINGS:
        assert any(line.strip().startswith(setting.name) and setting.help in line for line in lines)


def test_set_warns_if_a_variable_overrides_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCHAT_THREADS", "1")
    assert "KVCHAT_THREADS is set and overrides the file" in kvchat("set", "threads", "2").stderr
    assert kvchat("get", "threads").stdout == "1\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("get", "colour"), "There is no setting colour"),
        (("set", "colour", "red"), "There is no setting colour"),
        (("set", "threads", "none"), "threads is a whole number from 1 to 4,096; 'none' is not"),
        (("set", "theme", "beige"), "There is no theme beige. Themes: kvchat-dark, kvchat-light, "),
    ],
)
def test_invalid_arguments_are_one_sentence_and_write_nothing(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    assert words in sentence(*arguments)
    assert not (tmp_path / "kvchat").exists()


def test_set_keeps_unknown_names_and_leaves_a_broken_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "kvchat" / "config.toml"
    path.parent.mkdir()
    path.write_text("thrads = 1\n")
    kvchat("set", "threads", "2")
    assert path.read_text() == "thrads = 1\nthreads = 2\n"
    path.write_text("thrads = \n")
    assert f"The configuration {path} can't be changed" in sentence("set", "threads", "2")
    assert path.read_text() == "thrads = \n"


def test_keys_lists_every_command_with_remapped_keys(tmp_path: Path) -> None:
    path = tmp_path / "kvchat" / "config.toml"
    path.parent.mkdir()
    path.write_text('[keys]\npanel = "f9"\n')
    lines = {line.split()[0]: line for line in kvchat("keys").stdout.splitlines()}
    assert list(lines) == [command.name for command in COMMANDS]
    assert "F9" in lines["panel"]
    assert "/panel" in lines["panel"]
    path.write_text('[keys]\npannel = "f9"\n')
    assert "names pannel, which is no command" in sentence("keys")


def test_the_markdown_is_the_table_of_the_help() -> None:
    """`make docs` writes it into docs/keys.md, and tests/test_docs.py compares it."""
    assert kvchat("keys", "--markdown").stdout == table() + "\n"
