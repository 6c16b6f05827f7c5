"""The students of a sweep: some, each with every combination of a grid's values that it knows."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from core.specs.students import Student

MOST = 64
Value = bool | int | float | str | None
"""Of one field of a student; the student's own class says what is allowed."""


@dataclass(frozen=True)
class Variant:
    """One student of a sweep."""

    name: str
    """The student's, with the fields by which its like differ: ``rotor_product planes=4``."""
    student: Student


def expand(students: Sequence[Student], grid: Mapping[str, Sequence[Value]]) -> list[Variant]:
    """List every variant: by student, then by the grid's values in the order of its own fields.

    Args:
        students: at least one.
        grid: field -> values, for every student that has the field.

    Raises:
        ValueError: a field that no student has, more than MOST variants, a value that a student
            refuses, or two variants that are the same.
    """
    _check_fields(students, grid)
    axes = [{name: grid[name] for name in _fields(one) if name in grid} for one in students]
    count = sum(math.prod(len(values) for values in axis.values()) for axis in axes)
    if count > MOST:
        raise ValueError(f"students and grid make {count} variants; allowed: 1 to {MOST}")
    found = [
        _changed(one, dict(zip(axis, values, strict=True)))
        for one, axis in zip(students, axes, strict=True)
        for values in itertools.product(*axis.values())
    ]
    names = _names(found)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"students and grid make {twice} more than once; each must differ")
    return [Variant(name, one) for name, one in zip(names, found, strict=True)]


def _fields(student: Student) -> list[str]:
    return [name for name in type(student).model_fields if name != "name"]


def _check_fields(students: Sequence[Student], grid: Mapping[str, Sequence[Value]]) -> None:
    known = {name: None for one in students for name in _fields(one)}
    for name in grid:
        if name not in known:
            raise ValueError(
                f"grid.{name}: no student given has this field; allowed: {', '.join(known)}"
            )


def _changed(student: Student, changes: Mapping[str, Value]) -> Student:
    if not changes:
        return student
    try:
        return type(student).model_validate({**student.model_dump(), **changes})
    except ValidationError as error:
        told = ", ".join(f"{name}={json.dumps(value)}" for name, value in changes.items())
        why = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in why["loc"])
        raise ValueError(
            f"grid: {student.name} with {told}: {field + ': ' if field else ''}{why['msg']}"
        ) from error


def _names(students: Sequence[Student]) -> list[str]:
    """Name each by its kind and the fields in which those of its kind differ."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for one in students:
        alike.setdefault(one.name, []).append(one.model_dump(mode="json"))
    names = []
    for one in students:
        own, others = one.model_dump(mode="json"), alike[one.name]
        told = [
            f"{field}={_shown(own[field])}"
            for field in _fields(one)
            if any(other[field] != own[field] for other in others)
        ]
        names.append(" ".join([one.name, *told]))
    return names


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
