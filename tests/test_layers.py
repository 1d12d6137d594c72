"""Who may import whom: the contracts in pyproject.toml, and what a process really holds after an import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TENSORS = {"torch", "transformers"}
SCREEN = {"textual", "kvchat.ui"}
ENGINE = {"kvchat.engine", "kvchat.cache"}
TENSORS_OF_CACHE = {"kvchat.cache.kv", "kvchat.cache.layers", "kvchat.cache.snapshot", "kvchat.engine"}
STORAGE = {"sqlite_utils", "kvchat.store"}

NEVER_LOADED = {
    "kvchat.cli": TENSORS | SCREEN | ENGINE | STORAGE | {"numpy"},
    "kvchat.link": TENSORS | SCREEN | ENGINE | STORAGE,
    "kvchat.ui.app": TENSORS | ENGINE,
    "kvchat.session": TENSORS | SCREEN | ENGINE,
    "kvchat.headless": TENSORS | SCREEN | ENGINE,
    "kvchat.store": TENSORS | SCREEN | ENGINE,
    "kvchat.conversation": TENSORS | SCREEN | ENGINE | STORAGE,
    "kvchat.contract": TENSORS | SCREEN | ENGINE | STORAGE | {"kvchat.conversation"},
    "kvchat.cache_commands": TENSORS | SCREEN | ENGINE | STORAGE,
    "kvchat.cache.prefix": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.cache.evict": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.cache.pool": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.cache.fingerprint": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.cache.segment": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.cache.shelf": TENSORS | SCREEN | STORAGE | TENSORS_OF_CACHE,
    "kvchat.engine.prepare": TENSORS | SCREEN | STORAGE,
    "kvchat.locate": TENSORS | SCREEN | ENGINE | STORAGE,
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
