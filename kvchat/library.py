"""kvchat as a library: load a model, chat, look at the KV cache, edit, save, restore.

Everything runs in the calling process and thread, one turn at a time. Nothing of a chat is written to disk
before `Chat.save`. `docs/library.md` shows the use.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from kvchat.chat.session import ConversationDefaults, Session
from kvchat.chat.store import Store
from kvchat.config.paths import find_paths
from kvchat.config.settings import sampling_of
from kvchat.contract import (
    CacheMap,
    CacheMode,
    EvictionPolicy,
    Inspect,
    KVPrecision,
    ModelFacts,
    Refused,
    Report,
    Sampling,
    Tokens,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    TurnStats,
)
from kvchat.engine_process.openmp import limit_spinning
from kvchat.errors import KvchatError
from kvchat.models.cards import DEFAULT_MODEL, find_card
from kvchat.models.resolve import FolderModel, GgufModel, recognise
from kvchat.validation.checks import InvalidError, checked, refuse_bytes

if TYPE_CHECKING:  # torch, which takes seconds
    from kvchat.chat.conversation import Conversation
    from kvchat.engine.engine import LocalEngine
    from kvchat.models.staging import Progress

NO_LIMIT = 1 << 62
"""Bytes: a save removes no other cache of its folder."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said in one turn, and the figures of that turn."""

    text: str
    """As the model wrote it; `kvchat.clean` removes control characters before it goes to a terminal."""
    thinking: str
    """What the model wrote before the answer, with its tags; empty with most models."""
    stats: TurnStats


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    precision: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    device: str = "auto",
    draft: str = "lookup",
    kv_budget: int | None = None,
    data_dir: Path | None = None,
    report: Callable[["Progress"], None] = lambda _progress: None,
) -> "Model":
    """Loads a model into this process; fetches, converts and compiles it first where that is missing.

    In another precision than `auto` it is not compiled; `kvchat models prepare --precision` does that.

    Args:
        model: the name of a card, a hub id, a folder with safetensors, or a GGUF file.
        precision: of the weights: `auto`, `fp32`, `bf16`, `int8` or `int4`.
        threads: for torch; None takes every physical core.
        context: tokens at most; None takes what the model was made for.
        device: `auto`, `cpu`, `cuda` or `mps`.
        draft: what proposes tokens ahead: `lookup`, `off`, or another model with the same tokenizer.
        kv_budget: bytes that all caches of the model may take; None takes a quarter of the free memory.
        data_dir: where models and compiled code lie; None takes the user's own folders.
        report: called with the progress of fetching, converting and compiling.

    Raises:
        KvchatError: there is no such model, or it can't be fetched or run; the sentence says why.
    """
    limit_spinning()  # before torch is imported
    from kvchat.engine.factory import LOOKUP, load_draft, open_engine
    from kvchat.engine.model.loader import load_model
    from kvchat.engine.setup.prepare import prepare

    name, paths = _lasting_name(str(model)), find_paths(data_dir)
    # only the automatic precision is compiled unasked, as by the chat
    folder = prepare(name, paths.models, report, paths.compiled if precision == "auto" else None)
    draft_folder = None if draft in (LOOKUP, "off") else prepare(draft, paths.models, report, paths.compiled)
    loaded = load_model(
        folder,
        name,
        precision=precision,
        threads=threads,
        context=context,
        device=device,
        compiled=paths.compiled,
    )
    guesser = load_draft(draft, draft_folder, threads, paths.compiled)
    reports: list[Report] = []
    return Model(name, open_engine(loaded, kv_budget, None, 0, reports.append, guesser), reports)


def _lasting_name(model: str) -> str:
    """A name that means the same model in every working directory."""
    place = recognise(model)
    return str(place.path) if isinstance(place, FolderModel | GgufModel) else model


