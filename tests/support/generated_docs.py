"""Writes the generated blocks of the pages: `python -m tests.support.generated_docs`, or `make docs`.

A block stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`. Keys, flags and settings are
declared once in the program; the pages get their tables from there. A test compares the blocks.
"""

import re
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from kvchat.cli.main import cli
from kvchat.config.settings import SETTINGS
from tests.support import sizes

ROOT = Path(__file__).parents[2]
COMMAND = "make docs"
"""What writes the blocks again."""
MOST_USED = ("F1", "Esc", "Ctrl+N", "Ctrl+S", "F2", "F4", "F5", "F6", "F7", "F8")
"""Keys that the README shows, in this order."""
OF_SETTINGS = {setting.variable: f"`--{setting.name}`" for setting in SETTINGS}
"""Environment variable of a setting → its flag."""
BLOCK = re.compile(r"(<!-- generated: (?P<name>\S+) -->\n).*?(<!-- end of (?P=name) -->)", re.DOTALL)


def pages() -> list[Path]:
    """Every page of the documentation."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "models" / "README.md"])


def keys() -> str:
    """Every key and command of the chat: `kvchat config keys --markdown`."""
    return CliRunner().invoke(cli, ["config", "keys", "--markdown"]).stdout.strip()


def most_used_keys() -> str:
    """Ten of them."""
    head, rule, *rows = keys().splitlines()
    by_key = {row.split("|")[1].strip(): row for row in rows}
    return "\n".join((head, rule, *(by_key[key] for key in MOST_USED)))


def settings() -> str:
    """Every setting with its default, its values and when a change takes effect."""
    rows = [
        f"| `{s.name}` | {s.help} | {s.unset or 'none'} | {s.takes} | {s.holds.value} |" for s in SETTINGS
    ]
    head = ("| setting | what it sets | default | values | a change holds |", "|---|---|---|---|---|")
    return "\n".join((*head, *rows))


def commands() -> str:
    """Usage, help and own flags of every command; flags of settings by name only."""
    return "\n\n".join(_section(path, command) for path, command in _commands("kvchat", cli))


def _commands(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """(how it is typed, the command), for every command that does something by itself."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    if command.invoke_without_command:
        yield path, command
    context = click.Context(command, info_name=path)
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        yield from _commands(f"{path} {name}", inner)


def _section(path: str, command: click.Command) -> str:
    context = click.Context(command, info_name=path)
    arguments = [p.make_metavar(context) for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option)]
    shared = [OF_SETTINGS[str(p.envvar)] for p in options if p.envvar in OF_SETTINGS]
    own = [record for p in options if p.envvar not in OF_SETTINGS and (record := p.get_help_record(context))]
    parts = [f"### `{' '.join((path, *arguments))}`", _paragraphs(command.help or "")]
    if own:
        parts.append("\n".join(("| flag | |", "|---|---|", *(_row(*record) for record in own))))
    if shared:
        parts.append(f"Settings as flags: {', '.join(shared)}.")
    return "\n\n".join(part for part in parts if part)


def _row(flag: str, text: str) -> str:
    """A bar would end the table's cell."""
    escaped = (cell.replace("|", r"\|") for cell in (f"`{flag}`", " ".join(text.split())))
    return f"| {' | '.join(escaped)} |"


def _paragraphs(text: str) -> str:
    """Each paragraph in one line."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


BLOCKS: dict[str, Callable[[], str]] = {
    "keys": keys,
    "most-used-keys": most_used_keys,
    "settings": settings,
    "commands": commands,
    "sizes": sizes.table,
}
SNAPSHOTS = frozenset({"sizes"})
"""Blocks that may be older than the program: sizes change with every commit."""


def written(text: str, unchanged: Container[str] = ()) -> str:
    """A page's text with every block as the program has it now, but for those that stay `unchanged`."""

    def block(found: re.Match[str]) -> str:
        if found["name"] in unchanged:
            return found[0]
        return f"{found[1]}{BLOCKS[found['name']]()}\n{found[3]}"

    return BLOCK.sub(block, text)


def main() -> None:
    """Writes the pages that changed and names them."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (now := written(text)) != text:
            page.write_text(now, encoding="utf-8")
            sys.stdout.write(f"{page.relative_to(ROOT)} is written again\n")


if __name__ == "__main__":
    main()
