"""``still project``, ``still key`` and ``still whoami``: who shares the service, and how far."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from rich.table import Table

from client import render
from client.api import Stillroom
from client.inputs import TEXT, Finite
from client.session import connected, say, say_json, screen, session
from client.views import Key, Project

SCOPES = ("read", "submit", "admin")
NONE = "none"
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_SIZES = " KMGT"


class Limit(click.ParamType[int | str]):
    """A whole number, with K, M, G or T for powers of 1024; or ``none``."""

    name = "limit"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Return the number or ``none``, or end the command."""
        if value == NONE:
            return NONE
        found = re.fullmatch(r"(\d{1,12})([KMGT]?)", str(value), re.ASCII)
        if found is None:
            told = f"{str(value)[:40]!r}; allowed: none, or a number such as 20 or 200G"
            self.fail(told, param, ctx)
        number: int = int(found[1]) * 1024 ** _SIZES.index(found[2] or " ")
        return number


class Until(click.ParamType[str]):
    """An instant: so long from now, or as ISO 8601 with its zone."""

    name = "until"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the instant as ISO 8601, or end the command."""
        found = re.fullmatch(r"(\d{1,5})([mhd])", str(value), re.ASCII)
        if found is not None:
            now = datetime.now(UTC)  # noqa: TID251 - the edge: this machine's own clock
            return (now + timedelta(**{_UNITS[found[2]]: int(found[1])})).isoformat()
        try:
            instant = datetime.fromisoformat(str(value))
        except ValueError:
            instant = None
        if instant is None or instant.tzinfo is None:
            told = f"{str(value)[:40]!r}; allowed: 30d, 12h, 90m, or 2030-01-31T12:00:00Z"
            self.fail(told, param, ctx)
        return instant.isoformat()


def _limits(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of what a project may be given."""
    limit = Limit()
    for option in (
        click.option("--storage-limit", type=limit, help="Bytes stored, such as 200G; or none."),
        click.option("--queued-limit", type=limit, help="Jobs that are not over; or none."),
        click.option("--running-limit", type=limit, help="Chunks at once; or none."),
        click.option("--weight", type=Finite(min=0, min_open=True), help="Against the others."),
    ):
        command = option(command)
    return command


def _values(given: Mapping[str, float | str | None]) -> dict[str, Any]:
    """Return what was given, under the names of the API."""
    said = {name: value for name, value in given.items() if value is not None}
    found = {name: None if value == NONE else value for name, value in said.items()}
    if "storage_limit" in found:
        found["storage_limit_bytes"] = found.pop("storage_limit")
    return found


@click.group()
def project() -> None:
    """Make, list and change projects. Needs a key with the scope admin."""


@click.command("create")
@click.argument("name", type=TEXT)
@_limits
def create_project(name: str, **given: Any) -> None:
    """Make a project; give it keys with `still key create`."""
    here = session()
    with here.client() as client:
        _show_project(client.create_project(name, **_values(given)))


@click.command("ls")
def list_projects() -> None:
    """List projects with their limits and what is in use."""
    here, console = session(), screen()
    with here.client() as client:
        found = client.projects()
    if here.as_json:
        say_json(list(found))
        return
    headings = ("project", "name", "weight", "running", "queued", "stored")
    _print(console, headings, [_project_cells(one) for one in found])


def _project_cells(one: Project) -> list[str]:
    use, stored = one["use"], render.size(one["use"]["storage_bytes"])
    return [
        one["id"],
        one["name"],
        f"{one['weight']:g}",
        _of(str(use["running_chunks"]), one["running_limit"]),
        _of(str(use["queued_jobs"]), one["queued_limit"]),
        _of(stored, one["storage_limit_bytes"], shown=render.size),
    ]


def _of(use: str, limit: int | None, *, shown: Callable[[int], str] = str) -> str:
    return use if limit is None else f"{use} of {shown(limit)}"


@click.command("set")
@click.argument("name", metavar="PROJECT", type=TEXT)
@click.option("--name", "new_name", type=TEXT, help="Rename it.")
@_limits
def change_project(name: str, new_name: str | None, **given: Any) -> None:
    """Change a project, named by its name or id; what is not given stays."""
    values = _values(given) | ({} if new_name is None else {"name": new_name})
    if not values:
        raise click.UsageError("nothing to change; see --help")
    here = session()
    with here.client() as client:
        _show_project(client.change_project(_find(client, name)["id"], values))


