"""`kvchat doctor`: what this machine has, and what the program does with it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvchat.cli import doctor
from kvchat.cli.doctor import (
    EngineProbe,
    Verdict,
    Wanted,
    compiled,
    compiler,
    cores,
    disk,
    folders,
    libraries,
    memory,
    probe_engine,
    processor,
    terminal,
    weights,
)
from kvchat.cli.main import cli
from kvchat.config.paths import Paths, find_paths
from kvchat.engine.compiled import package
from kvchat.engine.compiled.package import (
    make_model_folder,
    package_folder,
    record_digests,
    refuse,
)
from kvchat.engine.model.dtypes import automatic_precision, weights_of
from kvchat.models.cards import DEFAULT_MODEL
from kvchat.models.resolve import GGUF_LINK, MARKER

GB = 1_000_000_000


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return find_paths(tmp_path / "data")


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine can start, without seconds of imports in a child process."""
    monkeypatch.setattr(doctor, "probe_engine", lambda _device: EngineProbe("cpu"))


@pytest.fixture
def cxx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that says its version."""
    program = tmp_path / "my-c++"
    program.write_text("#!/bin/sh\necho my-c++ 1.2\necho more\n")
    program.chmod(0o700)
    monkeypatch.setenv("CXX", str(program))
    return program


def prepared(paths: Paths, name: str = DEFAULT_MODEL) -> Path:
    """A model's folder with a marker and no weights."""
    folder = paths.models / name
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("{}")
    return folder


def add_package(paths: Paths, folder: Path, precision: str, words: str) -> Path:
    """What looks like a compiled step of that precision."""
    make_model_folder(paths.compiled, folder)
    made = package_folder(paths.compiled, folder, weights_of(folder, precision))
    made.mkdir()
    (made / "package.json").write_text(json.dumps({"weights": words}))
    record_digests(made)
    return made


# ---- the command ----------------------------------------------------------------------------------------


def test_it_looks_at_everything_and_says_what_it_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_probe: None
) -> None:
    monkeypatch.setattr(doctor, "memory", lambda *_: memory(8 * GB, 16 * GB, None))  # it changes all the time
    monkeypatch.setattr(doctor, "disk", lambda *_: doctor.Finding("disk", "80 GB free", "enough."))
    result = CliRunner().invoke(cli, ["doctor", "--json", "--data-dir", str(tmp_path)])
    found = {finding["name"]: finding for finding in json.loads(result.stdout)}
    names = ["processor", "cores", "memory", "compiler", "libraries", "model"]
    names += ["compiled", "disk", "folders", "terminal"]
    assert list(found) == names
    assert all(finding["means"].endswith(".") and finding["found"] for finding in found.values())
    assert result.exit_code == 0
    text = CliRunner().invoke(cli, ["doctor", "--data-dir", str(tmp_path)]).stdout
    for finding in found.values():
        assert finding["name"] in text
        assert finding["means"] in text


def test_every_setting_that_decides_is_read_from_flags_variables_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_probe: None
) -> None:
    seen: list[Wanted] = []

    def examine(_paths: Paths, wanted: Wanted) -> tuple[()]:
        seen.append(wanted)
        return ()

    monkeypatch.setattr(doctor, "examine", examine)
    monkeypatch.setenv("KVCHAT_KV_BUDGET", "2GB")
    flags = ["--precision", "int8", "--device", "cpu", "--threads", "3", "--kv-disk", "1GB", "-m", "mine"]
    CliRunner().invoke(cli, ["doctor", *flags], default_map={"doctor": {"threads": 2, "kv_disk": "0"}})
    CliRunner().invoke(cli, ["doctor"], default_map={"doctor": {"threads": 2, "kv_disk": "0"}})
    assert seen == [
        Wanted("mine", "int8", "cpu", 3, 2 * GB, GB),
        Wanted(DEFAULT_MODEL, "auto", "auto", 2, 2 * GB, 0),
    ]


