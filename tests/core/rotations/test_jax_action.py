from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.rotations import chebyshev
from core.rotations.action import exp_action
from core.rotations.mixture import Mixture
from tests.core._jax import require_jax
from tests.core.rotations import _make as make
from tests.core.rotations.test_action import exact, sha

require_jax(module=True)

from core.rotations import jax_action  # noqa: E402 - JAX may be missing
from core.rotations.jax_action import JaxSeries, Tiles  # noqa: E402

on_jax = JaxSeries()


def uneven(count: int, clusters: int, *, seed: int = 0) -> Mixture:
    """Weights that make radii, and so degrees, of all sizes; one query without any."""
    mixture = make.mixture(count, clusters, seed=seed)
    shares = torch.linspace(0, 1, len(mixture.weights), dtype=torch.float64)
    return Mixture(mixture.offsets, mixture.clusters, mixture.weights * shares, clusters)


def gap(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).norm(dim=1).max())


@pytest.mark.parametrize("at_once", [None, 8])
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_torchs_and_the_float64_exponentials(seed: int, at_once: int | None) -> None:
    queries, L = make.unit_queries(90, 24), make.bivectors(7, 24)
    mixture, series = uneven(90, 7, seed=seed), JaxSeries(tiles_at_once=at_once)

    narrow = exp_action(queries.float(), L.float(), mixture, series=series)
    wide = exp_action(queries, L, mixture, tolerance=1e-12, series=series)

    assert gap(narrow, exp_action(queries.float(), L.float(), mixture)) <= 1e-6
    assert gap(narrow, exact(queries, L, mixture)) <= 2e-6
    assert gap(wide, exact(queries, L, mixture)) <= 2e-12
    assert wide.dtype == torch.float64


@make.quick
@given(st.integers(1, 70), st.integers(1, 6), st.integers(1, 3))
def test_any_number_of_queries_and_clusters_fits(count: int, clusters: int, most: int) -> None:
    queries, L = make.unit_queries(count, 6).float(), make.bivectors(clusters, 6).float()
    mixture = make.mixture(count, clusters, entries=min(most, clusters), seed=count)

    assert gap(exp_action(queries, L, mixture, series=on_jax), exact(queries, L, mixture)) <= 2e-6


def test_length_is_kept_at_half_turns() -> None:
    queries, L = make.unit_queries(200, 32).float(), make.bivectors(5, 32).float()

    turned = exp_action(queries, L, make.mixture(200, 5), series=on_jax)

    assert float((turned.double().norm(dim=1) - 1).abs().max()) <= 1e-6


def test_a_query_that_is_done_stays_finite_beside_a_long_one() -> None:
    angles = torch.tensor([3000.0, 1.0, 0.5], dtype=torch.float64)
    L = torch.stack([make.bivector(6, (angles * size).tolist()) for size in (1.0, 1e-5)])
    queries = make.unit_queries(2, 6)
    mixture = Mixture.from_dense(torch.eye(2, dtype=torch.float64))

    turned = exp_action(queries, L, mixture, tolerance=1e-9, series=on_jax)

    torch.testing.assert_close(turned, exp_action(queries, L, mixture, tolerance=1e-9))


def test_jax_gives_the_same_bytes_twice() -> None:
    queries, L = make.unit_queries(300, 48).float(), make.bivectors(6, 48).float()
    mixture = uneven(300, 6)

    first = sha(exp_action(queries, L, mixture, series=on_jax))

    assert first == sha(exp_action(queries, L, mixture, series=on_jax))
    assert first == sha(exp_action(queries, L.clone(), mixture, series=JaxSeries()))


def test_other_bivectors_are_not_taken_for_the_last_ones() -> None:
    queries, mixture, series = make.unit_queries(9, 8), make.mixture(9, 3), JaxSeries()
    first, second = make.bivectors(3, 8), make.bivectors(3, 8, largest=1.0)

    for L in (first, second, first):
        assert (
            gap(exp_action(queries, L, mixture, series=series), exact(queries, L, mixture)) < 2e-6
        )


def test_blocks_of_all_lengths_share_few_sizes() -> None:
    like = torch.zeros(2000, 8)
    sizes = set()
    for count in range(1, 2000, 37):
        mixture = make.mixture(count, 9, seed=count)
        radii = mixture.radii(torch.full((9,), math.pi, dtype=torch.float64))
        planned = chebyshev.plan(mixture, radii, torch.arange(count), tolerance=1e-6)
        sizes.add(Tiles.of(planned, slice(0, count), like, at_once=1).size)

    assert len({rows for rows, *_ in sizes}) == 6  # 64 ... 2048
    assert {entries for _, entries, *_ in sizes} == {4}
    assert {degree for *_, degree in sizes} == {16}
    assert len(sizes) <= 6 * len(jax_action.TILE_ROWS)


def test_tiles_that_no_query_needs_any_more_are_not_multiplied() -> None:
    mixture = Mixture.from_dense(torch.eye(40, dtype=torch.float64))
    radii = torch.linspace(0.01, math.pi, 40, dtype=torch.float64)
    planned = chebyshev.plan(mixture, radii, torch.arange(40), tolerance=1e-6)

    batches = Tiles.of(planned, slice(0, 40), torch.zeros(40, 4), at_once=1).layout.batches

    needed = [sum(degree >= k for degree in planned.degrees) for k in range(1, len(batches) + 1)]
    assert batches.tolist() == needed
    assert needed[0] == 40
    assert needed[-1] == 0


def test_small_workspace_changes_only_rounding_on_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, L, mixture = make.unit_queries(300, 16), make.bivectors(5, 16), uneven(300, 5)
    whole = exp_action(queries, L, mixture, tolerance=1e-10, series=on_jax)

    monkeypatch.setattr(jax_action, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(jax_action, "MOST_ROWS", 128)

    parts = exp_action(queries, L, mixture, tolerance=1e-10, series=on_jax)
    assert torch.allclose(parts, whole, rtol=0, atol=1e-14)


def test_what_cannot_be_on_jax_is_refused() -> None:
    with pytest.raises(ValueError, match="tiles_at_once 0; allowed: from 1 up"):
        JaxSeries(tiles_at_once=0)
