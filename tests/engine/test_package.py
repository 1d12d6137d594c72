"""Where packages are, what they depend on, who can write to them, and stored refusals."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvchat.cache import layer, quant_codec, quantized_layer
from kvchat.config.paths import find_paths
from kvchat.engine.compiled import abi, package, quantized_linear
from kvchat.engine.compiled import build as building
from kvchat.engine.compiled.export import RefusedError
from kvchat.engine.compiled.package import (
    REFUSAL,
    find_package,
    fingerprint,
    is_decided,
    make_model_folder,
    package_folder,
    record_digests,
    refusal_of,
    refuse,
    remove_stale,
    wants_step,
)
from kvchat.engine.compiled.runner import find_step
from kvchat.errors import KvchatError
from kvchat.models.resolve import MARKER, compiled_folder, remove_orphaned
from kvchat.models.staging import Progress
from kvchat.system.ownership import require_own
from tests.engine.conftest import need_compiler

has_modes = pytest.mark.skipif(os.name == "nt", reason="access lists in place of modes")
BESIDE = {".lock", "model.txt", "files.json"}
"""Files beside the packages of a model."""


def ignore(_progress: Progress) -> None:
    """Ignores progress reports."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of compiled code, not made yet."""
    return tmp_path / "data" / "compiled"


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


# ---- what a package belongs to -----------------------------------------------------------------------------


