"""Look at a rotation ledger again: orthogonality, round trips, cosines by layer, and a picture.

Exit codes: 0 all holds; 1 a tolerance is broken, or a file is not what it should be; 2 wrong usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from core.errors import DataInvalid
from core.transport.pictures import draw_errors, draw_singular_values
from core.transport.rotation_files import load_rotations
from core.transport.rotation_ledger import read, write_folder
from core.transport.sanity import HEADER, TOLERANCE, Row, inspect, problems


@click.command(help=__doc__)
@click.argument("ledger", type=click.Path(exists=True, path_type=Path))
@click.argument(
    "rotations", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for errors.png and singular_values.png; made where it is not there.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=TOLERANCE,
    show_default=True,
    help="Of every error, max abs.",
)
@click.option(
    "--layers",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that also gets rotations/RUN_ID/layer_0.json and so on, as document 002 has it.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the rows of round trips.")
def main(
    ledger: Path,
    rotations: Path | None,
    out: Path | None,
    tolerance: float,
    layers: Path | None,
    seed: int,
) -> None:
    """Run: LEDGER is its JSON or a folder, ROTATIONS the maps whose errors are computed anew."""
    try:
        told = read(ledger)
        maps = None if rotations is None else load_rotations(rotations)
        rows = inspect(told, maps, tolerance=tolerance, seed=seed)
    except DataInvalid as error:
        raise click.ClickException(error.message) from error
    click.echo(f"run {told['run_id']}, tied by {told['tie']}, {told['widths']}")
    for line in table(rows):
        click.echo(line)
    if maps is None:
        click.echo("errors are those of the ledger; give the rotations to have them computed anew")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        draw_errors(out / "errors.png", rows, tolerance=tolerance)
        draw_singular_values(out / "singular_values.png", told)
        click.echo(f"wrote {out / 'errors.png'} and {out / 'singular_values.png'}")
    if layers is not None:
        if (layers / "rotations" / told["run_id"]).exists():
            raise click.ClickException(f"{layers}: run {told['run_id']} is there already")
        click.echo(f"wrote {write_folder(told, layers)}")
    if found := problems(rows):
        raise click.ClickException("\n".join([f"{len(found)} problems", *found]))


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows as lines of aligned columns, under a header."""
    lines = [[str(cell) for cell in cells] for cells in (HEADER, *(row.cells() for row in rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]


if __name__ == "__main__":
    main()
