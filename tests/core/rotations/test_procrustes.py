from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.rotations.procrustes import procrustes, procrustes_from_moment
from tests.core.rotations import _make as make


@make.quick
@given(make.angle_lists())
def test_the_rotation_behind_exact_pairs_is_found(case: tuple[int, list[float]]) -> None:
    W, queries = make.rotation(*case), make.unit_queries(40, case[0])
    flip = torch.linalg.slogdet(W).sign

    assert torch.allclose(procrustes(queries, queries @ W), W, rtol=0, atol=1e-9)
    assert float(flip) == 1


@make.quick
@given(st.integers(1, 8), st.integers(0, 999))
def test_no_other_rotation_has_a_larger_trace(width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    moment = torch.randn(width, width, generator=generator, dtype=torch.float64)

    R = procrustes_from_moment(moment)

    best = (R * moment).sum()
    assert float(torch.linalg.slogdet(R).sign) == 1
    assert torch.allclose(R.mT @ R, torch.eye(width, dtype=torch.float64))
    for other in range(4):
        step = 0.1 * make.bivector(width, [1.0] * (width // 2), seed=other)
        assert float((R @ torch.linalg.matrix_exp(step) * moment).sum()) <= float(best) + 1e-12


def test_reflected_pairs_still_give_a_rotation() -> None:
    queries = make.unit_queries(30, 5)
    targets = queries.clone()
    targets[:, 2] *= -1

    R = procrustes(queries, targets)

    assert float(torch.linalg.slogdet(R).sign) == 1


def test_flip_falls_on_the_smallest_singular_direction() -> None:
    R = procrustes_from_moment(torch.diag(torch.tensor([3.0, 0.1, -2.0])))

    assert torch.allclose(R, torch.diag(torch.tensor([1.0, -1.0, -1.0])), atol=1e-6)


def test_batch_is_one_answer_per_moment() -> None:
    moments = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    batch = procrustes_from_moment(moments)

    assert batch.shape == (2, 3, 4, 4)
    assert batch.dtype == torch.float32
    assert torch.allclose(batch[1, 2], procrustes_from_moment(moments[1, 2]), atol=1e-6)


def test_tiny_moments_keep_their_sign() -> None:
    moment = 1e-30 * torch.eye(40, dtype=torch.float64)  # the determinant underflows

    assert torch.allclose(procrustes_from_moment(moment), torch.eye(40, dtype=torch.float64))


def test_strong_anchor_wins_and_fills_what_the_pairs_never_see() -> None:
    queries, anchor = make.unit_queries(3, 12), make.rotation(12, [1.0] * 6)
    targets = queries @ make.rotation(12, [2.0] * 6, seed=4)

    pulled = procrustes(queries, targets, anchor=anchor, strength=1e9)
    gently = procrustes(queries, queries @ anchor, anchor=anchor, strength=1e-3)

    assert torch.allclose(pulled, anchor, atol=1e-6)
    assert torch.allclose(gently, anchor, atol=1e-9)


def test_without_an_anchor_strength_pulls_to_the_identity() -> None:
    queries = make.unit_queries(3, 6)

    R = procrustes(queries, -queries, strength=1e9)

    assert torch.allclose(R, torch.eye(6, dtype=torch.float64), atol=1e-6)


def test_negative_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="strength"):
        procrustes(torch.eye(2), torch.eye(2), strength=-1.0)
