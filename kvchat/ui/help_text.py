"""Keys and commands as Markdown: for the help, and for the README."""

from collections.abc import Sequence

from kvchat.chat.commands import COMMANDS, Command


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
