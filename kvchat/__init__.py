"""kvchat: chat with a local model in the terminal, and see its KV cache work.

The public API for other programs; `docs/library.md` explains it. Names are imported when they are first
used: importing this package imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvchat.contract import (
        CacheBlock,
        CacheMap,
        CacheMode,
        EvictionPolicy,
        KVPrecision,
        LayerGroup,
        ModelFacts,
        Sampling,
        TurnStats,
    )
    from kvchat.errors import KvchatError
    from kvchat.library import Answer, Cache, Chat, Model, load
    from kvchat.text import clean

__all__ = [
    "Answer",
    "Cache",
    "CacheBlock",
    "CacheMap",
    "CacheMode",
    "Chat",
    "EvictionPolicy",
    "KVPrecision",
    "KvchatError",
    "LayerGroup",
    "Model",
    "ModelFacts",
    "Sampling",
    "TurnStats",
    "clean",
    "load",
]

MODULES = ("kvchat.errors", "kvchat.text", "kvchat.contract", "kvchat.library")
"""Where the public names are defined, the fastest import first."""


def __getattr__(name: str) -> object:
    """A public name, imported now."""
    if name in __all__:
        for module in map(import_module, MODULES):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
