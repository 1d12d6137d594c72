"""The kernels compute the same with other compilers and instruction sets. `tests/kernels/run` builds all.

A build takes ten seconds or more, so only a few run here: this CPU's instructions with both compilers, and
aarch64 with int8 dot products in an emulator.
"""

import subprocess
from pathlib import Path

import pytest

from kvchat.engine.compiled.build import FLAGS
from kvchat.engine.compiled.package import fingerprint, kernel_sources

RUN = Path(__file__).parents[1] / "kernels" / "run"
MISSING = 77
"""Exit status where a compiler or the emulator isn't installed."""


@pytest.mark.parametrize("build", ["g++:native", "clang++:native", "g++:armv8.2-a+dotprod"])
def test_kernels_match_a_plain_fp64_reference(build: str) -> None:
    done = subprocess.run([RUN, build], capture_output=True, text=True, check=False)
    if done.returncode == MISSING:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"ok    {build}")


def test_the_builds_round_as_the_kernels_do() -> None:
    """Without -ffp-contract=off, results would depend on the batch size; the tests would not notice."""
    script = RUN.read_text(encoding="utf-8")
    for flag in ("-std=gnu++20", "-fno-math-errno", "-ffp-contract=off"):
        assert flag in FLAGS
        assert flag in script


def test_only_ops_includes_torch() -> None:
    operators, *headers = kernel_sources()
    assert operators.name == "ops.cpp"
    assert {"simd.h", "gemm.h", "attention.h"} <= {path.name for path in headers}
    for path in headers:
        included = [
            line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#include")
        ]
        assert included
        assert not [line for line in included if "torch" in line or "ATen" in line or "c10" in line]


def test_a_change_to_any_kernel_source_makes_another_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [tmp_path / path.name for path in kernel_sources()]
    for path, copy in zip(kernel_sources(), copies, strict=True):
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr("kvchat.engine.compiled.package.KERNELS_FOLDER", tmp_path)
    made = {fingerprint(tmp_path / "compiled", tmp_path / "model", "int4")}
    for copy in copies:
        copy.write_text(copy.read_text(encoding="utf-8") + "// changed\n", encoding="utf-8")
        made.add(fingerprint(tmp_path / "compiled", tmp_path / "model", "int4"))
    assert len(made) == len(copies) + 1
