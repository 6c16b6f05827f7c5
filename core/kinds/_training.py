"""What distill and sweep share: the targets, the epochs of one chunk, and a student's files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Metric, Produced, Stage
from core.kinds._files import blocks, read_json, write_json
from core.kinds._memory import check_held, rows_bytes, training_bytes
from core.kinds._teacher import (
    ROWS_PER_BLOCK,
    load_teacher,
    target_block,
    told_or_default,
)
from core.registry import LOSS_PLUGINS, names
from core.specs.base import JobSpec, Reads, Reference
from core.specs.loss_checks import check_losses
from core.specs.sizes import Sizes
from core.specs.students import Student, check_learns, check_router
from core.specs.teachers import Teacher, parse_teacher
from core.specs.training import Training

if TYPE_CHECKING:
    from core.distill.curriculum import TrainingData
    from core.distill.state import TrainState
    from core.distill.teachers._base import TeacherModel
    from core.tensors.shards import Array


class TrainingSpec(JobSpec):
    """Which teacher students are trained on, and how."""

    model: Annotated[Reference, Reads("federated_model", "lda_model", "embeddings")] = Field(
        description="The teacher's."
    )
    targets: Annotated[Reference, Reads("targets")] | None = Field(
        None, description="Of cache_targets on the same model; null: computed (or found) here."
    )
    teacher: Teacher | None = Field(
        None,
        description="null: as the targets were made; without them 'rotational', over an lda_model "
        "'lda', over embeddings 'checkpoint'.",
    )
    training: Training = Training()


def told_teacher(spec: TrainingSpec, inputs: Mapping[str, Input]) -> Teacher:
    """Return the teacher in force when planning: that of the targets, or as told."""
    if "targets" in inputs:
        made: Teacher = parse_teacher(inputs["targets"].meta["teacher"])
        return made
    return told_or_default(spec.teacher, inputs["model"])


def epoch_chunks(training: Training) -> int:
    """How many chunks of ``epochs_per_chunk``, none over a stage's end, train a student."""
    return len(training.epoch_blocks())


def train_chunks(spec: TrainingSpec, inputs: Mapping[str, Input]) -> int:
    """How many chunks train a student, or an upper bound: the chain ends with the training.

    How many queries are held out or doubled is known only when it runs.
    """
    from core.distill.schedules import BatchPlan

    if spec.training.checkpoint_interval is None:
        return epoch_chunks(spec.training)
    model = inputs["model"].meta
    plan = BatchPlan.of(
        spec.training,
        rows=model["rows"],
        centroids=model.get("clusters", 0),
        answers_new=told_teacher(spec, inputs).answers_new,
    )
    return math.ceil(plan.total_steps / spec.training.checkpoint_interval)


def needed_bytes(spec: TrainingSpec, student: Student, inputs: Mapping[str, Input]) -> int:
    """Return about what training a student takes, rather too much."""
    answers_new = told_teacher(spec, inputs).answers_new
    return training_bytes(inputs["model"].meta, student, spec.training, answers_new=answers_new)


def targets_stage(spec: TrainingSpec, inputs: Mapping[str, Input]) -> Stage:
    """Plan blocks of targets, none where they are given; refuse those of something else."""
    model = inputs["model"].meta
    count = len(blocks(model["rows"], ROWS_PER_BLOCK))
    if "targets" in inputs:
        _check_targets(spec, inputs["targets"].meta, inputs["model"].sha256)
        count = 0
    if spec.training.targets == "on_the_fly" or not told_teacher(spec, inputs).answers_new:
        count = 0  # what is stored already is looked up where it is needed
    return Stage("targets", count, memory_bytes=rows_bytes(model))


def check_student(spec: TrainingSpec, student: Student, inputs: Mapping[str, Input]) -> None:
    """Refuse a student or a training that the model's width or the teacher does not allow.

    Raises:
        SpecInvalid: which field, its value and what is allowed.
    """
    model = inputs["model"]
    sizes = Sizes.of(model.meta)
    check_learns(student, model.format)
    student.check_sizes(sizes)
    check_held(student, sizes)
    told = told_teacher(spec, inputs)
    check_router(student, told)
    spec.training.check_teacher(answers_new=told.answers_new)
    if not sizes.clusters and (
        spec.training.centroid_warmup_epochs or spec.training.centroid_replay
    ):
        raise SpecInvalid(
            "training.centroid_warmup_epochs and centroid_replay: the model has no clusters; "
            "allowed: 0",
            pointer="/training/centroid_warmup_epochs",
        )
    check_losses(spec.training, student, sizes)
    _check_custom(spec.training)


def _check_custom(training: Training) -> None:
    """Refuse terms of the loss that nothing here brings."""
    known = names("core.distill.losses", LOSS_PLUGINS)
    for name in training.losses.custom:
        if name not in known:
            raise SpecInvalid(
                f"training.losses.custom.{name}: no such term; allowed: {', '.join(known)}",
                pointer=f"/training/losses/custom/{name}",
            )


def _check_targets(spec: TrainingSpec, made: Mapping[str, Any], model: str) -> None:
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


def teacher_spec(spec: TrainingSpec, chunk: Chunk) -> Teacher:
    """Return the teacher in force: that of the targets, or as told."""
    if spec.targets is not None:
        made: Teacher = parse_teacher(chunk.input("targets").meta["teacher"])
        return made
    return told_or_default(spec.teacher, chunk.input("model"))


