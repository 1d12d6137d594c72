"""Text files attached to a message: after its text, each between `<file name="…">` and `</file>`.

A message is stored as one text, as the model reads it. Parsing and composing are exact inverses. Must not
depend on tokens or the screen.
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
"""Larger files don't fit into the context of a local model."""
LISTED, OFFERED = 5_000, 50
"""Limits of path completion: folder entries that are read, and completions."""
MENTION = re.compile(r"""(?<!\S)@(?:"(?P<quoted>[^"\n]+)"|(?P<plain>[^\s"]\S*))""")
"""`@path` or `@"path with spaces"`, at the beginning of a word."""
FIRST = re.compile(r'(?:\A|\n\n)(?=<file name="[^"\n]*">\n)')
BLOCK = re.compile(r'<file name="(?P<name>[^"\n]*)">\n(?P<text>.*)\n</file>', re.DOTALL)
BETWEEN = re.compile(r'(?<=\n</file>)\n\n(?=<file name="[^"\n]*">\n)')


@dataclass(frozen=True, slots=True)
class Attachment:
    """The name and contents of a text file."""

    name: str
    text: str


def compose(written: str, attached: Iterable[Attachment]) -> str:
    """The text of a message: what was written, then the files."""
    blocks = [f'<file name="{each.name}">\n{each.text}\n</file>' for each in attached]
    return "\n\n".join([*([written] if written else []), *blocks])


def parse_attachments(text: str) -> tuple[str, tuple[Attachment, ...]]:
    """(what was written, the files) of a message."""
    for first in FIRST.finditer(text):
        blocks = [BLOCK.fullmatch(block) for block in BETWEEN.split(text[first.end() :])]
        found = [Attachment(block["name"], block["text"]) for block in blocks if block]
        if len(found) == len(blocks):
            return text[: first.start()], tuple(found)
    return text, ()


def joined(first: str, second: str) -> str:
    """Merges two messages; the second starts on a new line unless it begins with a space.

    If the second begins with the first, it is returned alone. A file of the second gets a new name if the
    first has another file of that name.
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
    """The distinct paths after each `@`, in order, without trailing punctuation."""
    found = [match["quoted"] or match["plain"].rstrip(".,;:!?)]}'") for match in MENTION.finditer(text)]
    return list(dict.fromkeys(filter(None, found)))


def mention(name: str) -> str:
    """A path as it is written in a prompt."""
    return f'@"{name}"' if re.search(r"\s", name) else f"@{name}"


def path_completions(typed: str, folder: Path) -> list[str]:
    """Paths that start with `typed`, folders with a trailing slash; hidden ones only after a dot."""
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
    """Whether a file name is a completion of `begun`."""
    hidden = name.startswith(".") and not begun.startswith(".")
    return (
        name.casefold().startswith(begun.casefold()) and name.isprintable() and '"' not in name and not hidden
    )


def read_attachment(name: str, folder: Path) -> Attachment:
    """Reads the file of a mention; a relative path starts at `folder`.

    Raises:
        KvchatError: there is no such file, it is too large, or it is not UTF-8 text.
    """
    shown = one_line(name)
    path = folder / Path(name).expanduser()
    try:
        if path.is_dir():
            raise KvchatError(f"{shown} is a folder; attach the files in it one by one.")
        if not path.is_file():
            raise KvchatError(f"There is no file {shown}.")
        if (size := path.stat().st_size) > LARGEST_BYTES:
            limit = megabytes(LARGEST_BYTES)
            raise KvchatError(f"{shown} has {megabytes(size)}; files of at most {limit} can be attached.")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise KvchatError(f"{shown} is not UTF-8 text; only text files can be attached.") from error
    # ValueError: a NUL in the path; RuntimeError: no home folder
    except (OSError, ValueError, RuntimeError) as error:
        raise KvchatError(f"{shown} can't be read: {reason(error)}.") from error
    if "\0" in text:
        raise KvchatError(f"{shown} is binary; only text files can be attached.")
    return Attachment(name.replace('"', "'"), text.removesuffix("\n"))
