"""``still up``: start the service on this machine. Settings and announcements are the server's."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from client.session import screen

HINT = "pip install 'stillroom[worker]'"
NEEDED = ("api", "fastapi", "uvicorn", "sqlalchemy", "torch")


def missing() -> list[str]:
    """Return the packages of the server extra that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def environment(
    host: str | None, port: int | None, data_dir: Path | None, devices: str | None
) -> dict[str, str]:
    """Return the STILL_* variables for the options that were given."""
    listed = [name.strip() for name in (devices or "").split(",") if name.strip()]
    given = {
        "STILL_HOST": host,
        "STILL_PORT": port,
        "STILL_DATA_DIR": data_dir,
        "STILL_DEVICES": json.dumps(listed) if listed else None,
    }
    return {name: str(value) for name, value in given.items() if value is not None}


def _replace_process(arguments: list[str], variables: dict[str, str]) -> None:
    """Become the server: signals and the exit code are then its own."""
    sys.stdout.flush()
    inherited = dict(os.environ)  # noqa: TID251 - the server inherits the rest unread
    os.execve(arguments[0], arguments, {**inherited, **variables})


@click.command()
@click.option("--host", help="Address to bind. [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65_535), help="[default: 8321]")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Database, artifacts, uploads. [default: stillroom-data]",
)
@click.option("--devices", metavar="LIST", help="One worker each: cpu,cuda:0 [default: all GPUs]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads per worker.")
@click.option("--api-key", envvar="STILL_API_KEY", show_envvar=True, help="Asked of every request.")
def up(
    host: str | None,
    port: int | None,
    data_dir: Path | None,
    devices: str | None,
    threads: int | None,
    api_key: str | None,
) -> None:
    """Start the service: API, dashboard and workers, in one process tree."""
    absent = missing()
    if absent:
        raise click.ClickException(
            f"the server is not installed (missing: {', '.join(absent)}). Install it: {HINT}"
        )
    variables = environment(host, port, data_dir, devices)
    if threads is not None:
        variables["STILL_THREADS"] = str(threads)
    if api_key is not None:
        variables["STILL_API_KEY"] = api_key
    if screen().is_terminal:
        screen().print("starting the service ...")  # its first own words take some seconds
    # -P: a folder named api in the current directory is not the server.
    _replace_process([sys.executable, "-P", "-m", "api"], variables)
