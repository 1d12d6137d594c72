"""A model's chat template as a plain value: rendering needs no tokenizer and no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Renders messages to the text that the model reads."""

    text: str
    """In Jinja."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Name → text of the special tokens that the template may use, such as `bos_token`."""
    controls: tuple[str, ...] = ()
    """Texts that the tokenizer encodes as control tokens."""

    @property
    def delimiters(self) -> tuple[str, ...]:
        """The control tokens that the template writes."""
        named = {text for name, text in self.names.items() if name in self.text}
        return tuple(control for control in self.controls if control in self.text or control in named)

    def render(self, turns: Sequence[Mapping[str, str]], *, goes_on: bool, text: str = "") -> str:
        """The whole conversation, ending where an answer starts or, with `goes_on`, continues.

        Args:
            turns: role and content of each message.
            text: another template in place of this one.

        Raises:
            jinja2.TemplateError, ValueError: the template refuses the conversation.
        """
        render: Any = render_jinja_template  # annotated as if it returned a text
        texts, _places = render(
            conversations=[[dict(turn) for turn in turns]],
            chat_template=text or self.text,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            **self.names,
        )
        return str(texts[0])
