"""Conversations into files and out of them, and what is found in all of them.

It knows the session and files; it knows no widgets.
"""

from asyncio import to_thread
from collections.abc import Callable
from pathlib import Path

from kvchat.chat.conversation import Hit
from kvchat.chat.session import Session
from kvchat.errors import KvchatError
from kvchat.text import one_line

SWITCHED = "This is another branch of the conversation; the one before stays, and search finds it too."
SHOWN_PROBLEMS = 5
"""Of an import, one on each line."""


class Archive:
    """Exports, imports and searches."""

    def __init__(self, session: Session, say: Callable[[str], None]) -> None:
        self._session = session
        self._say = say

    def export(self, where: str) -> None:
        """Writes the open conversation into a file.

        Raises:
            KvchatError: there is nothing to write, or it can't be written there.
        """
        from kvchat.chat.exporters import export, other_branches

        if not self._session.current.messages:
            raise KvchatError("This conversation has no messages yet.")
        conversation = self._session.whole()
        path = export(conversation, where or "md", Path.cwd())
        lacks = other_branches(conversation) if path.suffix.lower() != ".json" else ""
        self._say(f"Exported to {one_line(str(path))}" + (f"\n{lacks}" if lacks else ""))

    async def import_file(self, name: str) -> None:
        """Reads conversations from a file of ours or of another program, and says what could not come in.

        Raises:
            KvchatError: it can't be read, or is no export that kvchat knows.
        """
        from kvchat.chat.importers import read_import
        from kvchat.chat.store import import_into

        found = await to_thread(read_import, name)
        if self._session.file:
            public = self._session.without_private(found.conversations)
            new = await to_thread(import_into, self._session.file, public)
        else:
            new = self._session.import_all(found.conversations)
        here = len(found.conversations) - new
        lines = [
            f"{new:,} conversation{'s' * (new != 1)} imported."
            + (f" {here:,} of the file were here already." if here else "")
            + (f" {found.skipped:,} skipped." if found.skipped else "")
        ]
        lines += map(str, found.problems[:SHOWN_PROBLEMS])
        if (more := len(found.problems) - SHOWN_PROBLEMS) > 0:
            lines.append(f"and {more:,} more; `kvchat sessions import` names them all.")
        self._say("\n".join(lines))

    def place_of(self, hit: Hit) -> int | None:
        """Opens the conversation of a hit; returns the place of its message, None for one in the title.

        Raises:
            KvchatError: it is gone, or its conversation is being answered on another branch.
        """
        if hit.message is None:
            if hit.conversation != self._session.current.id:
                self._session.open(hit.conversation)
            return None
        if self._session.open_at(hit.conversation, hit.message):
            self._say(SWITCHED)
        return [message.id for message in self._session.current.messages].index(hit.message)
