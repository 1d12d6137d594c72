"""The keys of commands: bindings of the screen, and `[keys]` of the configuration file, checked."""

from collections import Counter
from collections.abc import Mapping

from textual.binding import Binding, BindingType
from textual.keys import Keys

from kvchat.chat.commands import COMMANDS, remapped
from kvchat.errors import KvchatError
from kvchat.ui.help_text import key_label

MODIFIERS = ("ctrl", "alt", "shift", "super")
NAMED = {key.value for key in Keys if not key.value.startswith("<")}
TAKEN = {
    "enter": "sends the message",
    "ctrl+m": "is Enter in many terminals",
    "ctrl+i": "is Tab in many terminals",
    "tab": "moves the focus and takes a completion",
    "ctrl+c": "copies, stops and quits",
    "ctrl+p": "opens the palette",
    "up": "recalls what was sent",
    "down": "recalls what was sent",
    "backspace": "deletes",
}
"""Keys that no command may have, and why."""
UNBOUND = "unbound-"
"""How the key of a command begins that has none: no terminal sends it, and `[keys]` replaces it."""
EXAMPLES = "Keys are written f9, ctrl+g, alt+shift+k."


def checked_keys(given: object) -> dict[str, str]:
    """Command → key, as Textual takes them; several keys are separated by commas.

    Args:
        given: what stands under `[keys]`.

    Raises:
        KvchatError: a command or a key that there is not, one that can't be had, or one key for two commands.
    """
    if not isinstance(given, Mapping):
        raise KvchatError('[keys] is a table of commands and their keys, such as panel = "f9".')
    names = [command.name for command in COMMANDS]
    keys: dict[str, str] = {}
    for name, value in given.items():
        if name not in names:
            raise KvchatError(f"[keys] names {name}, which is no command. Commands: {', '.join(names)}.")
        if not isinstance(value, str) or not value.strip():
            raise KvchatError(f"[keys] gives {name} no key. {EXAMPLES}")
        keys[name] = ",".join(_checked(name, key.strip().lower()) for key in value.split(","))
    _refuse_clashes(keys)
    return keys


def _checked(name: str, key: str) -> str:
    if key in TAKEN:
        raise KvchatError(f"[keys] gives {name} the key {key}, which {TAKEN[key]}. Choose another one.")
    *modifiers, last = key.split("+")
    known = (len(last) == 1 and last.isalnum()) or last in NAMED
    if not known or not set(modifiers) <= set(MODIFIERS):
        raise KvchatError(f"[keys] gives {name} the key {key}, which there is not. {EXAMPLES}")
    if len(last) == 1 and not set(modifiers) & {"ctrl", "alt", "super"}:
        raise KvchatError(f"[keys] gives {name} the key {key}, which is for writing. {EXAMPLES}")
    return key


def _refuse_clashes(keys: Mapping[str, str]) -> None:
    commands = remapped(keys)
    counts = Counter(key for command in commands for key in command.key.split(",") if key)
    for key, count in counts.items():
        if count > 1:
            both = [command.name for command in commands if key in command.key.split(",")]
            raise KvchatError(
                f"[keys] leaves {key_label(key)} to {' and '.join(both)}. Give one of them another key too."
            )


def bindings() -> list[BindingType]:
    """The keys, each with the command's name as its id so that it can be re-mapped."""
    return [
        Binding(
            command.key or UNBOUND + command.name,
            f"run_command('{command.name}')",
            command.footer or command.title,
            show=bool(command.footer),
            # Esc belongs to whatever has the focus first
            priority=command.key != "escape",
            id=command.name,
            tooltip=command.help,
        )
        for command in COMMANDS
    ]
