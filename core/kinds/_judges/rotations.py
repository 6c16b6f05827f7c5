"""Judges over a federated model: retrieval of true targets, and cosine to the exact teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from core.kinds._base import Metric
from core.kinds._judges._base import Asked, Judge, Reported, held_out_or_unseen, most_of_pairs

if TYPE_CHECKING:
    from core.distill.evaluation import Map
    from core.distill.teachers._base import RotationTeacher
    from core.tensors.shards import Array

TRUTH = (
    "The teacher 'paired' is the true targets themselves: its row says what could be had, not what "
    "a teacher finds."
)


def _teacher(asked: Asked) -> RotationTeacher:
    return cast("RotationTeacher", asked.teacher)


def _choose(asked: Asked) -> tuple[Array, int]:
    return held_out_or_unseen(asked, _teacher(asked).model)


def _outputs(asked: Asked, rows: Array) -> dict[str, Array]:
    from core.distill.evaluation import baselines, student_vectors

    teacher = _teacher(asked)
    queries = asked.pairs().queries[rows].astype("float32")
    asked.chunk.progress(0, 2)
    outputs = baselines(teacher, queries, anchor=_global_rotation(teacher))
    asked.chunk.progress(1, 2)
    student = asked.student()
    if student is not None:
        outputs["student"] = student_vectors(student, queries, device=asked.chunk.device)
    return outputs


def _global_rotation(teacher: RotationTeacher) -> Array:
    """The one rotation a student must beat: the model's anchor, or fitted where it has none."""
    from core.distill.fitting import global_rotation

    model = teacher.model
    if model.manifest.get("anchor") == "global":
        return model.anchor
    return global_rotation(model.queries, model.targets)


def _report(asked: Asked, outputs: dict[str, Array], rows: Array, dropped: int) -> Reported:
    from core.distill.choosing import edges
    from core.distill.evaluation import evaluate, how_split
    from core.distill.report import write_report

    teacher = _teacher(asked)
    found = evaluate(
        outputs,
        asked.pairs().targets.astype("float32"),
        rows,
        seed=asked.seed,
        dropped=dropped,
        remarks=[
            *how_split(teacher.model.manifest),
            *edges(teacher.model.manifest),
            *([] if teacher.answers_new else [TRUTH]),
            *asked.trained["words"],
        ],
    )
    asked.chunk.progress(1, 3)
    files = write_report(
        asked.chunk.workdir,
        found,
        title=asked.title,
        history=asked.trained["history"],
        facts=asked.facts,
    )
    points = []
    for row in found.rows:
        points += [Metric(f"hit@{k}/{row.name}", 0, value) for k, value in row.hits.items()]
        points.append(Metric(f"cosine/{row.name}", 0, row.cosine_mean))
    return Reported(files, points)


def _timed(asked: Asked) -> dict[str, Map]:
    from core.distill.evaluation import MEAN, RAW, baseline_maps

    teacher = _teacher(asked)
    maps = baseline_maps(teacher, anchor=_global_rotation(teacher))
    del maps[RAW], maps[MEAN]  # cost nothing
    return maps


JUDGE = Judge(
    needs_pairs=True,
    most=most_of_pairs,
    choose=_choose,
    mapped=lambda asked, rows: rows,
    outputs=_outputs,
    report=_report,
    answers=4,
    timed=_timed,
)
