"""What the screen opens for a command: a dialog, a part of the screen, or the focus.

What opens over the chat is imported where it is opened: the first paint waits for none of it.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from kvchat.chat.conversation import Hit, Preset
from kvchat.chat.conversation_commands import use_preset
from kvchat.errors import KvchatError
from kvchat.ui.formatting import miss_words
from kvchat.ui.themes import checked_theme
from kvchat.ui.widgets.conversations import ConversationList
from kvchat.ui.widgets.transcript import Transcript

if TYPE_CHECKING:
    from kvchat.ui.screens.chat import ChatScreen

View = Callable[["ChatScreen", str], Awaitable[None] | None]


def show_help(screen: "ChatScreen", _argument: str) -> None:
    """The keys."""
    from kvchat.ui.screens.dialogs import Help

    screen.app.push_screen(Help(screen.commands))


def settings(screen: "ChatScreen", _argument: str) -> None:
    """Every setting."""
    from kvchat.ui.live_settings import Tuning
    from kvchat.ui.screens.settings import SettingsScreen

    screen.app.push_screen(SettingsScreen(screen.preferences, Tuning(screen.app, screen.controller).changed))


def conversations(screen: "ChatScreen", _argument: str) -> None:
    """The list; from the list, back to the prompt."""
    listed = screen.query_one(ConversationList)
    leaving = listed.has_focus
    screen.toggle("side", not leaving)
    (screen.prompt if leaving else listed).focus()


def prompt(screen: "ChatScreen", _argument: str) -> None:
    """The prompt; a question that is edited gives way to the draft."""
    if screen.controller.editing is not None:
        screen.controller.editing = None
        screen.prompt.recall(0)
    screen.prompt.focus()


def models(screen: "ChatScreen", _argument: str) -> None:
    """The models."""
    from kvchat.chat.model_choice import switch_price
    from kvchat.ui.screens.models import ModelScreen

    controller = screen.controller
    state = controller.state
    loaded, context, rate = state.model_name, state.turn.context, state.prefill_rate
    assert controller.models is not None

    async def chosen(name: str | None) -> None:
        if name:
            await screen.action_run_command("model", name)

    dialog = ModelScreen(
        controller.models, loaded, lambda choice: switch_price(choice, loaded, context, rate)
    )
    screen.app.push_screen(dialog, chosen)


def thinking(screen: "ChatScreen", _argument: str) -> None:
    """What the model thought, or nothing of it."""
    transcript = screen.query_one(Transcript)
    transcript.unfold_thinking(not transcript.unfolded)


def search(screen: "ChatScreen", words: str) -> None:
    """Words in all conversations."""
    from kvchat.ui.screens.search import SearchScreen

    async def open_hit(chosen: tuple[Hit, list[str]] | None) -> None:
        if chosen is None:
            return
        try:
            screen.save_draft()
            place = screen.controller.archive.place_of(chosen[0])
            await screen.controller.opened()
            if place is not None:
                await screen.query_one(Transcript).go_to(place, chosen[1])
        except KvchatError as error:
            screen.say(str(error))

    screen.app.push_screen(SearchScreen(screen.controller.session.search, words), open_hit)


def options(screen: "ChatScreen", _argument: str) -> None:
    """How this conversation answers."""
    from kvchat.ui.screens.options import OptionsScreen, Presets

    session = screen.controller.session
    presets = Presets(session.presets, session.save_preset, session.delete_preset)

    def use(chosen: Preset | None) -> None:
        try:
            if chosen:
                use_preset(screen.controller, chosen)
        except KvchatError as error:
            screen.say(str(error))

    current = session.current
    screen.app.push_screen(OptionsScreen(current.system_prompt, current.sampling, presets), use)


def why(screen: "ChatScreen", _argument: str) -> None:
    """The last miss."""
    from kvchat.ui.screens.dialogs import Explanation

    state = screen.controller.state
    words = miss_words(state.last_miss, state.turn.reuse_note)
    screen.app.push_screen(Explanation("Why was something read again?", words))


def theme(screen: "ChatScreen", name: str) -> None:
    """Other colours, or the list of them."""
    if name:
        screen.app.theme = checked_theme(name)
    else:
        screen.app.search_themes()


VIEWS: Mapping[str, View] = {
    "help": show_help,
    "settings": settings,
    "panel": lambda screen, _: screen.toggle("panel"),
    "conversations": conversations,
    "stop": prompt,
    "model": models,
    "copy": lambda screen, _: screen.query_one(Transcript).chosen.action_copy(),
    "code": lambda screen, _: screen.query_one(Transcript).chosen.action_copy_code(),
    "thinking": thinking,
    "search": search,
    "options": options,
    "theme": theme,
    "leave": lambda screen, _: screen.app.exit(),
    "why": why,
    "map": lambda screen, _: screen.inspectors.map(),
    "timeline": lambda screen, _: screen.inspectors.timeline(),
    "caches": lambda screen, _: screen.inspectors.caches(),
    "compare": lambda screen, text: screen.inspectors.compare(text),
    "tour": lambda screen, _: screen.inspectors.tour(),
}
