"""Conversations into files and out of them, and what is found in all of them.

It knows the session and files; it refuses to know widgets.
"""

from asyncio import sleep, to_thread
from collections.abc import Callable
from pathlib import Path

from kvchat.chat.conversation import Hit
from kvchat.chat.session import Session
from kvchat.errors import KvchatError
from kvchat.text import one_line

SWITCHED = "This is another branch of the conversation; the one before stays, and search finds it too."
AT_ONCE = 20
"""Conversations that are saved before the screen gets its turn."""


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
        from kvchat.chat.exporters import evicted_messages, export

        if not self._session.current.messages:
            raise KvchatError("This conversation has no messages yet.")
        conversation = self._session.whole()
        path = export(conversation, where or "md", Path.cwd())
        lacks = evicted_messages(conversation) if path.suffix.lower() != ".json" else ""
        self._say(f"Exported to {one_line(str(path))}" + (f"\n{lacks}" if lacks else ""))

    async def import_file(self, name: str) -> None:
        """Reads conversations from a file of ours or of another program.

        Raises:
            KvchatError: it can't be read, or is no export that kvchat knows.
        """
        from kvchat.chat.importers import read_conversations

        found = await to_thread(read_conversations, name)
        new = 0
        for start in range(0, len(found), AT_ONCE):
            new += self._session.import_all(found[start : start + AT_ONCE])
            await sleep(0)
        here = f" {len(found) - new:,} of the file were here already." if new < len(found) else ""
        self._say(f"{new:,} conversation{'s' * (new != 1)} imported.{here}")

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