def test_every_byte_of_the_weights_counts_and_they_are_read_once(
    root: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a tool set the time of the last change back."""
    weights = model / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    make_model_folder(root, model)
    before, facts = fingerprint(root, model, "fp32"), weights.stat()
    with monkeypatch.context() as patch:
        patch.setattr(package, "digest_of", None)
        assert fingerprint(root, model, "fp32") == before
    for place in (0, 5000, (1 << 20) - 1):
        with weights.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert fingerprint(root, model, "fp32") != before
        before = fingerprint(root, model, "fp32")
    other = model.with_name("other")
    other.write_bytes(weights.read_bytes())
    other.replace(weights)  # another file of the same content
    assert fingerprint(root, model, "fp32") == before


@pytest.mark.parametrize("damage", ["", "[]", '{"model.safetensors": 1}', '{"model.safetensors": ["a"]}'])
def test_damaged_digests_of_a_model_are_computed_again(root: Path, model: Path, damage: str) -> None:
    (model / "model.safetensors").write_bytes(b"weights")
    before = fingerprint(root, model, "fp32")
    (make_model_folder(root, model) / "files.json").write_text(damage)
    assert fingerprint(root, model, "fp32") == before


def test_every_source_that_lays_out_memory_is_in_the_fingerprint(
    root: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Path(str(building.__file__)).parent
    assert package.kernel_sources()[0].name == "ops.cpp"
    assert {*package.kernel_sources()} == {p for p in engine.rglob("*") if p.suffix in (".cpp", ".h")}
    sources = package.module_sources()
    assert len(sources) == len(package.SOURCES)
    for module in (building, quantized_linear, abi, layer, quant_codec, quantized_layer):
        assert Path(str(module.__file__)) in sources
    seen = {fingerprint(root, model, "fp32")}
    (model / "other.h").write_text("int i;")
    for listing in ("kernel_sources", "module_sources"):
        with monkeypatch.context() as patch:
            patch.setattr(package, listing, lambda: [model / "other.h"])
            seen.add(fingerprint(root, model, "fp32"))
    assert len(seen) == 3


def test_a_model_that_was_replaced_gets_no_package_of_the_one_before(
    root: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "model.safetensors").write_bytes(b"one")
    make_model_folder(root, model)
    package_folder(root, model, "fp32").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(package, "compiler_version", None)  # a process that the first paint needn't wait for
        assert find_package(root, model, "fp32")
    (model / "model.safetensors").write_bytes(b"two")
    assert find_package(root, model, "fp32") is None


def test_packages_for_other_versions_of_the_same_precision_are_removed(root: Path, model: Path) -> None:
    current = package_folder(root, model, "int8")
    for path in (current, *(current.with_name(name) for name in ("int8-old", "fp32-old"))):
        path.mkdir(parents=True)
    remove_stale(current, "int8")
    assert {path.name for path in current.parent.iterdir()} == {current.name, "fp32-old"}


def test_packages_of_removed_models_are_removed(root: Path, model: Path, tmp_path: Path) -> None:
    """Not where the whole drive is missing, and not what a note only claims to be one."""
    other = tmp_path / "drive" / "other"
    other.mkdir(parents=True)
    folders = [make_model_folder(root, model), make_model_folder(root, other)]
    (root / "claims").mkdir()
    (root / "claims" / "model.txt").write_text(str(tmp_path / "gone"))
    remove_orphaned(root)
    assert all(folder.is_dir() for folder in folders)
    model.rmdir()
    shutil.rmtree(other.parent)
    remove_orphaned(root)
    assert [folder.is_dir() for folder in folders] == [False, True]
    assert (root / "claims").is_dir()


def test_a_step_is_built_for_downloaded_models_and_where_there_was_one(root: Path, model: Path) -> None:
    need_compiler()
    assert not wants_step(root, model)
    (model / "compiled").mkdir()  # of an earlier version, or came with the model
    assert not wants_step(root, model)
    assert wants_step(root, model, fetched=True)
    (model / MARKER).write_text("{}")
    assert wants_step(root, model)
    (model / MARKER).unlink()
    make_model_folder(root, model)
    assert wants_step(root, model)
    package_folder(root, model, "fp32").mkdir()
    package_folder(root, model, "bf16").mkdir()
    assert not wants_step(root, model)


# ---- write access ----------------------------------------------------------------------------------------


@has_modes
def test_packages_are_writable_by_the_user_only_for_every_umask(root: Path, model: Path) -> None:
    (model / "config.json").write_text("{}")
    before = os.umask(0)
    try:
        made = make_model_folder(root, model)
        fingerprint(root, model, "fp32")
        refuse(made / "fp32-some", "It can't be compiled.")
        (made / "int8-some").mkdir()
        (made / "int8-some" / "step.so").write_text("code")
        record_digests(made / "int8-some")
    finally:
        os.umask(before)
    paths = [root.parent, *root.parent.rglob("*")]
    assert {path.name for path in paths} >= {"model.txt", "files.json", REFUSAL, "step.so", "digests.json"}
    assert [path for path in paths if path.stat().st_mode & 0o022] == []


@has_modes
def test_nothing_is_built_in_a_data_folder_that_others_can_write(model: Path, tmp_path: Path) -> None:
    """One that the user named may serve others too, and stays as it is."""
    need_compiler()
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(KvchatError, match=r"shared can be written by other users.*chmod go-w"):
        building.prepare_step(shared / "compiled", model, "fp32", ignore)
    assert shared.stat().st_mode & 0o777 == 0o777


@has_modes
def test_kvchats_usual_data_folder_is_closed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    root = find_paths().compiled
    root.parent.mkdir(parents=True)
    root.parent.chmod(0o775)
    make_model_folder(root, model)
    assert root.parent.stat().st_mode & 0o777 == 0o755


def test_where_there_are_no_modes_links_are_refused_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvchat.system.ownership.HAS_OWNERS", False)
    (tmp_path / "package").mkdir(mode=0o777)
    require_own(tmp_path / "package", tmp_path)
    (tmp_path / "package" / "step.so").symlink_to(tmp_path)
    with pytest.raises(KvchatError, match="neither a file nor a folder"):
        require_own(tmp_path / "package", tmp_path)


# ---- what is remembered of a failure -----------------------------------------------------------------------


class Making:
    """Stands in for the process that compiles; counts its runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], object] | None = None) -> None:
        self.runs, self.act = 0, act
        monkeypatch.setattr(building, "_make", self)

    def __call__(self, folder: Path, _weights: str, work: Path, identity: str, _report: object) -> None:
        self.runs += 1
        if self.act:
            self.act(folder)
        (work / "made").mkdir()
        (work / "made" / "step.so").write_text(identity)


