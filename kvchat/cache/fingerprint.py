"""Whether a cache fits a model: keys and values depend on the model and on how it is computed.

Compares strings; the engine supplies them.
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
    """Hash of the weights; each precision has its own."""
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
        """A sentence about the first field in which `stored` differs; empty where none does."""
        for field in fields(self):
            then, now = stored.get(field.name, "?"), getattr(self, field.name)
            if then != now:
                return f"{WORDS[field.name]} changed: {then} → {now}"
        return ""
