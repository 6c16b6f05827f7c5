"""The ``still`` command. Its one rule: a user's mistake ends in a sentence, never a traceback.

Exit codes: 0 done, 1 the job failed or the server refused, 2 usage, 3 cancelled, 4 no answer,
130 interrupted.
"""

import json
import sys
from typing import Any

import click

from client.commands import admin, files, jobs, kinds, pool, steer, submit, up, worker
from client.errors import ApiError, StillroomError, Unreachable
from client.session import (
    FAILED,
    INTERRUPTED,
    UNREACHABLE,
    clean,
    connected,
    connection_options,
    session,
)


class Still(click.Group):
    """The outermost command: where errors become sentences and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except (StillroomError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            _tell(error, as_json=session(ctx).as_json)
            ctx.exit(UNREACHABLE if isinstance(error, Unreachable) else FAILED)
        except KeyboardInterrupt:
            click.echo("stopped; the same command again goes on where it can", err=True)
            ctx.exit(INTERRUPTED)


def _tell(error: Exception, *, as_json: bool) -> None:
    """Say what went wrong, on stderr."""
    if as_json:
        about: dict[str, Any] = {"detail": str(error)}
        if isinstance(error, ApiError):
            about = {"status": error.status, "code": error.code, "detail": error.detail}
            about["errors"] = list(error.errors)
        click.echo(json.dumps({"error": about}), err=True)
        return
    code = f" [{error.code}]" if isinstance(error, ApiError) else ""
    click.echo(clean(f"Error: {error}{code}"), err=True)
    if isinstance(error, Unreachable) and error.retryable:
        click.echo("Is the service running? `still up` starts one; --url names another.", err=True)


@click.group(cls=Still, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stillroom")
def still() -> None:
    """Distil expensive teachers into small, fast students, as a service."""


still.params += connection_options(defaults=True)
for command in (up.up, worker.worker, worker.beat, submit.submit, submit.estimate):
    still.add_command(command)
for command in (
    *(*jobs.COMMANDS, *steer.COMMANDS, *files.COMMANDS, *pool.COMMANDS),
    *(*admin.COMMANDS, kinds.kinds),
):
    still.add_command(connected(command))


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Unicode shows "?" rather than ending in an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    still(prog_name="still")
