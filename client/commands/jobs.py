"""``still ls``, ``show`` and ``watch``: how jobs stand."""

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from typing import get_args

import click
from rich.console import Console
from rich.table import Table

from client import render
from client.api import Stillroom
from client.bars import job_display
from client.inputs import JOB_ID, TEXT
from client.session import (
    EXIT_OF,
    INTERRUPTED,
    Session,
    clean,
    labels_of,
    say,
    say_json,
    screen,
    session,
)
from client.views import Checkpoint, Curve, Job, Output, State

HEADINGS = ("job", "state", "kind", "name", "progress", "age", "note")


@click.command()
@click.option("--state", type=click.Choice(get_args(State)))
@click.option("--kind", type=TEXT, help="Only jobs of this kind.")
@click.option("--name", type=TEXT, help="Only jobs of this name.")
@click.option(
    "--label",
    "labels",
    type=TEXT,
    multiple=True,
    metavar="KEY=VALUE",
    help="May be repeated.",
)
@click.option("-n", "--limit", type=click.IntRange(min=1), default=50, show_default=True)
def ls(
    state: str | None, kind: str | None, name: str | None, labels: tuple[str, ...], limit: int
) -> None:
    """List jobs, newest first."""
    here, console = session(), screen()
    with here.client() as client:
        asked = client.list(state=state, kind=kind, name=name, labels=labels_of(labels))
        jobs = list(itertools.islice(asked, limit))
    if here.as_json:
        say_json(jobs)
    elif console.is_terminal:
        console.print(_table(jobs, time.time()))
    else:
        for job in jobs:
            say("\t".join(_cells(job, time.time())))


def _cells(job: Job, now: float) -> list[str]:
    age = render.duration(render.seconds_since(job["created_at"], now))
    texts = [job["id"], job["state"], job["kind"], job["name"] or "", render.percent(job), age]
    return [text.replace("\t", " ").replace("\n", " ") for text in [*texts, render.note(job)]]


def _table(jobs: Sequence[Job], now: float) -> Table:
    table = Table(*HEADINGS, box=None, header_style="bold")
    for job in jobs:
        job_id, state, kind, name, percent, age, note = _cells(job, now)
        done = f"{render.bar(job['progress']['fraction'])} {percent}"
        table.add_row(
            job_id,
            render.coloured(state),
            *(render.plain(text) for text in (kind, name, done, age, note)),
        )
    table.columns[0].no_wrap = True
    return table


@click.command()
@click.argument("job_id", type=JOB_ID, metavar="JOB")
def show(job_id: str) -> None:
    """Show all there is to know about a job."""
    here, console = session(), screen()
    with here.client() as client:
        job, outputs = client.get(job_id), client.artifacts(job_id)
        curves, kept = client.metrics(job_id), client.checkpoints(job_id)
    if here.as_json:
        facts = {"outputs": list(outputs), "checkpoints": list(kept), "metrics": curves}
        say_json({**job, **facts})
        return
    for key, value in _facts(job, time.time()):
        say(f"{key:<10} {value}")
    _say_outputs(outputs)
    _say_checkpoints(kept)
    _say_curves(curves, console)


def _facts(job: Job, now: float) -> list[tuple[str, str]]:
    progress = f"{render.bar(job['progress']['fraction'])} {render.percent(job)}"
    inputs = [
        f"{field} = {i['sha256'] or ''} {('from ' + i['job_id']) if i['job_id'] else ''}".strip()
        + (f"/{i['output']}" if i["output"] else "")
        for field, i in job["inputs"].items()
    ]
    facts = [
        ("job", job["id"]),
        ("kind", job["kind"]),
        ("name", job["name"] or ""),
        ("state", job["state"]),
        ("progress", f"{progress}  {render.pace(job['progress'])}"),
        ("not yet", job["waits_for"] or ""),
        ("starts", render.start(job, now)),
        ("error", render.note(job) if job["error"] else ""),
        ("retry of", job["retry_of"] or ""),
        ("priority", str(job["priority"])),
        ("labels", ", ".join(f"{k}={v}" for k, v in job["labels"].items())),
        ("by", job["submitted_by"] or ""),
        ("created", job["created_at"]),
        ("started", job["started_at"] or ""),
        ("finished", job["finished_at"] or ""),
        ("deadline", job["deadline_at"] or ""),
        ("computed", f"{job['device_seconds']:.1f} s on devices, {job['attempts']} attempts"),
        ("cache", render.hits(job)),
        *(("input", text) for text in inputs),
    ]
    return [(key, value.strip()) for key, value in facts if value.strip()]


def _say_outputs(outputs: Sequence[Output]) -> None:
    if outputs:
        say("\nartifacts")
    for output in outputs:
        about = f"{output['format']}, {render.size(output['size_bytes'])}"
        say(f"  {output['name']:<14} {output['file_name']:<22} {about:<30} {output['sha256']}")


def _say_checkpoints(kept: Sequence[Checkpoint]) -> None:
    if kept:
        say("\ncheckpoints")
    for one in kept:
        about = [f"{one['stage']} {one['index']}", one["name"], render.size(one["size_bytes"])]
        if one["score"] is not None:
            about.append(f"score {render.number(one['score'])}")
        say(f"  {'  '.join(about)}{'  pinned' if one['pinned'] else ''}")


def _say_curves(curves: Mapping[str, Curve], console: Console) -> None:
    unicode = "utf" in console.encoding.lower()
    blocks = render.BLOCKS if unicode else render.ASCII_BLOCKS
    if curves:
        say("\ncurves")
    for name, points in curves.items():
        values = [value for _, value in points]
        if len(values) == 1:
            say(f"  {name:<28} {render.number(values[0], 6)}")
        elif values:
            ends = f"{render.number(values[0])} -> {render.number(values[-1])}"
            line = render.sparkline(values, width=40, blocks=blocks)
            say(f"  {name:<28} {line} {ends}")


@click.command()
@click.argument("job_id", type=JOB_ID, metavar="JOB")
def watch(job_id: str) -> None:
    """Follow a job until it ends; Ctrl-C leaves it running.

    Exits with 0 where it succeeded, 1 failed, 3 cancelled.
    """
    here = session()
    with here.client() as client:
        follow(client, here, job_id)


def follow(client: Stillroom, here: Session, job_id: str) -> None:
    """Show a job until it ends, then end the command with its exit code."""
    console, context = screen(), click.get_current_context()
    try:
        if here.as_json:
            job = client.wait(job_id, _JsonLines().show)
        else:
            with job_display(console) as display:
                job = client.wait(job_id, display)
    except KeyboardInterrupt:
        click.echo(
            f"{job_id} keeps running: `still watch {job_id}` shows it again, "
            f"`still cancel {job_id}` stops it",
            err=True,
        )
        context.exit(INTERRUPTED)
    if not here.as_json:
        _say_end(job)
    context.exit(EXIT_OF[job["state"]])


class _JsonLines:
    """Prints a job's view whenever it changed, one line each."""

    def __init__(self) -> None:
        self._last: Job | None = None

    def show(self, job: Job) -> None:
        if job != self._last:
            click.echo(json.dumps(job))
        self._last = job


def _say_end(job: Job) -> None:
    if job["error"] is not None:
        click.echo(clean(f"{job['state']}: {render.note(job)}"), err=True)
    if job["artifacts"]:
        say(f"artifacts: {', '.join(job['artifacts'])} (`still get {job['id']}`)")


COMMANDS = (ls, show, watch)