def test_an_unsupported_shape_is_only_tried_again_with_force(
    root: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_compiler()

    def refuse_it(_folder: Path) -> None:
        raise RefusedError("The model can't be compiled: it has states")

    making = Making(monkeypatch, refuse_it)
    with pytest.raises(RefusedError):
        building.prepare_step(root, model, "fp32", ignore)
    refused = package_folder(root, model, "fp32")
    assert [path.name for path in refused.iterdir()] == [REFUSAL]
    assert is_decided(root, model, "fp32")
    for again in (
        lambda: building.prepare_step(root, model, "fp32", ignore),
        lambda: find_step(root, model, "fp32"),
    ):
        with pytest.raises(KvchatError, match="it has states"):
            again()
    assert making.runs == 1
    making.act = None
    assert building.prepare_step(root, model, "fp32", ignore, force=True) == refused
    assert [path.name for path in refused.iterdir()] == ["step.so"]
    assert (making.runs, refusal_of(root, model, "fp32")) == (2, "")
    building.prepare_step(root, model, "fp32", ignore)
    assert making.runs == 2
    building.prepare_step(root, model, "fp32", ignore, force=True)
    assert making.runs == 3


def test_a_refusal_belongs_to_the_compiler_and_its_version(
    root: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_folder(root, model)
    seen = set[Path]()
    for line in ("g++ 12.2", "g++ 13.1", "clang 17"):
        monkeypatch.setenv("CXX", program(tmp_path / line.replace(" ", "-"), f"echo '{line}'"))
        assert not is_decided(root, model, "fp32")
        seen.add(package_folder(root, model, "fp32"))
        refuse(package_folder(root, model, "fp32"), f"{line} refuses it")
        assert refusal_of(root, model, "fp32") == f"{line} refuses it"
    assert len(seen) == 3


def test_the_package_of_a_removed_compiler_is_found_if_it_is_the_only_one(
    root: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_compiler()
    make_model_folder(root, model)
    made = package_folder(root, model, "fp32")
    made.mkdir()
    monkeypatch.setenv("CXX", "no-such-compiler")
    another = package_folder(root, model, "fp32")
    assert another != made
    refuse(another, "refused")
    assert find_package(root, model, "fp32") == made
    shutil.rmtree(another)
    another.mkdir()
    assert find_package(root, model, "fp32") == another
    another.rmdir()
    assert building.prepare_step(root, model, "fp32", ignore) == made


@dataclass(frozen=True)
class Failure:
    """A real process that compiled, started in the model's folder, with a compiler that fails."""

    root: Path
    model: Path
    error: KvchatError
    ran: Path
    """Is there if a module that came with the model was imported."""


@pytest.fixture(scope="module")
def failure(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Failure:
    need_compiler()
    folder = tmp_path_factory.mktemp("failure")
    root, model, ran = folder / "data" / "compiled", folder / "model", folder / "ran"
    shutil.copytree(tiny_folder, model)
    (model / "kvchat").mkdir()
    for name in ("torch", "json", "random", "kvchat/__init__"):
        (model / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", program(folder / "compiler", "echo 'No space left on device' >&2; exit 1"))
        patch.chdir(model)
        with pytest.raises(KvchatError) as error:
            building.prepare_step(root, model, "fp32", ignore)
    return Failure(root, model, error.value, ran)


def test_a_failed_compiler_is_not_remembered(failure: Failure) -> None:
    assert str(failure.error).endswith("No space left on device")
    assert type(failure.error) is KvchatError
    assert not is_decided(failure.root, failure.model, "fp32")
    assert find_step(failure.root, failure.model, "fp32") is None
    assert {path.name for path in compiled_folder(failure.root, failure.model).iterdir()} <= BESIDE


def test_the_process_that_compiles_imports_no_module_of_the_model(failure: Failure) -> None:
    """`python -m` looks for modules in the current folder first."""
    assert not failure.ran.exists()


@pytest.mark.parametrize(("code", "kind"), [(building.REFUSED, RefusedError), (1, KvchatError)])
def test_the_exit_code_of_the_build_distinguishes_refusals_from_failures(
    root: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type
) -> None:
    need_compiler()
    monkeypatch.setattr("sys.executable", program(tmp_path / "python", f"echo 'some words' >&2; exit {code}"))
    with pytest.raises(KvchatError, match="The model can't be compiled: some words") as failure:
        building.prepare_step(root, model, "fp32", ignore)
    assert type(failure.value) is kind


def test_a_model_that_changes_while_it_is_compiled_gets_no_package(
    root: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_compiler()
    Making(monkeypatch, lambda folder: (folder / "config.json").write_text("{}"))
    with pytest.raises(KvchatError, match="was changed while it was compiled"):
        building.prepare_step(root, model, "fp32", ignore)
    assert find_package(root, model, "fp32") is None
    assert {path.name for path in compiled_folder(root, model).iterdir()} <= BESIDE
