"""The tour line by line: the same steps as on the screen, one after the other, without a key."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvchat.errors import KvchatError
from kvchat.ui.tour import LOOKS_EVERY_S, STEPS, Guide

if TYPE_CHECKING:
    from kvchat.chat.controller import ChatController


async def run_tour(chat: "ChatController", hear: Callable[[], None]) -> None:
    """Does every step, and says before it what is about to happen and after it what was measured.

    `hear` takes what the engine reported since the last time.

    Raises:
        KvchatError: a question was not answered, the engine ended, or Ctrl-C was pressed.
    """
    guide = Guide.begin(chat)
    listening = asyncio.create_task(_listen(chat, hear))
    try:
        for number, step in enumerate(STEPS, start=1):
            chat.port.say(f"\n{number} of {len(STEPS)}: {step.title}. {step.before}")
            acting = asyncio.ensure_future(step.act(guide))
            for ended in (await asyncio.wait({acting, listening}, return_when=asyncio.FIRST_COMPLETED))[0]:
                ended.result()
            chat.port.say(step.after(guide))
    finally:
        listening.cancel()
        guide.end()
        await chat.opened()
    chat.port.say("That was the tour.")


async def _listen(chat: "ChatController", hear: Callable[[], None]) -> None:
    """Takes the engine's reports while a step waits for them.

    Raises:
        KvchatError: there is no engine any more.
    """
    while True:
        hear()
        if chat.state.gone:
            raise KvchatError("The tour ends here: the engine is not running.")
        await asyncio.sleep(LOOKS_EVERY_S)
