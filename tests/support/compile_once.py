"""Stands in for the C++ compiler while tests run: most of what a model is compiled with is the same for all.

Run as the compiler. The kernels, torch's precompiled headers and its questions what the CPU can do are made
once; the code of a model itself, and everything else, is handed to the real one.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCES = (".cpp", ".h")
OWN = {"-c", "-E"}
"""Flags with which a model's own code is compiled, and with which nothing is."""


def install(folder: Path, compiler: str) -> Path:
    """Writes a program of that compiler's name into `folder`, which keeps what it made there."""
    program = folder / Path(compiler).name
    program.write_text(
        f"#!{sys.executable}\n{CALL.format(path=str(Path(__file__).parents[2]), real=compiler)}"
    )
    program.chmod(0o700)
    return program


CALL = """\
import sys
sys.path.insert(0, {path!r})
from tests.support.compile_once import compile_once
compile_once({real!r}, sys.argv[1:], __file__)
"""


def compile_once(real: str, arguments: Sequence[str], program: str) -> None:
    """Ends as the real compiler would."""
    sources = [Path(argument) for argument in arguments if argument.endswith(SOURCES)]
    if len(sources) != 1 or "-o" not in arguments or OWN & {*arguments}:
        os.execv(real, [real, *arguments])
    target = Path(arguments[arguments.index("-o") + 1])
    places = {str(sources[0]), str(target)}
    same = "\0".join("" if argument in places else argument for argument in arguments)
    headers = sorted(sources[0].parent.glob("*.h")) if sources[0].suffix == ".cpp" else []
    content = b"".join(path.read_bytes() for path in (sources[0], *headers))
    made = Path(program).with_name(hashlib.sha256(same.encode() + content).hexdigest())
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
        if not made.exists():
            if code := subprocess.run([real, *arguments], check=False).returncode:
                sys.exit(code)
            shutil.copy(target, made.with_suffix(".half"))
            made.with_suffix(".half").rename(made)
    shutil.copy(made, target)
