"""Converts HTML answers to Markdown."""

from html.parser import HTMLParser

BLOCKS = {"p", "div", "ul", "ol", "table", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "hr"}
AROUND = {"strong": "**", "b": "**", "em": "*", "i": "*"}
NOT_READ = {"script", "style", "head"}


def markdown_of(html: str) -> str:
    """The text of the HTML with paragraphs, headings, lists, emphasis and code."""
    page = _Page()
    page.feed(html)
    page.close()
    lines = "".join(page.pieces).strip().split("\n")
    kept = [line for n, line in enumerate(lines) if line.strip() or (n and lines[n - 1].strip())]
    return "\n".join(kept)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._lists: list[int | None] = []
        """Number of the last item of each open list; None for one with bullets."""
        self._code = 0
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in NOT_READ
        if tag in ("ul", "ol"):
            self._lists.append(0 if tag == "ol" else None)
        if tag == "li":
            self.pieces.append(f"\n{'  ' * (len(self._lists) - 1)}{self._bullet()} ")
        elif tag == "pre":
            self._code += 1
            self.pieces.append("\n\n```\n")
        elif tag in BLOCKS and not (self._lists and tag == "p"):
            self.pieces.append("\n\n" + "#" * int(tag[1]) + " " if tag[0] == "h" and tag != "hr" else "\n\n")
        elif tag in ("br", "tr"):
            self.pieces.append("\n")
        elif tag in ("td", "th"):
            self.pieces.append(" | ")
        elif tag == "code" and not self._code:
            self.pieces.append("`")
        else:
            self.pieces.append(AROUND.get(tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in NOT_READ and self._hidden > 0
        if tag in ("ul", "ol") and self._lists:
            self._lists.pop()
        if tag == "pre" and self._code:
            self._code -= 1
            self.pieces.append("\n```\n\n")
        elif tag in BLOCKS and not (self._lists and tag == "p"):
            self.pieces.append("\n\n")
        elif tag == "code" and not self._code:
            self.pieces.append("`")
        else:
            self.pieces.append(AROUND.get(tag, ""))

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data if self._code else " ".join(data.split("\n")))

    def _bullet(self) -> str:
        if not self._lists or self._lists[-1] is None:
            return "-"
        self._lists[-1] += 1
        return f"{self._lists[-1]}."
