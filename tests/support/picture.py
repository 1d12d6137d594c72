"""Makes the README's picture, tests/pictures/chat.svg: `python -m tests.support.picture`.

Runs the chat with the real model in a temporary folder: three turns with the cache, one without.
"""

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path

from textual.pilot import Pilot

from kvchat.chat.session import ConversationDefaults, Session
from kvchat.chat.store import Store
from kvchat.config.paths import find_paths
from kvchat.contract import Sampling
from kvchat.engine_process.client import LinkedEngine, allow_spawning
from kvchat.engine_process.server import EngineOptions
from kvchat.models.cards import DEFAULT_MODEL, find_card
from kvchat.models.resolve import is_prepared
from kvchat.ui.app import ChatApp

PICTURE = Path(__file__).parents[1] / "pictures" / "chat.svg"
SIZE = (150, 46)


async def wait_until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    """Lets the program run until `condition` holds."""
    while not condition():
        await pilot.pause(0.1)


async def chat(pilot: Pilot[None], session: Session, text: str, keys: tuple[str, ...] = ()) -> None:
    """Presses keys, sends a message and waits for the answer."""
    await pilot.press(*keys, *(("space" if c == " " else c) for c in text), "enter")
    await wait_until(pilot, lambda: session.pending is not None)
    await wait_until(pilot, lambda: session.pending is None)


async def main() -> None:
    """Plays the scene and saves it."""
    card = find_card(DEFAULT_MODEL)
    folder = is_prepared(DEFAULT_MODEL, find_paths().models)
    if card is None or folder is None:
        raise SystemExit("The model is not here yet: kvchat models pull")
    allow_spawning()
    with tempfile.TemporaryDirectory() as temporary:
        options = EngineOptions(
            folder, DEFAULT_MODEL, Path(temporary) / "engine.log", compiled=find_paths().compiled
        )
        session = Session(Store(None), ConversationDefaults(DEFAULT_MODEL, sampling=Sampling(max_tokens=160)))
        app = ChatApp(lambda: session, lambda report: LinkedEngine(options, report), model=card.title)
        async with app.run_test(size=SIZE) as pilot:
            await chat(pilot, session, "Which rivers flow through Paris?")
            await chat(pilot, session, "How do I bake bread? Just the steps.", ("ctrl+n",))
            session.configure(sampling=Sampling(max_tokens=12))
            await chat(pilot, session, "Thanks! Say it shorter.", ("f4",))
            await chat(pilot, session, "Even shorter.", ("f4",))
            session.configure(sampling=Sampling(max_tokens=160))
            await chat(pilot, session, "OK.", ("f4",))
            await chat(pilot, session, "Write a Python function that doubles a recipe.")
            await pilot.pause(1)
            PICTURE.parent.mkdir(exist_ok=True)
            app.save_screenshot(str(PICTURE))


if __name__ == "__main__":
    asyncio.run(main())
