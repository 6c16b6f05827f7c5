"""Train a student on a teacher's targets; export it as .pt, .safetensors and .onnx."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.kinds._files import blocks, float_bytes, read_json, write_json
from core.kinds._teacher import ROWS_PER_BLOCK, load_teacher, target_block, teacher_bytes
from core.specs.base import JobSpec, Reads, Reference
from core.specs.students import RotorProduct, Student
from core.specs.teachers import Rotational, Teacher
from core.specs.training import Training

if TYPE_CHECKING:
    from core.distill.curriculum import TrainingData
    from core.distill.teachers._base import BlendingTeacher
    from core.tensors.shards import Array


class Spec(JobSpec):
    """Which teacher, which student, and how to train."""

    kind: Literal["distill"] = "distill"
    model: Annotated[Reference, Reads("federated_model")] = Field(description="The teacher's.")
    targets: Annotated[Reference, Reads("targets")] | None = Field(
        None, description="Of cache_targets on the same model; null: computed (or found) here."
    )
    teacher: Teacher | None = Field(
        None, description="null: as the targets were made, or the defaults where there are none."
    )
    student: Student = RotorProduct()
    training: Training = Training()


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Targets where none are given, the chain of epochs, the export."""
    spec.student.check_width(inputs["model"].meta["dim"])
    told = spec.teacher or Rotational()
    if "targets" in inputs:
        _check_targets(spec, inputs["targets"].meta, inputs["model"].sha256)
        told = Rotational.model_validate(inputs["targets"].meta["teacher"])
    spec.training.check_teacher(answers_new=told.answers_new)
    model = inputs["model"].meta
    rows = model["rows"]
    # The teacher; queries and targets with their mixtures and a batch's work.
    needed = teacher_bytes(model) + 6 * float_bytes(rows, model["dim"])
    on_the_fly = spec.training.targets == "on_the_fly"
    return [
        Stage(
            "targets",
            0 if "targets" in inputs or on_the_fly else len(blocks(rows, ROWS_PER_BLOCK)),
            memory_bytes=needed,
        ),
        Stage("train", _train_chunks(spec.training, model, told), "chained", memory_bytes=needed),
        Stage("export", 1),
    ]


def _train_chunks(training: Training, model: Mapping[str, Any], teacher: Teacher) -> int:
    """Return the chunks of the chain, or an upper bound: it ends with the training.

    How many queries are held out or doubled is known only when it runs.
    """
    from core.distill.schedules import BatchPlan

    if training.checkpoint_interval is None:
        return len(blocks(training.epochs, training.epochs_per_chunk))
    plan = BatchPlan.of(
        training,
        rows=model["rows"],
        centroids=model["clusters"],
        answers_new=teacher.answers_new,
    )
    return math.ceil(plan.total_steps / training.checkpoint_interval)


def _check_targets(spec: Spec, made: Mapping[str, Any], model: str) -> None:
    """Refuse targets of another model, of other queries, of a teacher told otherwise, or idle."""
    if spec.training.targets == "on_the_fly":
        raise SpecInvalid(
            "training.targets 'on_the_fly': the field 'targets' names cached ones; leave it null, "
            "or take 'cache'",
            pointer="/training/targets",
        )
    if made["model"] != model:
        raise SpecInvalid(
            f"targets: made with model {made['model'][:12]}…, not with {model[:12]}…",
            pointer="/targets",
        )
    if made["pairs"] is not None:
        raise SpecInvalid(
            "targets: made for the queries of pairs; a student trains on the model's own: "
            "run cache_targets without 'pairs'",
            pointer="/targets",
        )
    if spec.teacher is not None and spec.teacher.model_dump(mode="json") != made["teacher"]:
        raise SpecInvalid(
            f"teacher: differs from the one the targets were made with, {made['teacher']}; "
            "leave it null to take that one",
            pointer="/teacher",
        )


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"targets": _targets, "train": _train, "export": _export}
    return steps[chunk.stage](spec, chunk)


def _teacher_spec(spec: Spec, chunk: Chunk) -> Teacher:
    if spec.targets is not None:
        return Rotational.model_validate(chunk.input("targets").meta["teacher"])
    return spec.teacher or Rotational()


def _teacher(spec: Spec, chunk: Chunk) -> BlendingTeacher:
    return load_teacher(chunk, chunk.input("model").sha256, _teacher_spec(spec, chunk))


