from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.transport.polar import deviation, polar, steady_signs
from tests.core.transport.moments_of import orthogonal

F64 = torch.float64
sizes = st.tuples(st.integers(1, 6), st.integers(0, 4), st.integers(0, 10_000))


def _noise(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=F64)


@settings(deadline=None, max_examples=40)
@given(sizes)
def test_factor_is_orthogonal_and_no_other_one_gains_more(case: tuple[int, int, int]) -> None:
    m, more, seed = case
    n = m + more
    M = _noise(m, n, seed)

    found = polar(M, torch.eye(m, n, dtype=F64))

    assert deviation(found.factor @ found.factor.mT) < 1e-12
    best = float((found.factor * M).sum())
    assert best == pytest.approx(float(torch.linalg.svdvals(M).sum()))
    for other in range(5):
        rival = orthogonal(n, seed=seed + other)[:m]
        assert float((rival * M).sum()) <= best + 1e-9


@settings(deadline=None, max_examples=30)
@given(sizes)
def test_free_directions_follow_the_prior(case: tuple[int, int, int]) -> None:
    m, more, seed = case
    n = m + more
    prior = orthogonal(n, seed=seed)[:m]

    found = polar(torch.zeros(m, n, dtype=F64), prior)

    torch.testing.assert_close(found.factor, prior, rtol=0, atol=1e-10)
    assert found.values.tolist() == [0.0] * m


def test_what_the_moment_says_is_kept_and_the_rest_stays_unturned() -> None:
    turn = orthogonal(2, seed=3)
    M = torch.zeros(5, 5, dtype=F64)
    M[:2, :2] = turn * 4

    found = polar(M, torch.eye(5, dtype=F64)).factor

    torch.testing.assert_close(found, torch.block_diag(turn, torch.eye(3, dtype=F64)))


def test_a_wide_factor_without_information_prefers_the_prior_over_all_columns() -> None:
    M = torch.zeros(2, 4, dtype=F64)
    M[0, 3] = 1.0
    prior = torch.eye(2, 4, dtype=F64)

    found = polar(M, prior).factor

    expected = torch.tensor([[0, 0, 0, 1.0], [0, 1.0, 0, 0]], dtype=F64)
    torch.testing.assert_close(found, expected)


def test_flipping_costs_what_it_says_and_changes_the_determinant() -> None:
    M = _noise(5, 5, 1)
    found = polar(M, torch.eye(5, dtype=F64))
    other = found.flipped()

    assert torch.linalg.det(found.factor) * torch.linalg.det(other.factor) == pytest.approx(-1)
    lost = float(((found.factor - other.factor) * M).sum())
    assert lost == pytest.approx(found.flip_cost)


def test_empty_moment_has_an_empty_factor_that_cannot_be_flipped() -> None:
    found = polar(torch.zeros(0, 3, dtype=F64), torch.zeros(0, 3, dtype=F64))

    assert found.factor.shape == (0, 3)
    assert found.flip_cost == float("inf")
    assert deviation(found.factor @ found.factor.mT) == 0.0


def test_signs_are_those_of_the_largest_entry() -> None:
    columns = torch.tensor([[1.0, -3.0, 0.0, -2.0], [-2.0, 1.0, 0.0, 2.0]], dtype=F64)

    found = steady_signs(columns)

    assert found.tolist() == [[-1.0, 3.0, 0.0, 2.0], [2.0, -1.0, 0.0, -2.0]]
    assert torch.equal(steady_signs(-columns)[:, [0, 1, 3]], found[:, [0, 1, 3]])
    assert steady_signs(torch.zeros(3, 0)).shape == (3, 0)
