"""``still get`` and ``still upload``: files out of and into the service."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from client.api import Stillroom
from client.bars import transfers
from client.downloads import Report
from client.folders import FORMAT
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


def file_names(outputs: Iterable[Output], *, whole: bool = False) -> dict[str, str]:
    """Return artifact name -> file name; files of the same name get the artifact's before it.

    ``whole``: a language model is a folder, which has the artifact's name.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for output in outputs:
        offered = output["name" if whole and output["format"] == FORMAT else "file_name"]
        file = safe_name(offered, output["name"])
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
@click.option("--manifest", is_flag=True, help="Of a language model the list of files alone.")
def get(
    job_id: str, names: tuple[str, ...], output_dir: Path, *, force: bool, manifest: bool
) -> None:
    """Download a job's artifacts, all or those named; each is checked against its SHA-256.

    A language model comes as a folder of the artifact's name, as from_pretrained loads it. What
    broke off goes on where it stopped when the same command is given again.
    """
    here, console = session(), screen()
    with here.client() as client:
        outputs = _wanted(client, job_id, names)
        output_dir.mkdir(parents=True, exist_ok=True)
        quiet = Console(quiet=True) if here.as_json else console
        with transfers(quiet) as start:
            fetch = partial(_fetch, client, start, force=force, whole=not manifest)
            files = file_names(outputs, whole=not manifest)
            found = [fetch(output, output_dir / files[output["name"]]) for output in outputs]
    if here.as_json:
        say_json(found)
        return
    for row in found:
        say(f"{row['name']}\t{row['path']}\t{size(row['size_bytes'])}\t{row['sha256']}")


def _fetch(
    client: Stillroom,
    start: Callable[[str], Report],
    output: Output,
    path: Path,
    *,
    force: bool,
    whole: bool,
) -> dict[str, Any]:
    """Fetch an artifact into a file, or a language model into a folder; say what is there now."""
    row = {"name": output["name"], "sha256": output["sha256"], "path": str(path)}
    if whole and output["format"] == FORMAT:
        made = client.download_folder(output["sha256"], path, overwrite=force, reports=start)
        size_bytes = sum(file.stat().st_size for file in made)
        return {**row, "size_bytes": size_bytes, "files": [file.name for file in made]}
    report = start(path.name)
    client.download(output["sha256"], path, overwrite=force, on_progress=report)
    report(output["size_bytes"], output["size_bytes"])
    return {**row, "size_bytes": output["size_bytes"]}


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
