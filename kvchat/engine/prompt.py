"""A conversation becomes token ids: the model's own chat template, with the generated ids spliced in.

Two rules hold here. The ids that a model generated are the truth: encoding their text again gives other ids
for one reply in ten or more, and the cache would be lost. And what somebody typed is text: a typed
`<|im_end|>` must not end a message.

It knows templates and tokenizers; it refuses to know the cache.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from jinja2 import TemplateError
from tokenizers import Tokenizer

from kvchat.contract import PromptMessage
from kvchat.engine.chat_template import ChatTemplate
from kvchat.errors import KvchatError

SPLIT = "\ufdd0"
"""Put inside a typed control token so that it is text to the tokenizer. Unicode reserves this code point for
use inside a program; it never reaches the model."""
MARK = "\ufdd1"
"""Stands around a message's number where the skeleton of a conversation has that message's text."""
HALF = "\ufffd"
"""What the bytes of an incomplete character decode to."""
DATE = re.compile(r"""strftime_now\(\s*(['"])(?P<format>.*?)\1\s*\)""")
"""How templates ask for the date: the name is transformers' own."""
ENCODED_RUNS = 4096
"""Template and message texts whose ids are remembered, so that a turn encodes only its new text."""


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Where a message's text stands in the rendered conversation, in characters."""

    start: int
    end: int
    message: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model reads it."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    """For each message, the number of tokens up to the end of its text; where a template did something else
    with a text, the end of the message before it."""


class Renderer:
    """Renders conversations for one model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, fingerprint: str) -> None:
        self._tokenizer = tokenizer
        self._chat = template
        self._fingerprint = fingerprint
        controls = sorted(template.controls, key=len)
        self._control = re.compile("|".join(re.escape(c) for c in reversed(controls)) or r"(?!)")
        self._encode_run = lru_cache(maxsize=ENCODED_RUNS)(self._encode_uncached)
        self._decode_answer = lru_cache(maxsize=ENCODED_RUNS)(self._decode_uncached)
        self._vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
        self._delimiters = {tokenizer.token_to_id(control) for control in template.delimiters}

    def render(self, messages: Sequence[PromptMessage], today: str = "") -> Rendered:
        """The whole conversation, ending where the answer starts or, if it was begun, goes on.

        Args:
            today: the date that the template sees, ISO 8601; empty for now.

        Raises:
            KvchatError: the template refuses the conversation.
        """
        texts = [self._as_text(message.text) for message in messages]
        rendered = self._template(messages, texts, today)
        skeleton = self._template(messages, [f"{MARK}{i}{MARK}" for i in range(len(messages))], today)
        return self._ids(messages, texts, rendered, find_texts(rendered, skeleton, texts))

    def count(self, text: str) -> int:
        """Tokens of a typed text by itself."""
        pieces = self._as_text(text).split(SPLIT)
        return sum(len(self._tokenizer.encode(piece, add_special_tokens=False).ids) for piece in pieces)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, control tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _ids(
        self,
        messages: Sequence[PromptMessage],
        texts: Sequence[str],
        rendered: str,
        spans: Sequence[TextSpan],
    ) -> Rendered:
        """Generated ids where they stand for exactly the rendered text, encoded text everywhere else."""
        ids: list[int] = []
        ends = [0] * len(messages)
        position, waiting = 0, list[TextSpan]()
        for span in spans:
            message = messages[span.message]
            whole = rendered[span.start : span.end] == texts[span.message]
            if whole and self._generated(message):
                self._add_run(ids, ends, rendered, range(position, span.start), waiting)
                ids.extend(message.token_ids)
                ends[span.message] = len(ids)
                position = span.end
                waiting.clear()
            else:
                waiting.append(span)
        self._add_run(ids, ends, rendered, range(position, len(rendered)), waiting)
        for index in range(1, len(ends)):
            ends[index] = max(ends[index], ends[index - 1])
        return Rendered(tuple(ids), tuple(ends))

    def _generated(self, message: PromptMessage) -> bool:
        """Whether the ids of a message can stand for its text.

        Only an answer has generated ids. They come from files too, so they are compared with the
        vocabulary, and what they decode to with the text: ids of other words would be read unseen. Control
        tokens have no text; those that the template puts between messages would begin another message.
        """
        ids = message.token_ids
        if message.role != "assistant" or not ids or message.tokenizer != self._fingerprint:
            return False
        if min(ids) < 0 or max(ids) >= self._vocabulary or not self._delimiters.isdisjoint(ids):
            return False
        # an answer that was cut inside a character has ids of its first bytes, and no text for them
        return self._decode_answer(ids).rstrip(HALF) == message.text.rstrip(HALF)

    def _decode_uncached(self, ids: tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _add_run(
        self, ids: list[int], ends: list[int], rendered: str, run: range, spans: Sequence[TextSpan]
    ) -> None:
        """Encodes a run of characters, and notes where the messages inside it end."""
        run_ids, starts = self._encode_run(rendered[run.start : run.stop])
        for span in spans:
            ends[span.message] = len(ids) + bisect_left(starts, span.end - run.start)
        ids.extend(run_ids)

    def _encode_uncached(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(ids, the character at which each of them starts)."""
        ids, starts, position = list[int](), list[int](), 0
        for piece in text.split(SPLIT):
            encoded = self._tokenizer.encode(piece, add_special_tokens=False)
            ids += encoded.ids
            starts += [position + start for start, _ in encoded.offsets]
            position += len(piece) + len(SPLIT)
        return tuple(ids), tuple(starts)

    def _as_text(self, text: str) -> str:
        """Breaks every control token in `text` after its first character."""
        return self._control.sub(lambda match: match[0][0] + SPLIT + match[0][1:], text)

    def _template(self, messages: Sequence[PromptMessage], texts: Sequence[str], today: str) -> str:
        turns = [{"role": m.role, "content": text} for m, text in zip(messages, texts, strict=True)]
        goes_on = turns[-1]["role"] == "assistant"
        try:
            return self._chat.render(turns, goes_on=goes_on, text=self._dated(today))
        except Exception as error:  # a template is a program of the model's: it may raise anything
            raise KvchatError(
                f"The model's chat template refuses this conversation: {_said(error)}"
            ) from error

    def _dated(self, today: str) -> str:
        """The chat template with a frozen date written into it: transformers lets no function through."""
        template = self._chat.text
        if not today:
            return template
        moment = datetime.fromisoformat(today)
        return DATE.sub(lambda call: repr(moment.strftime(call["format"])), template)


def _said(error: Exception) -> str:
    """What a template said itself, or how it failed."""
    words = " ".join(str(error).split()) or "it gives no reason"
    return words if isinstance(error, TemplateError | ValueError) else f"{type(error).__name__}: {words}"


def find_texts(rendered: str, skeleton: str, texts: Sequence[str]) -> list[TextSpan]:
    """Where each message's text went, by laying the skeleton (numbers for texts) over the rendering.

    Templates may strip a text or drop the reasoning of an old answer; both are recognised. Where a template
    did something else, the spans found so far are returned: the rest counts as plain text.
    """
    first, *rest = re.split(f"{MARK}(\\d+){MARK}", skeleton)
    if not rendered.startswith(first):
        return []
    spans, position = [], len(first)
    for number, glue in zip(map(int, rest[::2]), rest[1::2], strict=True):
        shown = next((v for v in _variants(texts[number]) if rendered.startswith(v + glue, position)), None)
        if shown is None:
            break
        spans.append(TextSpan(position, position + len(shown), number))
        position += len(shown) + len(glue)
    return spans


def _variants(text: str) -> tuple[str, str, str]:
    return text, text.strip(), text.rpartition("</think>")[2].strip()
