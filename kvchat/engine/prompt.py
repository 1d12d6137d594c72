"""Renders a conversation to token ids: the model's chat template, with the generated ids inserted.

Two rules. Generated ids are used as they are: encoding their text again gives other ids for one reply in ten
or more, and the cache would miss. Typed text is never a control token: a typed `<|im_end|>` must not end a
message. Must not depend on the cache.
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
"""Inserted into a typed control token so that the tokenizer sees text. Unicode reserves this code point for
internal use; it never reaches the model."""
MARK = "\ufdd1"
"""Encloses a message's number in the skeleton of a conversation, in place of that message's text."""
HALF = "\ufffd"
"""What the bytes of an incomplete character decode to."""
DATE = re.compile(r"""strftime_now\(\s*(['"])(?P<format>.*?)\1\s*\)""")
"""How templates get the date: transformers defines that function."""
ENCODED_RUNS = 4096
"""Cached encodings of template and message texts, so that a turn encodes only its new text."""


@dataclass(frozen=True, slots=True)
class TextSpan:
    """The place of a message's text in the rendered conversation, in characters."""

    start: int
    end: int
    message: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model reads it."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    """For each message, the number of tokens up to the end of its text; where a template changed a text, the
    end of the message before it."""


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
        """The whole conversation, ending where the answer starts, or continues if it was begun.

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
        """Uses generated ids where they decode to exactly the rendered text, else encodes the text."""
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
        """Whether the ids of a message can be used in place of its text.

        Only answers have generated ids. They may come from imported files, so they must be in the
        vocabulary and decode to the text; else the model would read something that the user can't see.
        Control tokens decode to nothing; the template's delimiters would start another message.
        """
        ids = message.token_ids
        if message.role != "assistant" or not ids or message.tokenizer != self._fingerprint:
            return False
        if min(ids) < 0 or max(ids) >= self._vocabulary or not self._delimiters.isdisjoint(ids):
            return False
        # an answer that was cut inside a character has ids for its first bytes, and no text
        return self._decode_answer(ids).rstrip(HALF) == message.text.rstrip(HALF)

    def _decode_uncached(self, ids: tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _add_run(
        self, ids: list[int], ends: list[int], rendered: str, run: range, spans: Sequence[TextSpan]
    ) -> None:
        """Encodes a run of characters, and computes where the messages inside it end."""
        run_ids, starts = self._encode_run(rendered[run.start : run.stop])
        for span in spans:
            ends[span.message] = len(ids) + bisect_left(starts, span.end - run.start)
        ids.extend(run_ids)

    def _encode_uncached(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(ids, the character offset of each)."""
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
        except Exception as error:  # a template is a program of the model: it may raise anything
            raise KvchatError(
                f"The model's chat template refuses this conversation: {_reason(error)}"
            ) from error

    def _dated(self, today: str) -> str:
        """The chat template with a fixed date written into it: transformers accepts no own function."""
        template = self._chat.text
        if not today:
            return template
        moment = datetime.fromisoformat(today)
        return DATE.sub(lambda call: repr(moment.strftime(call["format"])), template)


def _reason(error: Exception) -> str:
    """The message that a template raised, or how it failed."""
    words = " ".join(str(error).split()) or "it gives no reason"
    return words if isinstance(error, TemplateError | ValueError) else f"{type(error).__name__}: {words}"


def find_texts(rendered: str, skeleton: str, texts: Sequence[str]) -> list[TextSpan]:
    """Finds each message's text by aligning the skeleton (numbers in place of texts) with the rendering.

    Templates may strip a text or drop the reasoning of an old answer; both are recognised. Where a template
    changed a text otherwise, the spans found so far are returned; the rest is encoded as plain text.
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
