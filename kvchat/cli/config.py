"""`kvchat config`: lists and changes the settings, made from the table in `config.settings`."""

import os

import click

from kvchat.config.file import read_config, write_setting
from kvchat.config.paths import find_paths
from kvchat.config.settings import SETTINGS, Setting, effective, find_setting
from kvchat.validation.checks import refuse_bytes
from kvchat.validation.plain_json import write_json

NAME_CELLS, VALUE_CELLS = 17, 28


@click.group(name="config")
def config() -> None:
    """Show and change the settings."""


@config.command(name="path")
def show_path() -> None:
    """Print the path of the configuration file, which may not exist yet."""
    click.echo(str(find_paths().config_file))


@config.command(name="list")
@click.option("--json", "as_json", is_flag=True)
def list_settings(as_json: bool) -> None:
    """List every setting: its value, the source of the value, and what it does."""
    given = read_config(find_paths().config_file).values
    rows = [(setting, *effective(setting, given, os.environ)) for setting in SETTINGS]
    if as_json:
        click.echo(write_json([_described(*row) for row in rows], indent=1))
        return
    group = ""
    for setting, value, source in rows:
        if setting.group != group:
            group = setting.group
            click.echo(f"\n{group}" if setting is not SETTINGS[0] else group)
        origin = "" if source == "default" else f" [{source}]"
        click.echo(f"  {setting.name:<{NAME_CELLS}}{value + origin:<{VALUE_CELLS}}{setting.help}")


@config.command()
@click.argument("name")
def get(name: str) -> None:
    """Print the value of NAME that applies without a flag."""
    value, _ = effective(find_setting(name), read_config(find_paths().config_file).values, os.environ)
    click.echo(value)


@config.command(name="set")
@click.argument("name")
@click.argument("value")
def set_value(name: str, value: str) -> None:
    """Write NAME = VALUE into the file; comments and other entries are preserved."""
    setting = find_setting(name)
    refuse_bytes(value, f"The value of {setting.name}")
    parsed = setting.parse(value)
    if setting.name == "theme":
        from kvchat.ui.themes import checked_theme

        checked_theme(value)
    write_setting(find_paths().config_file, setting, parsed)
    click.echo(f"{setting.name} = {value}, {setting.holds.value}{_overridden(setting)}.", err=True)


@config.command()
@click.argument("name")
def unset(name: str) -> None:
    """Remove NAME from the file, which restores its default."""
    setting = find_setting(name)
    write_setting(find_paths().config_file, setting, None)
    click.echo(f"{setting.name} is {setting.unset} again{_overridden(setting)}.", err=True)


@config.command()
@click.option("--markdown", is_flag=True, help="A Markdown table, as in docs/keys.md.")
def keys(markdown: bool) -> None:
    """Print every command: its name in [keys], its key, its slash command, and what it does."""
    from kvchat.chat.commands import remapped
    from kvchat.ui.help_text import key_label, table
    from kvchat.ui.key_bindings import checked_keys

    if markdown:
        click.echo(table())
        return
    for command in remapped(checked_keys(read_config(find_paths().config_file).keys)):
        click.echo(f"{command.name:<15}{key_label(command.key):<12}/{command.slash:<14}{command.help}")


def _overridden(setting: Setting) -> str:
    """A note that an environment variable overrides the value in the file; empty where none does."""
    return f"; {setting.variable} is set and overrides the file" if os.environ.get(setting.variable) else ""


def _described(setting: Setting, value: str, source: str) -> dict[str, str]:
    return {
        "name": setting.name,
        "value": value,
        "source": source,
        "takes": setting.takes,
        "variable": setting.variable,
        "holds": setting.holds.value,
        "help": setting.help,
    }
