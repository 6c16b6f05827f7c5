"""Relations inside a batch: against float64 references, at their zeros and at the edges."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.distill import relational
from core.errors import DataInvalid, SpecInvalid

Term = Callable[[Tensor, Tensor], Tensor]
TERMS: dict[str, Term] = {
    "relational_kl": lambda s, t: relational.relational_kl(s, t, tau=0.7),
    "gram": relational.gram,
    "rkd_distance": relational.rkd_distance,
    "rkd_angle": relational.rkd_angle,
}
each_term = pytest.mark.parametrize("name", TERMS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def rotation(dim: int, seed: int = 5) -> Tensor:
    return torch.linalg.qr(normal(dim, dim, seed=seed, dtype=torch.float64))[0]


def _cosines(x: Any) -> Any:
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    return units @ units.T


def _others(x: Any) -> Any:
    return x[~np.eye(len(x), dtype=bool)].reshape(len(x), -1)


def _huber(gaps: Any) -> Any:
    return np.where(np.abs(gaps) < 1, gaps**2 / 2, np.abs(gaps) - 0.5)


def plain_kl(student: Any, teacher: Any, tau: float = 0.7) -> float:
    logs = []
    for x in (student, teacher):
        scaled = _others(_cosines(x)) / tau
        logs.append(scaled - np.log(np.exp(scaled).sum(1, keepdims=True)))
    return float(tau**2 * (np.exp(logs[1]) * (logs[1] - logs[0])).sum(1).mean())


def plain_gram(student: Any, teacher: Any) -> float:
    return float(np.mean((_others(_cosines(student)) - _others(_cosines(teacher))) ** 2))


def plain_distance(student: Any, teacher: Any) -> float:
    scaled = []
    for x in (student, teacher):
        found = np.array([np.linalg.norm(a - b) for a, b in itertools.combinations(x, 2)])
        scaled.append(found / found.mean())
    return float(_huber(scaled[0] - scaled[1]).mean())


def plain_angle(student: Any, teacher: Any) -> float:
    def angle(x: Any, i: int, j: int, k: int) -> float:
        one, other = x[i] - x[j], x[k] - x[j]
        lengths = np.linalg.norm(one) * np.linalg.norm(other)
        return float(one @ other / lengths) if lengths else 0.0

    triples = list(itertools.permutations(range(len(student)), 3))
    gaps = [angle(student, *three) - angle(teacher, *three) for three in triples]
    return float(_huber(np.array(gaps)).mean())


PLAIN: dict[str, Callable[[Any, Any], float]] = {
    "relational_kl": plain_kl,
    "gram": plain_gram,
    "rkd_distance": plain_distance,
    "rkd_angle": plain_angle,
}


@each_term
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_those_of_a_plain_reference(name: str, dtype: torch.dtype) -> None:
    student, teacher = normal(9, 5, dtype=dtype), normal(9, 40, seed=1, dtype=dtype)

    found = TERMS[name](student, teacher)

    wanted = PLAIN[name](student.double().numpy(), teacher.double().numpy())
    assert found.dtype == dtype
    assert found.item() == pytest.approx(wanted, rel=1e-5 if dtype == torch.float32 else 1e-12)


@each_term
def test_gradients_are_right_for_both_sides(name: str) -> None:
    student = normal(5, 3, dtype=torch.float64).requires_grad_()
    teacher = normal(5, 7, seed=1, dtype=torch.float64).requires_grad_()

    assert torch.autograd.gradcheck(TERMS[name], (student, teacher))


@each_term
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 8), dim=st.integers(2, 6), seed=st.integers(0, 1000))
def test_zero_where_the_relations_agree(name: str, rows: int, dim: int, seed: int) -> None:
    """Turned and scaled rows in a wider space have the same relations."""
    student = normal(rows, dim, seed=seed, dtype=torch.float64)
    wide = torch.nn.functional.pad(3 * student, (0, 4)) @ rotation(dim + 4, seed)

    assert abs(TERMS[name](student, wide).item()) < 1e-12


@each_term
def test_above_zero_where_one_row_differs(name: str) -> None:
    student = normal(6, 4, dtype=torch.float64)
    teacher = student.clone()
    teacher[2] = normal(4, seed=3, dtype=torch.float64)

    assert TERMS[name](student, teacher).item() > 1e-4


def test_kl_is_zero_exactly_up_to_a_constant_of_all_cosines() -> None:
    """Equal angles between all rows say nothing, however large: a simplex and a narrower one."""
    simplex = torch.eye(4, dtype=torch.float64) - 0.25
    narrow = torch.eye(4, dtype=torch.float64) + 2.0

    assert relational.relational_kl(simplex, narrow, tau=0.5).item() == pytest.approx(0, abs=1e-14)
    assert relational.gram(simplex, narrow).item() > 0.1


@each_term
@pytest.mark.parametrize("rows", [2, 3, 8])
def test_equal_rows_have_finite_values_and_gradients(name: str, rows: int) -> None:
    for student in (torch.ones(rows, 5), normal(1, 5).repeat(rows, 1), torch.zeros(rows, 5)):
        for teacher in (normal(rows, 30), torch.ones(rows, 30)):
            given = student.clone().requires_grad_()
            loss = TERMS[name](given, teacher)
            loss.backward()
            assert loss.isfinite()
            assert given.grad is not None
            assert given.grad.isfinite().all()


def test_two_equal_rows_among_others_do_not_blow_a_gradient_up() -> None:
    student = normal(8, 5)
    student[1] = student[0]
    student[3] = student[2] + 1e-9
    for term in TERMS.values():
        given = student.clone().requires_grad_()
        term(given, normal(8, 40, seed=1)).backward()
        assert given.grad is not None
        assert given.grad.norm() < 10


@pytest.mark.parametrize(("rows", "apart"), [(8, 0.0), (32, 0.0), (32, 2.0), (128, 2.0)])
def test_tau_hardly_changes_the_size_of_the_gradient(rows: int, apart: float) -> None:
    """Whether the teacher's rows are unlike each other or lie in eight clusters."""
    student = normal(rows, 5)
    teacher = normal(rows, 1536, seed=1) + apart * normal(8, 1536, seed=2)[torch.arange(rows) % 8]
    norms = []
    for tau in (0.5, 0.75, 1.0, 2.0, 3.0, 4.0):
        given = student.clone().requires_grad_()
        relational.relational_kl(given, teacher, tau=tau).backward()
        assert given.grad is not None
        norms.append(given.grad.norm().item())

    assert max(norms) < 2 * min(norms)


