"""Exports conversations as Markdown, JSON and HTML.

Markdown and JSON can be imported again (see `importers`) without loss of text; JSON also has statistics,
token ids and all branches. Markdown and HTML have the shown branch and the number of other messages. In HTML
all text of model and user is escaped.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from kvchat.chat.conversation import Conversation, Message
from kvchat.chat.reasoning import inner_thinking
from kvchat.errors import KvchatError, reason
from kvchat.text import clean, one_line
from kvchat.validation.plain_json import write_json

VERSION = 1
"""Version of the JSON format; increased by incompatible changes."""
NOT_SENT = "not sent"
"""Label of a question that is in no prompt."""
MARKER = re.compile(r"<!-- (\\*)kvchat:")
"""Marker before a message in Markdown. In a message's text it is escaped by one more backslash."""
CLOSED = "<!-- kvchat:closed -->"
"""Marker after a code fence that the export closed and the message left open."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content security policy: images in answers are not loaded, because a request would reveal the reader."""
STYLE = """\
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
article { border-left: 4px solid #8888; padding: .1rem 1rem; margin: 1.2rem 0; }
article.user { border-color: #b58900; white-space: pre-wrap; }
article.assistant { border-color: #268bd2; }
h2, footer, summary { font-size: .8rem; color: #888; font-weight: 600; margin: .3rem 0; }
pre { overflow-x: auto; padding: .7rem; background: #8881; }
table { border-collapse: collapse; } td, th { border: 1px solid #8886; padding: .2rem .6rem; }
.thinking { white-space: pre-wrap; font-style: italic; color: #888; }
"""


def other_branches(conversation: Conversation) -> str:
    """A sentence about messages that a file with the shown branch lacks; empty if there are none."""
    match len(conversation.other_branches):
        case 0:
            return ""
        case 1:
            return "1 message on another branch is not in this file; a JSON export has it."
        case count:
            return f"{count:,} messages on other branches are not in this file; a JSON export has them."


def to_json(conversation: Conversation) -> str:
    """One JSON object with everything about a conversation, including statistics and token ids."""
    whole = {"kvchat": VERSION, "conversations": [asdict(conversation)]}
    return write_json(whole, indent=1, readable=True)


def to_markdown(conversation: Conversation) -> str:
    """A Markdown document, with the fields that an import needs in comments."""
    separate = ("id", "messages", "other_branches")
    about = {key: value for key, value in asdict(conversation).items() if key not in separate}
    parts = [f"# {one_line(conversation.title) or 'untitled'}\n\n{_marker('conversation', about)}\n"]
    if missing := other_branches(conversation):
        parts.append(f"*{missing}*\n")
    for message in conversation.messages:
        head: dict[str, object] = {"created_at": message.created_at, "finish_reason": message.finish_reason}
        head |= {"not_sent": True} if message.not_sent else {}
        you = f"You ({NOT_SENT})" if message.not_sent else "You"
        author = you if message.role == "user" else one_line(conversation.model) or "Answer"
        text = MARKER.sub(r"<!-- \1\\kvchat:", message.raw)
        parts.append(f"{_marker(message.role, head)}\n### {author}\n\n{text}{_closing(text)}\n")
    return "\n".join(parts)


def to_html(conversation: Conversation) -> str:
    """A self-contained page that loads nothing and runs no scripts."""
    title = escape(one_line(conversation.title) or "untitled")
    system = _section("system", "system prompt", escape(clean(conversation.system_prompt)))
    messages = "\n".join(_message_html(message, conversation.model) for message in conversation.messages)
    missing = other_branches(conversation)
    return (
        '<!doctype html>\n<html><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
        f"{system if conversation.system_prompt else ''}{messages}\n"
        f"{f'<footer>{missing}</footer>' if missing else ''}</body></html>\n"
    )


FORMATS: Mapping[str, Callable[[Conversation], str]] = {
    "md": to_markdown,
    "json": to_json,
    "html": to_html,
}


OTHER_ENDINGS = {"markdown": "md", "htm": "html"}


def export(conversation: Conversation, where: str, folder: Path) -> Path:
    """Writes a conversation to a new file; returns its path.

    Args:
        where: a file name with the extension of a format, or a format alone, which takes the title as name.
        folder: base of a relative name.

    Raises:
        KvchatError: no such format, the file exists, or it can't be written.
    """
    name = f"{file_name(conversation.title)}.{where}" if where in FORMATS else where
    path = folder / Path(name).expanduser()
    ending = path.suffix.removeprefix(".").lower()
    if (write := FORMATS.get(OTHER_ENDINGS.get(ending, ending))) is None:
        raise KvchatError(f"{one_line(name)} has no known extension; the formats are .md, .json and .html.")
    number = 2
    while where in FORMATS and path.exists():
        path = path.with_stem(f"{file_name(conversation.title)}-{number}")
        number += 1
    try:
        with path.open("x", encoding="utf-8", errors="replace", newline="") as file:
            file.write(write(conversation))
    except FileExistsError as error:
        raise KvchatError(f"{one_line(str(path))} exists already; choose another name.") from error
    except (OSError, ValueError) as error:
        raise KvchatError(f"{one_line(str(path))} can't be written: {reason(error)}.") from error
    return path


def file_name(title: str) -> str:
    """A file name made from a title, without extension."""
    return re.sub(r"[^\w]+", "-", one_line(title)).strip("-").lower()[:60] or "conversation"


def _marker(what: str, about: Mapping[str, Any]) -> str:
    """A marker comment with JSON fields, escaped so that they can't end the comment."""
    fields = write_json(about, readable=True).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<!-- kvchat:{what} {fields} -->"


def _closing(text: str) -> str:
    """The closing of a code fence that a message left open; otherwise the rest of the file would be code."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    last = next(iter(MarkdownIt().parse("\n".join(lines))[-1:]), None)
    if last is None or last.type != "fence" or last.map is None:
        return ""
    first, end = last.map
    closing = rf" {{0,3}}{re.escape(last.markup[0])}{{{len(last.markup)},}}[ \t]*\Z"
    is_closed = end - first > 1 and re.match(closing, lines[end - 1])
    return "" if is_closed else f"\n{last.markup}\n{CLOSED}"


def _message_html(message: Message, model: str) -> str:
    if message.role == "user":
        you = f"you · {NOT_SENT}" if message.not_sent else "you"
        return _section("user", you, escape(clean(message.text)))
    thought = inner_thinking(message.thinking)
    thinking = (
        "<details><summary>thinking</summary>"
        f'<div class="thinking">{escape(clean(thought))}</div></details>\n'
        if thought
        else ""
    )
    # the renderer escapes raw HTML and drops links with unsafe schemes
    markdown = MarkdownIt("gfm-like", {"html": False}).render(clean(message.text))
    return _section("assistant", escape(one_line(model) or "answer"), thinking + markdown)


def _section(kind: str, head: str, body: str) -> str:
    return f'<article class="{kind}"><h2>{head}</h2>{body}</article>\n'
