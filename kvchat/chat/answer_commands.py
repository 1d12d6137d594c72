"""Commands about questions and answers of the open conversation."""

from collections.abc import Awaitable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from kvchat.chat.port import Asking

if TYPE_CHECKING:
    from kvchat.chat.controller import ChatController


def stop(chat: "ChatController", argument: str) -> Awaitable[None] | None:
    """Stops the answer; without one, the front end decides."""
    return None if chat.stop() else chat.port.open_view("stop", argument)


async def regenerate(chat: "ChatController", _argument: str) -> None:
    """Asks for the last answer again, or sends what was not sent."""
    await chat.answer(chat.session.regenerate(), Asking.AGAIN)


async def go_on(chat: "ChatController", _argument: str) -> None:
    """Lets the model go on with the last answer."""
    await chat.answer(chat.session.continue_answer(), Asking.CONTINUED)


async def undo(chat: "ChatController", _argument: str) -> None:
    """Takes the last question back."""
    text = chat.session.undo()
    await chat.changed()
    chat.port.give_back(text)


def edit(chat: "ChatController", number: str) -> None:
    """Lets the next message replace a question: what comes after it is on another branch then."""
    question = chat.question(number)
    current = chat.session.current
    upto = current.messages[: current.messages.index(question) + 1]
    request = chat.session.request_as_if(messages=replace(current, messages=upto).prompt())
    chat.costs.edit(request, partial(begin_edit, chat, question.id))


def begin_edit(chat: "ChatController", question: int) -> None:
    """The next message is asked in the place of this question."""
    text = next((m.text for m in chat.session.current.messages if m.id == question), None)
    if text is not None:
        chat.editing = question
        chat.port.edit(text)
