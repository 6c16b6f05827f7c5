from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge
from torch import Tensor

from core.distill.nulls import STRENGTHS, fit_ridge, mean_vector
from core.errors import DataInvalid
from tests.core.distill._lda import drawn


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_ridge_is_sklearns_at_the_chosen_strength(n: int, d: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)) + 3, rng.normal(size=(n, m)) - 2
    ridge = fit_ridge(torch.from_numpy(x), torch.from_numpy(y))
    size = np.trace(np.cov(x.T, bias=True).reshape(d, d)) / d
    other = SklearnRidge(alpha=n * ridge.strength * size).fit(x, y)
    wanted = other.predict(x).reshape(n, m)
    assert ridge.strength in STRENGTHS
    assert np.abs(ridge(torch.from_numpy(x)).numpy() - wanted).max() < 1e-6


def test_ridge_finds_a_linear_map_and_shrinks_noise() -> None:
    x, maps = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), drawn(8, 3, seed=1)
    assert torch.allclose(fit_ridge(x, x @ maps + 5)(x), (x @ maps + 5).double(), atol=1e-4)
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    assert fit_ridge(x, noise).strength > fit_ridge(x, x @ maps).strength


def test_ridge_of_one_row_is_the_mean_vector() -> None:
    x, y = drawn(1, 5, seed=0), drawn(1, 4, seed=1)
    assert torch.allclose(fit_ridge(x, y)(drawn(3, 5, seed=2)), mean_vector(y).expand(3, -1))
    same = x.expand(9, -1)
    assert torch.allclose(fit_ridge(same, y.expand(9, -1))(same), y.double().expand(9, -1))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(0, 3), torch.zeros(0, 2)),
        (torch.zeros(4, 3), torch.zeros(3, 2)),
        (torch.zeros(4), torch.zeros(4, 2)),
        (torch.full((4, 3), float("nan")), torch.zeros(4, 2)),
    ],
)
def test_ridge_refuses_what_it_cannot_fit(x: Tensor, y: Tensor) -> None:
    with pytest.raises(DataInvalid, match="ridge"):
        fit_ridge(x, y)
