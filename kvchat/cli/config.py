"""`kvchat config`: the settings from the command line, made from the same table as flags and screen."""

import os

import click

from kvchat.config.file import read_config, write_setting
from kvchat.config.paths import find_paths
from kvchat.config.settings import SETTINGS, Setting, effective, find_setting
from kvchat.validation.plain_json import write_json

NAME_CELLS, VALUE_CELLS = 17, 28


@click.group(name="config")
def config() -> None:
    """Show and change the settings."""


@config.command(name="path")
def show_path() -> None:
    """Print where the configuration file is, there or not."""
    click.echo(str(find_paths().config_file))


@config.command(name="list")
@click.option("--json", "as_json", is_flag=True)
def list_settings(as_json: bool) -> None:
    """List every setting: its value, where that comes from, and what it does."""
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
    """Print what holds for NAME."""
    value, _ = effective(find_setting(name), read_config(find_paths().config_file).values, os.environ)
    click.echo(value)


@config.command(name="set")
@click.argument("name")
@click.argument("value")
def set_value(name: str, value: str) -> None:
    """Write NAME = VALUE into the file; comments and everything else in it stay."""
    setting = find_setting(name)
    parsed = setting.parse(value)
    if setting.name == "theme":
        from kvchat.ui.themes import checked_theme

        checked_theme(value)
    path = find_paths().config_file
    read_config(path)  # a file that has a mistake elsewhere is not written to
    write_setting(path, setting, parsed)
    click.echo(f"{setting.name} = {value}, {setting.holds.value}{_overruled(setting)}.", err=True)


@config.command()
@click.argument("name")
def unset(name: str) -> None:
    """Take NAME out of the file; the default holds again."""
    setting = find_setting(name)
    write_setting(find_paths().config_file, setting, None)
    click.echo(f"{setting.name} is {setting.unset} again{_overruled(setting)}.", err=True)


@config.command()
@click.option("--markdown", is_flag=True, help="The table as it stands in the README.")
def keys(markdown: bool) -> None:
    """Print every command: its id for [keys], its key, its slash word, and what it does."""
    from kvchat.chat.commands import remapped
    from kvchat.ui.help_text import key_label, table
    from kvchat.ui.key_bindings import checked_keys

    if markdown:
        click.echo(table())
        return
    for command in remapped(checked_keys(read_config(find_paths().config_file).keys)):
        click.echo(f"{command.name:<15}{key_label(command.key):<12}/{command.slash:<14}{command.help}")


def _overruled(setting: Setting) -> str:
    """That a variable wins over what was just written."""
    return f"; {setting.variable} is set and wins over the file" if os.environ.get(setting.variable) else ""


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
