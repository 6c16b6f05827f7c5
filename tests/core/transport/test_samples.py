"""Rows that layers are compared by."""

from __future__ import annotations

import pytest
import torch

from bench._tiny_models import tiny_model
from core.errors import DataInvalid
from core.transport.samples import sample_layers
from tests.core.transport.readings import MERGES, captured, paired


def silent(_: float, __: float) -> None:
    pass


def test_sampled_rows_are_paired_like_those_that_are_summed() -> None:
    student, teacher = tiny_model(), tiny_model("qwen2", seed=1, num_hidden_layers=5)
    pairs = paired(teacher=MERGES)
    layer_map = (0, 2, 4)

    ours, theirs = sample_layers(
        student, teacher, pairs, rows=10_000, batch_tokens=64, report=silent
    )

    assert (list(ours), list(theirs)) == ([0, 1, 2], [0, 1, 2, 3, 4])
    sums = captured(student, teacher, pairs, layer_map=layer_map).sites
    for layer, beside in enumerate(layer_map):
        product = ours[layer].double().mT @ theirs[beside].double()
        torch.testing.assert_close(product, sums[f"attention.{layer}"].xy, rtol=1e-4, atol=1e-3)


def test_no_more_rows_are_taken_than_asked_for() -> None:
    model = tiny_model()

    ours, theirs = sample_layers(model, model, paired(), rows=30, batch_tokens=64, report=silent)

    assert {len(rows) for rows in [*ours.values(), *theirs.values()]} == {30}
    assert torch.equal(ours[2], theirs[2])


def test_one_row_compares_nothing() -> None:
    model = tiny_model()

    with pytest.raises(DataInvalid, match="fewer than 2"):
        sample_layers(model, model, paired(texts=["a"]), rows=30, batch_tokens=64, report=silent)
