from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from core.distill.evaluation import NLERP, baselines
from core.distill.students.geodesic_attention import GeodesicAttentionStudent
from core.distill.students.nlerp_geodesic import NlerpGeodesicStudent
from core.distill.students.shared_subspace import SharedSubspaceStudent, radius_step
from core.rotations.chebyshev import RADIUS_STEP
from core.rotations.sphere import squared_angles, step_along
from tests.core.distill._make import (
    CLUSTERS,
    DIM,
    make_student,
    make_teacher,
    shown,
    some_queries,
)


def nlerp(**changes: Any) -> NlerpGeodesicStudent:
    student = make_student("nlerp_geodesic", **changes)
    assert isinstance(student, NlerpGeodesicStudent)
    return student


def shared(**changes: Any) -> SharedSubspaceStudent:
    student = make_student("shared_subspace", **changes)
    assert isinstance(student, SharedSubspaceStudent)
    return student


def random_weights(rows: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(rows, CLUSTERS, generator=generator).softmax(-1)


@pytest.mark.parametrize("hidden", [0, 8])
def test_nlerp_with_exact_router_and_all_planes_is_the_normalised_blend(hidden: int) -> None:
    student = nlerp(router="exact", planes=None, correction_hidden=hidden)
    wanted = baselines(make_teacher(), some_queries().numpy())[NLERP]
    with torch.no_grad():
        found = student(some_queries()).numpy()
    assert np.abs(found - wanted).max() < 1e-6


def test_the_two_dense_products_are_the_sparse_sum() -> None:
    student, queries = nlerp(router="exact"), some_queries()
    with torch.no_grad():
        sparse = student(queries)
    weights = make_teacher().mixture(queries).dense().requires_grad_()
    torch.testing.assert_close(
        student.routed(shown(queries, weights)).vectors, sparse, rtol=0, atol=1e-6
    )


def test_where_the_answers_cancel_the_anchors_answer_is_taken() -> None:
    student, queries = nlerp(router="exact", planes=None, correction_hidden=0), some_queries()
    half = torch.full((len(queries), CLUSTERS), 1 / CLUSTERS)
    with torch.no_grad():  # half of the clusters turn every plane by pi, half by nothing
        student.angles.copy_(torch.pi * (torch.arange(CLUSTERS) % 2)[:, None].expand(-1, DIM // 2))
    found = student.routed(shown(queries, half)).vectors
    torch.testing.assert_close(found, queries @ make_teacher().anchor, rtol=0, atol=1e-6)
    lopsided = half + torch.tensor([0.1, -0.1] * (CLUSTERS // 2))
    assert not torch.isnan(student.routed(shown(queries, lopsided)).vectors).any()


def test_a_step_is_the_exponential_map() -> None:
    generator = torch.Generator().manual_seed(0)
    units = torch.nn.functional.normalize(
        torch.randn(9, 5, dtype=torch.float64, generator=generator), dim=1
    )
    steps = torch.randn(9, 5, dtype=torch.float64, generator=generator)
    tangent = steps - (steps * units).sum(1, keepdim=True) * units
    plane = units[:, :, None] * tangent[:, None] - tangent[:, :, None] * units[:, None]
    wanted = torch.einsum("bi,bij->bj", units, torch.linalg.matrix_exp(plane))
    torch.testing.assert_close(step_along(units, steps), wanted)


def test_a_step_of_nothing_stays_and_has_a_gradient() -> None:
    units = torch.nn.functional.normalize(some_queries(), dim=1)
    steps = torch.zeros_like(units).requires_grad_()
    moved = step_along(units, steps)
    assert torch.equal(moved, units)
    moved.sum().backward()
    assert steps.grad is not None
    wanted = 1 - units.sum(1, keepdim=True) * units
    torch.testing.assert_close(steps.grad, wanted, rtol=0, atol=1e-6)


def disturbed(student: torch.nn.Module, size: float = 0.3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return student


@pytest.mark.parametrize("name", ["geodesic_attention", "nlerp_geodesic", "shared_subspace"])
def test_a_zero_query_stays_zero_and_poisons_no_gradient(name: str) -> None:
    student = make_student(name)
    disturbed(student)
    student.retract()
    queries = some_queries(4)
    queries[1] = 0
    assert torch.equal(student(queries)[1], torch.zeros(DIM))
    vectors = student.routed(shown(queries, random_weights(4))).vectors
    squared_angles(vectors, some_queries(4).flip(1)).sum().backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


def test_shared_subspace_is_orthogonal_whatever_it_learns() -> None:
    student = shared()
    disturbed(student)
    student.retract()
    queries = some_queries()
    with torch.no_grad():
        bare = student.bare(queries)
        torch.testing.assert_close(bare.norm(dim=1), queries.norm(dim=1), rtol=2e-6, atol=0)
        one = random_weights(1).expand(DIM, CLUSTERS)
        matrix = student._rotate(torch.eye(DIM), one, student.bivectors())
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(DIM), rtol=0, atol=3e-6)
        student.basis.mul_(1.01)  # no rotation any more: the final scaling would hide it
        assert (student.bare(queries).norm(dim=1) / queries.norm(dim=1) - 1).abs().max() > 1e-4


def test_shared_subspace_is_the_exponential_of_the_blend() -> None:
    student = shared()
    disturbed(student)
    student.retract()
    queries, weights = some_queries(), random_weights()
    with torch.no_grad():
        found = student._rotate(queries @ student.anchor, weights, student.bivectors())
        basis = student.basis.double()
        full = basis @ student.bivectors().double() @ basis.T
    blend = torch.einsum("bc,cij->bij", weights.double(), full)
    x = queries.double() @ student.anchor.double()
    wanted = torch.einsum("bi,bij->bj", x, torch.linalg.matrix_exp(blend))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=5e-6)


def test_a_whole_subspace_with_the_exact_router_is_the_teacher() -> None:
    student = shared(router="exact", subspace=DIM)
    with torch.no_grad():
        found = student(some_queries())
    wanted = make_teacher().targets(some_queries())
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_the_radius_bounds_every_norm_and_not_by_much() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 8, 8, generator=generator)
    skew = values - values.mT
    largest = float(torch.linalg.matrix_norm(skew, ord=2).max())
    bound = radius_step(skew) * RADIUS_STEP
    assert largest <= bound <= largest * 4 ** (1 / 8) + RADIUS_STEP


def test_retraction_mends_the_subspace() -> None:
    student = shared()
    disturbed(student)
    student.retract()
    basis = student.basis.detach()
    torch.testing.assert_close(basis.T @ basis, torch.eye(6), rtol=0, atol=1e-6)


def test_attention_starts_at_the_anchors_map() -> None:
    student = make_student("geodesic_attention")
    found = student(some_queries()).detach()
    torch.testing.assert_close(found, some_queries() @ make_teacher().anchor, rtol=0, atol=1e-6)


def test_attention_weighs_the_clusters_convexly_and_has_no_more_slots_than_queries() -> None:
    student = make_student("geodesic_attention", slots=10_000)
    assert isinstance(student, GeodesicAttentionStudent)
    assert len(student.keys) == len(make_teacher().model.queries)
    log_weights = student.routed(shown(some_queries(), random_weights())).log_weights
    assert log_weights is not None
    torch.testing.assert_close(log_weights.exp().sum(1), torch.ones(50))


def test_more_hidden_units_than_directions_are_drawn() -> None:
    student = make_student("geodesic_attention", hidden=CLUSTERS * DIM + 9)
    rows = student.get_parameter("up.weight")
    assert rows.shape == (CLUSTERS * DIM + 9, DIM)
    assert rows.norm(dim=1).min() > 0.1
