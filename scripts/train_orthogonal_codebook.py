"""Train a small student on a federated model's teacher: document 000's command line.

On this machine by default, with ``--api URL`` as jobs of a running service. The teacher's targets
are computed once and found again in ``--target-cache``, whatever is trained on them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from client.errors import StillroomError as ClientError
from core.errors import SpecInvalid, StillroomError
from core.specs.training import Training
from scripts.codebook_plan import STUDENTS, TEACHERS, Plan, make_plan

Decorator = Callable[[Callable[..., None]], Callable[..., None]]
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


def options(*decorators: Decorator) -> Decorator:
    """Apply several options in the order they are listed."""

    def apply(function: Callable[..., None]) -> Callable[..., None]:
        for decorate in reversed(decorators):
            function = decorate(function)
        return function

    return apply


def setting(flag: str, name: str, kind: click.ParamType[Any]) -> Decorator:
    """An option of the training, which says what the training's own field does."""
    field = Training.model_fields[name]
    words = [field.description or f"{name.replace('_', ' ').capitalize()}."]
    if field.default is not None:
        words.append(f"[default: {field.default}]")
    return click.option(flag, name, type=kind, help=" ".join(words))


MODEL_OPTIONS = options(
    click.option("--train", is_flag=True, help="Train a student; without it a codebook is built."),
    click.option(
        "--federated-model",
        "models",
        multiple=True,
        required=True,
        type=click.Path(exists=True, path_type=Path),
        help="NAME.pkl beside its folder NAME/, an archive of both, or a model .safetensors. Named "
        "several times: all of them side by side, for --teacher multi_source.",
    ),
    click.option(
        "--build-canonical", "codebook", flag_value="canonical", help="Planes (2i, 2i+1)."
    ),
    click.option("--build-pca", "codebook", flag_value="pca", help="Planes of the clusters' logs."),
    click.option(
        "--build-combined", "codebook", flag_value="combined", help="Planes clusters share."
    ),
    click.option(
        "--pca-method",
        type=click.Choice(["full", "randomized", "incremental"]),
        help="How --build-pca finds its components. [default: full]",
    ),
    click.option("--n-components", type=click.IntRange(1), help="Planes. [default: 64]"),
    click.option("--save-codebook", type=FILE, help="Write the planes to this .npz."),
)
TEACHER_OPTIONS = options(
    click.option(
        "--teacher",
        type=click.Choice([*TEACHERS, "auto"]),
        default="rotational",
        show_default=True,
        help="jax: rotational_jax. auto: of the two the faster one here, by measurement.",
    ),
    click.option("--top-k", type=click.IntRange(1, 1024), help="Default: the model's own."),
    click.option("--temperature", type=click.FloatRange(0, 100, min_open=True)),
    click.option(
        "--compat", type=click.Choice(["legacy"]), help="Blend as document 000 does (log W)."
    ),
    click.option(
        "--target-cache", type=FILE, help="The teacher's targets: read, completed and written."
    ),
    click.option(
        "--bivector-cache",
        type=FILE,
        help="The rotations' logarithms. Default: NAME.bivectors.npz beside the model.",
    ),
    click.option(
        "--checkpoint-interval",
        type=click.IntRange(1),
        help="Targets between checkpoints while they are computed. [default: 1000]",
    ),
    click.option(
        "--checkpoint-path", type=FILE, help="Their file; default: beside --target-cache."
    ),
    click.option("--device", help="cpu, cuda or cuda:N. Default: cpu, or any of a service's."),
)
STUDENT_OPTIONS = options(
    click.option("--student", type=click.Choice(list(STUDENTS)), help="[default: canonical]"),
    click.option("--layers", type=click.IntRange(1), help="Of a student that has layers."),
    click.option("--heads", type=click.IntRange(1), help="Of a student that has heads."),
    click.option(
        "--transformer-type", type=click.Choice(["additive", "composed", "bivector_blend"])
    ),
    click.option("--bias", type=click.Choice(["none", "angle", "vector"])),
    click.option(
        "--student-option",
        "student_options",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any other field of the student, for example planes=32.",
    ),
    click.option(
        "--save-transformer", type=FILE, help="The .pt; .safetensors and .onnx beside it."
    ),
    click.option(
        "--pairs",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Judge on these pairs' queries that the model was not trained on.",
    ),
    click.option("--report", type=FOLDER, help="Write report.json, report.md and pictures here."),
)
TRAINING_OPTIONS = options(
    setting("--epochs", "epochs", click.IntRange(1)),
    setting("--batch-size", "batch_size", click.IntRange(1)),
    setting("--lr", "learning_rate", click.FloatRange(0, min_open=True)),
    setting("--weight-decay", "weight_decay", click.FloatRange(0)),
    setting("--scheduler", "scheduler", click.Choice(["none", "cosine", "plateau", "step"])),
    setting("--warmup-steps", "warmup_steps", click.IntRange(0)),
    setting(
        "--plateau-factor", "plateau_factor", click.FloatRange(0, 1, min_open=True, max_open=True)
    ),
    setting("--plateau-patience", "plateau_patience", click.IntRange(1)),
    setting("--patience", "patience", click.IntRange(1)),
    setting("--min-delta", "min_delta", click.FloatRange(0)),
    setting("--augment", "augment", click.FloatRange(0, 1, max_open=True)),
    setting("--centroid-warmup", "centroid_warmup_epochs", click.IntRange(0)),
    setting("--centroid-replay", "centroid_replay", click.FloatRange(0, 1, max_open=True)),
    click.option(
        "--test-split",
        "validation_fraction",
        type=click.FloatRange(0, 0.9, min_open=True, max_open=True),
        help="Share of the queries that the student never sees and is judged on. [default: 0.1]",
    ),
    click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True),
    click.option(
        "--train-checkpoint",
        type=FILE,
        help="Where training is kept after every epoch; default: beside --save-transformer.",
    ),
    click.option("--resume", is_flag=True, help="Go on from there instead of from the start."),
)
SERVICE_OPTIONS = options(
    click.option("--api", "api_url", metavar="URL", help="Submit as jobs to this service."),
    click.option("--api-key", envvar="STILL_API_KEY", help="For that service."),
)


