"""Every command, declared once: keys, palette, slash words, completion, help and the README's table are made
from it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvchat.chat import answer_commands as answers
from kvchat.chat import cache_commands as caches
from kvchat.chat import conversation_commands as conversations

if TYPE_CHECKING:
    from kvchat.chat.controller import ChatController

Run = Callable[["ChatController", str], Awaitable[None] | None]


@dataclass(frozen=True, slots=True)
class Command:
    """Something the user can ask for."""

    name: str
    """Its id, by which `[keys]` in the configuration file gives it another key."""
    title: str
    help: str
    key: str
    """Empty where only the slash word and the palette reach it; `[keys]` can give it one."""
    slash: str
    act: Run | None = None
    """Does it; without one, the front end opens the view of that name."""
    argument: str = ""
    """What the slash word takes after it, for the help."""
    footer: str = ""
    """Word in the footer; empty keeps the key out of it."""
    instead: str = ""
    """What to do where there is no view for it."""

    def run(self, chat: "ChatController", argument: str) -> Awaitable[None] | None:
        """Does it, with the argument.

        Raises:
            KvchatError: it can't be done.
            NoViewError: the front end has no view for it.
        """
        return self.act(chat, argument) if self.act else chat.port.open_view(self.name, argument)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that the argument may be; none where it may be anything."""
        return tuple(self.argument.split("|")) if "|" in self.argument else ()


def model(chat: "ChatController", name: str) -> Awaitable[None] | None:
    """Lets another model answer, or shows which there are."""
    if chat.models is None:
        chat.port.say("No other model can be had here.")
        return None
    return chat.switch_model(name) if name else chat.port.open_view("model", name)


