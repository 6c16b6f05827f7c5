"""``still get`` and ``still upload``: files out of and into the service."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
from rich.console import Console

from client.api import Stillroom
from client.bars import transfers
from client.inputs import JOB_ID, TEXT
from client.render import size
from client.session import FAILED, say, say_json, screen, session
from client.views import Output


def safe_name(offered: str, otherwise: str) -> str:
    """Return a plain base name for this machine; a server never chooses a folder."""
    base = re.split(r"[/\\]", offered)[-1]
    base = re.sub(r'[\x00-\x1f\x7f-\x9f<>:"|?*]', "_", base).strip(" .")
    kept = base.encode("utf-8", "replace")[:200].decode("utf-8", "ignore")
    return kept or re.sub(r"\W", "_", otherwise) or "artifact"


def file_names(outputs: Iterable[Output]) -> dict[str, str]:
    """Return artifact name -> file name; files of the same name get the artifact's before it."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for output in outputs:
        file = safe_name(output["file_name"], output["name"])
        if file.lower() in taken:
            file = f"{safe_name(output['name'], 'artifact')}-{file}"
        taken.add(file.lower())
        names[output["name"]] = file
    return names


@click.command()
@click.argument("job_id", type=JOB_ID, metavar="JOB")
@click.argument("names", type=TEXT, metavar="[NAME]...", nargs=-1)
@click.option(
    "-o",
    "--output-dir",
    default=".",
    type=click.Path(file_okay=False, path_type=Path),
    help="Made if absent. [default: the current folder]",
)
@click.option("--force", is_flag=True, help="Overwrite files that hold something else.")
def get(job_id: str, names: tuple[str, ...], output_dir: Path, *, force: bool) -> None:
    """Download a job's artifacts, all or those named; each is checked against its SHA-256."""
    here, console = session(), screen()
    with here.client() as client:
        outputs = _wanted(client, job_id, names)
        output_dir.mkdir(parents=True, exist_ok=True)
        quiet = Console(quiet=True) if here.as_json else console
        paths = _fetch_all(client, outputs, output_dir, quiet, force=force)
    found = [
        {"name": o["name"], "sha256": o["sha256"], "size_bytes": o["size_bytes"], "path": str(p)}
        for o, p in zip(outputs, paths, strict=True)
    ]
    if here.as_json:
        say_json(found)
        return
    for output, path in zip(outputs, paths, strict=True):
        say(f"{output['name']}\t{path}\t{size(output['size_bytes'])}\t{output['sha256']}")


def _fetch_all(
    client: Stillroom, outputs: Sequence[Output], folder: Path, console: Console, *, force: bool
) -> list[Path]:
    files, paths = file_names(outputs), []
    with transfers(console) as start:
        for output in outputs:
            path = folder / files[output["name"]]
            report = start(path.name)
            paths.append(
                client.download(output["sha256"], path, overwrite=force, on_progress=report)
            )
            report(output["size_bytes"], output["size_bytes"])
    return paths


def _wanted(client: Stillroom, job_id: str, names: tuple[str, ...]) -> list[Output]:
    """Return the artifacts asked for, or end the command saying what there is."""
    offered = {output["name"]: output for output in client.artifacts(job_id)}
    if not offered:
        state = client.get(job_id)["state"]
        click.echo(f"{job_id} is {state} and has no artifacts yet", err=True)
        click.get_current_context().exit(FAILED)
    unknown = [name for name in names if name not in offered]
    if unknown:
        raise click.BadParameter(
            f"no artifact {unknown[0]!r}; there are: {', '.join(offered)}", param_hint="NAME"
        )
    return [offered[name] for name in dict.fromkeys(names or offered)]


@click.command()
@click.argument("path", metavar="FILE", type=click.Path(exists=True, path_type=Path))
def upload(path: Path) -> None:
    """Send a file; prints the SHA-256 that jobs name it by.

    NAME.pkl with a folder NAME/ beside it is sent as one. An upload that broke off goes on where
    it stopped when the same command is given again.
    """
    here, console = session(), screen()
    quiet = Console(quiet=True) if here.as_json else console
    with here.client() as client, transfers(quiet) as start:
        artifact = client.upload(path, on_progress=start(path.name))
    if here.as_json:
        say_json(artifact)
        return
    facts = "  ".join(f"{k}={v}" for k, v in artifact["meta"].items())
    say(f"sha256  {artifact['sha256']}")
    say(f"format  {artifact['format']}")
    say(f"size    {size(artifact['size_bytes'])}")
    if facts:
        say(f"facts   {facts}")
    # The last one is this upload: the same content may have come before, with other notes.
    for upload_row in artifact.get("uploaded_as", [])[-1:]:
        for note in upload_row.get("notes", []):
            say(f"note    {note}")


COMMANDS = (get, upload)
