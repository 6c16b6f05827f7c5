"""``still pool``, ``drain``, ``undrain`` and ``sweep``: what all share."""

import time
from collections.abc import Sequence

import click
from rich.table import Table

from client import render
from client.inputs import TEXT
from client.session import say, say_json, screen, session
from client.views import Node, Pool, PoolWorker, Queue

WORKERS = ("node", "state", "device", "memory", "threads", "busy", "runs", "for")
QUEUES = ("project", "weight", "share", "used", "debt", "running", "jobs", "chunks left")


@click.command()
def pool() -> None:
    """Show the devices, what runs on them, and the queue of each project."""
    here, console = session(), screen()
    with here.client() as client:
        found = client.pool()
    if here.as_json:
        say_json(found)
        return
    states = {node["id"]: node for node in found["nodes"]}
    now = time.time()
    parts = (
        (WORKERS, [_worker(one, states[one["node"]], now) for one in found["workers"]]),
        (QUEUES, [_queue(one) for one in found["projects"]]),
    )
    for headings, rows in parts:
        if console.is_terminal:
            console.print(_table(headings, rows))
        else:
            for row in rows:
                say("\t".join(row))
    for line in _notes(found):
        say(line)


def _worker(one: PoolWorker, node: Node, now: float) -> list[str]:
    runs, since = "", ""
    if one["running"] is not None:
        at = one["running"]
        runs = f"{at['job_id']} {at['stage']} {at['index']}" if at["job_id"] else "another project"
        since = render.duration(render.seconds_since(at["since"], now)) if at["since"] else ""
    return [
        one["node"],
        node["state"] if one["alive"] else "gone",
        one["device"],
        render.size(one["memory_bytes"]),
        str(one["threads"]),
        f"{one['utilisation']:.0%}",
        runs,
        since,
    ]


def _queue(one: Queue) -> list[str]:
    limit = "" if one["running_limit"] is None else f" of {one['running_limit']}"
    return [
        one["name"],
        f"{one['weight']:g}",
        f"{one['share']:.0%}",
        render.duration(one["usage"]),
        f"{one['debt']:+.0f} s",
        f"{one['running_chunks']}{limit}",
        ", ".join(f"{count} {state}" for state, count in one["jobs"].items()) or "none",
        str(one["chunks_left"]),
    ]


def _notes(found: Pool) -> list[str]:
    """Say why nodes are not used, those without a live worker too."""
    return [
        f"{node['id']} is {node['state']}: {node['note'] or 'no reason given'}"
        for node in found["nodes"]
        if node["state"] != "active"
    ]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*headings, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(render.plain(cell) for cell in row))
    return table


@click.command()
@click.argument("node", type=TEXT)
@click.option("--note", type=TEXT, help="Why; shown with the node.")
def drain(node: str, note: str | None) -> None:
    """Let the chunk of NODE (host:device) end and give it no other. Needs the scope admin."""
    here = session()
    with here.client() as client:
        _say_node(client.drain(node, note=note), as_json=here.as_json)


@click.command()
@click.argument("node", type=TEXT)
def undrain(node: str) -> None:
    """Use a drained or excluded NODE again. Needs the scope admin."""
    here = session()
    with here.client() as client:
        _say_node(client.undrain(node), as_json=here.as_json)


def _say_node(node: Node, *, as_json: bool) -> None:
    if as_json:
        say_json(node)
    else:
        say(f"{node['id']} {node['state']}" + (f": {node['note']}" if node["note"] else ""))


@click.command()
@click.option("--dry-run/--yes", "dry_run", default=True, help="List, or remove. [default: list]")
def sweep(*, dry_run: bool) -> None:
    """Remove artifacts and files that no job, upload or cache entry names. Needs the scope admin.

    Only lists them unless --yes is given.
    """
    here = session()
    with here.client() as client:
        swept = client.sweep(dry_run=dry_run)
    if here.as_json:
        say_json(swept)
        return
    for name in swept["removed"]:
        say(name)
    count = len(swept["removed"])
    done = "would go; --yes removes them" if dry_run else "removed"
    click.echo(f"{count} {done}", err=True)


COMMANDS = (pool, drain, undrain, sweep)
