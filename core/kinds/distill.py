"""Train a student on a teacher's targets; export it as .pt, .safetensors and .onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Stage
from core.kinds._memory import export_bytes
from core.kinds._training import (
    TrainingSpec,
    check_student,
    curves,
    export_files,
    last_score,
    made_file,
    make_targets,
    needed_bytes,
    targets_stage,
    train_chunks,
    train_some,
)
from core.specs.base import Reads, Reference
from core.specs.canonical import Canonical
from core.specs.codebooks import MOST_PLANES, PrincipalPlanes
from core.specs.students import Student, default_student


class Spec(TrainingSpec):
    """Which teacher, which student, and how to train."""

    kind: Literal["distill"] = "distill"
    student: Student | None = Field(
        None,
        description="null: 'rotor_product'; over an lda_model 'hierarchical_router', over "
        "embeddings 'hierarchical'.",
    )
    codebook: Annotated[Reference, Reads("codebook")] | None = Field(
        None,
        description="Planes that a 'canonical' student turns in, of build_codebook or uploaded; "
        "null: those its own fields say.",
    )

    @model_validator(mode="after")
    def _planes_are_told_once(self) -> Spec:
        if self.codebook is None:
            return self
        if not isinstance(self.student, Canonical):
            name = "null" if self.student is None else f"'{self.student.name}'"
            raise ValueError(f"codebook beside student {name}: leave it null, or take 'canonical'")
        for field in ("codebook", "n_components"):
            if getattr(self.student, field) is not None:
                raise ValueError(f"codebook beside student.{field}: leave one of them null")
        return self


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Targets where none are given, the chain of epochs, the export."""
    model = inputs["model"].meta
    check_student(spec, _planned(spec, inputs), inputs)
    student = _on_codebook(spec, inputs)
    needed = needed_bytes(spec, student, inputs)
    return [
        targets_stage(spec, inputs),
        Stage("train", train_chunks(spec, inputs), "chained", memory_bytes=needed),
        Stage("export", 1, memory_bytes=export_bytes(model, student)),
    ]


def _student(spec: Spec, model: Input) -> Student:
    return spec.student or default_student(model.format)


def _planned(spec: Spec, inputs: Mapping[str, Input]) -> Student:
    """Return the student whose width is checked, after holding the codebook's against it."""
    if "codebook" not in inputs or not isinstance(spec.student, Canonical):
        return _student(spec, inputs["model"])
    planes, dim = inputs["codebook"].meta, inputs["model"].meta["dim"]
    if planes["dim"] != dim:
        raise SpecInvalid(
            f"codebook has {planes['dim']} dimensions, the model {dim}", pointer="/codebook"
        )
    if planes["n_components"] > MOST_PLANES:
        raise SpecInvalid(
            f"codebook has {planes['n_components']} planes; allowed: 1 to {MOST_PLANES}",
            pointer="/codebook",
        )
    # Its own planes are not made: one passes any width.
    return spec.student.model_copy(update={"n_components": 1})


def _on_codebook(spec: Spec, inputs: Mapping[str, Input]) -> Student:
    """Return the student as large as it will be on the codebook's planes."""
    student = _student(spec, inputs["model"])
    if "codebook" not in inputs or not isinstance(student, Canonical):
        return student
    count = inputs["codebook"].meta["n_components"]
    planes = PrincipalPlanes(n_components=count, disjoint=False)
    return student.model_copy(update={"codebook": planes, "n_components": None})


def _codebook(spec: Spec, chunk: Chunk) -> str | None:
    return None if spec.codebook is None else chunk.input("codebook").sha256


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"targets": make_targets, "train": _train, "export": _export}
    return steps[chunk.stage](spec, chunk)


def _train(spec: Spec, chunk: Chunk) -> ChunkResult:
    before = chunk.latest("train").get("state")
    student = _student(spec, chunk.input("model"))
    state, made, rows = train_some(spec, student, before, chunk, codebook=_codebook(spec, chunk))
    return ChunkResult(
        checkpoints={"state": made},
        metrics=curves(rows),
        # Inside an epoch nothing has been judged: such a checkpoint is never the best one.
        score=1.0 - last_score(rows) if rows else None,
        # Document 004: what a curriculum's stage ends with is there to be looked at afterwards.
        keep=spec.training.curriculum is not None
        and (state.stopped or spec.training.ends_stage(state.epoch)),
        stage_done=state.stopped,
    )


def _export(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill.report_parts import draw_loss
    from core.distill.state import TrainState

    state = TrainState.load(chunk.latest("train")["state"].path)
    chunk.progress(0, 2)
    codebook = _codebook(spec, chunk)
    beside = {} if codebook is None else {"codebook": codebook}
    outputs = export_files(spec, _student(spec, chunk.input("model")), state, chunk, **beside)
    chunk.progress(1, 2)
    picture = chunk.workdir / "loss_curve.png"
    draw_loss(picture, state.history)
    return ChunkResult(
        outputs={**outputs, "loss_curve": made_file(picture, "picture", "image/png")}
    )


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Train a student on a teacher's targets.",
    example={
        "kind": "distill",
        "model": "0" * 64,
        "targets": "1" * 64,
        "student": {"name": "rotor_product"},
    },
    outputs={
        "student": "student",
        "student_pt": "student_pt",
        "student_onnx": "student_onnx",
        "loss_curve": "picture",
        "training": "training",
    },
)