def _find(client: Stillroom, text: str) -> Project:
    """Return the project of that id or name, or end the command saying what there is."""
    found = client.projects()
    for field in ("id", "name"):  # an id is never somebody's choice
        for one in found:
            if text == one[field]:
                return one
    there = ", ".join(one["name"] for one in found)
    raise click.BadParameter(f"no project {text!r}; there are: {there}", param_hint="PROJECT")


def _show_project(one: Project) -> None:
    if session().as_json:
        say_json(one)
        return
    for key, value in _project_facts(one):
        say(f"{key:<8} {value}")


def _project_facts(one: Project) -> list[tuple[str, str]]:
    _, name, weight, running, queued, stored = _project_cells(one)
    return [
        ("project", f"{one['id']}  {name}"),
        ("weight", weight),
        ("running", f"{running} chunks"),
        ("queued", f"{queued} jobs"),
        ("stored", stored),
    ]


@click.group()
def key() -> None:
    """Make, list and revoke API keys. Needs a key with the scope admin."""


@click.command("create")
@click.argument("name", type=TEXT)
@click.option("--project", default="default", show_default=True, type=TEXT, help="Name or id.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    help="May be repeated; admin reaches every project. [default: read and submit]",
)
@click.option("--expires", type=Until(), metavar="WHEN", help="30d, 12h, or an instant.")
def create_key(name: str, project: str, scopes: tuple[str, ...], expires: str | None) -> None:
    """Make a key, printed alone on standard output. It is shown this once.

    The scopes read and submit end at the key's project. The scope admin does not: it makes and
    changes every project, makes keys of any project, steers the pool and reads the whole audit log.
    """
    here = session()
    with here.client() as client:
        asked = {"name": name, "scopes": scopes or ("read", "submit"), "expires_at": expires}
        made = client.create_key(_find(client, project)["id"], **asked)  # type: ignore[arg-type]
    if here.as_json:
        say_json(made)
        return
    click.echo(made["key"])
    until = made["expires_at"] or "it is revoked"
    told = (
        f"{made['id']}: {', '.join(made['scopes'])}, until {until}; keep it, it is not shown again"
    )
    click.echo(told, err=True)


@click.command("ls")
@click.option("--project", type=TEXT, help="Only keys of this project, by name or id.")
def list_keys(project: str | None) -> None:
    """List keys, newest first; none is shown whole."""
    here, console = session(), screen()
    with here.client() as client:
        project_id = None if project is None else _find(client, project)["id"]
        found = client.keys(project_id=project_id)
    if here.as_json:
        say_json(list(found))
        return
    headings = ("key", "begins", "project", "name", "scopes", "last used", "state")
    _print(console, headings, [_key_cells(one) for one in found])


def _key_cells(one: Key) -> list[str]:
    state = "revoked" if one["revoked_at"] else f"until {one['expires_at'] or 'revoked'}"
    scopes, used = ",".join(one["scopes"]), one["last_used_at"] or "never"
    return [one["id"], one["prefix"], one["project_id"], one["name"], scopes, used, state]


def _print(console: Any, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not console.is_terminal:
        for row in rows:
            say("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row))
        return
    table = Table(*headings, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(render.plain(cell) for cell in row))
    console.print(table)


@click.command("revoke")
@click.argument("key_id", metavar="KEY_ID", type=TEXT)
def revoke_key(key_id: str) -> None:
    """End a key for good, within two seconds. Named by its id, not by the key itself."""
    here = session()
    with here.client() as client:
        client.revoke_key(key_id)
    if here.as_json:
        say_json({"id": key_id, "revoked": True})
    else:
        say(f"{key_id} revoked")


@click.command()
def whoami() -> None:
    """Show whom the key in use stands for: project, scopes, limits and use."""
    here = session()
    with here.client() as client:
        found = client.me()
    if here.as_json:
        say_json(found)
        return
    say(f"{'actor':<8} {found['actor']}")
    say(f"{'scopes':<8} {', '.join(found['scopes'])}")
    for name, value in _project_facts(found["project"]):
        say(f"{name:<8} {value}")


for _group, _commands in (
    (project, (create_project, list_projects, change_project)),
    (key, (create_key, list_keys, revoke_key)),
):
    for _command in _commands:
        _group.add_command(connected(_command))

COMMANDS = (project, key, whoami)
