"""The tour line by line: the same steps as on the screen, one after the other, without a key."""

import asyncio
from collections.abc import Callable

from kvchat.chat.active_turn import ActiveTurn
from kvchat.chat.session import Session
from kvchat.contract import (
    CacheMode,
    Died,
    EvictionPolicy,
    KVPrecision,
    PoolState,
    Ready,
    Status,
    TurnFinished,
    TurnRequest,
    WarmCache,
)
from kvchat.errors import KvchatError
from kvchat.ui.cache_actions import CacheDesk
from kvchat.ui.panel_model import Figures
from kvchat.ui.tour import LOOKS_EVERY_S, STEPS, Guide
from kvchat.ui.turn_thread import EngineBridge


class PlainTurns:
    """What the guide asks of turns, and what it looks at after them, where there is no screen."""

    def __init__(self, session: Session, answer: Callable[[TurnRequest], None]) -> None:
        """`answer` runs a turn to its end."""
        self._session = session
        self._answer = answer
        self.figures = Figures()
        self.warm: dict[str, WarmCache] = {}
        """The caches that there are, by their conversations."""
        self.pool: PoolState | None = None
        self.gone = False
        """Whether the engine ended and is not started again."""

    @property
    def answering(self) -> ActiveTurn | None:
        """The turn under way."""
        return self._session.pending

    async def send(self, text: str) -> TurnRequest:
        """Asks, and waits for the end of the answer."""
        request = self._session.begin_turn(text)
        self._answer(request)
        return request

    def lost(self, _status: str) -> None:
        """There is no engine any more, and with it went every cache in memory."""
        self.warm.clear()
        self.pool = None
        self.figures.lost()

    def on_finished(self, event: TurnFinished) -> None:
        """Notes the figures of a turn."""
        self._note_pool(event.pool)
        self.figures.finished(event)

    def on_status(self, status: Status) -> None:
        """Notes how the engine is."""
        match status:
            case Ready():
                self.figures.ready(status.model, status.rss_bytes)
            case PoolState():
                self._note_pool(status)
            case Died():
                self.lost(status.reason)
                self.gone = status.for_good

    def _note_pool(self, pool: PoolState) -> None:
        self.pool = pool
        self.warm = {cache.conversation: cache for cache in pool.caches}
        self.figures.pool(pool, self._session.current.id)


class PlainTour:
    """All steps of the tour, in a conversation that is gone afterwards."""

    def __init__(
        self,
        session: Session,
        bridge: EngineBridge,
        turns: PlainTurns,
        desk: CacheDesk,
        say: Callable[[str], None],
        hear: Callable[[], None],
    ) -> None:
        """`hear` takes what the engine reported since the last time."""
        self._session = session
        self._bridge = bridge
        self._turns = turns
        self._desk = desk
        self._say = say
        self._hear = hear

    def run(self) -> None:
        """Does every step, and says before it what is about to happen and after it what was measured.

        Raises:
            KvchatError: a question was not answered, the engine ended, or Ctrl-C was pressed.
        """
        session = self._session
        session.aside()
        guide = Guide(session, self._bridge, self._turns, self._desk)
        try:
            session.configure(
                mode=CacheMode.ON, system_prompt="", kv=KVPrecision.AUTO, policy=EvictionPolicy.TURNS
            )
            asyncio.run(self._steps(guide))
        except KeyboardInterrupt as error:
            raise KvchatError("The tour was stopped.") from error
        finally:
            guide.restore_budget()
            self._bridge.forget(session.back())
        self._say("That was the tour.")

    async def _steps(self, guide: Guide) -> None:
        listening = asyncio.create_task(self._listen())
        for number, step in enumerate(STEPS, start=1):
            self._say(f"\n{number} of {len(STEPS)}: {step.title}. {step.before}")
            acting = asyncio.ensure_future(step.act(guide))
            for ended in (await asyncio.wait({acting, listening}, return_when=asyncio.FIRST_COMPLETED))[0]:
                ended.result()
            self._say(step.after(guide))

    async def _listen(self) -> None:
        """Takes the engine's reports while a step waits for them.

        Raises:
            KvchatError: there is no engine any more.
        """
        while True:
            self._hear()
            if self._turns.gone:
                raise KvchatError("The tour ends here: the engine is not running.")
            await asyncio.sleep(LOOKS_EVERY_S)
