"""Whether a cache may be used: keys and values belong to exactly one model, read in exactly one way.

It compares strings; where they come from is the engine's business.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

WORDS = {
    "model": "model",
    "weights": "weights precision",
    "revision": "model weights",
    "kv": "KV precision",
    "rope": "rope settings",
    "template": "chat template",
    "tokenizer": "tokenizer",
    "transformers": "transformers version",
}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything that keys and values depend on, besides the token ids."""

    model: str
    weights: str
    """Precision of the weights."""
    revision: str
    """Hash of the weights, which is another one in another precision."""
    kv: str
    """Precision of keys and values."""
    rope: str
    template: str
    tokenizer: str
    transformers: str
    """Major version."""

    def as_dict(self) -> dict[str, str]:
        """The fields by name, for a file's header."""
        return asdict(self)

    def difference(self, stored: Mapping[str, str]) -> str:
        """The first field in which `stored` differs, in words; empty where none does."""
        for field in fields(self):
            then, now = stored.get(field.name, "?"), getattr(self, field.name)
            if then != now:
                return f"{WORDS[field.name]} changed: {then} → {now}"
        return ""
