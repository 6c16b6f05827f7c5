from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.rotations.mixture import Mixture, segment_sums
from tests.core.rotations import _make as make


@st.composite
def topk(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    query_count, neighbours, clusters = (
        draw(st.integers(0, 6)),
        draw(st.integers(1, 8)),
        draw(st.integers(1, 5)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = (query_count, neighbours)
    numbers = torch.randint(0, clusters, shape, generator=generator)
    return numbers, torch.rand(shape, generator=generator, dtype=torch.float64), clusters


@make.quick
@given(topk())
def test_neighbours_of_one_cluster_are_merged(
    case: tuple[torch.Tensor, torch.Tensor, int],
) -> None:
    numbers, weights, cluster_count = case

    mixture = Mixture.from_topk(numbers, weights, cluster_count)

    expected = torch.zeros(len(numbers), cluster_count, dtype=torch.float64)
    expected.scatter_add_(1, numbers, weights)
    assert torch.allclose(mixture.dense(), expected)
    pairs = mixture.queries * cluster_count + mixture.clusters
    assert len(pairs.unique()) == len(pairs)


@make.quick
@given(topk(), st.integers(0, 99))
def test_rows_are_the_rows_of_the_dense_weights(
    case: tuple[torch.Tensor, torch.Tensor, int], seed: int
) -> None:
    mixture = Mixture.from_topk(*case)
    order = torch.randperm(mixture.query_count, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(mixture.rows(order).dense(), mixture.dense()[order])
    assert torch.equal(mixture.rows(slice(1, 3)).dense(), mixture.dense()[1:3])


@make.quick
@given(topk())
def test_dense_and_sparse_say_the_same(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    dense = Mixture.from_topk(*case).dense()
    values = torch.arange(case[2]) + 1.0

    again = Mixture.from_dense(dense)

    assert torch.equal(again.dense(), dense)
    assert torch.allclose(again.sums(values), dense @ values.double())
    assert torch.allclose(again.radii(values), dense @ values.double())
    assert torch.equal(again.kept(again.clusters > 0).dense()[:, 1:], dense[:, 1:])


def test_query_without_a_cluster_has_an_empty_row() -> None:
    mixture = Mixture.from_dense(torch.tensor([[0.0, 0.0], [0.25, 0.75]]))

    assert mixture.lengths.tolist() == [0, 2]
    assert mixture.sums(torch.ones(2)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("number", [-1, 3])
def test_cluster_out_of_range_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="cluster numbers"):
        Mixture.from_topk(torch.tensor([[number]]), torch.ones(1, 1), 3)


def test_neighbours_and_weights_must_agree() -> None:
    with pytest.raises(ValueError, match="must agree"):
        Mixture.from_topk(torch.zeros(2, 3), torch.ones(2, 4), 3)


def test_sum_of_no_segments_is_empty() -> None:
    assert segment_sums(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