class Model:
    """A loaded model and the KV caches of its chats. Made by `load`; ends with `close` or a `with` block."""

    def __init__(self, name: str, engine: "LocalEngine", reports: list[Report]) -> None:
        """`reports` is the list to which the engine appends what its commands report."""
        self.name = name
        self._engine = engine
        self._reports = reports
        self._answering = False

    @property
    def facts(self) -> ModelFacts:
        """Layers, heads, precisions, context limit, and which code computes."""
        return self._engine.facts

    def chat(
        self,
        system: str = "",
        *,
        sampling: Sampling | None = None,
        mode: str = CacheMode.ON,
        kv: str = KVPrecision.AUTO,
        policy: str = EvictionPolicy.TURNS,
    ) -> "Chat":
        """A new chat; nothing is computed before its first question.

        Args:
            system: the system prompt.
            sampling: None takes what the model's card recommends, greedy without a card.
            mode: of the cache: `on`, `turn` or `off`.
            kv: how keys and values are stored: `auto`, `fp32`, `bf16`, `int8` or `int4`.
            policy: what is evicted when the context is full: `turns`, `sinks`, `snapkv` or `none`.

        Raises:
            KvchatError: one of these has no such value.
        """
        refuse_bytes(system, "The system prompt")
        given = asdict(sampling or sampling_of(find_card(self.name)))
        try:
            defaults = ConversationDefaults(
                self.name,
                system,
                CacheMode(mode),
                checked(Sampling, given),
                KVPrecision(kv),
                EvictionPolicy(policy),
            )
        except InvalidError as error:
            raise KvchatError(f"The sampling can't be used: {error}.") from error
        except ValueError as error:
            raise KvchatError(f"The chat can't be made: {error}.") from error
        return Chat(self, Session(Store(None), defaults))

    def restore(self, folder: str | Path, conversation: str = "") -> "Chat":
        """A chat that `Chat.save` wrote, with its cache.

        A saved cache that doesn't fit this model, or is damaged, is left out: the next turn reads the
        conversation again, and its `reuse_note` says why.

        Args:
            folder: the one given to `Chat.save`.
            conversation: the chat's id, or the beginning of it; empty takes the one saved last.

        Raises:
            KvchatError: no such chat is in the folder, or it can't be read.
        """
        paths = find_paths(Path(folder))
        if not paths.database.is_file():
            raise KvchatError(f"No chat is saved in {folder}: there is no {paths.database.name} in it.")
        with _opened(paths.database) as store:
            saved = store.summaries()
            if not saved:
                raise KvchatError(f"No chat is saved in {folder}.")
            found = store.load(store.find(conversation or saved[0].id))
            whole = replace(store.whole(found), model=self.name)
        session = Session(Store(None), ConversationDefaults(self.name))
        session.import_all([whole])
        session.open(whole.id)
        self._engine.load_cache(whole.id, paths.kv, whole.kv)
        return Chat(self, session)

    def close(self) -> None:
        """Frees the caches; chats of the model can't be used any more."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _turn(self) -> Iterator["LocalEngine"]:
        """Inside the block the engine answers one turn, and no other may begin."""
        if self._answering:
            raise KvchatError(
                "Another answer of this model is being written. Read its stream to the end, or close it."
            )
        self._answering = True
        try:
            yield self._engine
        finally:
            self._answering = False

    def _inspect(self, request: TurnRequest) -> CacheMap:
        self._reports.clear()
        self._engine.command(Inspect(request))
        for report in self._reports:
            if isinstance(report, CacheMap):
                return report
            if isinstance(report, Refused):
                raise KvchatError(report.reason)
        raise AssertionError("the engine reported no map")


class Chat:
    """One conversation with a model. Made by `Model.chat` and `Model.restore`."""

    def __init__(self, model: Model, session: Session) -> None:
        self._model = model
        self._session = session
        answered = next((m for m in reversed(session.current.messages) if m.stats), None)
        self.answer = (
            Answer(answered.text, answered.thinking, answered.stats) if answered and answered.stats else None
        )
        """The last answer; None before the first one."""

    @property
    def conversation(self) -> "Conversation":
        """Id, title, settings and messages, as frozen values."""
        return self._session.current

    @property
    def cache(self) -> "Cache":
        """What the KV cache of this chat holds now."""
        return Cache(self._model, self._session)

    def ask(self, text: str) -> Answer:
        """Asks, and returns the whole answer.

        Raises:
            KvchatError: the question is no text, or the turn failed: then no later prompt has the question.
                Or another answer is being written.
        """
        return self._whole(lambda: self._session.begin_turn(_as_question(text)))

    def stream(self, text: str) -> Generator[str, None, None]:
        """Asks, and yields the answer in pieces as they are generated; `Chat.answer` has it afterwards.

        The turn begins with the first piece that is read. Closing the iterator, or leaving its loop, stops
        the turn: what was written stays as the answer.

        Raises:
            KvchatError: as `ask`.
        """
        return self._pieces(lambda: self._session.begin_turn(_as_question(text)))

    def edit(self, number: int, text: str) -> Answer:
        """Asks another question in the place of question `number`, counted from 1; what followed it goes.

        The cache of everything before that question is reused.

        Raises:
            KvchatError: there is no such question; else as `ask`.
        """
        question = self.conversation.question(str(number))
        if question is None:
            raise KvchatError(f"There is no question {number} in this chat.")
        return self._whole(lambda: self._session.edit(question.id, _as_question(text)))

    def regenerate(self) -> Answer:
        """Asks for the last answer again.

        Raises:
            KvchatError: there is no answer yet; else as `ask`.
        """
        return self._whole(self._session.regenerate)

    def save(self, folder: str | Path) -> None:
        """Writes the chat and its cache into `folder`, in the place of an earlier save of the same chat.

        The folder is a data folder of kvchat: `kvchat --data-dir FOLDER --continue` opens the chat too. It
        may hold several chats.

        Raises:
            KvchatError: it can't be written, or an answer is being written.
        """
        paths = find_paths(Path(folder))
        with self._model._turn() as engine:  # a cache that grows can't be saved
            with _opened(paths.database) as store:
                store.put(self._session.whole())
            engine.save_cache(self.conversation.id, paths.kv, NO_LIMIT)

    def _whole(self, begin: Callable[[], TurnRequest]) -> Answer:
        for _ in self._pieces(begin):
            pass
        assert self.answer is not None
        return self.answer

    def _pieces(self, begin: Callable[[], TurnRequest]) -> Generator[str, None, None]:
        session = self._session
        with self._model._turn() as engine, ExitStack() as at_end:
            request = begin()
            at_end.callback(session.abandon_turn)  # does nothing once the turn is finished
            events = engine.turn(request)
            at_end.callback(lambda: [self._take(event) for event in events])
            at_end.callback(engine.stop, request.turn)
            for event in events:
                if piece := self._take(event):
                    yield piece

    def _take(self, event: object) -> str:
        """Notes an event; returns the text that it brings."""
        session = self._session
        match event:
            case TurnStarted():
                session.note_started(event)
            case Tokens():
                session.keep_partial(event)
                return event.text
            case TurnFinished():
                message = session.finish_turn(event)
                assert message is not None
                self.answer = Answer(message.text, message.thinking, event.stats)
            case TurnFailed():
                session.fail_turn(event.turn)
                raise KvchatError(event.reason)
        return ""


class Cache:
    """The KV cache of one chat. Every value is as of the moment when it is read."""

    def __init__(self, model: Model, session: Session) -> None:
        self._model = model
        self._session = session

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are in memory."""
        return self._figures[0]

    @property
    def bytes(self) -> int:
        """Memory that it takes, with the spare room to grow; what chats share counts for each of them."""
        return self._figures[1]

    def map(self) -> CacheMap:
        """The cache token by token: blocks with their message, precision and bytes, and groups of layers.

        Raises:
            KvchatError: the conversation can't be rendered.
        """
        return self._model._inspect(self._session.request_as_if())

    @property
    def _figures(self) -> tuple[int, int]:
        found = self._model._engine.caches.get(self._session.current.id)
        return (len(found.kv), found.kv.storage_bytes) if found else (0, 0)


def _as_question(text: str) -> str:
    if not text.strip():
        raise KvchatError("The question is empty.")
    refuse_bytes(text, "The question")
    return text


@contextmanager
def _opened(database: Path) -> Iterator[Store]:
    store = Store(database)
    try:
        yield store
    finally:
        store.close()
