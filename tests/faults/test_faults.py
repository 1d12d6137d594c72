"""The list of kinds of faults names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
NAMED = re.compile(r"`(test_\w+)(\.py)?`")


def test_every_test_that_the_list_names_exists() -> None:
    files = list(TESTS.rglob("test_*.py"))
    functions = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text("utf-8"))}
    named = NAMED.findall((TESTS / "faults" / "README.md").read_text(encoding="utf-8"))
    missing = [
        name for name, ending in named if name not in (functions if not ending else {f.stem for f in files})
    ]
    assert named
    assert missing == []
