"""Tell what a rotation transport would take, from two config.json files: no weights are needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from client.inputs import Finite
from core.architectures.shape import ModelShape
from core.errors import DataInvalid
from core.specs.transport import Capture, Evaluate, Fold, Permute, Rotate
from core.transport import cost, memory

GIB = 2**30


@click.command(
    context_settings={"max_content_width": 100, "show_default": True},
    epilog="Exit codes: 0 told, 1 a configuration cannot be read, 2 wrong options.",
)
@click.option("--student", type=click.Path(path_type=Path), required=True, help="config.json.")
@click.option("--teacher", type=click.Path(path_type=Path), required=True, help="config.json.")
@click.option("--texts", type=click.IntRange(2), default=200, help="A fifth is held out.")
@click.option(
    "--tokens", type=Finite(1, 1e6), default=250.0, help="Of one text with the system prompt."
)
@click.option(
    "--tie", type=click.Choice(["global", "stage", "layer"]), default="global", help="One rotation."
)
@click.option("--prompts-per-chunk", type=click.IntRange(1), default=64, help="Loads the models.")
@click.option("--no-permute", is_flag=True, help="Match no heads and neurons.")
def main(
    student: Path,
    teacher: Path,
    texts: int,
    tokens: float,
    tie: str,
    prompts_per_chunk: int,
    no_permute: bool,  # noqa: FBT001  click passes it by name
) -> None:
    """Tell operations, bytes and seconds of a rotation transport, stage by stage."""
    try:
        small, large = _shape(student), _shape(teacher)
    except DataInvalid as error:
        click.echo(f"transport_cost: {error.message}", err=True)
        sys.exit(1)
    held_out = max(1, round(texts * Evaluate().held_out))
    lines = cost.price(
        small,
        large,
        cost.Texts(texts - held_out, held_out, tokens),
        capture=Capture(prompts_per_chunk=prompts_per_chunk),
        permute=None if no_permute else Permute(),
        rotate=Rotate.model_validate({"tie": tie}),
        fold=Fold(),
        evaluate=Evaluate(),
    )
    _show(small, large, lines)


def _shape(path: Path) -> ModelShape:
    try:
        return ModelShape.of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataInvalid(f"{path}: not a readable config.json: {error}") from error
    except DataInvalid as error:
        raise DataInvalid(f"{path}: {error.message}") from error


def _show(small: ModelShape, large: ModelShape, lines: list[cost.StageCost]) -> None:
    table = Table("stage", "operations", "read, GiB", "written, GiB", "seconds")
    for line in lines:
        table.add_row(
            line.stage,
            f"{line.operations:.2e}",
            f"{line.read_bytes / GIB:.1f}",
            f"{line.written_bytes / GIB:.1f}",
            f"{line.seconds(cost.ONE_GPU):.1f}",
        )
    console = Console()
    console.print(
        f"{large.parameters / 1e9:.2f} B parameters -> {small.parameters / 1e9:.2f} B; moments "
        f"of all sites {memory.moments_bytes(small, large) / GIB:.1f} GiB"
    )
    console.print(table)
    total = sum(line.seconds(cost.ONE_GPU) for line in lines)
    console.print(f"in all {total:.0f} s of one device, assuming")
    for what, rate in cost.ONE_GPU.told().items():
        console.print(f"  {what}: {rate}")


if __name__ == "__main__":
    main()
