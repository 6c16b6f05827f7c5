"""What every job spec shares, and how a spec names the artifacts it reads."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

SHA256 = re.compile(r"[0-9a-f]{64}")
REFERENCE = r"^([0-9a-f]{64}|job_[0-9a-hjkmnp-tv-z]{26}/[a-z][a-z0-9_]{0,63})$"
"""An artifact's SHA-256, or ``job_id/output`` for what another job will make."""

LABEL_KEY = re.compile(r"[A-Za-z0-9._/-]{1,63}")
LabelKey = Annotated[str, StringConstraints(pattern=rf"^{LABEL_KEY.pattern}$")]
LabelValue = Annotated[str, StringConstraints(min_length=1, max_length=63)]


class Closed(BaseModel):
    """Frozen, and an unknown field is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Reads:
    """Marks a spec field as an input artifact of one of these formats."""

    formats: tuple[str, ...]

    def __init__(self, *formats: str) -> None:
        object.__setattr__(self, "formats", formats)


Reference = Annotated[str, StringConstraints(pattern=REFERENCE)]


class JobSpec(Closed):
    """What every job may say about itself, beside what its kind asks for."""

    kind: str
    name: str | None = Field(None, min_length=1, max_length=200, description="Shown in lists.")
    priority: int = Field(50, ge=0, le=100, description="Higher runs first.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Every random choice derives from it.")
    labels: dict[LabelKey, LabelValue] = Field(
        default_factory=dict, max_length=16, description="Free tags to filter by."
    )
    device: Literal["any", "cpu", "gpu"] = Field("any", description="What its chunks may run on.")
    deadline_s: float | None = Field(
        None, gt=0, le=31_536_000, description="Seconds after which it fails if it is not done."
    )
    keep_checkpoints: Literal["best_and_latest", "all"] = Field(
        "best_and_latest",
        description="Pinned ones are kept in any case; "
        "those that end a stage of a curriculum come pinned.",
    )
    stall_limit_s: float | None = Field(
        None, ge=1, le=86_400, description="A chunk without progress for so long is ended."
    )


def inputs_of(spec: type[JobSpec]) -> dict[str, Reads]:
    """Return the fields of ``spec`` that name artifacts, with the formats each accepts.

    Works on ``Annotated[Reference, Reads("pairs")]``, with or without ``| None``, and on a
    ``tuple`` of them.
    """
    found: dict[str, Reads] = {}
    for name, field in spec.model_fields.items():
        for mark in (*field.metadata, *_marks(field.annotation)):
            if isinstance(mark, Reads):
                found[name] = mark
    return found


def references_of(spec: JobSpec) -> dict[str, str]:
    """Return what a spec names: input name -> reference; of a list ``models``, ``models.0`` ..."""
    found: dict[str, str] = {}
    for field in inputs_of(type(spec)):
        value = getattr(spec, field)
        if isinstance(value, tuple):
            found |= {f"{field}.{index}": each for index, each in enumerate(value)}
        elif value is not None:
            found[field] = value
    return found


def with_references(spec: JobSpec, changed: Mapping[str, str]) -> JobSpec:
    """Return the spec with other references under the names of ``references_of``."""
    all_of_them = {**references_of(spec), **changed}
    update: dict[str, Any] = {}
    for name, reference in all_of_them.items():
        field, listed, _ = name.partition(".")
        update[field] = (*update.get(field, ()), reference) if listed else reference
    return spec.model_copy(update=update)


def _marks(annotation: Any) -> list[Any]:
    """Collect Annotated metadata inside a union such as ``Annotated[...] | None``."""
    marks: list[Any] = list(getattr(annotation, "__metadata__", ()))
    for part in get_args(annotation):
        marks += getattr(part, "__metadata__", ())
    return marks
