"""Prints the largest classes and functions of the package: `python -m tests.support.sizes`.

Lines are counted from the first decorator to the last statement, docstrings included.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = 3
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Size:
    """A class or a function."""

    lines: int
    methods: int
    """Of a class; 0 for a function."""
    name: str
    module: str
    """Its path in the checkout."""


def sizes(source: str, path: str) -> Iterator[tuple[type[ast.stmt], Size]]:
    """(kind, size) of every class and function in a module; kind is `ClassDef` or `FunctionDef`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef | Function):
            continue
        begin = min((node.lineno, *(decorator.lineno for decorator in node.decorator_list)))
        is_class = isinstance(node, ast.ClassDef)
        methods = sum(isinstance(inner, Function) for inner in node.body) if is_class else 0
        lines = (node.end_lineno or node.lineno) - begin + 1
        yield ast.ClassDef if is_class else ast.FunctionDef, Size(lines, methods, node.name, path)


def largest() -> tuple[list[Size], list[Size]]:
    """(classes, functions) of the package, the largest first."""
    found: dict[type[ast.stmt], list[Size]] = {ast.ClassDef: [], ast.FunctionDef: []}
    for path in sorted((ROOT / "kvchat").rglob("*.py")):
        for kind, size in sizes(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))):
            found[kind].append(size)
    classes, functions = (sorted(each, key=lambda size: -size.lines) for each in found.values())
    return classes[:SHOWN], functions[:SHOWN]


def table() -> str:
    """The largest ones as a Markdown table."""
    classes, functions = largest()
    rows = [f"| class | `{size.name}` | {size.module} | {size.lines} | {size.methods} |" for size in classes]
    rows += [f"| function | `{size.name}` | {size.module} | {size.lines} | |" for size in functions]
    return "\n".join(("| | name | module | lines | methods |", "|---|---|---|---|---|", *rows))


def main() -> None:
    """Prints the table."""
    sys.stdout.write(table() + "\n")


if __name__ == "__main__":
    main()
