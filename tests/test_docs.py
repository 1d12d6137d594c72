"""The pages: generated blocks are up to date, links and paths lead somewhere, figures have a command."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import generated_docs
from tests.support.generated_docs import BLOCK, BLOCKS, COMMAND, ROOT, SNAPSHOTS, pages, written

README = ROOT / "README.md"
README_LINES = 120
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:kvchat|tests|docs|models)/[\w./-]*)`")
HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"\d (?:s|ms|MB|GB|tok/s|×|tokens (?:per|a) second)(?!\w)")
TARGET = re.compile(r"(?:^|`|: )make ([a-z]+)", re.MULTILINE)
AUTOMATION = (".ci/run", ".github/workflows/ci.yml", ".pre-commit-config.yaml")
MEASURING = re.compile(r"`(?:kvchat|python -m tests)[^`\n]*`|^\$ kvchat", re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", pages(), ids=name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings: lower case, without punctuation, hyphens for spaces."""
    headings = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Links to files and headings that there are not; those to other sites are not followed."""
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path
        headings = text if not path else text_of(file) if anchor and file.is_file() else ""
        if not file.exists() or (anchor and anchor not in anchors(headings)):
            yield target


def sections_without_command(text: str) -> Iterator[str]:
    """Headings of sections that have figures and no command that gives them."""
    for section in re.split(r"(?m)^(?=## )", text)[1:]:
        if FIGURE.search(section) and not MEASURING.search(section):
            yield section.partition("\n")[0]


@every_page
def test_generated_blocks_are_those_of_the_program(page: Path) -> None:
    now = written(text_of(page), unchanged=SNAPSHOTS)
    assert now == text_of(page), f"{name(page)} is not up to date: run `{COMMAND}`"


def test_every_generated_block_stands_on_a_page() -> None:
    found = {block["name"] for page in pages() for block in BLOCK.finditer(text_of(page))}
    assert found == set(BLOCKS)


def test_a_changed_block_is_written_again_and_nothing_else() -> None:
    text = "before\n<!-- generated: keys -->\nold\n<!-- end of keys -->\nafter\n"
    now = written(text)
    assert now.startswith("before\n<!-- generated: keys -->\n| key | command |")
    assert now.endswith("|\n<!-- end of keys -->\nafter\n")
    assert written(now) == now


def test_the_block_of_commands_escapes_bars_and_names_the_flags_of_settings() -> None:
    text = generated_docs.commands()
    assert r"| `--format [md\|json\|html]` | [default: md] |" in text
    assert "Settings as flags: `--data-dir`." in text
    # `bench` and `models prepare` have flags of their own with the names of settings
    assert "| `--kv TEXT` |" in text
    assert r"| `--precision [auto\|fp32\|bf16\|int8\|int4]` | [default: auto] |" in text


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page, text_of(page))) == []


def test_a_broken_link_is_found() -> None:
    links = "[a](README.md) [b](gone.md) [c](#here) [d](#there) [e](https://example.org)\n# Here\n"
    assert list(broken_links(README, links)) == ["gone.md", "#there"]


@every_page
def test_paths_in_code_exist(page: Path) -> None:
    assert [path for path in PATH.findall(text_of(page)) if not (ROOT / path).exists()] == []


def test_targets_of_make_that_pages_and_automation_name_exist() -> None:
    existing = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    named = {
        target
        for file in (*pages(), *(ROOT / each for each in AUTOMATION))
        for target in TARGET.findall(text_of(file))
    }
    assert {"ci", "test", "kernels", "types"} <= named
    assert named - existing == set()


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= README_LINES


@pytest.mark.parametrize("page", [p for p in pages() if p.parent.name == "docs"] + [README], ids=name)
def test_sections_with_figures_name_the_command_that_gives_them(page: Path) -> None:
    assert list(sections_without_command(text_of(page))) == []


def test_a_figure_without_its_command_is_found() -> None:
    text = "# Page\n## One\n3 MB\n## Two\n3 MB: `kvchat bench`\n## Three\n3 models\n"
    assert list(sections_without_command(text)) == ["## One"]
