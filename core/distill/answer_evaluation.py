"""Judges answers against an LDA teacher's, beside what is had without learning anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.distill.evaluation import Interval, Map, paired_interval
from core.distill.nulls import fit_ridge, mean_vector
from core.distill.retrieval import Index, row_cosines
from core.distill.teachers.lda import LdaTeacher
from core.tensors.shards import Array

RAW, MEAN, RIDGE, TEACHER = "raw", "mean answer", "ridge", "teacher"
NULLS = (RAW, MEAN, RIDGE)
"""Rows that need no student; raw only where questions and answers have one width."""
FLAT = 1e-6
"""Below this share of the answers' length a centred answer is rounding, not a direction."""


@dataclass(frozen=True)
class AnswerRow:
    """What one way of answering is worth."""

    name: str
    cosine_mean: float
    """To the teacher's answers, as all five."""
    cosine_min: float
    cosine_max: float
    cosine_std: float
    centred: float | None
    """Mean cosine after the teacher's mean answer is taken from both, which a shared mean cannot
    flatter; none where the teacher says nothing but that mean."""
    accuracy: float
    """Share of questions whose own answer is the nearest."""
    versus_teacher: Interval
    """Its accuracy less the teacher's."""


@dataclass(frozen=True)
class AnswerEvaluation:
    """The whole judgement; a function of vectors and seed."""

    rows: list[AnswerRow]
    questions: int
    answers: int
    """Distinct answers chosen among."""
    dropped: int
    words: list[str]

    def row(self, name: str) -> AnswerRow:
        """Return one row by name."""
        return next(row for row in self.rows if row.name == name)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def answer_maps(teacher: LdaTeacher, *, seed: int) -> dict[str, Map]:
    """Return every way of answering that a student is compared to, by name.

    The mean and the ridge are fitted to what the teacher answers to its training queries.
    """
    queries = torch.from_numpy(teacher.queries)
    said = teacher.targets(queries).float().cpu()
    mean, ridge = mean_vector(said).float(), fit_ridge(queries, said, seed=seed)
    maps: dict[str, Map] = {
        MEAN: lambda asked: mean.to(asked.device).expand(len(asked), -1),
        RIDGE: lambda asked: ridge(asked.cpu()).float().to(asked.device),
        TEACHER: lambda asked: teacher.targets(asked).float(),
    }
    if queries.shape[1] == said.shape[1]:
        maps = {RAW: lambda asked: asked, **maps}
    return maps


def evaluate_answers(
    outputs: Mapping[str, Array],
    truths: Array,
    answers: Array,
    *,
    mean: Array,
    seed: int,
    dropped: int = 0,
    remarks: Sequence[str] = (),
) -> AnswerEvaluation:
    """Judge every set of answers against the teacher's and against what is right.

    Args:
        outputs: name -> [Q, m]; with the names of ``answer_maps``, students after them.
        truths: [Q, m], each question's own answer; the nearest of ``answers`` is the right one.
        answers: [K, m], what is chosen among.
        mean: [m], the teacher's mean answer to its training queries.
        seed: of the bootstrap.
        dropped: repeats left out before, told in the result.
        remarks: sentences that join the findings.
    """
    index = Index(answers)
    right = index.nearest(truths, 1)[:, 0]
    hits = {name: index.nearest(vectors, 1)[:, 0] == right for name, vectors in outputs.items()}
    rows = [
        _row(name, vectors, outputs[TEACHER], hits=hits, mean=mean, seed=seed)
        for name, vectors in outputs.items()
    ]
    words = _words({row.name: row for row in rows})
    return AnswerEvaluation(rows, len(truths), len(index.targets), dropped, [*words, *remarks])


def _row(
    name: str,
    vectors: Array,
    teacher: Array,
    *,
    hits: Mapping[str, Array],
    mean: Array,
    seed: int,
) -> AnswerRow:
    cosines = row_cosines(vectors, teacher)
    wins = hits[name].astype(np.int64) - hits[TEACHER]
    return AnswerRow(
        name=name,
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        cosine_max=float(cosines.max()),
        cosine_std=float(cosines.std()),
        centred=_centred(vectors, teacher, mean),
        accuracy=float(hits[name].mean()),
        versus_teacher=paired_interval(wins, seed=seed),
    )


def _centred(vectors: Array, teacher: Array, mean: Array) -> float | None:
    apart = teacher.astype(np.float64) - mean
    kept = np.linalg.norm(apart, axis=1) > FLAT * np.linalg.norm(teacher, axis=1).mean()
    found = vectors.astype(np.float64) - mean
    # An answer that is the mean itself points nowhere: it agrees with nothing.
    some = kept & (np.linalg.norm(found, axis=1) > FLAT * np.linalg.norm(mean))
    if not kept.any():
        return None
    return float(row_cosines(found[some], apart[some]).sum() / kept.sum())


def _words(rows: Mapping[str, AnswerRow]) -> list[str]:
    teacher, nulls = rows[TEACHER], [rows[name] for name in NULLS if name in rows]
    words = []
    if RAW in rows:
        gain = rows[RAW].versus_teacher
        if gain.high < 0:
            words.append(
                f"The teacher finds the right answer more often than the raw query: "
                f"{teacher.accuracy:.1%} against {rows[RAW].accuracy:.1%}."
            )
        else:
            words.append(
                f"Warning: the teacher ({teacher.accuracy:.1%} right) is not beyond chance better "
                f"than the raw query ({rows[RAW].accuracy:.1%})."
            )
    words.append(
        f"One answer for all has cosine {rows[MEAN].cosine_mean:.4f} to the teacher, a ridge "
        f"regression {rows[RIDGE].cosine_mean:.4f}: what a student must beat."
    )
    best = max(row.cosine_mean for row in nulls)
    for row in rows.values():
        if row.name in (*NULLS, TEACHER):
            continue
        lost = row.versus_teacher
        beaten = "" if row.cosine_mean > best else " Warning: a null row is nearer."
        words.append(
            f"{row.name} has cosine {row.cosine_mean:.5f} to the teacher (min "
            f"{row.cosine_min:.4f}, std {row.cosine_std:.4f}); its accuracy "
            f"differs by {100 * lost.difference:+.2f} points (95 % {100 * lost.low:+.2f} to "
            f"{100 * lost.high:+.2f}).{beaten}"
        )
    return words


def answers_of(teacher: LdaTeacher, targets: Array) -> Array:
    """Return what a question is answered with: the heads' answers, of maps the true targets.

    Args:
        teacher: of either mode.
        targets: [Q, m] of all pairs.
    """
    answers = teacher.model.answers
    return targets if answers is None else answers


def mean_answer(teacher: LdaTeacher) -> Array:
    """Return the teacher's mean answer to its training queries: [m] float64."""
    said: Tensor = teacher.targets(torch.from_numpy(teacher.queries)).cpu()
    mean: Array = mean_vector(said).numpy()
    return mean
