"""What every subcommand shares: where the server is, how to print, and how a command ends."""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import httpx2
from rich.console import Console

from client.api import DEFAULT_URL, Stillroom
from client.errors import StillroomError
from client.inputs import TEXT, Finite
from client.views import State
from client.wire import Retry

OK, FAILED, USAGE, CANCELLED, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 4, 130
EXIT_OF: Mapping[State, int] = {"succeeded": OK, "failed": FAILED, "cancelled": CANCELLED}

SHARED = "stillroom.session"


@dataclass(frozen=True)
class Session:
    """The options in force for one command."""

    url: str = DEFAULT_URL
    api_key: str | None = None
    as_json: bool = False
    patience_s: float | None = None
    cache_dir: Path | None = None

    def client(self) -> Stillroom:
        """Open a client; the caller closes it."""
        retry = Retry(on_retry=_Told())
        if self.patience_s is not None:
            retry = replace(retry, limit_s=self.patience_s, contact_s=self.patience_s)
        try:
            return Stillroom(self.url, api_key=self.api_key, retry=retry, cache_dir=self.cache_dir)
        except httpx2.InvalidURL as error:
            raise click.BadParameter(f"{self.url!r}: {error}", param_hint="--url") from error
        except UnicodeError as error:
            raise click.BadParameter("only ASCII characters", param_hint="--api-key") from error


class _Told:
    """Says once that the server is away; more would bury what matters."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, error: StillroomError) -> None:
        if not self._said:
            click.echo(clean(f"{error}; trying again ..."), err=True)
        self._said = True


def session(context: click.Context | None = None) -> Session:
    """Return the options in force; a command and its subcommands share them."""
    context = context or click.get_current_context()
    found: Session = context.meta.get(SHARED, Session())
    return found


def connection_options(*, defaults: bool = False) -> list[click.Option]:
    """Return --url, --api-key, --json and friends, which may stand before or after a command.

    ``defaults`` is for the outermost command, which alone reads the environment.
    """

    def env(name: str) -> str | None:
        return name if defaults else None

    return [
        _option(
            "--url",
            "url",
            env("STILL_URL"),
            type=TEXT,
            help=f"The service. [default: {DEFAULT_URL}]",
        ),
        _option(
            "--api-key", "api_key", env("STILL_API_KEY"), type=TEXT, help="Sent as a bearer token."
        ),
        _option("--json", "as_json", None, is_flag=True, default=None, help="Print JSON."),
        _option(
            "--patience",
            "patience_s",
            env("STILL_PATIENCE"),
            type=Finite(0, 86_400),
            metavar="SECONDS",
            help="Wait so long for a server that is away. [default: 3 at first, then 60]",
        ),
        _option(
            "--cache-dir",
            "cache_dir",
            env("STILL_CACHE_DIR"),
            type=click.Path(file_okay=False, path_type=Path),
            hidden=True,
        ),
    ]


def _option(flag: str, name: str, envvar: str | None, **about: Any) -> click.Option:
    return click.Option(
        [flag, name],
        envvar=envvar,
        show_envvar=envvar is not None,
        expose_value=False,
        is_eager=True,
        callback=_keep,
        **about,
    )


def _keep(context: click.Context, option: click.Parameter, value: Any) -> None:
    if value is not None and option.name is not None:
        change = {option.name: value}
        context.meta[SHARED] = replace(session(context), **change)


def connected(command: click.Command) -> click.Command:
    """Give a command the connection options."""
    command.params += connection_options()
    return command


def screen() -> Console:
    """Return the terminal, or a console that writes plain text where there is none."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def say(text: str) -> None:
    """Print one plain line."""
    click.echo(clean(text))


def say_json(value: Any) -> None:
    """Print JSON: indented for eyes, one line where a program reads."""
    indent = 2 if sys.stdout.isatty() else None
    click.echo(json.dumps(value, indent=indent))


def clean(text: str) -> str:
    """Take out what must not drive a terminal or cannot be printed: names come from others."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "?", text)


def labels_of(pairs: tuple[str, ...]) -> dict[str, str]:
    """Read ``key=value`` options."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise click.BadParameter(f"{pair!r}; needed key=value", param_hint="--label")
        found[key] = value
    return found
