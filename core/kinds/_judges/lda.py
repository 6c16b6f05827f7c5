"""Judges over an LDA model: answers right, and cosine to the teacher beside the null rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from core.kinds._base import Metric
from core.kinds._judges._base import Asked, Judge, Reported, held_out_or_unseen, most_of_pairs

if TYPE_CHECKING:
    from core.distill.evaluation import Map
    from core.distill.teachers.lda import LdaTeacher
    from core.tensors.shards import Array


def _teacher(asked: Asked) -> LdaTeacher:
    return cast("LdaTeacher", asked.teacher)


def _choose(asked: Asked) -> tuple[Array, int]:
    return held_out_or_unseen(asked, _teacher(asked).model)


def _outputs(asked: Asked, rows: Array) -> dict[str, Array]:
    from core.distill.answer_evaluation import answer_maps
    from core.distill.evaluation import mapped, student_vectors

    queries = asked.pairs().queries[rows].astype("float32")
    asked.chunk.progress(0, 2)
    maps = answer_maps(_teacher(asked), seed=asked.seed)
    device = asked.chunk.device
    outputs = {name: mapped(function, queries, device=device) for name, function in maps.items()}
    asked.chunk.progress(1, 2)
    student = asked.student()
    if student is not None:
        outputs["student"] = student_vectors(student, queries, device=device)
    return outputs


def _report(asked: Asked, outputs: dict[str, Array], rows: Array, dropped: int) -> Reported:
    from core.distill.answer_evaluation import answers_of, evaluate_answers, mean_answer
    from core.distill.answer_report import write_answer_report

    teacher, targets = _teacher(asked), asked.pairs().targets.astype("float32")
    found = evaluate_answers(
        outputs,
        targets[rows],
        answers_of(teacher, targets),
        mean=mean_answer(teacher),
        seed=asked.seed,
        dropped=dropped,
        remarks=asked.trained["words"],
    )
    asked.chunk.progress(1, 3)
    files = write_answer_report(
        asked.chunk.workdir,
        found,
        title=asked.title,
        history=asked.trained["history"],
        facts=asked.facts,
    )
    points = []
    for row in found.rows:
        points.append(Metric(f"accuracy/{row.name}", 0, row.accuracy))
        points.append(Metric(f"cosine/{row.name}", 0, row.cosine_mean))
    return Reported(files, points)


def _timed(asked: Asked) -> dict[str, Map]:
    from core.distill.answer_evaluation import MEAN, RAW, answer_maps

    maps = answer_maps(_teacher(asked), seed=asked.seed)
    return {name: function for name, function in maps.items() if name not in (RAW, MEAN)}


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
