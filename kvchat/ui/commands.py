"""Every command, declared once: keys, palette, slash words, completion, help and the README's table are made
from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from textual.binding import Binding, BindingType


@dataclass(frozen=True, slots=True)
class Command:
    """Something the user can ask for; `action_<name>` of the chat screen does it."""

    name: str
    """Its id, by which `[keys]` in the configuration file gives it another key."""
    title: str
    help: str
    key: str
    """Empty where only the slash word and the palette reach it; `[keys]` can give it one."""
    slash: str
    argument: str = ""
    """What the slash word takes after it, for the help."""
    footer: str = ""
    """Word in the footer; empty keeps the key out of it."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that the argument may be; none where it may be anything."""
        return tuple(self.argument.split("|")) if "|" in self.argument else ()


COMMANDS = (
    Command("help", "Help", "Keys and commands.", "f1", "help", footer="help"),
    Command(
        "settings",
        "Settings",
        "Every setting, with what it does; saved for the next start too.",
        "f2",
        "settings",
    ),
    Command("panel", "Panel", "Show or hide the cache panel.", "f3", "panel", footer="panel"),
    Command(
        "cache",
        "Cache mode",
        "Keep the KV cache (on), throw it away after each turn (turn), or do without (off).",
        "f4",
        "cache",
        "on|turn|off",
        footer="cache",
    ),
    Command("new", "New conversation", "Start an empty conversation.", "ctrl+n", "new", footer="new"),
    Command(
        "conversations",
        "Conversations",
        "Go to the list of conversations: Enter opens, R renames, D deletes.",
        "ctrl+s",
        "sessions",
        footer="conversations",
    ),
    Command(
        "stop",
        "Stop",
        "Stop the answer; what there is stays, with its cache.",
        "escape",
        "stop",
        footer="stop",
    ),
    Command(
        "model",
        "Model",
        "Let another model answer; shows sizes, licences and what is here, and fetches what is not.",
        "ctrl+l",
        "model",
        "NAME",
    ),
    Command("regenerate", "Write again", "Write the last answer again, as a new branch.", "ctrl+r", "regen"),
    Command("undo", "Undo", "Take the last question back into the prompt, with its answer.", "", "undo"),
    Command(
        "edit",
        "Edit a question",
        "Write an earlier question anew, on a branch of its own; without a number, the last one.",
        "",
        "edit",
        "NUMBER",
    ),
    Command(
        "continue",
        "Go on",
        "Let the model go on with an answer that was stopped or cut.",
        "",
        "continue",
    ),
    Command(
        "fork",
        "Fork",
        "Go on in a new conversation that shares the cache; with a number, up to that question's answer.",
        "",
        "fork",
        "NUMBER",
    ),
    Command("copy", "Copy", "Send the focused message, or the last answer, to the clipboard.", "", "copy"),
    Command("code", "Copy code", "Send a code block of that message to the clipboard.", "", "code"),
    Command("thinking", "Thinking", "Show or fold what the model thought.", "ctrl+t", "think"),
    Command(
        "search", "Search", "Find words in all conversations, on every branch.", "ctrl+f", "search", "WORDS"
    ),
    Command(
        "export",
        "Export",
        "Write this conversation into a file: md, json, html, or a name that ends so.",
        "",
        "export",
        "FILE",
    ),
    Command(
        "import",
        "Import",
        "Read conversations from a file of kvchat, ChatGPT, Claude, Open WebUI, Gemini or llm.",
        "",
        "import",
        "FILE",
    ),
    Command(
        "private",
        "Private conversation",
        "Start a conversation of which nothing is written; it is gone when kvchat ends.",
        "",
        "private",
    ),
    Command(
        "map",
        "Cache map",
        "The cache of this conversation as a picture: whose tokens, how stored, what they cost.",
        "f5",
        "cache map",
    ),
    Command("why", "Why", "Why the last turn read something again.", "f6", "cache why"),
    Command(
        "timeline",
        "Cache timeline",
        "Everything that happened to the cache of this conversation, drawn in order.",
        "",
        "cache timeline",
    ),
    Command(
        "compare",
        "Compare",
        "The same question with the cache and without, side by side: the prompt's, or the last one.",
        "f7",
        "cache compare",
        "QUESTION",
    ),
    Command("tour", "Tour", "Eight things a KV cache does, done and measured, in three minutes.", "", "tour"),
    Command("caches", "Caches", "Every cache: in memory, on disk; pin, move, drop, budget.", "f8", "caches"),
    Command(
        "policy",
        "Eviction policy",
        "What is dropped when the context is full; says what that would be now, and what it costs.",
        "",
        "policy",
        "none|turns|sinks|snapkv",
    ),
    Command(
        "kv",
        "KV precision",
        "Store keys and values of this conversation in fewer bits.",
        "",
        "kv",
        "auto|fp32|bf16|int8|int4",
    ),
    Command("budget", "KV budget", "Memory that all caches may take together.", "", "budget", "SIZE"),
    Command("system", "System prompt", "Set the system prompt of this conversation.", "", "system", "TEXT"),
    Command(
        "options",
        "Chat options",
        "System prompt and sampling of this conversation on one screen, with named presets.",
        "ctrl+o",
        "options",
    ),
    Command("rename", "Rename", "Give this conversation another title.", "", "rename", "TITLE"),
    Command("clear", "Clear", "Empty this conversation and its cache.", "", "clear"),
    Command("delete", "Delete", "Delete this conversation for good.", "", "delete"),
    Command("theme", "Theme", "Other colours; without a name, choose from a list.", "", "theme", "NAME"),
    Command("leave", "Quit", "Leave kvchat; unsent text stays.", "ctrl+q", "exit"),
)

