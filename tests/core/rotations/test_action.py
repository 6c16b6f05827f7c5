from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import expm
from torch import Tensor

from core.rotations import chebyshev
from core.rotations.action import chebyshev_degree, exp_action, spectral_norms
from core.rotations.mixture import Mixture
from tests.core.rotations import _make as make


def exact(queries: Tensor, bivectors: Tensor, mixture: Mixture) -> Tensor:
    """q expm(B) in float64, one query at a time."""
    blends = torch.einsum("qc,cij->qij", mixture.dense().double(), bivectors.double())
    rows = [row @ expm(B.numpy()) for row, B in zip(queries.double().numpy(), blends, strict=True)]
    return torch.from_numpy(np.stack(rows))


def sha(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@make.quick
@given(
    st.integers(1, 12),
    st.sampled_from([0.0, 1e-8, 1e-3, 1.0, math.pi]),
    st.sampled_from([1e-3, 1e-6, 1e-12]),
    st.integers(0, 9),
)
def test_error_stays_within_the_tolerance(
    width: int, largest: float, tolerance: float, seed: int
) -> None:
    angles = torch.linspace(0, largest, max(width // 2, 1)).tolist()[: width // 2]
    L = torch.stack([make.bivector(width, angles, seed=seed + c) for c in range(4)])
    queries, mixture = make.unit_queries(7, width), make.mixture(7, 4, seed=seed)

    turned = exp_action(queries, L, mixture, tolerance=tolerance)

    error = (turned - exact(queries, L, mixture)).norm(dim=1)
    assert float(error.max()) <= tolerance + 1e-14


@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.float32, 5e-7), (torch.float64, 1e-6)], ids=["float32", "float64"]
)
def test_length_is_kept(dtype: torch.dtype, bar: float) -> None:
    queries = make.unit_queries(50, 64).to(dtype)
    L = make.bivectors(5, 64)

    turned = exp_action(queries, L.to(dtype), make.mixture(50, 5))

    assert turned.dtype == dtype
    assert float((turned.double().norm(dim=1) - 1).abs().max()) <= bar


def test_float32_meets_the_default_tolerance_at_radius_pi() -> None:
    queries, L, mixture = make.unit_queries(20, 96), make.bivectors(4, 96), make.mixture(20, 4)

    turned = exp_action(queries.float(), L.float(), mixture)

    assert float((turned - exact(queries, L, mixture)).abs().max()) <= 1e-6


def test_without_onednn_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, L, mixture = make.unit_queries(20, 32), make.bivectors(4, 32), make.mixture(20, 4)
    there = exp_action(queries.float(), L.float(), mixture)

    monkeypatch.setattr(chebyshev, "ONEDNN", False)

    assert torch.allclose(exp_action(queries.float(), L.float(), mixture), there, rtol=0, atol=1e-6)


def test_rows_turn_from_the_first_towards_the_second_axis() -> None:
    L = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]], dtype=torch.float64) * math.pi / 2
    whole = Mixture.from_dense(torch.ones(1, 1, dtype=torch.float64))
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64)

    turned = exp_action(queries, L, whole, tolerance=1e-12)

    assert torch.allclose(turned, torch.tensor([[0.0, 1.0]], dtype=torch.float64))


def test_zero_bivectors_and_empty_rows_leave_queries_alone() -> None:
    queries = make.unit_queries(3, 6)
    weights = torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    L = torch.zeros(2, 6, 6, dtype=torch.float64)

    assert torch.equal(exp_action(queries, L, Mixture.from_dense(weights)), queries)


def test_no_queries_give_no_rows() -> None:
    empty = Mixture.from_dense(torch.zeros(0, 3))

    turned = exp_action(torch.zeros(0, 8), torch.zeros(3, 8, 8), empty)

    assert turned.shape == (0, 8)
    given_rotations = torch.eye(8).repeat(3, 1, 1)
    assert exp_action(
        torch.zeros(0, 8), torch.zeros(3, 8, 8), empty, rotations=given_rotations
    ).shape == (0, 8)


