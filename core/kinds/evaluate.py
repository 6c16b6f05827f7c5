"""Judge a student on held-out queries, beside every simpler map and the exact teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.errors import DataInvalid, SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.kinds._files import blocks, float_bytes, read_json, write_json
from core.kinds._teacher import load_teacher, teacher_bytes
from core.specs.base import JobSpec, Reads, Reference
from core.specs.teachers import Rotational, Teacher, parse_teacher

if TYPE_CHECKING:
    from core.distill.teachers._base import TeacherModel
    from core.tensors.formats import Pairs
    from core.tensors.shards import Array

ROWS_PER_CHUNK = 8192
TIMED_ROWS = 1024
"""Batch in which queries per second are measured."""
TIMED_SECONDS = 0.2
"""For each way of mapping, after a warm-up."""


TRUTH = (
    "The teacher 'paired' is the true targets themselves: its row says what could be had, not what "
    "a teacher finds."
)


class Spec(JobSpec):
    """Which student, against which teacher, on which pairs."""

    kind: Literal["evaluate"] = "evaluate"
    pairs: Annotated[Reference, Reads("pairs")] = Field(
        description="Those the model was fitted on (its held-out rows are judged), or others "
        "(all rows are judged whose query it was not trained on)."
    )
    model: Annotated[Reference, Reads("federated_model")] = Field(description="The teacher's.")
    student: Annotated[Reference, Reads("student")] | None = Field(
        None, description="null: the teacher and the baselines alone."
    )
    teacher: Teacher | None = Field(
        None, description="null: the student's own, or the defaults where there is no student."
    )


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Map blocks of queries every way, then judge."""
    dim = inputs["model"].meta["dim"]
    for name, given in inputs.items():
        if given.meta["dim"] != dim:
            raise SpecInvalid(
                f"{name} has {given.meta['dim']} dimensions, the model {dim}", pointer=f"/{name}"
            )
    if "student" in inputs and inputs["student"].meta["model"] != inputs["model"].sha256:
        raise SpecInvalid(
            f"student: distilled from model {inputs['student'].meta['model'][:12]}…, not from "
            f"{inputs['model'].sha256[:12]}…; it may have been trained on what that one held out. "
            "Judge it with its own model",
            pointer="/student",
        )
    if spec.teacher is not None:
        spec.teacher.check_width(dim)
    own = inputs["model"].meta["pairs"] == inputs["pairs"].sha256
    most = inputs["model"].meta["held_out"] if own else inputs["pairs"].meta["rows"]
    if most == 0:
        raise SpecInvalid("the model held no rows of these pairs out", pointer="/pairs")
    needed = teacher_bytes(inputs["model"].meta) + 4 * float_bytes(
        inputs["pairs"].meta["rows"], dim
    )
    return [
        Stage("choose", 1, memory_bytes=needed),
        Stage("map", len(blocks(most, ROWS_PER_CHUNK)), memory_bytes=needed),
        Stage("judge", 1, memory_bytes=needed),
    ]


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"choose": _choose, "map": _map, "judge": _judge}
    return steps[chunk.stage](spec, chunk)


def _pairs(chunk: Chunk) -> Pairs:
    from core.tensors.formats import load_pairs

    return load_pairs(chunk.fetch(chunk.input("pairs").sha256))


def _teacher(spec: Spec, chunk: Chunk) -> TeacherModel:
    told = spec.teacher
    if told is None and spec.student is not None:
        told = parse_teacher(chunk.input("student").meta["teacher"])
    pairs = chunk.input("pairs").sha256
    return load_teacher(chunk, chunk.input("model").sha256, told or Rotational(), pairs=pairs)


