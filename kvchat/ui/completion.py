"""What a slash word or an `@path` that is being typed may become. Text in, plain values out; no widgets."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvchat.chat.attachments import mention, path_completions
from kvchat.chat.commands import ALIASES, COMMANDS, Command, parse_slash

NO_MATCH = 3


MENTIONED = re.compile(r"""(?<!\S)@(?:"(?P<quoted>[^"\n]*)|(?P<plain>[^\s"]*))\Z""")
"""A path that is being written."""


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
    if mentioned := MENTIONED.search(text):
        return _paths(text[: mentioned.start()], mentioned["quoted"] or mentioned["plain"] or "")
    if not text.startswith("/") or "\n" in text:
        return []
    word, space, argument = text.removeprefix("/").partition(" ")
    return _arguments(text, argument.lstrip(), arguments) if space else _words(word)


def _paths(before: str, typed: str) -> list[Completion]:
    found = path_completions(typed, Path.cwd())
    if typed in found:
        return []
    names = [f'@"{path}' if path.endswith("/") and " " in path else mention(path) for path in found]
    return [Completion(before + name, path) for path, name in zip(found, names, strict=True)]


def _words(typed: str) -> list[Completion]:
    """Commands whose word begins so, then those of which an alias does, then those that have it inside."""
    typed = typed.casefold()
    named = {slash for alias, slash in ALIASES.items() if alias.startswith(typed)}
    ranked = sorted(COMMANDS, key=lambda command: _rank(command, typed, named))
    found = [_completion(command) for command in ranked if _rank(command, typed, named) < NO_MATCH]
    return [] if [f.text for f in found] == [f"/{typed}"] else found


def _rank(command: Command, typed: str, named: Collection[str]) -> int:
    if command.slash.startswith(typed):
        return 0
    if command.slash in named:
        return 1
    return 2 if typed in f"{command.slash} {command.title}".casefold() else NO_MATCH


def _completion(command: Command) -> Completion:
    return Completion(f"/{command.slash}", f"/{command.slash}", command.help)


def _arguments(text: str, typed: str, arguments: Mapping[str, Sequence[str]]) -> list[Completion]:
    parsed = parse_slash(text)
    if parsed is None:
        return []
    command, _ = parsed
    words = arguments.get(command.name, command.choices)
    found = [Completion(f"/{command.slash} {word}", word) for word in words if word.startswith(typed)]
    # `/cache map` is a command of its own
    found += [_completion(c) for c in COMMANDS if c.slash.startswith(text.removeprefix("/"))]
    return [] if [f.text for f in found] == [text] else found
