"""`kvchat sessions`: lists, searches, exports and imports conversations. Must not import the screen."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvchat.cli.options import data_dir
from kvchat.config.paths import find_paths
from kvchat.errors import KvchatError
from kvchat.text import clean, one_line
from kvchat.validation.checks import refuse_bytes
from kvchat.validation.plain_json import write_json

if TYPE_CHECKING:
    from kvchat.chat.store import Store


def open_store(folder: Path | None) -> "Store":
    """The store in that data folder, or in the user's default one."""
    from kvchat.chat.store import Store

    return Store(find_paths(folder).database)


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True)
@data_dir
@click.pass_context
def sessions(ctx: click.Context, as_json: bool, data_dir: Path | None) -> None:
    """List the conversations, most recently used first; or search, export and import them."""
    ctx.obj = data_dir
    if ctx.invoked_subcommand:
        return
    found = open_store(data_dir).summaries()
    if as_json:
        named = [{key: value for key, value in asdict(each).items() if key != "private"} for each in found]
        click.echo(write_json(named))
        return
    for each in found:
        click.echo(
            f"{each.id}  {each.updated_at[:16].replace('T', ' ')}  {each.messages:>4}  {one_line(each.title)}"
        )
    if not found:
        click.echo("No conversations yet. `kvchat` starts one.", err=True)


@sessions.command()
@click.argument("words", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True)
@data_dir
@click.pass_obj
def search(above: Path | None, words: tuple[str, ...], as_json: bool, data_dir: Path | None) -> None:
    """Find messages with all these words, on every branch. Ctrl+F in the chat does the same."""
    from kvchat.chat.session import MOST_HITS

    each_word = [word for given in words for word in given.split()]
    if not each_word:
        raise KvchatError("There are no words to search for.")
    refuse_bytes(" ".join(each_word), "What to search for")
    hits = open_store(data_dir or above).search(each_word, MOST_HITS)
    if as_json:
        click.echo(write_json([asdict(hit) for hit in hits]))
        return
    for hit in hits:
        branch = "(other branch) " if hit.other_branch else ""
        click.echo(f"{hit.conversation}  {hit.role or 'title':<9}  {branch}{one_line(hit.text)[:100]}")
    if not hits:
        click.echo(f"No conversation contains {one_line(' '.join(each_word))}.", err=True)
        sys.exit(1)


@sessions.command()
@click.argument("conversation")
@click.argument("where", default="-")
@click.option(
    "--format", "ending", type=click.Choice(["md", "json", "html"]), default="md", show_default=True
)
@data_dir
@click.pass_obj
def export(above: Path | None, conversation: str, where: str, ending: str, data_dir: Path | None) -> None:
    """Write CONVERSATION to the file WHERE; its extension is the format. `-` is standard output."""
    from kvchat.chat.exporters import FORMATS
    from kvchat.chat.exporters import export as write

    store = open_store(data_dir or above)
    found = store.whole(store.load(store.find(conversation)))
    if where == "-":
        text = FORMATS[ending](found)
        click.echo(clean(text) if sys.stdout.isatty() else text, nl=False)
    else:
        click.echo(str(write(found, where, Path.cwd())), err=True)


@sessions.command(name="import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@data_dir
@click.pass_obj
def import_files(above: Path | None, files: tuple[Path, ...], data_dir: Path | None) -> None:
    """Import conversations from FILES of kvchat, ChatGPT, Claude, Open WebUI, Gemini or llm.

    Reports what can't be imported, with its place, and imports the rest. A second import adds nothing.
    """
    from kvchat.chat.importers import read_import

    store = open_store(data_dir or above)
    for file in files:
        found = read_import(file)
        new = store.import_all(found.conversations)
        skipped = f" {found.skipped:,} skipped." if found.skipped else ""
        click.echo(
            f"{one_line(str(file))}: {new:,} of {len(found.conversations):,} are new.{skipped}", err=True
        )
        for problem in found.problems:
            click.echo(f"  {problem}", err=True)