def test_something_missing_is_exit_code_1(tmp_path: Path, no_probe: None) -> None:
    result = CliRunner().invoke(cli, ["doctor", "-m", "nothing", "--data-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "✗ model      nothing" in result.stdout
    assert "There is no model 'nothing'" in result.stdout


# ---- the machine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "precision", "verdict", "words"),
    [
        ({"avx2", "avx512f", "avx512_bf16", "amx_tile"}, "bf16", Verdict.GOOD, "AMX multiplies"),
        ({"avx2", "avx512f", "avx512_bf16"}, "bf16", Verdict.GOOD, "The processor computes in bf16"),
        (
            {"avx2"},
            "fp32",
            Verdict.SLOW,
            "a model that is not compiled computes in fp32, in twice the memory",
        ),
        ({"asimd", "bf16"}, "bf16", Verdict.GOOD, "A model that is not compiled computes in bf16."),
        (set(), "fp32", Verdict.SLOW, "A model that is not compiled computes in fp32"),
    ],
)
def test_the_processor(flags: set[str], precision: str, verdict: Verdict, words: str) -> None:
    finding = processor(flags, precision)
    assert finding.verdict is verdict
    assert words in finding.means


def test_the_precision_is_the_one_that_the_program_chooses(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, no_probe: None
) -> None:
    for precision in ("bf16", "fp32"):
        monkeypatch.setattr(doctor, "automatic_precision", lambda _device, said=precision: said)
        first = next(iter(doctor.examine(paths, Wanted())))
        assert f"computes in {precision}" in first.means


@pytest.mark.parametrize(
    ("physical", "threads", "verdict", "words"),
    [
        (4, None, Verdict.GOOD, "the model takes 4 threads; --threads gives it fewer."),
        (4, 1, Verdict.GOOD, "the model takes 1 thread, as --threads says."),
        (4, 8, Verdict.SLOW, "--threads 8 is more than there are cores"),
        (1, None, Verdict.SLOW, "typing may lag"),
    ],
)
def test_the_cores(physical: int, threads: int | None, verdict: Verdict, words: str) -> None:
    finding = cores(physical, threads)
    assert (finding.found, finding.verdict) == (str(physical), verdict)
    assert words in finding.means


@pytest.mark.parametrize(
    ("free", "budget", "verdict", "words"),
    [
        (
            8 * GB,
            None,
            Verdict.GOOD,
            "a quarter of what the model leaves (below 2.00 GB); --kv-budget sets it.",
        ),
        (8 * GB, 3 * GB, Verdict.GOOD, "KV caches may take 3.00 GB (--kv-budget)."),
        (8 * GB, 9 * GB, Verdict.SLOW, "more than is free"),
        (GB, None, Verdict.SLOW, "close something first"),
    ],
)
def test_the_memory(free: int, budget: int | None, verdict: Verdict, words: str) -> None:
    finding = memory(free, 16 * GB, budget)
    assert finding.verdict is verdict
    assert finding.found.endswith("free of 16.00 GB")
    assert words in finding.means


def test_the_compiler_is_the_one_that_is_called(cxx: Path) -> None:
    finding = compiler()
    assert (finding.verdict, finding.found) == (Verdict.GOOD, f"{cxx}: my-c++ 1.2")
    cxx.write_text("#!/bin/sh\nexit 1\n")
    package._version_of.cache_clear()
    finding = compiler()
    assert (finding.verdict, finding.found) == (Verdict.SLOW, str(cxx))
    assert f"`{cxx} --version` fails" in finding.means
    cxx.unlink()
    finding = compiler()
    assert (finding.verdict, finding.found) == (Verdict.SLOW, f"no {cxx}")
    assert "`unset CXX`" in finding.means


def test_another_compiler_than_the_one_that_is_called_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("clang++", "c++"):
        (tmp_path / name).write_text("#!/bin/sh\necho other\n")
        (tmp_path / name).chmod(0o700)
    assert (compiler().verdict, compiler().found) == (Verdict.SLOW, "no g++")
    assert "`apt install g++`" in compiler().means
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compiler().found.startswith(str(tmp_path / "clang++"))


def test_libraries_are_imported_by_a_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_engine("cpu")
    assert probe == EngineProbe("cpu")
    assert libraries(probe).verdict is Verdict.GOOD
    assert "computes on cpu" in libraries(probe).means
    said = "Traceback …\nkvchat.errors.KvchatError: There is no device cuda that torch can use here.\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr("subprocess.run", lambda *_args, **_options: failed)
    finding = libraries(probe_engine("cuda"))
    assert finding.verdict is Verdict.BAD
    assert finding.means == "the engine can't start: There is no device cuda that torch can use here."
    failed.stderr = "Traceback …\nImportError: libgomp.so.1: cannot open shared object file\n"
    assert "libgomp.so.1" in libraries(probe_engine("auto")).means


def test_a_library_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    assert (libraries(EngineProbe("cpu")).verdict, libraries(EngineProbe("cpu")).found) == (
        Verdict.BAD,
        "no torch",
    )


# ---- the model ------------------------------------------------------------------------------------------


def test_the_model_here_and_not_here(paths: Paths, tmp_path: Path) -> None:
    finding = weights(paths, DEFAULT_MODEL)
    assert f"`kvchat models pull {DEFAULT_MODEL}`, or the first start, fetches it (92.9 MB)" in finding.means
    prepared(paths)
    assert weights(paths, DEFAULT_MODEL).verdict is Verdict.GOOD
    (tmp_path / "my model.gguf").write_bytes(b"GGUF")
    finding = weights(paths, str(tmp_path / "my model.gguf"))
    assert (
        f"`kvchat models pull '{tmp_path}/my model.gguf'`, or the first start, converts it" in finding.means
    )


def test_what_computes_the_model_is_what_was_compiled_of_it(paths: Paths, cxx: Path) -> None:
    assert compiled(paths, Wanted(), "cpu").means.startswith(
        f"`kvchat models prepare {DEFAULT_MODEL}` fetches"
    )
    folder = prepared(paths)
    (folder / GGUF_LINK).touch()
    eager = f"transformers computes it in {automatic_precision('cpu')}"
    finding = compiled(paths, Wanted(), "cpu")
    assert (finding.verdict, finding.found) == (Verdict.SLOW, "not yet")
    assert finding.means.startswith(f"{eager} until the next start of the chat, or `kvchat models prepare")
    made = add_package(paths, folder, "auto", "int4, head int8")
    finding = compiled(paths, Wanted(), "cpu")
    assert (finding.verdict, finding.found) == (Verdict.GOOD, "int4, head int8")
    (made / "package.json").write_text("{}")
    finding = compiled(paths, Wanted(), "cpu")
    assert (finding.verdict, finding.found) == (Verdict.SLOW, "can't be used")
    assert "is damaged: package.json is not what was built" in finding.means
    assert finding.means.endswith(f"Until then {eager}.")


def test_each_precision_has_compiled_code_of_its_own(paths: Paths, cxx: Path) -> None:
    folder = prepared(paths)
    add_package(paths, folder, "int8", "int8")
    assert compiled(paths, Wanted(precision="int8"), "cpu").found == "int8"
    finding = compiled(paths, Wanted(precision="int4"), "cpu")
    assert (finding.verdict, finding.found) == (Verdict.BAD, "no")
    assert "Weights in int4 need a compiled step" in finding.means
    finding = compiled(paths, Wanted(precision="fp32"), "cpu")
    prepare = f"`kvchat models prepare {DEFAULT_MODEL} --precision fp32`"
    assert finding.means == f"transformers computes it in fp32; {prepare} makes it several times faster."


def test_compiled_code_that_may_not_be_loaded_is_not_what_computes(paths: Paths, cxx: Path) -> None:
    folder = prepared(paths)
    place = add_package(paths, folder, "auto", "fp32").parent
    place.chmod(0o777)
    finding = compiled(paths, Wanted(), "cpu")
    assert (finding.verdict, finding.found) == (Verdict.SLOW, "can't be used")
    assert "can be written by other users" in finding.means


def test_a_model_that_can_not_be_compiled_says_why(paths: Paths, cxx: Path) -> None:
    folder = prepared(paths)
    make_model_folder(paths.compiled, folder)
    refuse(package_folder(paths.compiled, folder, weights_of(folder, "auto")), "It has states.")
    finding = compiled(paths, Wanted(), "cpu")
    assert (
        finding.means
        == f"It has states. Until then transformers computes it in {automatic_precision('cpu')}."
    )


def test_other_devices_use_no_compiled_code(paths: Paths) -> None:
    add_package(paths, prepared(paths), "auto", "fp32")
    finding = compiled(paths, Wanted(), "cuda")
    assert (finding.verdict, finding.found) == (Verdict.GOOD, "not used on cuda")
    assert "transformers computes it in bf16 on cuda" in finding.means
    assert compiled(paths, Wanted(precision="int4"), "cuda").verdict is Verdict.BAD
    assert compiled(paths, Wanted(), "").found == "not known"


def test_without_a_compiler_the_model_is_not_compiled(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nothing/g++")
    prepared(paths)
    assert "compiling needs a C++ compiler: see compiler." in compiled(paths, Wanted(), "cpu").means


# ---- folders and the terminal ---------------------------------------------------------------------------


def test_the_disk_of_a_folder_that_is_not_there_yet(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = disk(paths, 4 * GB)
    assert finding.found.endswith("free")
    assert "saved caches take 4.00 GB at most" in finding.means
    assert "their caches are not" in disk(paths, 0).means
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 1 << 62)
    assert disk(paths, 1 << 61).verdict is Verdict.SLOW
    assert disk(paths, 0).verdict is Verdict.GOOD


def test_a_folder_that_can_not_be_written_is_told_and_what_to_do(tmp_path: Path) -> None:
    assert folders(find_paths(tmp_path / "not" / "yet")).verdict is Verdict.GOOD
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    finding = folders(find_paths(tmp_path / "file" / "data"))
    assert finding.verdict is Verdict.BAD
    assert finding.found == f"{tmp_path / 'file'}: Not a directory"
    assert finding.means.endswith("make it writable, or choose another with --data-dir.")
    (tmp_path / "models").touch()  # the folder itself is fine
    assert folders(find_paths(tmp_path)).found.startswith(str(tmp_path / "models"))


@pytest.mark.parametrize(
    ("environment", "columns", "verdict", "found", "words"),
    [
        (
            {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
            120,
            Verdict.GOOD,
            "xterm-256color, true colour, 120×24",
            "the mouse works",
        ),
        ({"TERM": "dumb"}, 80, Verdict.SLOW, "dumb, no colours, 80×24", "--plain"),
        ({}, 0, Verdict.SLOW, "none, 16 colours", "--plain"),
        ({"TERM": "xterm", "NO_COLOR": ""}, 80, Verdict.GOOD, "xterm, 16 colours, 80×24", "NO_COLOR is set"),
        ({"TERM": "xterm-256color"}, 40, Verdict.SLOW, "xterm-256color, 256 colours, 40×24", "60 columns"),
    ],
)
def test_the_terminal(
    environment: Mapping[str, str], columns: int, verdict: Verdict, found: str, words: str
) -> None:
    finding = terminal(environment, os.terminal_size((columns, 24)))
    assert (finding.verdict, finding.found) == (verdict, found)
    assert words in finding.means