def test_a_warm_kl_is_half_the_centred_difference_of_the_cosines() -> None:
    student, teacher = normal(12, 5), normal(12, 50, seed=1)
    gaps = _others(_cosines(student.double().numpy())) - _others(_cosines(teacher.double().numpy()))
    wanted = gaps.var(axis=1).mean() / 2

    found = relational.relational_kl(student, teacher, tau=500.0)

    assert found.item() == pytest.approx(wanted, rel=1e-3)


def test_a_cool_kl_looks_at_neighbours_alone() -> None:
    """Turning neighbours together changes far relations alone, turning one of them near ones."""
    angles = torch.tensor([0.0, 0.3, 0.7, 2.2, 2.5, 2.9], dtype=torch.float64)

    def ratio(tau: float) -> float:
        rows = [
            torch.stack([turned.cos(), turned.sin()], 1)
            for turned in (
                angles,
                angles + torch.tensor([-0.3, -0.3, -0.3, 0, 0, 0]),
                angles + torch.tensor([-0.3, 0, 0, 0, 0, 0]),
            )
        ]
        far, near = (relational.relational_kl(x, rows[0], tau=tau).item() for x in rows[1:])
        return far / near

    assert ratio(2.0) > 1
    assert ratio(0.05) < 1e-3


def test_angles_are_the_same_however_they_are_cut() -> None:
    student, teacher = normal(20, 5), normal(20, 64, seed=1)
    found = []
    for entries in (1, 900, 2**20):
        given = student.clone().requires_grad_()
        loss = relational.rkd_angle(given, teacher, entries=entries)
        loss.backward()
        found.append((loss.item(), given.grad))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, found[0][1])


def test_angles_of_rows_far_from_the_origin_keep_their_digits() -> None:
    student = normal(8, 5)

    assert relational.rkd_angle(student + 1000, student.double() + 1000).item() < 1e-7


@each_term
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(name: str, dtype: torch.dtype) -> None:
    student = normal(6, 5, dtype=dtype).requires_grad_()

    loss = TERMS[name](student, normal(6, 9, seed=1).to(dtype))
    loss.backward()

    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.isfinite().all()


@each_term
@pytest.mark.parametrize(
    ("student", "teacher", "told"),
    [
        (normal(1, 5), normal(1, 9), "student_vec: 1 rows; needed at least 2"),
        (normal(4, 5), normal(3, 9), "teacher_vec: 3 rows beside student_vec's 4"),
        (normal(4), normal(4, 9), r"student_vec: torch.float32 of shape \[4\]"),
        (normal(4, 0), normal(4, 9), r"student_vec: torch.float32 of shape \[4, 0\]"),
        (normal(4, 5), torch.ones(4, 9, dtype=torch.int64), "teacher_vec: torch.int64 of"),
        (np.ones((4, 5)), normal(4, 9), "student_vec: a ndarray; needed a tensor"),
        (normal(4, 5), normal(4, 9).to("meta"), "teacher_vec: on meta, student_vec on cpu"),
    ],
)
def test_what_is_no_batch_is_refused(name: str, student: Any, teacher: Any, told: str) -> None:
    with pytest.raises(DataInvalid, match=told):
        TERMS[name](student, teacher)


@pytest.mark.parametrize("tau", [0, -1.0, float("nan"), float("inf"), "1", None, True])
def test_what_is_no_temperature_is_refused(tau: Any) -> None:
    with pytest.raises(SpecInvalid, match=r"tau .*; allowed: a number, 1e-06 to 1000") as caught:
        relational.relational_kl(normal(4, 5), normal(4, 9), tau=tau)
    assert caught.value.pointer == "/tau"
