from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench._tiny_models import tiny_model
from core.architectures.shape import ModelShape
from core.errors import DataInvalid
from core.transport.moments import HeadMoments, NeuronMoments
from core.transport.permutations import check, identity
from core.transport.permute import (
    LayerSums,
    correlations,
    match,
    match_heads,
    match_layer,
    match_neurons,
    resemblance,
)

F64 = torch.float64


def _sums(x: torch.Tensor, y: torch.Tensor) -> NeuronMoments:
    n = torch.tensor(float(len(x)), dtype=F64)
    return NeuronMoments(n, x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), x.mT @ y)


def _head_sums(x: torch.Tensor, y: torch.Tensor) -> HeadMoments:
    """x [H_s, n], y [H_t, n]: maps laid flat."""
    return HeadMoments((x * x).sum(1), (y * y).sum(1), x @ y.mT)


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _shape(**sizes: Any) -> ModelShape:
    return ModelShape.of(tiny_model(**sizes).config.to_dict())


def test_correlations_are_those_of_the_columns() -> None:
    x, y = _noise(40, 3, seed=1) + 2, _noise(40, 4, seed=2) - 1

    found = correlations(_sums(x, y))

    torch.testing.assert_close(found, torch.corrcoef(torch.cat([x, y], 1).mT)[:3, 3:])


def test_a_neuron_that_never_changes_resembles_none() -> None:
    x, y = _noise(40, 3, seed=1), _noise(40, 3, seed=2)
    x[:, 1] = 0.1
    y[:, 2] = 0.0

    found = correlations(_sums(x, y))

    assert bool(found.isfinite().all())
    assert bool((found[1] == 0).all())
    assert bool((found[:, 2] == 0).all())


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(9)), st.integers(0, 1000))
def test_a_planted_order_of_neurons_is_recovered(order: list[int], seed: int) -> None:
    x = _noise(200, 9, seed=seed)
    y = x[:, order] + 0.3 * _noise(200, 9, seed=seed + 1)

    assert match_neurons(_sums(x, y)) == tuple(order)


