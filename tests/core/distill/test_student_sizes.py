"""What a student's spec says it will hold, against what the built one holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from core.distill.students._base import build_student, sizes_of, students
from core.specs.codebooks import PrincipalPlanes
from core.specs.plain_students import HierarchicalRouter, Mlp
from core.specs.sizes import Sizes
from core.specs.students import RotorProduct, Student
from tests.core.distill._make import SMALL_STUDENTS, teacher_for

CHANGES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in sorted(SMALL_STUDENTS)),
    ("rotor_product", {"router": "exact", "router_hidden": None}),
    ("rotor_product", {"planes": None, "train_planes": True}),
    ("nlerp_geodesic", {"router": "projected", "router_hidden": None, "router_rank": 5}),
    ("shared_subspace", {"router": "projected", "router_hidden": None, "subspace": 500}),
    ("geodesic_attention", {"slots": 5000}),
    ("canonical", {"n_components": None, "codebook": PrincipalPlanes(n_components=4)}),
    ("canonical", {"bias": "vector", "compat": "legacy"}),
    ("hierarchical_router", {"own_rank": 2, "candidates": 3}),
    ("hierarchical_router", {"own_rank": 0}),
    ("projection_transformer", {"num_heads": None, "num_layers": None}),
    ("linear", {"dim": 3}),
    ("mlp", {"layers": 3, "dim": 5}),
    ("hierarchical", {"decoder": 0}),
]


def spec_of(name: str, changes: dict[str, Any]) -> Student:
    return SMALL_STUDENTS[name].model_copy(update=changes)


def test_every_student_is_counted() -> None:
    assert {name for name, _ in CHANGES} == set(students())


@pytest.mark.parametrize(("name", "changes"), CHANGES)
def test_a_spec_says_how_many_numbers_its_student_holds(name: str, changes: dict[str, Any]) -> None:
    spec, teacher = spec_of(name, changes), teacher_for(name)
    held = sum(value.numel() for value in build_student(spec, teacher, 0).state_dict().values())
    assert held <= spec.parameters(sizes_of(teacher)) <= 1.5 * held


def test_heads_that_answer_by_matrices_are_counted_as_such() -> None:
    sizes, spec = Sizes(8, 6, 100, clusters=9), HierarchicalRouter(heads=3, levels=2)
    by_maps = replace(sizes, maps=True)
    assert Sizes.of({"dim": 8, "target_dim": 6, "rows": 100, "clusters": 9, "mode": "maps"}) == (
        by_maps
    )
    assert spec.parameters(by_maps) - spec.parameters(sizes) == 9 * (8 * 6 - 6)
    assert spec.units(by_maps) > spec.units(sizes)


def test_queries_copied_into_a_router_are_told_apart() -> None:
    sizes = Sizes(12, 12, 1000, clusters=4)
    assert RotorProduct().copied(sizes) == Mlp().copied(sizes) == 0
    assert RotorProduct(router="exact").copied(sizes) == 1000 * 13
    assert RotorProduct(router="projected", router_rank=5).copied(sizes) == 1000 * 6


@pytest.mark.parametrize("name", sorted(SMALL_STUDENTS))
def test_more_to_keep_of_a_query_than_its_answer(name: str) -> None:
    spec, sizes = SMALL_STUDENTS[name], sizes_of(teacher_for(name))
    assert spec.units(sizes) > (5 if name == "hierarchical" else sizes.width)
