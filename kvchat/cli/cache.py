"""`kvchat cache`: lists and deletes the KV caches on disk. Must not import torch or the engine."""

import csv
import sys
from collections.abc import Mapping, Sized
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvchat.cli.options import data_dir
from kvchat.config.paths import Paths, find_paths
from kvchat.contract import CacheEvent
from kvchat.errors import KvchatError
from kvchat.text import megabytes, one_line
from kvchat.validation.bounds import INT64
from kvchat.validation.plain_json import write_json

if TYPE_CHECKING:
    from kvchat.cache.disk.disk_store import Chain, DiskStore, Entry
    from kvchat.chat.store import Store


@click.group(name="cache")
def cache() -> None:
    """List, show, delete and clean up the KV caches on disk."""


@cache.command()
@click.option("--json", "as_json", is_flag=True)
@data_dir
def ls(as_json: bool, data_dir: Path | None) -> None:
    """List the saved caches, most recently used first."""
    paths = find_paths(data_dir)
    entries, titles = _disk_store(paths).entries(), _titles(paths)
    if as_json:
        rows = [asdict(e) | {"title": titles.get(e.conversation, "")} for e in entries]
        click.echo(write_json(rows))
        return
    for entry in entries:
        click.echo(_line(entry, titles))
    if entries:
        click.echo(f"{_counted(entries)}, {megabytes(sum(e.bytes for e in entries))}", err=True)
    else:
        click.echo("No caches are saved yet. Every turn of a chat saves its cache.", err=True)


@cache.command()
@click.argument("conversation")
@click.option("--json", "as_json", is_flag=True, help="The saved segments and the timeline as JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="The timeline as CSV.")
@data_dir
def show(conversation: str, as_json: bool, as_csv: bool, data_dir: Path | None) -> None:
    """Show a conversation's saved cache and its timeline of cache events."""
    paths = find_paths(data_dir)
    store = _store(paths)
    conversation = store.find(conversation)
    events = store.events(conversation)
    if as_csv:
        _write_csv(events)
        return
    from kvchat.cache.disk.segment import SnapshotRefused

    try:
        chain, damage = _disk_store(paths).chain(conversation), ""
    except SnapshotRefused as error:
        chain, damage = None, str(error)
    if as_json:
        saved = _chain_json(chain) if chain else {"damage": damage}
        click.echo(write_json({"saved": saved, "events": [asdict(e) for e in events]}, indent=1))
        return
    if chain:
        _print_chain(chain)
    else:
        click.echo(one_line(damage))
    for event in events:
        click.echo(_event_line(event))


@cache.command()
@click.argument("conversations", nargs=-1, metavar="CONVERSATION...")
@click.option("--all", "everything", is_flag=True, help="Every saved cache.")
@data_dir
def rm(conversations: tuple[str, ...], everything: bool, data_dir: Path | None) -> None:
    """Delete saved caches. The conversations stay; their next turn prefills them again."""
    disk_store = _disk_store(find_paths(data_dir))
    saved = disk_store.conversations()
    if not conversations and not everything:
        raise KvchatError("Which cache? `kvchat cache ls` lists them; --all deletes every one.")
    names = saved if everything else list({_matching(prefix, saved): None for prefix in conversations})
    freed = sum(disk_store.remove(name) for name in names)
    click.echo(f"{_counted(names)} deleted; {megabytes(freed)} freed.", err=True)


@cache.command()
@data_dir
def gc(data_dir: Path | None) -> None:
    """Delete caches of deleted conversations and files left by killed processes."""
    paths = find_paths(data_dir)
    click.echo(f"{megabytes(collect_garbage(paths))} freed.", err=True)


def collect_garbage(paths: Paths) -> int:
    """Deletes saved caches without a conversation; returns the freed bytes."""
    if not paths.kv.exists():
        return 0
    return _disk_store(paths).gc({summary.id for summary in _store(paths).summaries()})


def _disk_store(paths: Paths) -> "DiskStore":
    from kvchat.cache.disk.disk_store import DiskStore

    return DiskStore(paths.kv, INT64)


def _store(paths: Paths) -> "Store":
    from kvchat.chat.store import Store

    return Store(paths.database)


def _titles(paths: Paths) -> dict[str, str]:
    return {s.id: s.title for s in _store(paths).summaries()}


def _matching(prefix: str, names: list[str]) -> str:
    found = [name for name in names if name.startswith(prefix)] if prefix else []
    if len(found) != 1:
        how_many = f"{len(found)} saved caches begin" if found else "No saved cache begins"
        raise KvchatError(f"{how_many} with {prefix!r}. `kvchat cache ls` lists them.")
    return found[0]


def _counted(caches: Sized) -> str:
    return "1 cache" if len(caches) == 1 else f"{len(caches)} caches"


def _line(entry: "Entry", titles: Mapping[str, str]) -> str:
    used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
    what = one_line(entry.damage) or f"{entry.tokens:>7,} tokens  {_model_and_precision(entry.fingerprint)}"
    title = one_line(titles.get(entry.conversation, "(no conversation: gc deletes it)"))
    return f"{entry.conversation}  {used}  {megabytes(entry.bytes):>9}  {what}  {title}"


def _model_and_precision(fingerprint: Mapping[str, str]) -> str:
    return one_line(f"{fingerprint.get('model', '?')} · KV {fingerprint.get('kv', '?')}")


def _chain_json(chain: "Chain") -> dict[str, object]:
    segments = [
        {
            "file": segment.path.name,
            "start": segment.header.start,
            "rows": len(segment.header.rows),
            "bytes": segment.header.tensor_bytes,
        }
        for segment in chain.segments
    ]
    return {"fingerprint": dict(chain.fingerprint), "tokens": len(chain.rows), "segments": segments}


def _print_chain(chain: "Chain") -> None:
    click.echo(f"{chain.conversation}: {len(chain.rows):,} tokens, {megabytes(chain.tensor_bytes)} on disk")
    for name, value in chain.fingerprint.items():
        click.echo(f"  {name:<13}{one_line(value)}")
    for segment in chain.segments:
        rows = len(segment.header.rows)
        size = megabytes(segment.header.tensor_bytes)
        click.echo(f"  {segment.path.name}  from token {segment.header.start:,}: {rows:,} tokens, {size}")


def _event_line(event: CacheEvent) -> str:
    at = datetime.fromtimestamp(event.at).strftime("%Y-%m-%d %H:%M:%S")
    size = megabytes(event.bytes) if event.bytes else ""
    time = f"{event.seconds:.3f} s" if event.seconds else ""
    return (
        f"{at}  {event.kind:<8}{event.tokens:>7,} tokens {size:>9} {time:>8}  {one_line(event.note)}".rstrip()
    )


def _write_csv(events: list[CacheEvent]) -> None:
    names = [field.name for field in fields(CacheEvent)]
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(event) | {"note": one_line(event.note)} for event in events)
