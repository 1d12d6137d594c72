"""Text files inside a message: written after its words, each between `<file name="…">` and `</file>`.

The message stays one text, as the model reads it; composing what was parsed gives that text again, letter by
letter. It knows text and files; it refuses to know tokens and screens.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from kvchat.errors import KvchatError, reason
from kvchat.text import megabytes, one_line

LARGEST_BYTES = 1_000_000
"""No context of a local model holds more; counting its tokens would only take long."""
LISTED, OFFERED = 5_000, 50
"""Entries of a folder that are looked at, and of those the ones that are offered."""
MENTION = re.compile(r"""(?<!\S)@(?:"(?P<quoted>[^"\n]+)"|(?P<plain>[^\s"]\S*))""")
"""`@path` or `@"path with spaces"`, at the beginning of a word."""
FIRST = re.compile(r'(?:\A|\n\n)(?=<file name="[^"\n]*">\n)')
BLOCK = re.compile(r'<file name="(?P<name>[^"\n]*)">\n(?P<text>.*)\n</file>', re.DOTALL)
BETWEEN = re.compile(r'(?<=\n</file>)\n\n(?=<file name="[^"\n]*">\n)')


@dataclass(frozen=True, slots=True)
class Attachment:
    """A text file, as it was when it was read."""

    name: str
    text: str


def compose(written: str, attached: Iterable[Attachment]) -> str:
    """One message out of what was written and the files."""
    blocks = [f'<file name="{each.name}">\n{each.text}\n</file>' for each in attached]
    return "\n\n".join([*([written] if written else []), *blocks])


def parse_attachments(text: str) -> tuple[str, tuple[Attachment, ...]]:
    """(what was written, the files) of a message; of one without files, all of it and none."""
    for first in FIRST.finditer(text):
        blocks = [BLOCK.fullmatch(block) for block in BETWEEN.split(text[first.end() :])]
        found = [Attachment(block["name"], block["text"]) for block in blocks if block]
        if len(found) == len(blocks):
            return text[: first.start()], tuple(found)
    return text, ()


def joined(first: str, second: str) -> str:
    """One message out of two, the second on a new line unless it begins with a space.

    Where the second begins with the first, it is the whole.

    A file of the second that has the name of another one in the first gets another name.
    """
    if second.startswith(first):
        return second
    (written, attached), (more, others) = parse_attachments(first), parse_attachments(second)
    files = {each.name: each.text for each in attached}
    taken = {*files, *(each.name for each in others)}
    for each in others:
        name = each.name
        if files.get(name, each.text) != each.text:
            name = next(new for n in count(2) if (new := f"{each.name}-{n}") not in taken)
            taken.add(name)
            old, new_mention = re.escape(mention(each.name)), mention(name).replace("\\", r"\\")
            more = re.sub(rf"{old}(?![\w-])", new_mention, more)
        files[name] = each.text
    between = "\n" if written and more.strip() and not more[0].isspace() else ""
    return compose(f"{written}{between}{more}", [Attachment(*file) for file in files.items()])


def mentions(text: str) -> list[str]:
    """The paths after each `@`, in order, each once; closing punctuation is none of them."""
    found = [match["quoted"] or match["plain"].rstrip(".,;:!?)]}'") for match in MENTION.finditer(text)]
    return list(dict.fromkeys(filter(None, found)))


def mention(name: str) -> str:
    """How a path is written in a prompt."""
    return f'@"{name}"' if re.search(r"\s", name) else f"@{name}"


def path_completions(typed: str, folder: Path) -> list[str]:
    """Paths that begin as `typed` does, folders with a slash at their end; hidden ones only if asked for."""
    start, _, begun = typed.rpartition("/")
    place = folder / Path(f"{start}/" if start or typed.startswith("/") else ".").expanduser()
    shown = f"{start}/" if "/" in typed else ""
    try:
        with os.scandir(place) as entries:
            found = [(e.name, e.is_dir()) for e in islice(entries, LISTED) if fits(e.name, begun)]
    except (OSError, ValueError, RuntimeError):
        return []
    found.sort(key=lambda entry: (not entry[1], entry[0].casefold()))
    return [f"{shown}{name}{'/' * is_folder}" for name, is_folder in found[:OFFERED]]


def fits(name: str, begun: str) -> bool:
    """Whether a file's name is offered for its beginning."""
    hidden = name.startswith(".") and not begun.startswith(".")
    return (
        name.casefold().startswith(begun.casefold()) and name.isprintable() and '"' not in name and not hidden
    )


def read_attachment(name: str, folder: Path) -> Attachment:
    """The file that a mention names, seen from `folder`.

    Raises:
        KvchatError: there is none, or it is no text.
    """
    shown = one_line(name)
    path = folder / Path(name).expanduser()
    try:
        if path.is_dir():
            raise KvchatError(f"{shown} is a folder; attach the files in it one by one.")
        if not path.is_file():
            raise KvchatError(f"There is no file {shown}.")
        if (size := path.stat().st_size) > LARGEST_BYTES:
            raise KvchatError(f"{shown} has {megabytes(size)}: more than any context here holds.")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise KvchatError(f"{shown} is no text (no UTF-8); only text files can be attached.") from error
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # ValueError: a NUL in the path; RuntimeError: no home
        raise KvchatError(f"{shown} can't be read: {reason(error)}.") from error
    if "\0" in text:
        raise KvchatError(f"{shown} is binary; only text files can be attached.")
    return Attachment(name.replace('"', "'"), text.removesuffix("\n"))
