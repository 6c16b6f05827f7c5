"""Holds a loss against the student it is to train: every term must have what it acts on."""

from __future__ import annotations

from collections.abc import Mapping

from core.errors import SpecInvalid
from core.specs.losses import (
    DEFAULTS,
    EQUAL_WIDTH,
    LEAST_ROWS,
    OF_DECODER,
    OF_ROUTER,
    RELATIONAL,
    TEMPERED,
)
from core.specs.sizes import Sizes
from core.specs.students import Student
from core.specs.training import Curriculum, Training


def check_losses(training: Training, student: Student, sizes: Sizes) -> None:
    """Raise SpecInvalid where a setting of the loss has nothing to act on.

    A term needs a student of the teacher's width, a router or a decoder; a relational term needs
    rows to compare, and a temperature such a term.
    """
    _check_terms(training, student, sizes)
    compares = student.compares(sizes)
    weights = training.losses.weights(compares, routes=student.routes(), decodes=student.decodes())
    if not weights:
        raise SpecInvalid(
            f"training.losses: no term weighs anything for student {student.name!r}; its default "
            f"terms: {', '.join(DEFAULTS[compares])}",
            pointer="/training/losses",
        )
    _check_rows(training, weights)
    if not (TEMPERED | set(training.losses.custom)) & set(weights):
        _check_no_temperature(training)


def _check_terms(training: Training, student: Student, sizes: Sizes) -> None:
    told = training.losses.told()
    without = {
        "an answer of the teacher's width": (
            EQUAL_WIDTH if student.compares(sizes) == "relations" else ()
        ),
        "a learnt router": () if student.routes() else OF_ROUTER,
        "a decoder": () if student.decodes() else OF_DECODER,
    }
    for what, terms in without.items():
        for name in sorted(terms):
            if told.get(name):
                raise SpecInvalid(
                    f"training.losses.{name} {told[name]:g} needs {what}, which student "
                    f"{student.name!r} does not have; allowed: null or 0",
                    pointer=f"/training/losses/{name}",
                )


def _check_rows(training: Training, weights: Mapping[str, float]) -> None:
    """Refuse parts of a batch in which no relation can be learnt."""
    rows = training.batch_size // training.accumulate
    compared = sorted(RELATIONAL & set(weights))
    if compared and rows < LEAST_ROWS:
        raise SpecInvalid(
            f"training.batch_size {training.batch_size} with accumulate {training.accumulate}: "
            f"{compared[0]} compares the rows of a part, which are {rows}; allowed: {LEAST_ROWS} "
            "and more",
            pointer="/training/batch_size",
        )


def _check_no_temperature(training: Training) -> None:
    """Refuse temperatures that no term has; a curriculum may still order its rows."""
    told = training.curriculum
    warm = told is not None and (
        told.order == "shuffled"
        or any(
            getattr(told, name) != Curriculum.model_fields[name].default
            for name in ("start_tau", "end_tau", "schedule")
        )
    )
    if warm or training.tau is not None:
        field = "curriculum" if warm else "tau"
        raise SpecInvalid(
            f"training.{field}: no term of the loss has a temperature; allowed beside a weight of "
            f"{', '.join(sorted(TEMPERED))}",
            pointer=f"/training/{field}",
        )
