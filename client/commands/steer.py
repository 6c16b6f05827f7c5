"""``still cancel``, ``pause``, ``resume``, ``retry``, ``set``, ``pin`` and ``unpin``."""

from collections.abc import Callable, Sequence

import click

from client.api import Stillroom
from client.commands.jobs import follow
from client.inputs import JOB_ID, TEXT
from client.session import say, say_json, session
from client.views import Checkpoint, Job


def _one(name: str, help_text: str, act: Callable[[Stillroom, str], Job]) -> click.Command:
    """Return a command that does one thing to a job and says how it stands then."""

    def run(job_id: str) -> None:
        here = session()
        with here.client() as client:
            job = act(client, job_id)
        if here.as_json:
            say_json(job)
        else:
            say(f"{job['id']} {job['state']}")

    argument = click.Argument(["job_id"], type=JOB_ID, metavar="JOB")
    return click.Command(name, params=[argument], callback=run, help=help_text)


cancel = _one("cancel", "Cancel a job.", Stillroom.cancel)
pause = _one(
    "pause",
    "Start no chunk more of a job; one that runs is given back and runs again later.",
    Stillroom.pause,
)
resume = _one("resume", "Let a paused job go on where it stopped.", Stillroom.resume)


@click.command()
@click.argument("job_id", type=JOB_ID, metavar="JOB")
@click.option("--watch", "watch", is_flag=True, help="Follow the new job until it ends.")
def retry(job_id: str, *, watch: bool) -> None:
    """Go on with a failed or cancelled job, as a new job that keeps the chunks that are done.

    Jobs that failed only because they needed an output of it are retried too.
    """
    here = session()
    with here.client() as client:
        made = client.retry(job_id)
        if here.as_json and not watch:
            say_json(made)
        elif not here.as_json:
            say(f"{made['id']} {made['state']}")
            for one in made["retried_with"]:
                say(f"{one['id']} retries {one['retry_of']}, which needed it")
        if watch:
            follow(client, here, made["id"])


@click.command("set")
@click.argument("job_id", type=JOB_ID, metavar="JOB")
@click.option("--priority", type=click.IntRange(0, 100), help="Higher runs first.")
@click.option("--name", type=TEXT, help="Shown in lists.")
def change(job_id: str, priority: int | None, name: str | None) -> None:
    """Change a job's priority or name."""
    if priority is None and name is None:
        raise click.UsageError("nothing to change: give --priority or --name")
    here = session()
    with here.client() as client:
        job = client.change(job_id, priority=priority, name=name)
    if here.as_json:
        say_json(job)
    else:
        say(f"{job['id']} {job['state']}, priority {job['priority']}, {job['name'] or 'no name'}")


def _pins(
    name: str, help_text: str, act: Callable[[Stillroom, str, str, int], Sequence[Checkpoint]]
) -> click.Command:
    def run(job_id: str, stage: str, index: int) -> None:
        here = session()
        with here.client() as client:
            kept = act(client, job_id, stage, index)
        if here.as_json:
            say_json(list(kept))
            return
        for one in kept:
            what = "pinned" if one["pinned"] else "not pinned"
            say(f"{one['stage']} {one['index']} {one['name']} {what}")

    params: list[click.Parameter] = [
        click.Argument(["job_id"], type=JOB_ID, metavar="JOB"),
        click.Argument(["stage"], type=TEXT, metavar="STAGE"),
        click.Argument(["index"], type=click.IntRange(0, 2**31 - 1), metavar="INDEX"),
    ]
    return click.Command(name, params=params, callback=run, help=help_text)


pin = _pins("pin", "Keep the checkpoints of a chunk; `still show` lists them.", Stillroom.pin)
unpin = _pins("unpin", "Leave the checkpoints of a chunk to retention again.", Stillroom.unpin)

COMMANDS = (cancel, pause, resume, retry, change, pin, unpin)
