"""What training and writing a student take of memory, told from sizes alone; rather too much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from core.errors import SpecInvalid
from core.kinds._files import float_bytes
from core.kinds._teacher import teacher_bytes
from core.specs.losses import OF_BATCH
from core.specs.sizes import Sizes
from core.specs.students import Student
from core.specs.training import Training

MOST_NUMBERS = 2**34
"""That a student may hold: 64 GiB."""
COPIES = 10
"""Of a student in training, as measured on perceptrons of 72 MB.

Weights, two moments of Adam, their average and the best are twice there while a chunk takes up
what another left; the gradient finds room in what that leaves.
"""
EXPORTED = 12
"""Copies of a student while its files are written; measured so."""


def rows_bytes(model: Mapping[str, Any]) -> int:
    """Return what the rows that students are trained on take.

    The teacher; queries, also by its anchor, and targets with mixtures.
    """
    sizes = Sizes.of(model)
    return teacher_bytes(model) + 7 * float_bytes(sizes.rows, max(sizes.dim, sizes.width))


def training_bytes(
    model: Mapping[str, Any], student: Student, training: Training, *, answers_new: bool
) -> int:
    """Return about what training a student over a model takes, rather too much.

    The rows, the copies of the student, what the gradient keeps of a part of a batch, and where
    rows of a part are compared some six float64 matrices of it.
    """
    sizes = Sizes.of(model)
    rows = _batch_rows(training, sizes, answers_new=answers_new)
    part = math.ceil(rows / training.accumulate)
    pairs = 6 * 2 * float_bytes(part, part) if _relates(student, sizes, training) else 0
    batch = float_bytes(part, student.units(sizes)) + pairs
    return rows_bytes(model) + _held_bytes(student, sizes, COPIES) + batch


def export_bytes(model: Mapping[str, Any], student: Student) -> int:
    """Return about what writing a trained student's files takes: its state and the files."""
    return _held_bytes(student, Sizes.of(model), EXPORTED)


def _held_bytes(student: Student, sizes: Sizes, copies: int) -> int:
    """Return what so many copies of a student take; of what has no moments half as many."""
    copied = student.copied(sizes)
    return float_bytes(copies, student.parameters(sizes) - copied) + float_bytes(
        copies // 2, copied
    )


def _batch_rows(training: Training, sizes: Sizes, *, answers_new: bool) -> int:
    """Bound the rows of a batch: no more real ones than there are, and those beside them."""
    size = training.batch_size
    shares = (training.made_share(answers_new=answers_new), training.centroid_replay)
    beside = sum(math.ceil(share * size) for share in shares)
    return min(size, max(sizes.rows + beside, sizes.clusters))


def _relates(student: Student, sizes: Sizes, training: Training) -> bool:
    """Whether a term of the loss compares the rows of a batch; one of the user's own may."""
    weights = training.losses.weights(
        student.compares(sizes), routes=student.routes(), decodes=student.decodes()
    )
    return bool((OF_BATCH | set(training.losses.custom)) & set(weights))


def check_held(student: Student, sizes: Sizes) -> None:
    """Refuse a student that nothing here could hold."""
    held = student.parameters(sizes)
    if held > MOST_NUMBERS:
        raise SpecInvalid(
            f"student: '{student.name}' of these sizes holds {held} numbers, "
            f"{float_bytes(held) / 2**30:.0f} GiB; allowed: at most {MOST_NUMBERS}, "
            f"{float_bytes(MOST_NUMBERS) / 2**30:.0f} GiB",
            pointer="/student",
        )
