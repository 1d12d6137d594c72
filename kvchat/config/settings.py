"""Every setting, declared once: the flag, the variable, the line of the file, the settings screen and the
documentation are made from this table.

flag > environment > file > default. How the file is read and written is `config_file`'s business.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from math import isfinite

from kvchat.contract import CacheMode, EvictionPolicy, KVPrecision, Sampling
from kvchat.errors import KvchatError
from kvchat.models.cards import ModelCard
from kvchat.text import parse_size
from kvchat.validation import bounds

Value = str | int | float | bool


class Kind(StrEnum):
    """What a setting's value is."""

    TEXT = "text"
    WHOLE = "a whole number"
    NUMBER = "a number"
    SIZE = "a size, such as 2GB or 512MB"
    SWITCH = "true or false"
    CHOICE = "one of its words"


class Holds(StrEnum):
    """From when on a change holds."""

    AT_ONCE = "at once"
    NEW = "for new conversations"
    START = "from the next start"


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that can be set."""

    name: str
    """That of the long flag and of the line in the file."""
    group: str
    help: str
    kind: Kind = Kind.TEXT
    default: Value | None = None
    otherwise: str = ""
    """What happens where nothing is set, for a setting without a default."""
    choices: tuple[str, ...] = ()
    lowest: float | None = None
    """None is no bound."""
    highest: float | None = None
    above: bool = False
    """Whether the value must be above `lowest`; else it may equal it."""
    short: str = ""
    """The short flag."""
    holds: Holds = Holds.START

    @property
    def variable(self) -> str:
        """The environment variable that sets it too."""
        return "KVCHAT_" + self.key.upper()

    @property
    def key(self) -> str:
        """The name as Python spells it."""
        return self.name.replace("-", "_")

    @property
    def takes(self) -> str:
        """What may be written, in words."""
        if self.choices:
            return f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
        if self.lowest is None:
            return self.kind.value
        least = f"{self.kind.value} {'above' if self.above else 'from'} {self.lowest:,}"
        return least if self.highest is None else f"{least} to {self.highest:,}"

    @property
    def unset(self) -> str:
        """What stands where nothing was set."""
        return self.otherwise if self.default is None else shown(self.default)

    def parse(self, text: str) -> Value:
        """A value that somebody wrote.

        Raises:
            KvchatError: it is none, and says what would be one.
        """
        try:
            value = self._convert(text.strip())
        except ValueError:
            value = None
        if value is None or not self._is_within(value):
            raise KvchatError(f"{self.name} is {self.takes}; {text.strip()!r} is not.")
        return value

    def check(self, value: object) -> None:
        """Passes a value of the configuration file; text is read as a variable's is.

        Raises:
            KvchatError: it is none, and says what would be one.
        """
        if isinstance(value, str):
            self.parse(value)
        elif not self._may_be(value):
            raise KvchatError(f"{self.name} is {self.takes}; {shown(value)} is not.")

    def _may_be(self, value: object) -> bool:
        """Whether a value that TOML does not write as text fits."""
        if isinstance(value, bool):
            return self.kind is Kind.SWITCH
        if not isinstance(value, int | float):
            return False
        match self.kind:
            case Kind.WHOLE:
                return isinstance(value, int) and self._is_within(value)
            case Kind.NUMBER:
                return self._is_within(value)
            case Kind.SIZE:
                return value >= 0 and isfinite(value)
            case _:
                return False

    def _convert(self, text: str) -> Value | None:
        match self.kind:
            case Kind.WHOLE:
                return int(text)
            case Kind.NUMBER:
                return float(text)
            case Kind.SWITCH:
                return {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}.get(
                    text.lower()
                )
            case Kind.SIZE:
                parse_size(text)
                return text
            case Kind.CHOICE:
                return text if text in self.choices else None
            case _:
                return text

    def _is_within(self, value: Value) -> bool:
        if isinstance(value, str | bool):
            return True
        if not isfinite(value):
            return False
        low = self.lowest is None or value > self.lowest or (value == self.lowest and not self.above)
        return low and (self.highest is None or value <= self.highest)


PRECISIONS = ("auto", "fp32", "bf16", "int8", "int4")
MODEL, ANSWERS, CACHE, SCREEN, FILES = "model", "answers", "KV cache", "screen", "files"
SETTINGS = (
    Setting(
        "model",
        MODEL,
        "Which model answers: a card's name, a hub id, a folder, or a GGUF file.",
        otherwise="smollm2-135m-instruct",
        short="-m",
    ),
    Setting(
        "precision",
        MODEL,
        "Of the weights; auto is no lower than the source has them.",
        Kind.CHOICE,
        "auto",
        choices=PRECISIONS,
    ),
    Setting(
        "threads",
        MODEL,
        "Processor threads for the model.",
        Kind.WHOLE,
        otherwise="every physical core",
        lowest=bounds.THREADS.lowest,
        highest=bounds.THREADS.highest,
    ),
    Setting(
        "context",
        MODEL,
        "Tokens a conversation may hold at most.",
        Kind.WHOLE,
        otherwise="what the model was made for",
        lowest=bounds.CONTEXT.lowest,
        highest=bounds.CONTEXT.highest,
    ),
    Setting(
        "device",
        MODEL,
        "What computes.",
        Kind.CHOICE,
        "auto",
        choices=("auto", "cpu", "cuda", "mps"),
    ),
    Setting(
        "draft",
        MODEL,
        "What guesses tokens ahead: lookup (in the conversation itself), off, or a smaller model's name.",
        default="lookup",
    ),
    Setting(
        "unload-after",
        MODEL,
        "Idle minutes after which the weights leave memory until the next turn; 0 keeps them.",
        Kind.NUMBER,
        30,
        lowest=bounds.UNLOAD_AFTER.lowest,
        highest=bounds.UNLOAD_AFTER.highest,
    ),
    Setting("system", ANSWERS, "System prompt.", otherwise="the model's own", short="-s", holds=Holds.NEW),
    Setting(
        "max-tokens",
        ANSWERS,
        "Tokens of an answer at most.",
        Kind.WHOLE,
        otherwise="the model card's",
        lowest=bounds.MAX_TOKENS.lowest,
        highest=bounds.MAX_TOKENS.highest,
        holds=Holds.NEW,
    ),
    Setting(
        "temperature",
        ANSWERS,
        "How freely the next token is drawn; 0 always takes the most probable one.",
        Kind.NUMBER,
        otherwise="the model card's",
        lowest=bounds.TEMPERATURE.lowest,
        highest=bounds.TEMPERATURE.highest,
        holds=Holds.NEW,
    ),
    Setting(
        "top-p",
        ANSWERS,
        "Draw from the most probable tokens that together have this probability.",
        Kind.NUMBER,
        otherwise="the model card's",
        lowest=bounds.TOP_P.lowest,
        highest=bounds.TOP_P.highest,
        above=True,
        holds=Holds.NEW,
    ),
    Setting(
        "top-k",
        ANSWERS,
        "Draw from so many of the most probable tokens; 0 from all.",
        Kind.WHOLE,
        otherwise="the model card's",
        lowest=bounds.TOP_K.lowest,
        highest=bounds.TOP_K.highest,
        holds=Holds.NEW,
    ),
    Setting(
        "min-p",
        ANSWERS,
        "Never draw a token that is less probable than this share of the best one.",
        Kind.NUMBER,
        otherwise="the model card's",
        lowest=bounds.MIN_P.lowest,
        highest=bounds.MIN_P.highest,
        holds=Holds.NEW,
    ),
    Setting(
        "repeat-penalty",
        ANSWERS,
        "Makes tokens that were said already less probable; 1 is none.",
        Kind.NUMBER,
        otherwise="none",
        lowest=bounds.REPEAT_PENALTY.lowest,
        highest=bounds.REPEAT_PENALTY.highest,
        above=True,
        holds=Holds.NEW,
    ),
    Setting(
        "seed",
        ANSWERS,
        "The same seed gives the same text.",
        Kind.WHOLE,
        otherwise="another one every turn",
        lowest=bounds.SEED.lowest,
        highest=bounds.SEED.highest,
        holds=Holds.NEW,
    ),
    Setting(
        "cache",
        CACHE,
        "What happens to the KV cache: kept across turns, thrown away after each one, or never made.",
        Kind.CHOICE,
        otherwise="on",
        choices=tuple(mode.value for mode in CacheMode),
        holds=Holds.NEW,
    ),
    Setting(
        "kv",
        CACHE,
        "Precision of keys and values; auto is as the model computes them.",
        Kind.CHOICE,
        otherwise="auto",
        choices=tuple(precision.value for precision in KVPrecision),
        holds=Holds.NEW,
    ),
    Setting(
        "policy",
        CACHE,
        "What is dropped when the context is full.",
        Kind.CHOICE,
        otherwise="turns",
        choices=tuple(policy.value for policy in EvictionPolicy),
        holds=Holds.NEW,
    ),
    Setting(
        "kv-budget",
        CACHE,
        "Memory for all KV caches together.",
        Kind.SIZE,
        otherwise="a quarter of what is free",
        holds=Holds.AT_ONCE,
    ),
    Setting("kv-disk", CACHE, "Disk for saved caches; 0 saves none.", Kind.SIZE, "4GB"),
    Setting(
        "theme",
        SCREEN,
        "Colours: kvchat-dark, kvchat-light, or one of Textual's.",
        default="kvchat-dark",
        holds=Holds.AT_ONCE,
    ),
    Setting(
        "reduced-motion",
        SCREEN,
        "Nothing moves by itself: no animations, and answers are drawn less often.",
        Kind.SWITCH,
        False,
        holds=Holds.AT_ONCE,
    ),
    Setting("data-dir", FILES, "Keep everything in this folder.", otherwise="the system's folders"),
    Setting("private", FILES, "Write nothing to disk.", Kind.SWITCH, False),
)


def find_setting(name: str) -> Setting:
    """The setting of that name, however it is spelled.

    Raises:
        KvchatError: there is none; names them all.
    """
    found = next((s for s in SETTINGS if s.key == name.replace("-", "_")), None)
    if found is None:
        raise KvchatError(f"There is no setting {name}. Settings: {', '.join(s.name for s in SETTINGS)}.")
    return found


def effective(
    setting: Setting, config: Mapping[str, object], environment: Mapping[str, str]
) -> tuple[str, str]:
    """(what holds without a flag, where that comes from: a variable's name, `file` or `default`)."""
    if value := environment.get(setting.variable):
        return value, setting.variable
    if setting.key in config:
        return shown(config[setting.key]), "file"
    return setting.unset, "default"


def shown(value: object) -> str:
    """A value as the file spells it, without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def sampling_of(card: ModelCard | None) -> Sampling:
    """What the card recommends; greedy where there is no card."""
    if card is None:
        return Sampling()
    given = {field.name: getattr(card.defaults, field.name) for field in fields(card.defaults)}
    return changed(Sampling(), given)


def changed(sampling: Sampling, given: Mapping[str, object]) -> Sampling:
    """`sampling` with every value of `given` that is not None and belongs to it."""
    names = {field.name for field in fields(Sampling)}
    return replace(sampling, **{k: v for k, v in given.items() if k in names and v is not None})  # type: ignore[arg-type]