def test_one_cluster_at_weight_one_is_the_rotation_itself() -> None:
    angles = [[math.pi, 1.0, 0.5], [2.0, 3.0, 0.0]]
    W = torch.stack([make.rotation(6, a, seed=i) for i, a in enumerate(angles)])
    L = torch.stack([make.bivector(6, a, seed=i) for i, a in enumerate(angles)])
    weights = torch.tensor([[0.0, 1.0], [0.3, 0.7], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    queries, mixture = make.unit_queries(4, 6), Mixture.from_dense(weights)

    turned = exp_action(queries, L, mixture, rotations=W)

    for row, cluster in ((0, 1), (2, 0), (3, 1)):
        assert torch.allclose(turned[row], queries[row] @ W[cluster], rtol=0, atol=1e-15)
    assert torch.allclose(turned, exact(queries, L, mixture), rtol=0, atol=1e-6)


def test_the_anchor_comes_first_and_the_rotations_hold_it() -> None:
    G = make.rotation(6, [0.4, 0.9, 2.2], seed=7)
    L = torch.stack([make.bivector(6, [2.0, 1.0, 0.5], seed=i) for i in range(2)])
    W = torch.stack([G @ make.rotation(6, [2.0, 1.0, 0.5], seed=i) for i in range(2)])
    weights = torch.tensor([[0.0, 1.0], [0.3, 0.7], [1.0, 0.0]], dtype=torch.float64)
    queries, mixture = make.unit_queries(3, 6), Mixture.from_dense(weights)

    turned = exp_action(queries, L, mixture, tolerance=1e-12, anchor=G, rotations=W)

    assert torch.allclose(turned, exact(queries @ G, L, mixture), rtol=0, atol=1e-12)
    assert torch.equal(turned[0], (queries[:1] @ W[1])[0])


def test_one_cluster_at_half_weight_is_half_the_rotation() -> None:
    W, L = make.rotation(4, [2.0, 1.0])[None], make.bivector(4, [2.0, 1.0])[None]
    queries = make.unit_queries(1, 4)
    half = Mixture.from_dense(torch.full((1, 1), 0.5, dtype=torch.float64))

    turned = exp_action(queries, L, half, rotations=W)

    assert torch.allclose(turned, queries @ make.rotation(4, [1.0, 0.5]), rtol=0, atol=1e-6)


@make.quick
@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_scales_blend_geometrically(first: float, second: float) -> None:
    queries, L = make.unit_queries(5, 8), make.bivectors(2, 8)
    mixture = make.mixture(5, 2, entries=2)
    scales = torch.tensor([first, second], dtype=torch.float64)

    scaled = exp_action(queries, L, mixture, log_scales=scales.log())

    lengths = (mixture.dense() @ scales.log()).exp()
    assert torch.allclose(scaled, exp_action(queries, L, mixture) * lengths[:, None])


@pytest.mark.parametrize("radius", [math.pi, 50 * math.pi, 314.16, 1000 * math.pi, 3141.6, 9999.0])
def test_a_large_blend_is_as_exact_as_a_small_one(radius: float) -> None:
    angles = [radius, radius / 3, 1.0]  # just above the edge of a bucket for multiples of pi
    queries = make.unit_queries(3, 6)
    whole = Mixture.from_dense(torch.ones(3, 1, dtype=torch.float64))
    wanted = queries @ make.rotation(6, angles)

    turned = exp_action(queries, make.bivector(6, angles)[None], whole, tolerance=1e-9)

    assert float((turned - wanted).norm(dim=1).max()) <= 1e-9 + 1e-15 * radius**1.5


def test_a_bucket_is_never_smaller_than_its_radius() -> None:
    radii = torch.linspace(0, 100, 5001, dtype=torch.float64).outer(
        torch.tensor([1.0, 1 + 1e-9, 1 + 1e-6], dtype=torch.float64)
    )
    radii = torch.cat([radii.flatten(), math.pi / 64 * torch.arange(1.0, 2000).double()])
    none = Mixture.from_dense(torch.zeros(len(radii), 1))

    planned = chebyshev.plan(none, radii, torch.arange(len(radii)), tolerance=1e-3)

    assert bool((1 / planned.inverse_radii >= radii[planned.order] * (1 - 1e-15)).all())


def test_pi_and_its_rounding_share_a_bucket_and_what_is_out_of_range_is_refused() -> None:
    radii = math.pi * torch.tensor([1.0, 1 + 1e-9, 1 + 2e-6], dtype=torch.float64)
    none = Mixture.from_dense(torch.zeros(3, 1))

    assert set(chebyshev.plan(none, radii, torch.arange(3), tolerance=1e-6).degrees) == {11}
    for bad in (10_001.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="allowed: at most 10000"):
            chebyshev.plan(none, radii * bad, torch.arange(3), tolerance=1e-6)


def test_small_weights_are_dropped_only_within_the_tolerance() -> None:
    weights = torch.tensor([[1.0, 1e-9, 1e-9], [0.9, 0.1, 1e-5]], dtype=torch.float64)
    queries, L = make.unit_queries(2, 16), make.bivectors(3, 16)
    mixture = Mixture.from_dense(weights)

    for tolerance in (1e-3, 1e-6, 1e-12):
        error = exp_action(queries, L, mixture, tolerance=tolerance) - exact(queries, L, mixture)
        assert float(error.norm(dim=1).max()) <= tolerance


def test_same_inputs_give_the_same_bytes() -> None:
    queries, mixture = make.unit_queries(300, 48).float(), make.mixture(300, 6)
    L = make.bivectors(6, 48).float()

    assert sha(exp_action(queries, L, mixture)) == sha(exp_action(queries, L, mixture))


def test_small_workspace_changes_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, L = make.unit_queries(40, 16), make.bivectors(5, 16)
    mixture = make.mixture(40, 5)
    weights = mixture.weights * torch.linspace(0.1, 1, len(mixture.weights), dtype=torch.float64)
    uneven = Mixture(mixture.offsets, mixture.clusters, weights, 5)  # radii all over the place
    whole = exp_action(queries, L, uneven, tolerance=1e-10)

    monkeypatch.setattr(chebyshev, "WORKSPACE_BYTES", 16 * 8 * 30)

    assert torch.allclose(exp_action(queries, L, uneven, tolerance=1e-10), whole, atol=1e-14)
    assert torch.allclose(whole, exact(queries, L, uneven), rtol=0, atol=1e-10)


def test_given_norms_are_used() -> None:
    queries, L, mixture = make.unit_queries(5, 8), make.bivectors(3, 8), make.mixture(5, 3)

    same = exp_action(queries, L, mixture, norms=spectral_norms(L))

    assert torch.equal(same, exp_action(queries, L, mixture))


@pytest.mark.parametrize(
    ("radius", "tolerance", "degree"),
    [(math.pi, 1e-6, 11), (math.pi, 1e-12, 18), (1.2, 1e-6, 7), (1.2, 1e-12, 12), (0.0, 1e-9, 0)],
)
def test_degree_is_the_least_that_meets_the_tolerance(
    radius: float, tolerance: float, degree: int
) -> None:
    assert chebyshev_degree(radius, tolerance) == degree


@make.quick
@given(st.floats(0, 60), st.floats(1e-14, 1))
def test_degree_grows_with_radius_and_shrinks_with_tolerance(
    radius: float, tolerance: float
) -> None:
    degree = chebyshev_degree(radius, tolerance)

    assert chebyshev_degree(radius + 1, tolerance) >= degree
    assert chebyshev_degree(radius, tolerance / 10) >= degree


def test_norms_bound_the_largest_angle_closely() -> None:
    L = make.bivectors(3, 11, largest=2.5)

    norms = spectral_norms(L)

    assert bool((norms >= 2.5 - 1e-12).all())
    assert bool((norms <= 2.5 * (1 + 1e-8)).all())
    assert spectral_norms(L[:0]).shape == (0,)


def test_what_does_not_fit_together_is_refused() -> None:
    queries, L, mixture = make.unit_queries(5, 8), make.bivectors(3, 8), make.mixture(5, 3)

    with pytest.raises(ValueError, match="of width 8"):
        exp_action(queries[:4], L, mixture)
    with pytest.raises(ValueError, match="share a dtype"):
        exp_action(queries, L.float(), mixture)
    with pytest.raises(ValueError, match="tolerance"):
        exp_action(queries, L, mixture, tolerance=0.0)
    with pytest.raises(ValueError, match="must be >= 0"):
        chebyshev_degree(-1.0, 1e-6)
