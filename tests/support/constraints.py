"""Writes tests/constraints.txt: `python -m tests.support.constraints`, or `make constraints`.

pip resolves what CI installs (kvchat, its test dependencies and the build backend) without installing it.
Versions that the file has stay; what is missing is added, what nobody needs goes. `--upgrade` takes the
newest versions instead.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "constraints.txt"
HEADER = "# Exact versions of what CI installs; `make constraints` writes this file.\n"


def resolved(*, upgrade: bool) -> list[str]:
    """`name==version` of every package, without local versions such as `+cpu`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    constraints = [] if upgrade else ["-c", str(FILE)]
    wanted = ["-e", f"{ROOT}[test]", *project["build-system"]["requires"]]
    done = subprocess.run(
        [*pip, *constraints, *wanted, "--report", "-"], stdout=subprocess.PIPE, text=True, check=True
    )
    found = (item["metadata"] for item in json.loads(done.stdout)["install"])
    versions = {each["name"]: each["version"].partition("+")[0] for each in found}
    return [
        f"{name}=={versions[name]}"
        for name in sorted(versions, key=str.lower)
        if name != project["project"]["name"]
    ]


def main() -> None:
    """Writes the file."""
    lines = resolved(upgrade="--upgrade" in sys.argv[1:])
    FILE.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