def _choose(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill.evaluation import held_out, unseen
    from core.tensors.formats import load_federated

    model = load_federated(chunk.fetch(chunk.input("model").sha256))
    own = model.manifest.get("pairs") == chunk.input("pairs").sha256
    rows, dropped = (held_out if own else unseen)(_pairs(chunk), model)
    if not len(rows):
        raise DataInvalid("pairs: the model was trained on every one of these queries")
    chosen = {"rows": rows.tolist(), "dropped": dropped}
    file = write_json(chunk.workdir / "rows.json", chosen, format_name="rows")
    return ChunkResult(checkpoints={"rows": file})


def _rows(chunk: Chunk) -> tuple[Array, int]:
    import numpy as np

    chosen = read_json(chunk.outputs("choose")[0]["rows"].path)
    return np.array(chosen["rows"], dtype=np.int64), chosen["dropped"]


def _map(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill.evaluation import baselines, student_vectors
    from core.distill.export import load_student
    from core.tensors import shards

    rows, _ = _rows(chunk)
    pieces = blocks(len(rows), ROWS_PER_CHUNK)
    if chunk.index >= len(pieces):
        # Some rows were dropped as repeats: nothing is left for this chunk.
        return ChunkResult()
    teacher = _teacher(spec, chunk)
    start, stop = pieces[chunk.index]
    queries = _pairs(chunk).queries[rows[start:stop]].astype("float32")
    chunk.progress(0, 2)
    outputs = baselines(teacher, queries, anchor=_global_rotation(teacher))
    chunk.progress(1, 2)
    if spec.student is not None:
        student = load_student(_student_file(chunk))
        outputs["student"] = student_vectors(student, queries, device=chunk.device)
    path = chunk.workdir / "vectors.safetensors"
    shards.save(path, outputs, {"names": list(outputs)})
    return ChunkResult(checkpoints={"vectors": Produced(path, "vectors", path.name)})


def _global_rotation(teacher: TeacherModel) -> Array:
    """The one rotation a student must beat: the model's anchor, or fitted where it has none."""
    from core.distill.fitting import global_rotation

    model = teacher.model
    if model.manifest.get("anchor") == "global":
        return model.anchor
    return global_rotation(model.queries, model.targets)


def _student_file(chunk: Chunk) -> Any:
    """Give the stored student the suffix by which the reader knows it."""
    link = chunk.workdir / "student.safetensors"
    link.symlink_to(chunk.fetch(chunk.input("student").sha256))
    return link


def _judge(spec: Spec, chunk: Chunk) -> ChunkResult:
    import numpy as np

    from core.distill.choosing import edges
    from core.distill.evaluation import evaluate, how_split
    from core.distill.report import write_report
    from core.tensors import shards

    rows, dropped = _rows(chunk)
    parts = [shards.load(made["vectors"].path) for made in chunk.outputs("map")]
    names = parts[0][1]["names"]
    outputs = {name: np.concatenate([tensors[name] for tensors, _ in parts]) for name in names}
    chunk.progress(0, 3)
    targets = _pairs(chunk).targets.astype("float32")
    trained = _student_facts(spec, chunk)
    model = _teacher(spec, chunk).model
    found = evaluate(
        outputs,
        targets,
        rows,
        seed=spec.seed,
        dropped=dropped,
        remarks=[
            *how_split(model.manifest),
            *edges(model.manifest),
            *([] if _teacher(spec, chunk).answers_new else [TRUTH]),
            *trained["words"],
        ],
    )
    chunk.progress(1, 3)
    files = write_report(
        chunk.workdir,
        found,
        title=spec.name or "Evaluation",
        history=trained["history"],
        facts={name: given and chunk.input(name).sha256 for name, given in _given(spec).items()},
    )
    made = {
        "report": Produced(files["report_json"], "report", "report.json", "application/json"),
        "report_md": Produced(files["report_md"], "report_md", "report.md", "text/markdown"),
        "hits": Produced(files["hits_png"], "picture", "hits.png", "image/png"),
        "cosines": Produced(files["cosines_png"], "picture", "cosines.png", "image/png"),
    }
    if "loss_curve_png" in files:
        picture = Produced(files["loss_curve_png"], "picture", "loss_curve.png", "image/png")
        made["loss_curve"] = picture
    chunk.progress(2, 3)
    return ChunkResult(outputs=made, metrics=_metrics(spec, chunk, found.rows, rows))


def _given(spec: Spec) -> dict[str, str | None]:
    return {"pairs": spec.pairs, "model": spec.model, "student": spec.student}


def _student_facts(spec: Spec, chunk: Chunk) -> dict[str, Any]:
    """Return what the student's file says about its training: ``history`` and ``words``."""
    from core.distill.export import student_facts

    said: dict[str, Any] = {"history": [], "words": []}
    if spec.student is None:
        return said
    return {**said, **student_facts(chunk.fetch(chunk.input("student").sha256))["facts"]}


def _metrics(spec: Spec, chunk: Chunk, found: Sequence[Any], rows: Array) -> list[Metric]:
    """What was judged, and what each way costs: timings are metrics, never part of a report."""
    points = []
    for row in found:
        points += [Metric(f"hit@{k}/{row.name}", 0, value) for k, value in row.hits.items()]
        points.append(Metric(f"cosine/{row.name}", 0, row.cosine_mean))
    for name, speed in _speeds(spec, chunk, rows).items():
        points.append(Metric(f"queries_per_second/{name}", 0, speed))
    return points


def _speeds(spec: Spec, chunk: Chunk, rows: Array) -> dict[str, float]:
    import numpy as np
    import torch

    from core.distill.evaluation import MEAN, RAW, baseline_maps, throughput
    from core.distill.export import load_student

    teacher = _teacher(spec, chunk)
    batch = _pairs(chunk).queries[np.resize(rows, TIMED_ROWS)].astype("float32")
    queries = torch.from_numpy(batch).to(chunk.device)
    maps = baseline_maps(teacher, anchor=_global_rotation(teacher))
    del maps[RAW], maps[MEAN]  # cost nothing
    if spec.student is not None:
        maps["student"] = load_student(_student_file(chunk)).to(chunk.device)
    speeds = {}
    for name, function in maps.items():
        chunk.progress(2, 3)
        speeds[name] = throughput(function, queries, seconds=TIMED_SECONDS)
    return speeds


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Judge a student on held-out queries.",
    example={"kind": "evaluate", "pairs": "0" * 64, "model": "1" * 64, "student": "2" * 64},
    outputs={
        "report": "report",
        "report_md": "report_md",
        "hits": "picture",
        "cosines": "picture",
        "loss_curve": "picture",
    },
)
