"""Judge a student on held-out rows, beside every simpler map and the exact teacher.

What is judged depends on the model's format: one file each in ``core/kinds/_judges``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.kinds._files import blocks, float_bytes, read_json, write_json
from core.kinds._judges import codes, lda, rotations
from core.kinds._judges._base import Asked, Judge, has_student
from core.kinds._teacher import load_teacher, teacher_bytes, told_or_default
from core.specs.base import JobSpec, Reads, Reference
from core.specs.sizes import Sizes
from core.specs.students import parse_student
from core.specs.teachers import Teacher, parse_teacher

if TYPE_CHECKING:
    from core.tensors.shards import Array

ROWS_PER_CHUNK = 8192
TIMED_ROWS = 1024
"""Batch in which queries per second are measured."""
TIMED_SECONDS = 0.2
"""For each way of mapping, after a warm-up."""
JUDGES: Mapping[str, Judge] = {
    "federated_model": rotations.JUDGE,
    "lda_model": lda.JUDGE,
    "embeddings": codes.JUDGE,
}
"""By the format of the model."""
SORTS = {
    "json": ("report", "application/json"),
    "md": ("report_md", "text/markdown"),
    "png": ("picture", "image/png"),
}
"""Format and media type of a report's file, by the end of its name."""


class Spec(JobSpec):
    """Which student, against which teacher, on which rows."""

    kind: Literal["evaluate"] = "evaluate"
    pairs: Annotated[Reference, Reads("pairs")] | None = Field(
        None,
        description="Those the model was fitted on (its held-out rows are judged), or others "
        "(all rows are judged whose query it was not trained on). null over embeddings, which "
        "have held-out rows of their own.",
    )
    model: Annotated[Reference, Reads("federated_model", "lda_model", "embeddings")] = Field(
        description="The teacher's."
    )
    student: Annotated[Reference, Reads("student")] | None = Field(
        None, description="null: the teacher and the baselines alone."
    )
    teacher: Teacher | None = Field(
        None, description="null: the student's own, or the model's default without a student."
    )


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Map blocks of rows every way, then judge."""
    model = inputs["model"]
    judge, sizes = JUDGES[model.format], Sizes.of(model.meta)
    _check_inputs(judge, inputs, sizes)
    _check_answers(judge, inputs, sizes)
    if spec.teacher is not None:
        told_or_default(spec.teacher, model)
    most = judge.most(inputs)
    asked = inputs["pairs"].meta["rows"] if "pairs" in inputs else most
    held = judge.answers * float_bytes(asked, max(sizes.dim, sizes.width))
    needed = teacher_bytes(model.meta) + held + _student_bytes(inputs, sizes)
    return [
        Stage("choose", 1, memory_bytes=needed),
        Stage("map", len(blocks(most, ROWS_PER_CHUNK)), memory_bytes=needed),
        Stage("judge", 1, memory_bytes=needed),
    ]


def _student_bytes(inputs: Mapping[str, Input], sizes: Sizes) -> int:
    """Return what the student takes, and its file while it is read."""
    if "student" not in inputs:
        return 0
    student = parse_student(inputs["student"].meta["student"])
    return 2 * float_bytes(student.parameters(sizes))


def _check_inputs(judge: Judge, inputs: Mapping[str, Input], sizes: Sizes) -> None:
    """Refuse inputs that are not of this model."""
    if judge.needs_pairs != ("pairs" in inputs):
        said = "needed over" if judge.needs_pairs else "null over"
        raise SpecInvalid(
            f"pairs: {said} a model of format '{inputs['model'].format}'", pointer="/pairs"
        )
    for name, given in inputs.items():
        if given.meta["dim"] != sizes.dim:
            raise SpecInvalid(
                f"{name} has {given.meta['dim']} dimensions, the model {sizes.dim}",
                pointer=f"/{name}",
            )
    if "student" in inputs and inputs["student"].meta["model"] != inputs["model"].sha256:
        raise SpecInvalid(
            f"student: distilled from model {inputs['student'].meta['model'][:12]}…, not from "
            f"{inputs['model'].sha256[:12]}…; it may have been trained on what that one held out. "
            "Judge it with its own model",
            pointer="/student",
        )


def _check_answers(judge: Judge, inputs: Mapping[str, Input], sizes: Sizes) -> None:
    """Refuse answers that have no cosine to what is right: those of another width."""
    if not judge.needs_pairs:
        return
    if sizes.width != sizes.dim:
        raise SpecInvalid(
            f"pairs: the model answers with {sizes.width} dimensions; a pair's target has those of "
            f"its query, {sizes.dim}, and cannot say which answer is right",
            pointer="/pairs",
        )
    if "student" not in inputs:
        return
    student = parse_student(inputs["student"].meta["student"])
    if student.compares(sizes) == "relations":
        raise SpecInvalid(
            f"student: '{student.name}' makes codes that have no cosine to the model's answers; "
            "codes are judged over embeddings (hold_out makes them of pairs)",
            pointer="/student",
        )


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"choose": _choose, "map": _map, "judge": _judge}
    return steps[chunk.stage](_asked(spec, chunk), chunk, JUDGES[chunk.input("model").format])


def _asked(spec: Spec, chunk: Chunk) -> Asked:
    told, model = spec.teacher, chunk.input("model")
    if told is None and spec.student is not None:
        told = parse_teacher(chunk.input("student").meta["teacher"])
    pairs = None if spec.pairs is None else chunk.input("pairs").sha256
    return Asked(
        chunk=chunk,
        teacher=load_teacher(chunk, model.sha256, told_or_default(told, model), pairs=pairs),
        seed=spec.seed,
        title=spec.name or "Evaluation",
        facts={
            name: getattr(spec, name) and chunk.input(name).sha256
            for name in ("pairs", "model", "student")
        },
        trained=_student_facts(chunk),
    )


def _student_facts(chunk: Chunk) -> dict[str, Any]:
    """Return what the student's file says about its training: ``history`` and ``words``."""
    from core.distill.export import student_facts

    said: dict[str, Any] = {"history": [], "words": []}
    if not has_student(chunk):
        return said
    return {**said, **student_facts(chunk.fetch(chunk.input("student").sha256))["facts"]}