# a table: name, title, help, key, slash word, what does it
# fmt: off
COMMANDS = (
    Command("help", "Help", "Keys and commands.", "f1", "help", footer="help"),
    Command("settings", "Settings", "Every setting, with what it does; saved for the next start too.", "f2",
            "settings", instead="`kvchat config` lists the settings and changes them"),
    Command("panel", "Panel", "Show or hide the cache panel.", "f3", "panel", footer="panel",
            instead="the figures of a turn stand after its answer"),
    Command("cache", "Cache mode",
            "Keep the KV cache (on), throw it away after each turn (turn), or do without (off).", "f4",
            "cache", caches.mode, "on|turn|off", footer="cache"),
    Command("new", "New conversation", "Start an empty conversation.", "ctrl+n", "new", conversations.new,
            footer="new"),
    Command("conversations", "Conversations",
            "Go to the list of conversations: Enter opens, R renames, D deletes.", "ctrl+s", "sessions",
            footer="conversations"),
    Command("stop", "Stop", "Stop the answer; what there is stays, with its cache.", "escape", "stop",
            answers.stop, footer="stop", instead="Ctrl-C stops an answer while it is written"),
    Command("model", "Model",
            "Let another model answer; shows sizes, licences and what is here, and fetches what is not.",
            "ctrl+l", "model", model, "NAME"),
    Command("regenerate", "Write again", "Write the last answer again, as a new branch.", "ctrl+r", "regen",
            answers.regenerate),
    Command("undo", "Undo", "Take the last question back into the prompt, with its answer.", "", "undo",
            answers.undo),
    Command("edit", "Edit a question",
            "Write an earlier question anew, on a branch of its own; without a number, the last one.", "",
            "edit", answers.edit, "NUMBER"),
    Command("continue", "Go on", "Let the model go on with an answer that was stopped or cut.", "",
            "continue", answers.go_on),
    Command("fork", "Fork",
            "Go on in a new conversation that shares the cache; with a number, up to that question's answer.",
            "", "fork", conversations.fork, "NUMBER"),
    Command("copy", "Copy", "Send the focused message, or the last answer, to the clipboard.", "", "copy"),
    Command("code", "Copy code", "Send a code block of that message to the clipboard.", "", "code"),
    Command("thinking", "Thinking", "Show or fold what the model thought.", "ctrl+t", "think",
            instead="what the model thinks is written with its answer"),
    Command("search", "Search", "Find words in all conversations, on every branch.", "ctrl+f", "search",
            argument="WORDS"),
    Command("export", "Export",
            "Write this conversation into a file: md, json, html, or a name that ends so.", "", "export",
            conversations.export, "FILE"),
    Command("import", "Import",
            "Read conversations from a file of kvchat, ChatGPT, Claude, Open WebUI, Gemini or llm.", "",
            "import", conversations.import_file, "FILE"),
    Command("private", "Private conversation",
            "Start a conversation of which nothing is written; it is gone when kvchat ends.", "", "private",
            conversations.private),
    Command("map", "Cache map",
            "The cache of this conversation as a picture: whose tokens, how stored, what they cost.", "f5",
            "cache map", instead="`kvchat cache show` lists what is saved of a cache"),
    Command("why", "Why", "Why the last turn read something again.", "f6", "cache why"),
    Command("timeline", "Cache timeline",
            "Everything that happened to the cache of this conversation, drawn in order.", "",
            "cache timeline"),
    Command("compare", "Compare",
            "The same question with the cache and without, side by side: the prompt's, or the last one.",
            "f7", "cache compare", argument="QUESTION",
            instead="/cache off and then /regen answer the last question without a cache, /cache on with it"),
    Command("tour", "Tour", "Eight things a KV cache does, done and measured, in three minutes.", "",
            "tour"),
    Command("caches", "Caches", "Every cache: in memory, on disk; pin, move, drop, budget.", "f8", "caches",
            instead="`kvchat cache` lists the caches on disk and deletes them; /budget sets their memory"),
    Command("policy", "Eviction policy",
            "What is dropped when the context is full; says what that would be now, and what it costs.", "",
            "policy", caches.policy, "none|turns|sinks|snapkv"),
    Command("kv", "KV precision", "Store keys and values of this conversation in fewer bits.", "", "kv",
            caches.precision, "auto|fp32|bf16|int8|int4"),
    Command("budget", "KV budget", "Memory that all caches may take together.", "", "budget", caches.budget,
            "SIZE"),
    Command("system", "System prompt", "Set the system prompt of this conversation.", "", "system",
            conversations.system, "TEXT"),
    Command("options", "Chat options",
            "System prompt and sampling of this conversation on one screen, with named presets.", "ctrl+o",
            "options"),
    Command("rename", "Rename", "Give this conversation another title.", "", "rename", conversations.rename,
            "TITLE"),
    Command("clear", "Clear", "Empty this conversation and its cache.", "", "clear", conversations.clear),
    Command("delete", "Delete", "Delete this conversation for good.", "", "delete", conversations.delete),
    Command("theme", "Theme", "Other colours; without a name, choose from a list.", "", "theme",
            argument="NAME", instead="there are no colours to choose"),
    Command("leave", "Quit", "Leave kvchat; unsent text stays.", "ctrl+q", "exit"),
)
# fmt: on

ALIASES = {
    "find": "search",
    "quit": "exit",
    "bye": "exit",
    "?": "help",
    "retry": "regen",
    "resume": "sessions",
    "why": "cache why",
}


def remapped(keys: Mapping[str, str]) -> tuple[Command, ...]:
    """The commands with the keys that the user gave them."""
    return tuple(replace(command, key=keys.get(command.name, command.key)) for command in COMMANDS)


def parse_slash(text: str) -> tuple[Command, str] | None:
    """The command that `/word argument` names, with its argument; None for other text."""
    said = text.strip().removeprefix("/")
    first, _, after_first = said.partition(" ")
    second, _, after_second = after_first.strip().partition(" ")
    # `/cache map` is a command of its own, and `map` no argument of `/cache`
    for words, argument in ((f"{first} {second}", after_second), (ALIASES.get(first, first), after_first)):
        command = next((c for c in COMMANDS if c.slash == words), None)
        if command:
            return command, argument.strip()
    return None
