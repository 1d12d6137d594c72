"""Stands in for the C++ compiler while tests run: `kernels.cpp` takes it long, and never changes meanwhile.

Run as the compiler; everything but the kernels is handed to the real one.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE = "kernels.cpp"


def install(folder: Path, compiler: str) -> Path:
    """Writes a program of that compiler's name into `folder`, which keeps what it made there."""
    program = folder / Path(compiler).name
    program.write_text(
        f"#!{sys.executable}\n{CALL.format(path=str(Path(__file__).parents[1]), real=compiler)}"
    )
    program.chmod(0o700)
    return program


CALL = """\
import sys
sys.path.insert(0, {path!r})
from tests.compile_once import compile_once
compile_once({real!r}, sys.argv[1:], __file__)
"""


def compile_once(real: str, arguments: Sequence[str], program: str) -> None:
    """Ends as the real compiler would."""
    if not any(argument.endswith(SOURCE) for argument in arguments):
        os.execv(real, [real, *arguments])
    target = Path(arguments[arguments.index("-o") + 1])
    same = "\0".join(argument for argument in arguments if argument != str(target))
    made = Path(program).with_name(hashlib.sha256(same.encode()).hexdigest())
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
        if not made.exists():
            if code := subprocess.run([real, *arguments], check=False).returncode:
                sys.exit(code)
            shutil.copy(target, made.with_suffix(".half"))
            made.with_suffix(".half").rename(made)
    shutil.copy(made, target)
