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

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- keys -->", "<!-- end of keys -->"


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)


def kvchat(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["config", *arguments], prog_name="kvchat")


def sentence(*arguments: str) -> str:
    """What a command that goes wrong says."""
    result = kvchat(*arguments)
    assert isinstance(result.exception, KvchatError)
    return str(result.exception)


def test_set_get_list_and_unset_agree(tmp_path: Path) -> None:
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


def test_the_list_says_what_each_setting_does_and_where_it_comes_from() -> None:
    kvchat("set", "threads", "2")
    lines = kvchat("list").stdout.splitlines()
    assert any(line.split()[:3] == ["threads", "2", "[file]"] for line in lines)
    for setting in SETTINGS:
        assert any(line.strip().startswith(setting.name) and setting.help in line for line in lines)


def test_a_variable_that_wins_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCHAT_THREADS", "1")
    assert "KVCHAT_THREADS is set and wins over the file" in kvchat("set", "threads", "2").stderr
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
def test_mistakes_are_named_and_write_nothing(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    assert words in sentence(*arguments)
    assert not (tmp_path / "kvchat").exists()


def test_a_file_with_a_mistake_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "kvchat" / "config.toml"
    path.parent.mkdir()
    path.write_text("thrads = 1\n")
    assert "sets thrads, which kvchat doesn't know" in sentence("set", "threads", "2")
    assert path.read_text() == "thrads = 1\n"


def test_keys_lists_every_command_with_the_users_keys(tmp_path: Path) -> None:
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
    assert kvchat("keys", "--markdown").stdout == table() + "\n"


def test_the_readme_has_that_table() -> None:
    """`kvchat config keys --markdown` prints it; it stands between two comments."""
    text = README.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == table()
