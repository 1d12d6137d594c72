"""What is done with questions and answers of the open conversation."""

from kvchat.ui.actions.base import ActionBase
from kvchat.ui.widgets.transcript import Transcript


class AnswerActions(ActionBase):
    """Acts on questions and answers."""

    def action_stop(self) -> None:
        """Stops the answer; without one, goes to the prompt."""
        if self._turns.stop():
            return
        if self._turns.editing is not None:
            self._turns.editing = None
            self._prompt.recall(0)
        self._prompt.focus()

    async def action_regenerate(self) -> None:
        """Asks for the last answer again, or sends what was not sent."""
        with self._telling():
            request = await self._turns.regenerate()
            self._prompt.drop(request.messages[-1].text)
        self._refresh_all()

    async def action_undo(self) -> None:
        """Takes the last question back into the prompt."""
        with self._telling():
            self._prompt.give_back(await self._turns.undo())
            self._refresh_all()

    def action_edit(self, number: str = "") -> None:
        """Takes a question into the prompt; what is sent then replaces it."""
        with self._telling():
            self._desk.edit(self._turns.question_id(number), lambda: self._edit(number))

    def _edit(self, number: str) -> None:
        self._prompt.show_instead(self._turns.edit(number))
        self._prompt.focus()
        self._say("Enter asks it in the old one's place, which stays as another branch; Esc leaves it.")

    async def action_continue(self) -> None:
        """Lets the model go on with the last answer."""
        with self._telling():
            await self._turns.go_on()
        self._refresh_all()

    def action_copy(self) -> None:
        """Sends the focused message, or the last answer, to the clipboard."""
        with self._telling():
            self.query_one(Transcript).chosen.action_copy()

    def action_code(self) -> None:
        """Sends a code block of that message to the clipboard."""
        with self._telling():
            self.query_one(Transcript).chosen.action_copy_code()

    def action_thinking(self) -> None:
        """Shows or folds what the model thought."""
        transcript = self.query_one(Transcript)
        transcript.unfold_thinking(not transcript.unfolded)
