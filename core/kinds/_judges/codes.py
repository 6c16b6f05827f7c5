"""Judges over stored embeddings: whether a student's codes keep who is near whom, beside PCA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from core.errors import SpecInvalid
from core.kinds._base import Input, Metric
from core.kinds._judges._base import Asked, Judge, Reported

if TYPE_CHECKING:
    from core.distill.evaluation import Map
    from core.distill.teachers.checkpoint import CheckpointTeacher
    from core.tensors.embeddings import Embeddings
    from core.tensors.shards import Array

LEVELS = (5, 25)
"""Widths of the PCA rows where there is no student to tell them: document 004's."""


def _model(asked: Asked) -> Embeddings:
    return cast("CheckpointTeacher", asked.teacher).model


def _most(inputs: Mapping[str, Input]) -> int:
    meta = inputs["model"].meta
    if not meta["held_out"]:
        raise SpecInvalid(
            "model: its embeddings have no held-out rows to judge on; run hold_out on them first",
            pointer="/model",
        )
    return int(meta["all_rows"])


def _choose(asked: Asked) -> tuple[Array, int]:
    rows = _model(asked).held_out_rows
    return rows, 0


def _all_rows(asked: Asked, rows: Array) -> Array:
    """Neighbours of the rows judged are looked for among all."""
    import numpy as np

    del rows
    return np.arange(len(_model(asked).embeddings))


def _outputs(asked: Asked, rows: Array) -> dict[str, Array]:
    from core.distill.evaluation import student_vectors

    asked.chunk.progress(0, 1)
    student = asked.student()
    if student is None:
        return {"rows": rows[:, None]}
    queries = _model(asked).given[rows].astype("float32")
    return {
        "rows": rows[:, None],
        "student": student_vectors(student, queries, device=asked.chunk.device),
    }


def _levels(asked: Asked) -> list[int]:
    """Widths of the codes that are judged: the student's nested ones."""
    student = asked.student()
    most = min(_model(asked).embeddings.shape[1], len(_model(asked).train_rows))
    if student is None:
        return [dim for dim in LEVELS if dim <= most] or [most]
    return [width for width, _ in student.levels] or [student.output_dim()]


def _report(asked: Asked, outputs: dict[str, Array], rows: Array, dropped: int) -> Reported:
    from core.distill.code_evaluation import baseline_codes, evaluate_codes
    from core.distill.code_report import write_code_report

    del dropped
    model, told = _model(asked), None
    named: dict[str, Array] = {}
    for dim in _levels(asked):
        if dim <= model.embeddings.shape[1]:
            named |= baseline_codes(model, dim, seed=asked.seed)
        if "student" in outputs:
            named[f"student {dim}-D"] = outputs["student"][:, :dim]
            told = told or f"student {dim}-D"
        asked.chunk.progress(0, 3)
    found = evaluate_codes(
        named, model, rows, student=told, seed=asked.seed, remarks=asked.trained["words"]
    )
    asked.chunk.progress(1, 3)
    files = write_code_report(
        asked.chunk.workdir,
        found,
        codes=named if told is None else {told: named[told]},
        groups=model.groups,
        title=asked.title,
        history=asked.trained["history"],
        facts=asked.facts,
    )
    return Reported(files, [Metric(f"recall@10/{row.name}", 0, row.recall) for row in found.rows])


def _timed(asked: Asked) -> dict[str, Map]:
    """Nothing but the student computes anything."""
    del asked
    return {}


JUDGE = Judge(
    needs_pairs=False,
    most=_most,
    choose=_choose,
    mapped=_all_rows,
    outputs=_outputs,
    report=_report,
    answers=10,
    timed=_timed,
)
