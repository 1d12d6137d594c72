"""What is installed: constraints for everything CI installs, and what the packages carry."""

import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from importlib.resources import files
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = {
    canonicalize_name(name): pin
    for line in (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for name, _, pin in [line.partition("==")]
}


def needed(wanted: list[str], extra: str, seen: set[str]) -> Iterator[str]:
    """Names of the packages that these requirements install here, and of those that they need in turn."""
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        package = canonicalize_name(requirement.name)
        for inner in requirement.extras or {""}:
            if (key := f"{package}[{inner}]") not in seen:
                seen.add(key)
                yield package
                yield from needed(requires(package) or [], inner, seen)


def test_everything_that_ci_installs_has_a_constraint() -> None:
    """`make constraints` writes the file."""
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    found = set(needed(wanted, "", set()))
    assert len(found) > len(wanted)
    assert found - set(CONSTRAINTS) == set(), "run `make constraints`"


def test_constraints_fit_the_requirements() -> None:
    project = PROJECT["project"]
    wanted = [
        *PROJECT["build-system"]["requires"],
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    for requirement in map(Requirement, wanted):
        assert CONSTRAINTS[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_package_says_that_it_is_typed() -> None:
    assert files("kvchat").joinpath("py.typed").is_file()


def test_what_the_source_package_includes_exists() -> None:
    assert [
        name
        for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
        if not (ROOT / name).exists()
    ] == []
