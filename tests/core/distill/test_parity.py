"""Every spec class has its file and every file its spec class."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from core.distill.losses._base import losses
from core.distill.students._base import students
from core.distill.teachers._base import teachers
from core.specs.losses import Losses
from core.specs.students import Student
from core.specs.teachers import Teacher
from tests.core.distill._make import SMALL_STUDENTS


def specs_in(union: Any) -> dict[str, type]:
    """Name -> class, of a spec class, a union, or an annotated union."""
    found: dict[str, type] = {}
    parts = [union]
    while parts:
        part = parts.pop()
        if isinstance(part, type):
            found[part.model_fields["name"].default] = part  # type: ignore[attr-defined]
        else:
            parts += [
                inner for inner in get_args(part) if get_args(inner) or isinstance(inner, type)
            ]
    return found


@pytest.mark.parametrize(("union", "plugins"), [(Student, students()), (Teacher, teachers())])
def test_specs_and_files_match(union: Any, plugins: Any) -> None:
    specs = specs_in(union)
    assert sorted(specs) == sorted(plugins)
    assert all(plugins[name].spec is spec for name, spec in specs.items())


def test_every_loss_has_its_weight_and_every_weight_its_loss() -> None:
    assert sorted(Losses.model_fields.keys() - {"custom"}) == sorted(losses())


def test_every_student_is_tested() -> None:
    assert sorted(SMALL_STUDENTS) == sorted(students())