def _targets(spec: Spec, chunk: Chunk) -> ChunkResult:
    teacher = _teacher(spec, chunk)
    start, stop = blocks(len(teacher.model.queries), ROWS_PER_BLOCK)[chunk.index]
    made, speed = target_block(chunk, teacher, teacher.model.queries[start:stop])
    return ChunkResult(checkpoints={"targets": made}, metrics=speed)


def _load_targets(spec: Spec, chunk: Chunk) -> Array:
    """Return [n, d]: the teacher's answers to its model's training queries, from the cache."""
    import numpy as np

    from core.tensors import shards

    if spec.targets is not None:
        listed = read_json(chunk.fetch(chunk.input("targets").sha256))["blocks"]
        paths = [chunk.fetch(block["sha256"]) for block in listed]
    else:
        paths = [made["targets"].path for made in chunk.outputs("targets")]
    return np.concatenate([shards.load(path)[0]["targets"] for path in paths])


_kept: dict[str, TrainingData] = {}
"""The training data of the last job, for its next chunk: a function of the job's spec."""


def _training_data(spec: Spec, chunk: Chunk, teacher: BlendingTeacher) -> TrainingData:
    from core.distill.curriculum import teacher_answers, training_data

    if chunk.job_id not in _kept:
        _kept.clear()
        if spec.training.targets == "on_the_fly":
            targets = teacher_answers(teacher, chunk.progress).cpu().numpy()
        else:
            targets = _load_targets(spec, chunk)
        _kept[chunk.job_id] = training_data(teacher, targets, spec.training, seed=spec.seed)
    return _kept[chunk.job_id]


def _train(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill.students._base import build_student
    from core.distill.training import TrainState, run_epochs, run_steps

    teacher = _teacher(spec, chunk)
    data = _training_data(spec, chunk, teacher)
    before = chunk.latest("train")
    if before:
        state = TrainState.load(before["state"].path, device=chunk.device)
    else:
        student = build_student(spec.student, teacher, spec.seed)
        state = TrainState.start(student, spec.training, seed=spec.seed, device=chunk.device)
    first = state.epoch
    interval = spec.training.checkpoint_interval
    if interval is None:
        run_epochs(state, data, first, first + spec.training.epochs_per_chunk, chunk.progress)
    else:
        run_steps(state, data, interval, chunk.progress)
    path = chunk.workdir / "state.safetensors"
    state.save(path)
    made = Produced(path, "train_state", path.name, meta={"epoch": state.epoch, "step": state.step})
    points = [
        Metric(name, int(row["epoch"]), value)
        for row in state.history[first:]
        for name, value in row.items()
        if name != "epoch"
    ]
    return ChunkResult(
        checkpoints={"state": made},
        metrics=points,
        # Inside an epoch nothing has been judged: such a checkpoint is never the best one.
        score=1.0 - state.history[-1]["validation_cosine"] if state.epoch > first else None,
        stage_done=state.stopped,
    )


def _export(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill.export import export_student
    from core.distill.report import draw_loss
    from core.distill.training import TrainState, remarks

    state = TrainState.load(chunk.latest("train")["state"].path)
    student = state.result()
    told = {"history": state.history, "words": remarks(student)}
    facts = {
        "teacher": _teacher_spec(spec, chunk).model_dump(mode="json"),
        "model": chunk.input("model").sha256,
        "dim": chunk.input("model").meta["dim"],
        "student": spec.student.model_dump(mode="json"),
        "training": spec.training.recipe(),
        "seed": spec.seed,
    }
    folder = chunk.workdir
    chunk.progress(0, 2)
    files = export_student(student, folder, facts={**facts, **told})
    chunk.progress(1, 2)
    draw_loss(folder / "loss_curve.png", state.history)
    outputs = {
        "student": _made(files.safetensors, "student", facts),
        "student_pt": _made(files.torch, "student_pt", facts),
        "student_onnx": _made(files.onnx, "student_onnx", facts),
        "loss_curve": _made(folder / "loss_curve.png", "picture", {}, "image/png"),
        "training": write_json(folder / "training.json", {**facts, **told}, format_name="training"),
    }
    return ChunkResult(outputs=outputs)


def _made(
    path: Path, format_name: str, meta: dict[str, Any], media: str = "application/octet-stream"
) -> Produced:
    return Produced(path, format_name, path.name, media, meta)


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
