from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy.linalg import expm

from core.rotations.planes import leading_planes, plane_factors, rotate_in_planes
from core.rotations.skew import from_planes, split_planes
from tests.core.rotations import _make as make


@make.quick
@given(make.angle_lists())
@example((4, [0.125, 2.0**-52]))  # just above what is taken for rounding
@example((3, [8e-162]))
def test_planes_put_the_bivector_together_again(case: tuple[int, list[float]]) -> None:
    width, angles = case
    L = make.bivector(width, angles)[None]

    factors = plane_factors(L)

    columns = factors.bases[0]
    assert torch.allclose(from_planes(factors.bases, factors.angles), L, rtol=0, atol=1e-12)
    assert torch.allclose(columns.mT @ columns, torch.eye(2 * len(angles)).double(), atol=1e-12)
    expected = torch.tensor(sorted(angles, reverse=True), dtype=torch.float64)
    assert torch.allclose(factors.angles[0], expected, rtol=0, atol=1e-13)


@make.quick
@given(make.angle_lists())
def test_rotating_in_planes_is_the_exponential(case: tuple[int, list[float]]) -> None:
    L, queries = make.bivector(*case), make.unit_queries(4, case[0])
    factors = plane_factors(L[None])

    turned = rotate_in_planes(queries, factors.bases[0], factors.angles[0])

    assert torch.allclose(turned, queries @ torch.from_numpy(expm(L.numpy())), rtol=0, atol=1e-12)
    assert torch.allclose(turned.norm(dim=1), queries.norm(dim=1), rtol=0, atol=1e-13)


def test_fewer_planes_keep_the_largest_angles() -> None:
    L = make.bivector(9, [0.5, 2.0, 1.0, 3.0])[None]

    factors = plane_factors(L, planes=2)

    assert factors.bases.shape == (1, 9, 4)
    assert torch.allclose(factors.angles[0], torch.tensor([3.0, 2.0], dtype=torch.float64))


def test_low_rank_bivector_has_its_rank_in_planes() -> None:
    L = make.bivector(40, [math.pi, math.pi, 1.0])[None]

    factors = plane_factors(L, planes=3)

    assert torch.allclose(from_planes(factors.bases, factors.angles), L, rtol=0, atol=1e-12)


def test_float32_bivectors_give_float32_factors() -> None:
    L = make.bivector(10, [1.0, 2.0, 2.0]).float()[None]

    factors = plane_factors(L)

    assert factors.bases.dtype == torch.float32
    assert torch.allclose(from_planes(factors.bases, factors.angles), L, atol=1e-6)


def test_every_query_may_have_its_own_angles() -> None:
    queries, factors = make.unit_queries(3, 8), plane_factors(make.bivectors(1, 8))
    angles = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    turned = rotate_in_planes(queries, factors.bases[0], angles)

    for row in range(3):
        alone = rotate_in_planes(queries[row : row + 1], factors.bases[0], angles[row])
        assert torch.allclose(turned[row], alone[0], rtol=0, atol=1e-15)


def test_rotation_is_differentiable_in_everything() -> None:
    basis = make.basis(6).requires_grad_()
    queries = make.unit_queries(2, 6).requires_grad_()
    angles = torch.tensor([0.0, 1.0, math.pi], dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(rotate_in_planes, (queries, basis, angles))


def test_more_planes_than_half_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 2"):
        plane_factors(torch.zeros(1, 5, 5), planes=3)


def test_no_bivectors_have_no_planes() -> None:
    assert plane_factors(torch.zeros(0, 6, 6)).bases.shape == (0, 6, 6)


def test_null_directions_are_paired_last() -> None:
    bases, sizes = split_planes(make.bivector(7, [0.0, 2.0, 0.0]))

    assert sizes.tolist() == pytest.approx([2.0, 0.0, 0.0], abs=1e-14)
    assert bases.shape == (7, 7)


@make.quick
@given(make.angle_lists(), st.integers(0, 3))
def test_the_leading_planes_are_the_first_of_all(
    case: tuple[int, list[float]], planes: int
) -> None:
    width, angles = case
    L, m = make.bivector(width, angles)[None], min(planes, width // 2)
    falling = [math.pi, *sorted(angles, reverse=True), -1.0]
    assume(m == 0 or falling[m] - falling[m + 1] > 0.01)  # equals may be mixed
    found = leading_planes(L, m)
    assert found.bases.shape == (1, width, 2 * m)
    expected = torch.tensor(sorted(angles, reverse=True)[:m], dtype=torch.float64)
    assert torch.allclose(found.angles[0], expected, rtol=0, atol=1e-7)
    columns = found.bases[0]
    assert torch.allclose(columns.mT @ columns, torch.eye(2 * m).double(), atol=1e-12)
    inside = columns.mT @ L[0] @ columns
    wanted = from_planes(torch.eye(2 * m).double()[None], found.angles)[0]
    assert torch.allclose(inside, wanted, rtol=0, atol=1e-7)
