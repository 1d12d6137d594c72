"""What a slash word that is being typed may become. Text in, plain values out; no widgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvchat.ui.commands import ALIASES, COMMANDS, Command, parse_slash


@dataclass(frozen=True, slots=True)
class Completion:
    """One thing that the text may become."""

    text: str
    """The whole prompt, once it is taken."""
    label: str
    """What the list shows."""
    help: str = ""


def completions(text: str, arguments: Mapping[str, Sequence[str]]) -> list[Completion]:
    """What `text` may become; nothing where it begins no command or is one already.

    Args:
        text: the prompt, up to the cursor.
        arguments: command name → words its argument may be, where the table of commands can't know them.
    """
    if not text.startswith("/") or "\n" in text:
        return []
    word, space, argument = text.removeprefix("/").partition(" ")
    return _arguments(text, argument.lstrip(), arguments) if space else _words(word)


def _words(typed: str) -> list[Completion]:
    """Commands whose word begins so, then those whose word or title has it elsewhere."""
    typed = typed.casefold()
    means = {alias: slash for alias, slash in ALIASES.items() if typed and alias.startswith(typed)}
    begin = [c for c in COMMANDS if c.slash.startswith(typed) or c.slash in means.values()]
    inside = [c for c in COMMANDS if c not in begin and typed in f"{c.slash} {c.title}".casefold()]
    found = [_completion(command) for command in begin + inside]
    return [] if [f.text for f in found] == [f"/{typed}"] else found


def _completion(command: Command) -> Completion:
    label = f"/{command.slash} {command.argument}".rstrip()
    return Completion(f"/{command.slash}", label, command.help)


def _arguments(text: str, typed: str, arguments: Mapping[str, Sequence[str]]) -> list[Completion]:
    parsed = parse_slash(text)
    if parsed is None:
        return []
    command, _ = parsed
    words = arguments.get(command.name, command.choices)
    found = [word for word in words if word.startswith(typed)]
    if found == [typed]:
        return []
    return [Completion(f"/{command.slash} {word}", word) for word in found]