@click.command(context_settings={"max_content_width": 100}, epilog="Exit codes: 0 done, 1 failed "
               "or interrupted (with the reason), 2 wrong options.")  # fmt: skip
@MODEL_OPTIONS
@TEACHER_OPTIONS
@STUDENT_OPTIONS
@TRAINING_OPTIONS
@SERVICE_OPTIONS
def main(**given: Any) -> None:
    """Train an orthogonal student on the targets of a federated model's teacher."""
    api_url, api_key = given.pop("api_url"), given.pop("api_key")
    try:
        plan = make_plan(**given)
    except ValidationError as error:
        raise click.UsageError(_first(error)) from error
    except SpecInvalid as error:
        raise click.UsageError(error.message) from error
    try:
        _run(plan, api_url, api_key)
    except StillroomError as error:
        raise click.ClickException(error.message) from error
    except (ClientError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _run(plan: Plan, api_url: str | None, api_key: str | None) -> None:
    """Run here or there; what is not needed is not loaded (torch takes seconds)."""
    if api_url is None:
        from scripts import codebook_local  # noqa: PLC0415

        try:
            codebook_local.run(plan)
        except KeyboardInterrupt as error:
            raise click.ClickException(codebook_local.interrupted(plan)) from error
    else:
        from scripts import codebook_jobs  # noqa: PLC0415

        codebook_jobs.run(plan, api_url, api_key)


def _first(error: ValidationError) -> str:
    """Name the first field that does not fit, its value and what is allowed."""
    found = error.errors(include_url=False)[0]
    *within, field = [str(part) for part in found["loc"]] or [""]
    said = {option.name: option.opts[0] for option in main.params}
    where = said.get(field, f"--student-option {field}") if field else ""
    shown = "" if isinstance(found["input"], dict) else f" {found['input']!r}"
    why = found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        why = f"{within[0]} has no such field"
        if within[0] in STUDENTS:
            has = [name for name in STUDENTS[within[0]].model_fields if name != "name"]
            why += f"; it has {', '.join(has)}"
    return f"{where}{shown}: {why}" if where else why


if __name__ == "__main__":
    sys.exit(main())
