"""``still worker`` and ``still beat``: one part of a team on this machine; settings are STILL_*."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import click

HINT = "pip install 'stillroom[worker,team]'"
NEEDED = ("workers", "sqlalchemy", "celery", "redis", "psycopg")
KEYS = frozenset({"STILL_API_KEY", "STILL_KEY_SECRET", "STILL_METRICS_KEY"})
"""What a worker has no use for, and could only lose."""
URLS = (
    click.option(
        "--broker-url",
        envvar="STILL_BROKER_URL",
        show_envvar=True,
        metavar="URL",
        help="Redis of the team: redis://:password@host:6379/0",
    ),
    click.option(
        "--database-url",
        envvar="STILL_DATABASE_URL",
        show_envvar=True,
        metavar="URL",
        help="PostgreSQL of the team: postgresql+psycopg://user:password@host/name",
    ),
)
"""A password in a variable is not seen by the machine's other users, as one in an option is."""


def missing(*names: str) -> list[str]:
    """Return those packages that are not installed."""
    return [name for name in names if find_spec(name) is None]


def _become(arguments: list[str], given: dict[str, object], *needed: str) -> None:
    """Become ``python -m workers``: signals and the exit code are then its own."""
    absent = missing(*NEEDED, *needed)
    if absent:
        raise click.ClickException(
            f"team mode is not installed (missing: {', '.join(absent)}). Install it: {HINT}"
        )
    variables = {name: str(value) for name, value in given.items() if value is not None}
    inherited = {
        name: value
        for name, value in os.environ.items()  # noqa: TID251 - the worker inherits the rest unread
        if name not in KEYS
    }
    sys.stdout.flush()
    # -P: a folder named workers in the current directory is not the worker.
    command = [sys.executable, "-P", "-m", "workers", *arguments]
    os.execve(command[0], command, {**inherited, **variables})


@click.command()
@click.option("--device", required=True, metavar="DEVICE", help="cpu, or cuda:0, cuda:1 ...")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads. Results depend on it: all CPU workers of a team take the first one's.",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder that the API and every worker share. [default: stillroom-data]",
)
@click.option("--node", metavar="NAME", help="Of this machine in the pool. [default: its own]")
@URLS[0]
@URLS[1]
def worker(
    device: str,
    threads: int | None,
    data_dir: Path | None,
    node: str | None,
    broker_url: str | None,
    database_url: str | None,
) -> None:
    """Run jobs of a team on one device of this machine, until told to stop."""
    given: dict[str, object] = {
        "STILL_THREADS": threads,
        "STILL_DATA_DIR": data_dir,
        "STILL_NODE": node,
        "STILL_BROKER_URL": broker_url,
        "STILL_DATABASE_URL": database_url,
    }
    _become(["--device", device], given, "torch")


@click.command()
@URLS[0]
@URLS[1]
def beat(broker_url: str | None, database_url: str | None) -> None:
    """Run a team's reconciler: dead workers' chunks come back, deadlines pass."""
    given: dict[str, object] = {"STILL_BROKER_URL": broker_url, "STILL_DATABASE_URL": database_url}
    _become(["--beat"], given)
