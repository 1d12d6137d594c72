"""A conversation becomes token ids: the model's own chat template, with the generated ids spliced in.

Two rules hold here. The ids that a model generated are the truth: encoding their text again gives other ids
for one reply in ten or more, and the cache would be lost. And what somebody typed is text: a typed
`<|im_end|>` must not end a message.

It knows templates and tokenizers; it refuses to know the cache.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from kvchat.contract import PromptMessage
from kvchat.errors import KvchatError

SPLIT = "\ufdd0"
"""Put inside a typed control token so that it is text to the tokenizer. Unicode reserves this code point for
use inside a program; it never reaches the model."""
MARK = "\ufdd1"
"""Stands around a message's number where the skeleton of a conversation has that message's text."""
ENCODED_RUNS = 4096
"""Template and message texts whose ids are remembered, so that a turn encodes only its new text."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a message's text stands in the rendered conversation, in characters."""

    start: int
    end: int
    message: int


class Renderer:
    """Renders conversations for one model."""

    def __init__(self, tokenizer: Tokenizer, chat: TokenizersBackend, fingerprint: str) -> None:
        """`chat` is transformers' tokenizer, for its `apply_chat_template`."""
        self._tokenizer = tokenizer
        self._chat = chat
        self._fingerprint = fingerprint
        controls = sorted((t.content for t in chat.added_tokens_decoder.values() if t.special), key=len)
        self._control = re.compile("|".join(re.escape(c) for c in reversed(controls)) or r"(?!)")
        self._encode_run = lru_cache(maxsize=ENCODED_RUNS)(self._encode_uncached)

    def render(self, messages: Sequence[PromptMessage]) -> list[int]:
        """The ids of the whole conversation, ending where the answer starts.

        Raises:
            KvchatError: the template refuses the conversation.
        """
        texts = [self._as_text(message.text) for message in messages]
        rendered = self._template(messages, texts)
        skeleton = self._template(messages, [f"{MARK}{i}{MARK}" for i in range(len(messages))])
        return list(self._ids(messages, texts, rendered, find_texts(rendered, skeleton, texts)))

    def _ids(
        self, messages: Sequence[PromptMessage], texts: Sequence[str], rendered: str, spans: Sequence[Span]
    ) -> Iterator[int]:
        """Generated ids where they stand for exactly the rendered text, encoded text everywhere else."""
        position = 0
        for span in spans:
            message = messages[span.message]
            whole = rendered[span.start : span.end] == texts[span.message]
            if whole and message.token_ids and message.tokenizer == self._fingerprint:
                yield from self._encode_run(rendered[position : span.start])
                yield from message.token_ids
                position = span.end
        yield from self._encode_run(rendered[position:])

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        pieces = (self._tokenizer.encode(piece, add_special_tokens=False).ids for piece in text.split(SPLIT))
        return tuple(token for ids in pieces for token in ids)

    def _as_text(self, text: str) -> str:
        """Breaks every control token in `text` after its first character."""
        return self._control.sub(lambda match: match[0][0] + SPLIT + match[0][1:], text)

    def _template(self, messages: Sequence[PromptMessage], texts: Sequence[str]) -> str:
        turns = [{"role": m.role, "content": text} for m, text in zip(messages, texts, strict=True)]
        try:
            rendered = self._chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise KvchatError(f"The model's chat template refuses this conversation: {error}") from error
        return str(rendered)


def find_texts(rendered: str, skeleton: str, texts: Sequence[str]) -> list[Span]:
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
        spans.append(Span(position, position + len(shown), number))
        position += len(shown) + len(glue)
    return spans


def _variants(text: str) -> tuple[str, str, str]:
    return text, text.strip(), text.rpartition("</think>")[2].strip()
