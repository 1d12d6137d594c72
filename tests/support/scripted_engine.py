"""An engine that says what a test wrote down: the same pieces and figures every time, and no model."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from threading import Condition, Thread

from kvchat.chat.cost_estimates import OPENED
from kvchat.chat.port import OnEvent
from kvchat.chat.prompt_cost import TYPED
from kvchat.contract import (
    CacheBlock,
    CacheCommand,
    CacheMap,
    CacheMode,
    Converted,
    CostEstimate,
    CountTokens,
    Died,
    Drop,
    EstimateCost,
    Evicted,
    FinishReason,
    Fork,
    Inspect,
    KVPrecision,
    LayerGroup,
    Loading,
    Miss,
    ModelFacts,
    Pin,
    PoolState,
    PrefillProgress,
    Ready,
    Refused,
    Report,
    SetBudget,
    SetPrecision,
    Spill,
    TokenCounts,
    Tokens,
    TokenSpan,
    TokenStatus,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    TurnStats,
    Warm,
    WarmCache,
)

FACTS = ModelFacts(
    name="scripted",
    layers=30,
    kv_heads=3,
    head_dim=64,
    kv_dtype="bf16",
    kv_dtype_bytes=2,
    weights_dtype="bf16",
    weights_bytes=269_000_000,
    context_limit=8192,
    threads=2,
    path="eager bf16",
    tokenizer="scripted",
)
RSS = 640_000_000
STEP_S = 0.02
READ_TOK_S = 500.0
DECODE_TOK_S = {CacheMode.ON: 100.0, CacheMode.TURN: 80.0, CacheMode.OFF: 10.0}
BUDGET, DISK_CAP = 2_000_000_000, 8_000_000_000
PREVIEW = "3 turns (1,204 tokens); 96 that stay are read again, about 0.2 s: exact"
NOT_RUNNING = "The engine is not running."
PATIENCE_S = 30.0
"""Nothing takes so long; what waits longer waits for something that will never come."""


class Gate:
    """A place in a script where the engine waits until the test opens it (or stops the turn, or kills it)."""

    def __init__(self, changed: Condition) -> None:
        self._changed = changed
        self.is_open = False
        self.reached = False

    def open(self) -> None:
        """Lets the script go on."""
        with self._changed:
            self.is_open = True
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Fails:
    """The turn ends here, without an answer."""

    reason: str


Step = str | Gate | PrefillProgress | Evicted | Fails


@dataclass(frozen=True, slots=True)
class Script:
    """What one turn does: each text is a piece of the answer."""

    steps: tuple[Step, ...]
    finish: FinishReason = FinishReason.STOP
    reuse_note: str = ""
    miss: Miss | None = None
    restored: int = 0


class ScriptedEngine:
    """Satisfies `kvchat.chat.port.EngineClient`; hand its `attach` to the app as the factory."""

    def __init__(self, *, loads_at_once: bool = True) -> None:
        self._changed = Condition()
        self._on_status: OnEvent = lambda _event: None
        self._scripts: deque[Script] = deque()
        self._deaths_on_load: deque[Died] = deque()
        self._stopped: set[str] = set()
        self._held: dict[str, WarmCache] = {}
        self._budget = BUDGET
        self._price = CostEstimate("", 0, 0, 0, 0.1, None, PREVIEW)
        self.map: CacheMap | None = None
        """What it answers when somebody looks into a cache; None tells of the tokens it holds."""
        self._later: list[CacheCommand] = []
        """Acts that wait for the end of the turn under way, or for the engine."""
        self._lives = 0
        """Goes up with every death: a turn belongs to the life that it began in."""
        self._state = "new"
        self.loading = self.gate()
        self.loading.is_open = loads_at_once
        self.requests: list[TurnRequest] = []
        self.stops: list[str] = []
        self.forgotten: list[str] = []
        self.acts: list[CacheCommand] = []
        self.openings: list[EstimateCost] = []
        """Prices of going on with the conversations that were opened."""
        self.tells_openings = False
        self.typed: list[EstimateCost | CountTokens] = []
        """Tokens and prices of what stands in the prompt."""
        self.tells_typed = False
        self.answers_acts = True
        """Whether anything comes of an act at all."""
        self.starts = 0

    def attach(self, on_event: OnEvent) -> "ScriptedEngine":
        """The factory of an app."""
        self._on_status = on_event
        return self

    def gate(self) -> Gate:
        """A gate for a script of this engine."""
        return Gate(self._changed)

    def answers(
        self,
        *steps: Step,
        finish: FinishReason = FinishReason.STOP,
        reuse_note: str = "",
        miss: Miss | None = None,
        restored: int = 0,
    ) -> "ScriptedEngine":
        """Writes down what the next turn without a script does; without any, a turn answers `ok`."""
        self._scripts.append(Script(steps, finish, reuse_note, miss, restored))
        return self

    def holds(self, *caches: WarmCache) -> "ScriptedEngine":
        """These caches are there, in memory or on disk, once it is ready."""
        self._held = {cache.conversation: cache for cache in caches}
        return self

    def prices(
        self, seconds: float | None, miss: Miss | None = None, *, preview: str = PREVIEW, refusal: str = ""
    ) -> "ScriptedEngine":
        """What every turn costs from now on, whoever asks."""
        self._price = CostEstimate("", 1300, 96, 1204, seconds, miss, preview, refusal)
        return self

    def dies_on_load(self, reason: str, *log_tail: str) -> None:
        """The next start ends like this."""
        self._deaths_on_load.append(Died(reason, log_tail))

    def die(self, reason: str, *log_tail: str) -> None:
        """The process ends, wherever it is."""
        self._end("dead")
        self._on_status(Died(reason, log_tail))

    def start(self) -> None:
        with self._changed:
            self._state = "loading"
            self.starts += 1
            lives = self._lives
        self._on_status(Loading("loading scripted"))
        if self._deaths_on_load:
            died = self._deaths_on_load.popleft()
            self.die(died.reason, *died.log_tail)
            return
        self._wait(lambda: self.loading.is_open or self._lives != lives)
        with self._changed:
            if self._lives != lives:
                return
            self._state = "ready"
            self._changed.notify_all()
        self._on_status(Ready(FACTS, RSS))
        self._on_status(self.pool())
        self._catch_up()

    def submit(self, request: TurnRequest) -> None:
        def follow() -> None:
            for event in self.turn(request):
                self._on_status(event)

        Thread(target=follow, daemon=True, name="scripted-turn").start()

    def turn(self, request: TurnRequest) -> Iterator[TurnEvent]:
        lives = self._lives
        self.requests.append(request)
        self._wait(lambda: self._state in ("ready", "dead") or self._lives != lives)
        if self._state != "ready":
            yield TurnFailed(request.turn, NOT_RUNNING)
            return
        script = self._scripts.popleft() if self._scripts else Script(("ok",))
        with self._changed:
            self._state = "busy"
        yield from self._play(request, script, self._lives)
        with self._changed:
            if self._state == "busy":
                self._state = "ready"
        self._catch_up()

    def stop(self, turn: str) -> None:
        with self._changed:
            self.stops.append(turn)
            self._stopped.add(turn)
            self._changed.notify_all()

    def command(self, act: CacheCommand) -> None:
        with self._changed:
            if isinstance(act, EstimateCost | CountTokens) and act.key.startswith(TYPED):
                self.typed.append(act)  # whoever pauses while typing asks; no test counts it
                if not self.tells_typed:
                    return
            elif isinstance(act, EstimateCost) and act.key.startswith(OPENED):
                self.openings.append(act)  # nobody asked for it, and no test counts it
                if not self.tells_openings:
                    return
            else:
                self.acts.append(act)
            self._later.append(act)
            idle = self._state == "ready"
        if idle:
            self._catch_up()

    def pool(self) -> PoolState:
        """Every cache that is held."""
        held = tuple(self._held.values())
        memory, disk = (sum(sizes) for sizes in ([c.bytes for c in held], [c.disk_bytes for c in held]))
        return PoolState(held, memory, self._budget, disk, DISK_CAP)

    def forget(self, conversation: str) -> None:
        self.forgotten.append(conversation)
        self._held.pop(conversation, None)

    def close(self) -> None:
        self._end("closed")

    def _play(self, request: TurnRequest, script: Script, lives: int) -> Iterator[TurnEvent]:
        turn = request.turn
        prompt = prompt_tokens(request)
        held = self._held.get(request.conversation) if request.mode is CacheMode.ON else None
        reused = min(held.tokens if held else 0, prompt - 1)
        yield TurnStarted(
            turn,
            prompt,
            reused,
            prompt - reused,
            script.reuse_note,
            script.miss,
            script.restored,
            spans_of(request, reused),
        )
        pieces: list[str] = []
        evicted, evicted_messages = 0, request.evicted_messages
        for step in script.steps:
            if turn in self._stopped:
                break
            if isinstance(step, Gate):
                self._pause_at(step, turn, lives)
            if self._lives != lives:
                yield TurnFailed(turn, "The engine was killed (signal 9).")
                return
            if isinstance(step, Fails):
                yield TurnFailed(turn, step.reason)
                return
            if isinstance(step, Evicted):
                evicted, evicted_messages = evicted + step.tokens, step.evicted_messages
            if isinstance(step, PrefillProgress | Evicted):
                yield replace(step, turn=turn)
            elif isinstance(step, str):
                pieces.append(step)
                kv = prompt + len(pieces)
                ids = (len(pieces),)
                yield Tokens(turn, step, ids, (STEP_S,), FACTS.tokenizer, kv, kv * FACTS.kv_bytes_per_token)
        finish = FinishReason.CANCELLED if turn in self._stopped else script.finish
        stats = stats_of(request, reused, len(pieces), finish, script.reuse_note)
        stats = replace(stats, evicted_tokens=evicted, restored_tokens=script.restored)
        yield self._finished(request, pieces, stats, evicted_messages)

    def _finished(
        self, request: TurnRequest, pieces: list[str], stats: TurnStats, evicted_messages: int
    ) -> TurnFinished:
        if request.mode is CacheMode.ON:
            self._held[request.conversation] = warm(request.conversation, stats.kv_tokens)
        ids = tuple(range(1, len(pieces) + 1))
        spans = spans_of(request, stats.reused_tokens, len(pieces))
        text = "".join(pieces)
        return TurnFinished(
            request.turn, text, ids, FACTS.tokenizer, stats, self.pool(), evicted_messages, spans
        )

    def _catch_up(self) -> None:
        """Does what was asked for meanwhile, as the engine does: in order, the new state after each."""
        with self._changed:
            later, self._later = self._later, []
        for act in later if self.answers_acts else ():
            report = self._do(act)
            if report:
                self._on_status(report)
            self._on_status(self.pool())

    def _do(self, act: CacheCommand) -> Report | None:
        match act:
            case CountTokens(key, texts):
                return TokenCounts(key, tuple(len(text.split()) for text in texts))
            case EstimateCost(key):
                return replace(self._price, key=key)
            case Inspect(request):
                return self.map or map_of(request, self._held.get(request.conversation))
            case SetBudget(size):
                self._budget = size
            case Fork(parent, child) if parent in self._held:
                self._held[child] = replace(self._held[parent], conversation=child)
            case SetPrecision(conversation, kv):
                return self._convert(conversation, kv)
            case Pin(conversation) | Spill(conversation) | Warm(conversation) | Drop(conversation):
                return self._move(act, self._held.get(conversation))
        return None

    def _move(self, act: CacheCommand, held: WarmCache | None) -> Report | None:
        if held is None:
            return Refused("There is no such cache.")
        match act:
            case Pin(name, pinned):
                self._held[name] = replace(held, pinned=pinned)
            case Spill(name):
                self._held[name] = replace(held, bytes=0, tokens=0, disk_bytes=held.bytes or held.disk_bytes)
            case Warm(name):
                self._held[name] = replace(held, bytes=held.disk_bytes, disk_bytes=held.disk_bytes)
            case Drop(name):
                del self._held[name]
        return None

    def _convert(self, conversation: str, kv: KVPrecision) -> Converted:
        held = self._held.get(conversation)
        if held is None:
            return Converted(conversation, kv.value, 0, 0, 0, 0, "nothing is cached")
        self._held[conversation] = replace(held, bytes=held.bytes // 2, kv_dtype=kv.value)
        return Converted(conversation, kv.value, held.bytes, held.bytes // 2, 64, 63)

    def _pause_at(self, gate: Gate, turn: str, lives: int) -> None:
        gate.reached = True
        self._wait(lambda: gate.is_open or turn in self._stopped or self._lives != lives)

    def _end(self, state: str) -> None:
        with self._changed:
            self._state = state
            self._lives += 1
            self._held.clear()
            self._later.clear()
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S), "nobody opened the gate"


def warm(conversation: str, tokens: int) -> WarmCache:
    """A cache in memory, as a turn leaves it."""
    return WarmCache(conversation, tokens, tokens * FACTS.kv_bytes_per_token, kv_dtype=FACTS.kv_dtype)


def prompt_tokens(request: TurnRequest) -> int:
    """A word is a token, and every message has four more around it."""
    return sum(len(message.text.split()) + 4 for message in request.messages)


def spans_of(request: TurnRequest, reused: int, written: int = 0) -> tuple[TokenSpan, ...]:
    """What is done with every message, by the counts alone."""
    spans, left = list[TokenSpan](), reused
    off = request.mode is CacheMode.OFF
    for place, message in enumerate(request.messages):
        tokens = len(message.text.split()) + 4
        kept = min(tokens, left)
        left -= kept
        parts = (
            (TokenStatus.REUSED, kept),
            (TokenStatus.UNCACHED if off else TokenStatus.READ, tokens - kept),
        )
        spans += [TokenSpan(place, fate, count) for fate, count in parts if count]
    return (*spans, TokenSpan(len(request.messages), TokenStatus.WRITTEN, written))


def map_of(request: TurnRequest, held: WarmCache | None) -> CacheMap:
    """A block for each message of a cache in memory."""
    blocks, start = list[CacheBlock](), 0
    for place, message in enumerate(request.messages if held else ()):
        count = len(message.text.split()) + 4
        size = count * FACTS.kv_bytes_per_token
        whose = (place, message.role, message.text)
        blocks.append(CacheBlock(start, count, *whose, True, False, FACTS.kv_dtype, size))
        start += count
    size = start * FACTS.kv_bytes_per_token
    return CacheMap(request.conversation, tuple(blocks), (LayerGroup("full", 30, 0, size),), size, 0)


def stats_of(
    request: TurnRequest, reused: int, written: int, finish: FinishReason, note: str = ""
) -> TurnStats:
    """Figures that follow from the counts alone."""
    prompt = prompt_tokens(request)
    read = prompt - reused
    off = request.mode is CacheMode.OFF
    kept = 0 if off else prompt + written
    rate = DECODE_TOK_S[request.mode]
    return TurnStats(
        cache_mode=request.mode.value,
        prompt_tokens=prompt,
        reused_tokens=reused,
        prefilled_tokens=read,
        generated_tokens=written,
        evaluated_tokens=(prompt + written) * written if off else read + written,
        ttft_s=read / READ_TOK_S,
        prefill_s=read / READ_TOK_S,
        decode_s=written / rate,
        prefill_tok_s=READ_TOK_S,
        decode_tok_s=rate,
        kv_tokens=kept,
        kv_bytes=kept * FACTS.kv_bytes_per_token,
        kv_used_bytes=kept * FACTS.kv_bytes_per_token,
        kv_dtype=FACTS.kv_dtype,
        weights_dtype=FACTS.weights_dtype,
        weights_bytes=FACTS.weights_bytes,
        path=FACTS.path,
        rss_bytes=RSS,
        context_limit=FACTS.context_limit,
        finish_reason=finish.value,
        reuse_note=note,
    )
