"""Who may import whom: the contracts in pyproject.toml, and what a process really holds after an import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TENSORS = {"torch", "transformers"}
SCREEN = {"textual", "kvchat.ui"}
ENGINE = {"kvchat.engine", "kvchat.cache"}
TENSORS_OF_CACHE = {
    "kvchat.cache.kv_cache",
    "kvchat.cache.layer",
    "kvchat.cache.disk.snapshot",
    "kvchat.engine",
}
STORAGE = {"sqlite_utils", "kvchat.chat.store"}

NEVER_LOADED = {
    "kvchat.cli.main": TENSORS | SCREEN | ENGINE | STORAGE | {"numpy"},
    "kvchat.engine_process.client": TENSORS | SCREEN | ENGINE | STORAGE,
    "kvchat.ui.app": TENSORS | ENGINE,
    "kvchat.chat.session": TENSORS | SCREEN | ENGINE,
    "kvchat.chat.controller": TENSORS | SCREEN | ENGINE,
    "kvchat.cli.run": TENSORS | SCREEN | ENGINE,
    "kvchat.chat.store": TENSORS | SCREEN | ENGINE,
    "kvchat.chat.conversation": TENSORS | SCREEN | ENGINE | STORAGE,
    "kvchat.contract": TENSORS | SCREEN | ENGINE | STORAGE | {"kvchat.chat.conversation"},
    "kvchat.cli.cache": TENSORS | SCREEN | ENGINE | STORAGE,
    "kvchat.cache.prefix": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.cache.eviction": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.cache.memory_budget": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.cache.fingerprint": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.cache.disk.segment": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.cache.disk.disk_store": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.engine.setup.prepare": TENSORS | SCREEN | STORAGE,
    "kvchat.models.resolve": TENSORS | SCREEN | ENGINE | STORAGE,
}


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)


def loaded_by(module: str) -> set[str]:
    """Every module in a process that imported `module`."""
    done = run("-c", f"import {module}, sys; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_contracts_between_modules_are_kept() -> None:
    lint = "from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    done = run("-c", f"import sys; {lint}")
    assert done.returncode == 0, done.stdout
    assert " kept, 0 broken." in done.stdout


@pytest.mark.parametrize("module", NEVER_LOADED)
def test_importing_it_loads_nothing_of_the_other_side(module: str) -> None:
    modules = loaded_by(module)
    assert module in modules
    parents = {name.rsplit(".", n)[0] for name in modules for n in range(name.count(".") + 1)}
    own = {module.rsplit(".", n)[0] for n in range(module.count(".") + 1)}
    assert not (parents - own) & NEVER_LOADED[module]