ALIASES = {
    "find": "search",
    "quit": "exit",
    "bye": "exit",
    "?": "help",
    "retry": "regen",
    "resume": "sessions",
    "why": "cache why",
}


UNBOUND = "unbound-"
"""How the key of a command begins that has none: no terminal sends it, and `[keys]` replaces it."""


def bindings() -> list[BindingType]:
    """The keys, each with the command's name as its id so that it can be re-mapped."""
    return [
        Binding(
            command.key or UNBOUND + command.name,
            command.name,
            command.footer or command.title,
            show=bool(command.footer),
            # Esc belongs to whatever has the focus first
            priority=command.key != "escape",
            id=command.name,
            tooltip=command.help,
        )
        for command in COMMANDS
    ]


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


def key_label(key: str) -> str:
    """`ctrl+n` → `Ctrl+N`; of several keys, all."""
    keys = key.replace("escape", "esc").split(",")
    return ", ".join("+".join(part.strip().capitalize() for part in each.split("+")) for each in keys)


def table(commands: Sequence[Command] = COMMANDS) -> str:
    """Keys, slash words and what they do, as a Markdown table: for the help and the README."""
    rows = [f"| {key_label(c.key)} | {_slash_label(c)} | {c.help} |" for c in commands]
    return "\n".join(("| key | command | what it does |", "|---|---|---|", *rows))


def help_markdown(commands: Sequence[Command] = COMMANDS) -> str:
    """The help screen's text."""
    return f"{table(commands)}\n\n{MORE_HELP}"


def _slash_label(command: Command) -> str:
    """`/cache on/turn/off` as code; a bar would end the table's cell."""
    words = f"/{command.slash} {command.argument}".strip().replace("|", "/")
    return f"`{words}`"


MORE_HELP = """\
**Writing.** Enter sends; Shift+Enter, Ctrl+J or Alt+Enter breaks the line; Up and Down at the edges bring \
back what was sent before. Type `/` and the commands are offered: Tab takes one, Enter runs it. \
Ctrl+P opens the palette. Ctrl+C copies a selection, else stops the answer, else \
asks before it quits.

**Reading.** Tab goes from the prompt to the messages: Up and Down walk over them, Y copies one, C its code \
block (again: the next one), E edits a question, F goes on from there in another conversation, Enter unfolds \
what is folded, Esc goes back. Page Up and Page Down scroll, Home goes to the first message of all.

**Reading the panel.** *reused* tokens were in the cache and cost nothing; *read* tokens went through the \
model once; *written* ones were generated. *TTFT* is the time to the first text. A KV cache grows with every \
token by 2 (keys and values) × layers × KV heads × head dim × bytes of a number.

**Reading the strip.** Beside every message stands what the last turn did with its tokens: ▒ reused, █ read, \
▓ written, × evicted, · never cached. With the mouse over it, it tells the numbers.

**The three modes.** `on` keeps the cache across turns: a turn reads its new tokens only. `turn` throws it \
away after each answer: the next turn reads everything once. `off` never makes one: every single token reads \
everything again. Press F4 and send a message to feel the difference.

**Other keys.** A table `[keys]` in the configuration file gives any command another key, by its id: \
`panel = "f9"`. `kvchat config keys` prints the ids.
"""
