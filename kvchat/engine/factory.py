"""Builds an engine from a loaded model, a memory budget for its caches, and a store to save them in."""

from collections.abc import Callable
from pathlib import Path

import psutil

from kvchat.cache.disk.disk_store import DiskStore
from kvchat.cache.memory_budget import default_budget
from kvchat.contract import Report
from kvchat.engine.disk_tier import DiskTier
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel, load_model
from kvchat.engine.speculative import Drafter, DraftModel, PromptLookup
from kvchat.errors import KvchatError

LOOKUP = "lookup"


def open_engine(
    loaded: LoadedModel,
    budget: int | None,
    folder: Path | None,
    disk_cap: int,
    report: Callable[[Report], None] = lambda _report: None,
    draft: LoadedModel | str = LOOKUP,
) -> LocalEngine:
    """An engine that saves its caches in `folder`; with None, it saves none.

    Args:
        budget: bytes in memory for all caches; None takes a share of what is available now.
        disk_cap: bytes that all saved caches may take; with 0 none is saved.
        report: gets the results of cache commands.
        draft: what drafts tokens: `lookup`, `off`, or another model.

    Raises:
        KvchatError: the draft model has another tokenizer.
    """
    available = default_budget(int(psutil.virtual_memory().available))
    disk = DiskTier(DiskStore(folder, disk_cap)) if folder and disk_cap else None
    model = _draft_model(loaded, draft) if isinstance(draft, LoadedModel) else None
    engine = LocalEngine(
        loaded,
        budget_bytes=available if budget is None else budget,
        disk=disk,
        report=report,
        new_drafter=_drafters(model or draft),
    )
    if model:
        engine.caches.add_draft_cache(model)
    return engine


def load_draft(
    draft: str, folder: Path | None, threads: int | None, compiled: Path | None = None
) -> LoadedModel | str:
    """The `draft` argument of `open_engine`: the word as it is, or the model loaded from `folder`."""
    return draft if folder is None else load_model(folder, draft, threads=threads, compiled=compiled)


def _drafters(draft: object) -> Callable[[], Drafter | None]:
    if isinstance(draft, DraftModel):
        return lambda: draft
    return PromptLookup if draft == LOOKUP else lambda: None


def _draft_model(loaded: LoadedModel, draft: LoadedModel) -> DraftModel:
    if draft.facts.tokenizer != loaded.facts.tokenizer:
        raise KvchatError(
            f"{draft.facts.name} has another tokenizer than {loaded.facts.name}, so it can't draft for it. "
            "Take a model of the same family, or --draft lookup."
        )
    return DraftModel(draft)
