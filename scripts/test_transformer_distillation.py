"""Train a transformer on an LDA database's teacher, judge it, time both: document 001's command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from client.inputs import Finite
from core.errors import SpecInvalid, StillroomError

FRACTION = Finite(0, 1, max_open=True)
POSITIVE = Finite(0, min_open=True)
FLAGS = {"/embed_dim": "--embed-dim", "/num_heads": "--num-heads", "/num_layers": "--num-layers",
         "/ff_dim": "--ff-dim", "/learning_rate": "--learning-rate"}  # fmt: skip
"""Which option says what an error points at."""


@click.command(
    context_settings={"max_content_width": 100, "show_default": True},
    epilog="Exit codes: 0 done, 1 failed or interrupted (with the reason), 2 wrong options.",
)
@click.option(
    "--db",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="LDA database: SQLite with heads and questions.",
)
@click.option("--projection", help="Which of the database's projections. Default: the newest.")
@click.option("--epochs", type=click.IntRange(1), default=200, help="Each shows every question.")
@click.option(
    "--cosine-weight",
    type=Finite(0, 1),
    default=0.7,
    help="Share of the loss that looks at directions; the rest is the squared distance.",
)
@click.option(
    "--num-heads", type=click.IntRange(1), default=4, help="Per layer; divides the width."
)
@click.option("--num-layers", type=click.IntRange(1), default=2, help="Of the encoder.")
@click.option(
    "--embed-dim", type=click.IntRange(1), default=384, help="Width of the database's questions."
)
@click.option("--ff-dim", type=click.IntRange(1), default=512, help="Hidden width of each layer.")
@click.option("--learning-rate", type=POSITIVE, default=1e-4, help="Of AdamW, constant.")
@click.option("--batch-size", type=click.IntRange(1), default=256, help="Made questions included.")
@click.option("--full-batch", is_flag=True, help="All questions in one step, as document 001.")
@click.option(
    "--augment",
    type=FRACTION,
    default=0.5,
    help="Share of each batch made anew between neighbours and answered by the teacher.",
)
@click.option(
    "--compat",
    type=click.Choice(["legacy"]),
    help="Train as document 001 prints it: full batch, none made, mean squared error per "
    "coordinate, dropout 0.1. Not beside --full-batch, --batch-size, --augment.",
)
@click.option(
    "--test-fraction",
    type=Finite(0, 1, min_open=True, max_open=True),
    default=0.2,
    help="Share of the distinct questions kept from training, to judge on.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Of every random draw.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the student to this .pt, a .safetensors and an .onnx beside it.",
)
@click.option(
    "--latency/--no-latency",
    default=True,
    help="Time both sides here, also for other numbers of heads, and say when to use which.",
)
@click.option(
    "--seconds",
    type=Finite(0, 60, min_open=True),
    default=0.2,
    help="To time each batch size and number of heads.",
)
@click.pass_context
def main(ctx: click.Context, /, **given: Any) -> None:
    """Train a projection transformer on the answers of an LDA database's heads."""
    _refuse_contradictions(ctx, given)
    from scripts import distillation_local  # noqa: PLC0415 - torch takes seconds

    try:
        distillation_local.run(distillation_local.Plan(**given))
    except SpecInvalid as error:
        flag = FLAGS.get(error.pointer or "")
        raise click.ClickException(f"{flag}: {error.message}" if flag else error.message) from error
    except StillroomError as error:
        raise click.ClickException(error.message) from error
    except OSError as error:
        raise click.ClickException(str(error)) from error


def _refuse_contradictions(ctx: click.Context, given: dict[str, Any]) -> None:
    """Refuse options of which one would be ignored."""
    said = [
        f"--{name.replace('_', '-')}"
        for name in ("full_batch", "batch_size", "augment", "seconds")
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    doubled = [name for name in said if name != "--seconds"]
    if given["compat"] and doubled:
        raise click.UsageError(f"{', '.join(doubled)}: --compat legacy says it already")
    if given["full_batch"] and "--batch-size" in said:
        raise click.UsageError("--batch-size: --full-batch says it already")
    if not given["latency"] and "--seconds" in said:
        raise click.UsageError("--seconds: --no-latency measures nothing")
    saved = given["output"]
    if saved is not None and saved.suffix in (".safetensors", ".onnx"):
        raise click.UsageError(
            f"--output {saved}: names the .pt, beside which a .safetensors and an .onnx of the "
            "same name are written; give it another suffix"
        )


if __name__ == "__main__":
    sys.exit(main())
