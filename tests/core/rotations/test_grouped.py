from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.rotations import grouped
from core.rotations.action import exp_action
from core.rotations.chebyshev import run_block
from core.rotations.grouped import FULL, GroupedStep, cut_groups
from core.rotations.mixture import Mixture
from tests.core.rotations import _make as make

together = partial(run_block, grouped=True)


@make.quick
@given(st.lists(st.integers(0, 500), max_size=60), st.integers(1, 9))
def test_every_cluster_with_rows_is_in_one_group_that_is_nearly_full(
    counts: list[int], most: int
) -> None:
    groups = cut_groups(counts, most=most)

    members = [cluster for clusters, _ in groups for cluster in clusters]
    assert sorted(members) == [c for c, count in enumerate(counts) if count]
    for clusters, rows in groups:
        assert len(clusters) <= most
        assert max(counts[c] for c in clusters) == rows
        assert min(counts[c] for c in clusters) >= FULL * rows


@make.quick
@given(st.integers(1, 80), st.integers(1, 9), st.integers(0, 9))
def test_clusters_multiplied_together_give_what_one_by_one_gives(
    count: int, clusters: int, seed: int
) -> None:
    queries, L = make.unit_queries(count, 10), make.bivectors(clusters, 10)
    mixture = make.mixture(count, clusters, entries=min(3, clusters), seed=seed)

    for dtype, apart in ((torch.float64, 1e-14), (torch.float32, 5e-7)):
        asked = queries.to(dtype), L.to(dtype), mixture
        gap = exp_action(*asked, series=together) - exp_action(*asked)
        assert float(gap.norm(dim=1).max()) <= apart


def test_a_popular_cluster_does_not_pad_the_others() -> None:
    clusters = torch.tensor([0] * 100 + [1, 2, 3, 3])
    mixture = Mixture(torch.arange(105), clusters, torch.ones(104), 4)

    step = GroupedStep.of(mixture, torch.ones(104, dtype=torch.float64), torch.zeros(104, 2))

    assert [(g.clusters.tolist(), g.rows) for g in step.groups] == [
        ([0], 100),
        ([3], 2),
        ([1, 2], 1),
    ]
    assert len(step.products) == 104


def test_copied_bivectors_stay_within_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, L, mixture = make.unit_queries(40, 8), make.bivectors(6, 8), make.mixture(40, 6)
    whole = exp_action(queries, L, mixture, series=together)

    monkeypatch.setattr(grouped, "GATHER_BYTES", 2 * 8 * 8 * 8)

    step = GroupedStep.of(mixture, torch.ones(40, dtype=torch.float64), queries)
    assert max(len(group.clusters) for group in step.groups) <= 2
    gap = exp_action(queries, L, mixture, series=together) - whole
    assert float(gap.abs().max()) <= 1e-14


def test_on_a_cpu_clusters_go_one_by_one_unless_told() -> None:
    queries, L, mixture = make.unit_queries(40, 8), make.bivectors(6, 8), make.mixture(40, 6)
    alone = exp_action(queries, L, mixture, series=partial(run_block, grouped=False))

    assert torch.equal(exp_action(queries, L, mixture), alone)


def test_grouped_products_give_the_same_bytes_twice() -> None:
    queries, L = make.unit_queries(300, 48).float(), make.bivectors(6, 48).float()
    mixture = make.mixture(300, 6)

    first = exp_action(queries, L, mixture, series=together)

    assert torch.equal(first, exp_action(queries, L, mixture, series=together))