def test_the_sign_of_a_correlation_counts() -> None:
    x = _noise(100, 2, seed=1)
    y = torch.stack([-x[:, 0], 0.1 * x[:, 1] + _noise(100, seed=5)], dim=1)

    assert match_neurons(_sums(x, y)) == (1, 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_no_order_has_a_larger_sum(n: int, seed: int) -> None:
    similarity = _noise(n, n, seed=seed)

    order = match(similarity)

    best = max(
        sum(float(similarity[at, place]) for place, at in enumerate(rival))
        for rival in itertools.permutations(range(n))
    )
    assert sum(float(similarity[at, place]) for place, at in enumerate(order)) == pytest.approx(
        best
    )


def test_equal_choices_move_nothing() -> None:
    assert match(torch.zeros(5, 5)) == (0, 1, 2, 3, 4)
    assert match_heads(torch.ones(4, 4), 2) == ((0, 1), (0, 1, 2, 3))


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(3)), st.integers(0, 1000), st.data())
def test_planted_groups_and_heads_inside_them_are_recovered(
    groups: list[int], seed: int, data: st.DataObject
) -> None:
    inner = [data.draw(st.permutations(range(2))) for _ in groups]
    heads = [group * 2 + at for group, order in zip(groups, inner, strict=True) for at in order]
    similarity = _noise(6, 6, seed=seed).abs() * 0.1
    for place, head in enumerate(heads):
        similarity[head, place] = 1.0

    assert match_heads(similarity, 3) == (tuple(groups), tuple(heads))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_no_order_that_keeps_groups_together_has_a_larger_sum(seed: int) -> None:
    similarity = _noise(6, 6, seed=seed)

    groups, heads = match_heads(similarity, 3)

    def total(order: tuple[int, ...]) -> float:
        return sum(float(similarity[at, place]) for place, at in enumerate(order))

    rivals = [
        tuple(group * 2 + at for group, turn in zip(each, turns, strict=True) for at in turn)
        for each in itertools.permutations(range(3))
        for turns in itertools.product([(0, 1), (1, 0)], repeat=3)
    ]
    assert total(heads) == pytest.approx(max(map(total, rivals)))
    assert all(head // 2 == groups[place // 2] for place, head in enumerate(heads))


def test_resemblance_is_the_cosine_of_maps() -> None:
    x, y = _noise(3, 50, seed=1), _noise(4, 50, seed=2)
    y[1] = 0

    found = resemblance(_head_sums(x, y))

    expected = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    torch.testing.assert_close(found, expected)
    assert bool((found[:, 1] == 0).all())


def test_a_layer_is_matched_and_tells_what_it_gained() -> None:
    shape = _shape()  # 4 heads in 2 groups, 48 neurons
    neurons = torch.randperm(48, generator=torch.Generator().manual_seed(1)).tolist()
    heads = [3, 2, 0, 1]
    x, maps = _noise(300, 48, seed=1), _noise(4, 100, seed=2).abs()
    sums = LayerSums(_sums(x, x[:, neurons]), _head_sums(maps, maps[heads]))

    found, told = match_layer(1, sums, student=shape, teacher=shape)

    assert (found.layer, found.kv_heads, found.heads) == (1, (1, 0), tuple(heads))
    assert found.neurons == tuple(neurons)
    check(found, shape)
    assert told["layer"] == 1
    assert told["neurons"]["after"] == pytest.approx(1)
    assert told["neurons"]["before"] < 0.2
    assert told["heads"]["after"] == pytest.approx(1)
    assert told["heads"]["moved"] == 4
    assert (told["heads"]["hurt"], told["neurons"]["hurt"]) == (False, False)


def test_held_out_sums_show_an_order_that_hurts() -> None:
    shape = _shape(intermediate_size=3)
    x, y = _noise(4, 3, seed=1), _noise(4, 3, seed=2)
    other = _noise(500, 3, seed=3)
    held_out = LayerSums(_sums(other, other + 0.1 * _noise(500, 3, seed=4)))

    found, told = match_layer(
        0, LayerSums(_sums(x, y)), student=shape, teacher=shape, held_out=held_out
    )

    assert found.neurons != (0, 1, 2)
    shown = told["neurons"]
    assert shown["after"] > shown["before"]
    assert shown["held_out_after"] < shown["held_out_before"]
    assert shown["hurt"] is True


def test_uneven_counts_are_skipped_with_a_reason() -> None:
    student = _shape()
    teacher = replace(student, neurons=64, kv_heads=4)
    sums = LayerSums(
        _sums(_noise(9, 48), _noise(9, 64)), _head_sums(_noise(4, 9), _noise(4, 9, seed=1))
    )

    found, told = match_layer(0, sums, student=student, teacher=teacher)

    assert found == replace(identity(0, student), kv_heads=None, heads=None, neurons=None)
    assert told["neurons"]["skipped"].startswith("the student has 48 neurons, the teacher 64")
    assert "2 KV heads, the teacher 4" in told["heads"]["skipped"]


def test_what_was_not_kept_is_left_as_it_is() -> None:
    shape = _shape()

    found, told = match_layer(2, LayerSums(), student=shape, teacher=shape)

    assert (found.kv_heads, found.heads, found.neurons) == (None, None, None)
    assert told["neurons"]["skipped"] == told["heads"]["skipped"] == "no statistics were kept"


def test_broken_sums_are_refused() -> None:
    good = _sums(_noise(9, 3), _noise(9, 3))

    for broken, said in [
        (replace(good, xy=good.xy[:2]), "do not fit"),
        (replace(good, xx=good.xx / 0), "not finite"),
        (replace(good, n=torch.tensor(0.0)), "no token counts"),
    ]:
        with pytest.raises(DataInvalid, match=said):
            correlations(broken)
    maps = _head_sums(_noise(4, 9), _noise(4, 9))
    with pytest.raises(DataInvalid, match="do not fit"):
        resemblance(replace(maps, xx=maps.xx[:2]))
    with pytest.raises(DataInvalid, match="not finite"):
        resemblance(replace(maps, yy=maps.yy * float("nan")))