def _choose(asked: Asked, chunk: Chunk, judge: Judge) -> ChunkResult:
    rows, dropped = judge.choose(asked)
    chosen = {"rows": rows.tolist(), "dropped": dropped}
    file = write_json(chunk.workdir / "rows.json", chosen, format_name="rows")
    return ChunkResult(checkpoints={"rows": file})


def _rows(chunk: Chunk) -> tuple[Array, int]:
    import numpy as np

    chosen = read_json(chunk.outputs("choose")[0]["rows"].path)
    return np.array(chosen["rows"], dtype=np.int64), chosen["dropped"]


def _map(asked: Asked, chunk: Chunk, judge: Judge) -> ChunkResult:
    from core.tensors import shards

    rows, _ = _rows(chunk)
    mapped = judge.mapped(asked, rows)
    pieces = blocks(len(mapped), ROWS_PER_CHUNK)
    if chunk.index >= len(pieces):
        # Some rows were dropped as repeats: nothing is left for this chunk.
        return ChunkResult()
    start, stop = pieces[chunk.index]
    outputs = judge.outputs(asked, mapped[start:stop])
    path = chunk.workdir / "vectors.safetensors"
    shards.save(path, outputs, {"names": list(outputs)})
    return ChunkResult(checkpoints={"vectors": Produced(path, "vectors", path.name)})


def _judge(asked: Asked, chunk: Chunk, judge: Judge) -> ChunkResult:
    import numpy as np

    from core.tensors import shards

    rows, dropped = _rows(chunk)
    parts = [shards.load(made["vectors"].path) for made in chunk.outputs("map")]
    names = parts[0][1]["names"]
    outputs = {name: np.concatenate([tensors[name] for tensors, _ in parts]) for name in names}
    chunk.progress(0, 3)
    found = judge.report(asked, outputs, rows, dropped)
    chunk.progress(2, 3)
    made = {}
    for name, path in found.files.items():
        sort, media = SORTS[name.rpartition("_")[2]]
        made[name.removesuffix("_json").removesuffix("_png")] = Produced(
            path, sort, path.name, media
        )
    speeds = [
        Metric(f"queries_per_second/{name}", 0, speed)
        for name, speed in _speeds(asked, judge, rows).items()
    ]
    return ChunkResult(outputs=made, metrics=[*found.metrics, *speeds])


def _speeds(asked: Asked, judge: Judge, rows: Array) -> dict[str, float]:
    """What each way costs: timings are metrics, never part of a report."""
    import numpy as np
    import torch

    from core.distill.evaluation import throughput

    given = asked.given()[np.resize(rows, TIMED_ROWS)].astype("float32")
    queries = torch.from_numpy(given).to(asked.chunk.device)
    maps = judge.timed(asked)
    student = asked.student()
    if student is not None:
        maps["student"] = student
    speeds = {}
    for name, function in maps.items():
        asked.chunk.progress(2, 3)
        speeds[name] = throughput(function, queries, seconds=TIMED_SECONDS)
    return speeds


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Judge a student on held-out rows.",
    example={"kind": "evaluate", "pairs": "0" * 64, "model": "1" * 64, "student": "2" * 64},
    outputs={
        "report": "report",
        "report_md": "report_md",
        "hits": "picture",
        "cosines": "picture",
        "loss_curve": "picture",
        "recall": "picture",
        "map": "picture",
    },
)
