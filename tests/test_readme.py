"""README and docs: every command that they name exists and is run by CI, and every command is in them."""

import re
from collections.abc import Iterator

import click

from kvchat.cli.main import cli
from tests.readme_commands import PAGES, STEPS

CODE = re.compile(r"`([^`\n]+)`|^\$ (.+)$", re.MULTILINE)
WORDS = re.compile(r"kvchat ([a-z]+)(?: ([a-z]+))?")


def existing() -> set[str]:
    """Every command, as it is typed after `kvchat`; a group is one where it does something by itself."""
    context, found = click.Context(cli), set()
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}" for inner in command.commands}
        if not isinstance(command, click.Group) or command.invoke_without_command:
            found.add(name)
    return found


def named(text: str, commands: set[str]) -> Iterator[str]:
    """What each `kvchat …` in code names; in a table row also the commands of its group that follow it.

    A group that does nothing by itself names nothing.
    """
    groups = {name.split()[0] for name in commands if " " in name}
    for line in text.splitlines():
        group = ""
        for code in (first or second for first, second in CODE.findall(line)):
            words = WORDS.match(code)
            if words:
                group, inner = words[1], words[2]
                name = f"{group} {inner}" if f"{group} {inner}" in commands else group
                if name in commands or name not in groups:
                    yield name
            elif line.startswith("|") and f"{group} {code}" in commands:
                yield f"{group} {code}"


def test_commands_are_found_where_a_page_names_them() -> None:
    commands = {"sessions", "sessions search", "run", "models rm", "config get"}
    lines = (
        "`kvchat run -`, `kvchat -m X`, `kvchat config` and",
        "$ kvchat models rm NAME",
        "| `kvchat sessions` | lists; `search`, `md` |",
        "`kvchat gone away`",
    )
    found = ["run", "models rm", "sessions", "sessions search", "gone"]
    assert list(named("\n".join(lines), commands)) == found


def test_ci_runs_every_command_of_the_pages() -> None:
    found, run_by_ci = set(named(PAGES, existing())), {name for names, _ in STEPS for name in names}
    assert found - existing() == set(), "a page names commands that don't exist"
    assert found - run_by_ci == set(), "tests/readme_commands.py does not run them"
    assert run_by_ci <= existing()


def test_every_command_is_on_a_page() -> None:
    assert existing() - set(named(PAGES, existing())) == set()