def teacher_of(spec: TrainingSpec, chunk: Chunk) -> TeacherModel:
    """Build the teacher in force."""
    return load_teacher(chunk, chunk.input("model").sha256, teacher_spec(spec, chunk))


def make_targets(spec: TrainingSpec, chunk: Chunk) -> ChunkResult:
    """Answer one block of the model's training queries."""
    teacher = teacher_of(spec, chunk)
    start, stop = blocks(len(teacher.queries), ROWS_PER_BLOCK)[chunk.index]
    made, speed = target_block(chunk, teacher, teacher.queries[start:stop])
    return ChunkResult(checkpoints={"targets": made}, metrics=speed)


def _load_targets(spec: TrainingSpec, chunk: Chunk) -> Array:
    """Return [n, d]: the teacher's answers to its model's training queries."""
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


def data_of(spec: TrainingSpec, chunk: Chunk) -> TrainingData:
    """Return the rows that a job's students are trained and validated on."""
    from core.distill.curriculum import teacher_answers, training_data

    teacher = teacher_of(spec, chunk)
    if chunk.job_id not in _kept:
        _kept.clear()
        stored = not teacher.answers_new and spec.targets is None
        if stored or spec.training.targets == "on_the_fly":
            targets = teacher_answers(teacher, chunk.progress).cpu().numpy()
        else:
            targets = _load_targets(spec, chunk)
        _kept[chunk.job_id] = training_data(teacher, targets, spec.training, seed=spec.seed)
    return _kept[chunk.job_id]


def train_some(
    spec: TrainingSpec,
    student: Student,
    before: Produced | None,
    chunk: Chunk,
    *,
    codebook: str | None = None,
) -> tuple[TrainState, Produced, list[dict[str, float]]]:
    """Train a student for one chunk: its epochs, or its steps.

    Args:
        spec: the job's.
        student: built anew where nothing came before.
        before: the state to go on from.
        chunk: told how far it is.
        codebook: SHA-256 of the planes it turns in; None: its own.

    Returns:
        The state, its file, and the history rows that were added.
    """
    from core.distill.state import TrainState
    from core.distill.students._base import build_student
    from core.distill.training import run_epochs, run_steps
    from core.tensors.codebooks import load_codebook

    data = data_of(spec, chunk)
    if before is not None:
        state = TrainState.load(before.path, device=chunk.device)
    else:
        planes = None if codebook is None else load_codebook(chunk.fetch(codebook))
        built = build_student(student, teacher_of(spec, chunk), spec.seed, codebook=planes)
        state = TrainState.start(built, spec.training, seed=spec.seed, device=chunk.device)
    first = state.epoch
    interval = spec.training.checkpoint_interval
    if interval is None:
        ends = (last for start, last in spec.training.epoch_blocks() if start == first)
        run_epochs(state, data, first, next(ends, first), chunk.progress)
    else:
        run_steps(state, data, interval, chunk.progress)
    path = chunk.workdir / "state.safetensors"
    state.save(path)
    made = Produced(path, "train_state", path.name, meta=_place(state))
    return state, made, state.history[first:]


def _place(state: TrainState) -> dict[str, int | float]:
    """Say how far a checkpoint is; of a curriculum also the stage and the temperature it ends."""
    place: dict[str, int | float] = {"epoch": state.epoch, "step": state.step}
    if state.training.curriculum is not None:
        last = max(0, state.epoch - 1)
        place |= {"stage": state.training.stage_of(last), "tau": state.training.tau_of(last)}
    return place


SCORES = ("validation_cosine", "validation_recall")
"""By one of which a student is validated, whatever it is."""


def last_score(history: list[dict[str, float]]) -> float:
    """Return what validation said last."""
    return next(history[-1][name] for name in SCORES if name in history[-1])


def curves(rows: list[dict[str, float]], *, suffix: str = "") -> list[Metric]:
    """Return history rows as points of curves."""
    return [
        Metric(name + suffix, int(row["epoch"]), value)
        for row in rows
        for name, value in row.items()
        if name != "epoch"
    ]


def export_files(
    spec: TrainingSpec, student: Student, state: TrainState, chunk: Chunk, **beside: Any
) -> dict[str, Produced]:
    """Write the trained student's files and its training.json; the same for any kind of job.

    ``beside``: what else made the student, JSON values.
    """
    from core.distill.export import export_student
    from core.distill.training import remarks

    trained, folder = state.result(), chunk.workdir
    words = remarks(trained, state.history, best=state.best_score)
    told = {"history": state.history, "words": words}
    facts = {
        "teacher": teacher_spec(spec, chunk).model_dump(mode="json"),
        "model": chunk.input("model").sha256,
        "dim": chunk.input("model").meta["dim"],
        "student": student.model_dump(mode="json"),
        "training": spec.training.recipe(),
        "seed": spec.seed,
        **beside,
    }
    files = export_student(trained, folder, facts={**facts, **told})
    return {
        "student": made_file(files.safetensors, "student", meta=facts),
        "student_pt": made_file(files.torch, "student_pt", meta=facts),
        "student_onnx": made_file(files.onnx, "student_onnx", meta=facts),
        "training": write_json(folder / "training.json", {**facts, **told}, format_name="training"),
    }


def made_file(
    path: Path,
    format_name: str,
    media: str = "application/octet-stream",
    *,
    meta: Mapping[str, Any] | None = None,
) -> Produced:
    """Name a file by its own name."""
    return Produced(path, format_name, path.name, media, meta or {})
