"""The table of settings, from which flags, environment variables, file entries, settings screen and
documentation are made.

Precedence: flag > environment > file > default. The file is read and written by `config.file`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from math import isfinite

from kvchat.contract import CacheMode, EvictionPolicy, KVPrecision, Sampling
from kvchat.errors import KvchatError
from kvchat.models.cards import DEFAULT_MODEL, ModelCard
from kvchat.text import either, parse_size
from kvchat.validation import bounds
from kvchat.validation.bounds import Bounds

Value = str | int | float | bool


class Kind(StrEnum):
    """Type of a setting's value."""

    TEXT = "text"
    WHOLE = "a whole number"
    NUMBER = "a number"
    SIZE = "a size, such as 2GB or 512MB"
    SWITCH = "true or false"
    CHOICE = "one of its words"


class Holds(StrEnum):
    """When a change takes effect."""

    AT_ONCE = "at once"
    NEW = "for new conversations"
    START = "from the next start"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting."""

    name: str
    """Name of the long flag and of the key in the file."""
    group: str
    help: str
    kind: Kind = Kind.TEXT
    default: Value | None = None
    otherwise: str = ""
    """What happens if nothing is set, for a setting without a default."""
    choices: tuple[str, ...] = ()
    bounds: Bounds | None = None
    short: str = ""
    """The short flag."""
    holds: Holds = Holds.START

    @property
    def variable(self) -> str:
        """Name of its environment variable."""
        return "KVCHAT_" + self.key.upper()

    @property
    def key(self) -> str:
        """The name as a Python identifier."""
        return self.name.replace("-", "_")

    @property
    def takes(self) -> str:
        """Description of the valid values."""
        if self.choices:
            return either(self.choices)
        if self.bounds is None:
            return self.kind.value
        start = "above" if self.bounds.above else "from"
        return f"{self.kind.value} {start} {self.bounds.lowest:,} to {self.bounds.highest:,}"

    @property
    def unset(self) -> str:
        """The value, or a description of it, if nothing is set."""
        return self.otherwise if self.default is None else shown(self.default)

    def parse(self, text: str) -> Value:
        """Converts text from the user into a value.

        Raises:
            KvchatError: it is invalid; the message describes valid values.
        """
        try:
            value = self._convert(text.strip())
        except ValueError:
            value = None
        if value is None or not self._is_within(value):
            raise KvchatError(f"{self.name} is {self.takes}; {text.strip()!r} is not.")
        return value

    def check(self, value: object) -> None:
        """Validates a value from the configuration file; text is parsed like that of a variable.

        Raises:
            KvchatError: it is invalid; the message describes valid values.
        """
        if isinstance(value, str):
            self.parse(value)
        elif not self._is_valid(value):
            raise KvchatError(f"{self.name} is {self.takes}; {shown(value)} is not.")

    def _is_valid(self, value: object) -> bool:
        """Whether a TOML value other than text is valid."""
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
        return value in self.bounds if self.bounds else isfinite(value)


PRECISIONS = ("auto", "fp32", "bf16", "int8", "int4")
MODEL, ANSWERS, CACHE, SCREEN, FILES = "model", "answers", "KV cache", "screen", "files"
SETTINGS = (
    Setting(
        "model",
        MODEL,
        "The model: a card's name, a hub id, a folder, or a GGUF file.",
        otherwise=DEFAULT_MODEL,
        short="-m",
    ),
    Setting(
        "precision",
        MODEL,
        "Precision of the weights; auto is at least that of the source.",
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
        bounds=bounds.THREADS,
    ),
    Setting(
        "context",
        MODEL,
        "Context limit of a conversation in tokens.",
        Kind.WHOLE,
        otherwise="what the model was made for",
        bounds=bounds.CONTEXT,
    ),
    Setting(
        "device", MODEL, "Device of the model.", Kind.CHOICE, "auto", choices=("auto", "cpu", "cuda", "mps")
    ),
    Setting(
        "draft",
        MODEL,
        "Speculative decoding: lookup (drafts from the conversation itself), off, or a smaller model's name.",
        default="lookup",
    ),
    Setting(
        "unload-after",
        MODEL,
        "Idle minutes after which the weights leave memory until the next turn; 0 keeps them.",
        Kind.NUMBER,
        30,
        bounds=bounds.UNLOAD_AFTER,
    ),
    Setting("system", ANSWERS, "System prompt.", otherwise="the model's own", short="-s", holds=Holds.NEW),
    Setting(
        "max-tokens",
        ANSWERS,
        "Maximum length of an answer in tokens.",
        Kind.WHOLE,
        otherwise="the model card's",
        bounds=bounds.MAX_TOKENS,
        holds=Holds.NEW,
    ),
    Setting(
        "temperature",
        ANSWERS,
        "How freely the next token is drawn; 0 always takes the most probable one.",
        Kind.NUMBER,
        otherwise="the model card's",
        bounds=bounds.TEMPERATURE,
        holds=Holds.NEW,
    ),
    Setting(
        "top-p",
        ANSWERS,
        "Sample from the most probable tokens that together have this probability.",
        Kind.NUMBER,
        otherwise="the model card's",
        bounds=bounds.TOP_P,
        holds=Holds.NEW,
    ),
    Setting(
        "top-k",
        ANSWERS,
        "Sample from this number of most probable tokens; 0 samples from all.",
        Kind.WHOLE,
        otherwise="the model card's",
        bounds=bounds.TOP_K,
        holds=Holds.NEW,
    ),
    Setting(
        "min-p",
        ANSWERS,
        "Minimum probability of a token, relative to the most probable one.",
        Kind.NUMBER,
        otherwise="the model card's",
        bounds=bounds.MIN_P,
        holds=Holds.NEW,
    ),
    Setting(
        "repeat-penalty",
        ANSWERS,
        "Makes tokens that occurred before less probable; 1 changes nothing.",
        Kind.NUMBER,
        otherwise="none",
        bounds=bounds.REPEAT_PENALTY,
        holds=Holds.NEW,
    ),
    Setting(
        "seed",
        ANSWERS,
        "The same seed gives the same text.",
        Kind.WHOLE,
        otherwise="another one every turn",
        bounds=bounds.SEED,
        holds=Holds.NEW,
    ),
    Setting(
        "cache",
        CACHE,
        "KV cache: on (reused across turns), turn (dropped after each turn), or off (none).",
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
        "Eviction policy: which tokens are evicted when the context is full.",
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
        "No animations, and answers are redrawn less often.",
        Kind.SWITCH,
        False,
        holds=Holds.AT_ONCE,
    ),
    Setting("data-dir", FILES, "Keep everything in this folder.", otherwise="the system's folders"),
    Setting("private", FILES, "Write nothing to disk.", Kind.SWITCH, False),
)


def find_setting(name: str) -> Setting:
    """The setting of that name, with hyphens or underscores.

    Raises:
        KvchatError: there is none; the message lists all names.
    """
    found = next((s for s in SETTINGS if s.key == name.replace("-", "_")), None)
    if found is None:
        raise KvchatError(f"There is no setting {name}. Settings: {', '.join(s.name for s in SETTINGS)}.")
    return found


def effective(
    setting: Setting, config: Mapping[str, object], environment: Mapping[str, str]
) -> tuple[str, str]:
    """(value without a flag, its source: the variable's name, `file` or `default`)."""
    if value := environment.get(setting.variable):
        return value, setting.variable
    if setting.key in config:
        return shown(config[setting.key]), "file"
    return setting.unset, "default"


def shown(value: object) -> str:
    """A value as in the file, without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def sampling_of(card: ModelCard | None) -> Sampling:
    """The sampling that the card recommends; greedy without a card."""
    if card is None:
        return Sampling()
    given = {field.name: getattr(card.defaults, field.name) for field in fields(card.defaults)}
    return changed(Sampling(), given)


def changed(sampling: Sampling, given: Mapping[str, object]) -> Sampling:
    """`sampling` with every field of `given` that is not None; other names in `given` are ignored."""
    names = {field.name for field in fields(Sampling)}
    return replace(sampling, **{k: v for k, v in given.items() if k in names and v is not None})  # type: ignore[arg-type]
