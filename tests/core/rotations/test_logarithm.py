from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.linalg import expm, logm

from core.rotations.action import spectral_norms
from core.rotations.logarithm import _residual, log_residuals, rotation_log
from core.rotations.skew import from_planes
from tests.core.rotations import _make as make


@make.quick
@given(make.angle_lists())
def test_exp_of_the_log_is_the_rotation(case: tuple[int, list[float]]) -> None:
    W = make.rotation(*case)

    log = rotation_log(W)

    L = log.bivectors[0]
    assert torch.equal(L, -L.mT)
    assert np.abs(expm(L.numpy()) - W.numpy()).max() <= 1e-12
    assert float(log.residuals[0]) <= 1e-13


@make.quick
@given(make.angle_lists())
def test_no_angle_of_the_log_exceeds_pi_and_the_norm_is_the_largest(
    case: tuple[int, list[float]],
) -> None:
    log = rotation_log(make.rotation(*case))

    largest = float(torch.linalg.matrix_norm(log.bivectors[0], 2))
    assert largest <= math.pi + 1e-12
    assert largest == pytest.approx(max(case[1], default=0.0), abs=1e-13, rel=1e-7)
    assert largest - 1e-14 <= float(log.norms[0]) <= max(2.5 * largest, 1e-13)


def test_log_agrees_with_scipy_below_pi() -> None:
    W = make.rotation(9, [0.3, 1.0, 2.0, 3.0])

    assert np.allclose(rotation_log(W).bivectors[0].numpy(), logm(W.numpy()).real, atol=1e-12)


@pytest.mark.parametrize("repeats", [1, 2, 7, 16])
def test_repeated_pi_leads_back(repeats: int) -> None:
    angles = [math.pi] * repeats + torch.linspace(0.1, 3.1, 16 - repeats).tolist()
    W = make.rotation(33, angles)

    log = rotation_log(W)

    assert np.abs(expm(log.bivectors[0].numpy()) - W.numpy()).max() <= 1e-12
    assert float(log.norms[0]) == pytest.approx(math.pi, rel=2e-9)


def test_planes_at_the_border_of_near_pi_stay_whole() -> None:
    border = math.acos(-0.98)
    angles = [border + shift for shift in (0.0, 0.0, 1e-12, -1e-12, 1e-9, 1e-5, -1e-5, 0.0)]

    log = rotation_log(make.rotation(16, angles))

    assert float(log.residuals[0]) <= 1e-13


def test_float32_rotation_gives_a_float32_log_of_the_nearest_rotation() -> None:
    W = make.rotation(24, torch.linspace(0, math.pi, 12).tolist()).float()

    log = rotation_log(W)

    assert log.bivectors.dtype == torch.float32
    assert float(log.residuals[0]) <= 1e-6
    assert np.abs(expm(log.bivectors[0].double().numpy()) - W.double().numpy()).max() <= 2e-6


def test_batch_holds_one_log_per_rotation() -> None:
    W = torch.stack([make.rotation(6, [angle, 1.0, 0.0]) for angle in (0.5, math.pi)])

    batch = rotation_log(W)

    for index in range(2):
        assert torch.equal(batch.bivectors[index], rotation_log(W[index]).bivectors[0])
    assert rotation_log(W[:0]).bivectors.shape == (0, 6, 6)


@pytest.mark.parametrize("angles", [[1.0, 2.0], [math.pi, math.pi]])
def test_reflection_has_no_log(angles: list[float]) -> None:
    W = make.rotation(5, angles)
    axis = make.basis(5)[:, 4]

    with pytest.raises(ValueError, match="determinant is -1"):
        rotation_log(W - 2 * torch.outer(axis, axis))


def test_matrix_far_from_orthogonal_has_no_log() -> None:
    with pytest.raises(ValueError, match="not orthogonal"):
        rotation_log(2 * torch.eye(3))


@pytest.mark.parametrize("size", [1e-12, 1e-8, 1e-3, 1.0])
@pytest.mark.parametrize("planes", [1, 24])
def test_residual_tells_how_wrong_a_logarithm_is(size: float, planes: int) -> None:
    """Whether the error sits in one plane or in all, and also where L is far too long."""
    d = 48
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=_draws(3)))[0]
    angles = torch.linspace(0.1, 3.0, d // 2, dtype=torch.float64)
    right, wrong = (
        from_planes(basis, angles + shift * (torch.arange(d // 2) < planes))
        for shift in (0.0, size)
    )
    rotation = torch.linalg.matrix_exp(right)
    exact = torch.linalg.norm(torch.linalg.matrix_exp(wrong) - rotation) / math.sqrt(d)

    found = _residual(wrong, rotation, radius=4.0)

    assert float(found) == pytest.approx(float(exact), rel=0.5, abs=1e-14)
    assert float(_residual(wrong + 9 * wrong, rotation, radius=4.0)) > 1


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_the_residual_of_a_foreign_logarithm_is_its_error(seed: int) -> None:
    L = make.bivector(40, [0.3 + 0.05 * plane for plane in range(20)])
    off = make.bivector(40, [1e-3] * 20, seed=5)
    stack = torch.stack([L, L + off])
    W = torch.stack([torch.from_numpy(expm(L.numpy()))] * 2)

    found = log_residuals(stack, W, spectral_norms(stack), seed=seed)

    error = np.linalg.norm(expm((L + off).numpy()) - W[1].numpy()) / math.sqrt(40)
    assert float(found[0]) <= 1e-13
    assert float(found[1]) == pytest.approx(error, rel=0.4)
    assert torch.equal(found, log_residuals(stack, W, spectral_norms(stack), seed=seed))
