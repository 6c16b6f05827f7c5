from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from core.rotations.sphere import keep_length, squared_angles, step_along, typical_length, unit
from tests.core.rotations import _make as make


def vectors(rows: int = 7, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 5, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def walk(starts: Tensor, steps: Tensor) -> Tensor:
    return step_along(unit(starts), steps)


def lengths(x: Tensor, like: Tensor) -> Tensor:
    return keep_length(x, like)


@pytest.mark.parametrize("function", [lengths, squared_angles, walk])
def test_the_gradients_by_hand_are_the_gradients(
    function: Callable[[Tensor, Tensor], Tensor],
) -> None:
    inputs = [vectors(seed=seed).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradcheck(unit, inputs[0])
    for index in (0, 1):  # one of both is enough
        given_one = [value if at == index else value.detach() for at, value in enumerate(inputs)]
        assert torch.autograd.gradcheck(function, given_one)


def test_one_length_for_all_rows_has_a_gradient_too() -> None:
    like = torch.full((1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(keep_length, (vectors().requires_grad_(), like))


def test_angles_are_exact_at_both_ends() -> None:
    turns = torch.tensor([0.0, 1e-6, 1e-3, 1.0, math.pi - 1e-3, math.pi], dtype=torch.float64)
    x = torch.stack([turns.cos(), turns.sin()], dim=1)
    y = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(6, 2)
    torch.testing.assert_close(squared_angles(x, y).sqrt(), turns, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-4, 1e-2, 1.0, 3.0])
def test_in_float32_the_gradient_of_an_angle_is_right_to_rounding(angle: float) -> None:
    y = unit(vectors(50))
    sideways = unit(vectors(50, seed=1) - (vectors(50, seed=1) * y).sum(1, keepdim=True) * y)
    exact = (math.cos(angle) * y + math.sin(angle) * sideways).requires_grad_()
    squared_angles(exact, y).sum().backward()
    x = exact.detach().float().requires_grad_()

    squared_angles(x, y.float()).sum().backward()

    assert exact.grad is not None
    assert x.grad is not None
    # Rounding the inputs turns each by 1e-7, the gradient's direction by that over the sine.
    turned = 1 + 2 * angle / math.sin(angle) if angle else 3.0
    assert (x.grad - exact.grad).norm(dim=1).max() < 5e-7 * turned


@pytest.mark.parametrize("angle", [1e-4, 1e-2, 1.0, 3.0])
def test_the_gradient_of_an_angle_pulls_at_no_length(angle: float) -> None:
    y = unit(vectors(50, dtype=torch.float32))
    sideways = unit(vectors(50, seed=1) - (vectors(50, seed=1) * y).sum(1, keepdim=True) * y)
    x = (math.cos(angle) * y + math.sin(angle) * sideways).float().requires_grad_()
    squared_angles(x, y).sum().backward()
    assert x.grad is not None
    along = (x.grad.double() * x.detach()).sum(1) / x.grad.double().norm(dim=1)
    assert along.square().mean().sqrt() < 1e-7


def test_opposite_and_zero_vectors_have_finite_gradients() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 1e-7], [1.0, 2.0]], requires_grad=True)
    y = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    found = squared_angles(x, y)
    torch.testing.assert_close(
        found.sqrt(), torch.tensor([0.0, math.pi, math.pi, math.pi / 2]), rtol=1e-6, atol=0
    )
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert torch.equal(x.grad[0], torch.zeros(2))


def test_zero_rows_stay_zero_with_finite_gradients() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    like = torch.zeros(2, 3, requires_grad=True)
    kept = keep_length(x, like)
    assert torch.equal(kept, torch.zeros(2, 3))
    kept.sum().backward()
    for leaf in (x, like):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))
    leaf = torch.zeros(2, 3, requires_grad=True)
    kept = keep_length(leaf, torch.full((2, 3), 5.0))
    assert torch.equal(kept, torch.zeros(2, 3))
    (5 * kept).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.zeros(2, 3))


@make.quick
@given(seed=st.integers(0, 2**31), size=st.floats(1e-6, 1e6))
def test_lengths_and_directions_come_from_where_they_should(seed: int, size: float) -> None:
    x, like = vectors(seed=seed), size * vectors(seed=seed + 1)
    kept = keep_length(x, like)
    torch.testing.assert_close(kept.norm(dim=1), like.norm(dim=1))
    torch.testing.assert_close(functional.cosine_similarity(kept, x), torch.ones(7).double())
    scaled = squared_angles(size * x, like)
    torch.testing.assert_close(scaled, squared_angles(x, like), rtol=1e-9, atol=1e-15)


def test_half_precision_comes_out_in_the_wider_type() -> None:
    x, like = vectors().bfloat16().requires_grad_(), vectors(seed=1).float()
    kept = keep_length(x, like)
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept.norm(dim=1), like.norm(dim=1))
    kept.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_the_typical_length_is_the_root_of_the_mean_square() -> None:
    rows = vectors(100, dtype=torch.float32)
    wanted = rows.double().square().sum(1).mean().sqrt()
    torch.testing.assert_close(typical_length(rows), wanted)
    assert typical_length(rows[:0]) == 0
