from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import DataInvalid
from core.rotations.logarithm import rotation_log
from core.rotations.scaled import split
from tests.core.rotations import _make as make


@make.quick
@given(make.angle_lists(), st.floats(1e-3, 1e3))
def test_scale_and_rotation_are_told_apart(case: tuple[int, list[float]], scale: float) -> None:
    W = make.rotation(*case).numpy()

    parts = split(scale * W, cluster="a")

    assert parts.scale == pytest.approx(scale, rel=1e-5)
    assert parts.rotation.dtype == np.float64
    assert np.abs(parts.rotation - W).max() <= 1e-12
    assert not parts.reflected
    assert parts.deviation <= 1e-12


@make.quick
@given(st.lists(make.ANGLES.filter(lambda angle: angle < 3.1), min_size=1, max_size=5))
def test_reflection_is_undone_along_its_own_axis(angles: list[float]) -> None:
    W, axis = make.rotation(2 * len(angles) + 1, angles), make.basis(2 * len(angles) + 1)[:, -1]

    parts = split((3 * (W - 2 * torch.outer(axis, axis))).numpy(), cluster="a")

    assert parts.reflected
    assert np.abs(parts.rotation - W.numpy()).max() <= 1e-11
    assert parts.scale == pytest.approx(3)


@make.quick
@given(make.angle_lists().filter(lambda case: case[0] > 1))
def test_reflected_matrix_beside_any_angles_becomes_a_rotation_with_a_log(
    case: tuple[int, list[float]],
) -> None:
    W = make.rotation(*case)
    W[:, 0] *= -1

    parts = split(W.numpy(), cluster="a")
    log = rotation_log(torch.from_numpy(parts.rotation))

    assert np.linalg.slogdet(parts.rotation)[0] == 1
    assert float(log.residuals[0]) <= 1e-13
    assert np.linalg.matrix_rank(parts.rotation - W.numpy(), tol=1e-6) == 1


def test_what_is_a_thousandth_off_is_polished_and_more_is_refused() -> None:
    W = make.rotation(8, [0.5, 1.0, 2.0, 3.0]).numpy()
    stretched = W.copy()
    stretched[0] *= 1 + 5e-4

    rotation = split(stretched, cluster="a").rotation

    assert np.abs(rotation @ rotation.T - np.eye(8)).max() <= 1e-12
    stretched[0] *= 1.01
    with pytest.raises(DataInvalid, match="cluster a: W is not a scaled rotation"):
        split(stretched, cluster="a")
    with pytest.raises(DataInvalid, match="cluster a: W_stack holds NaN, infinity, only zeros"):
        split(np.zeros((3, 3)), cluster="a")
