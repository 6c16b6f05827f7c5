"""Small LDA models for the tests of their files and of their formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from core.tensors.lda import LDA, Mode
from core.tensors.shards import Array

HEADS, DIM, WIDTH, ROWS = 4, 6, 5, 11


def some_lda(mode: Mode = "answers", **changes: Any) -> LDA:
    """Four heads, eleven questions of six numbers, answers of five; unit lengths nowhere."""
    random = np.random.default_rng(3)

    def drawn(*shape: int) -> Array:
        array: Array = random.normal(size=shape).astype(np.float32)
        return array

    model = LDA(
        centroids=drawn(HEADS, DIM),
        answers=drawn(HEADS, WIDTH) if mode == "answers" else None,
        maps=drawn(HEADS, DIM, WIDTH) if mode == "maps" else None,
        queries=drawn(ROWS, DIM),
        targets=drawn(ROWS, WIDTH),
        cluster_of=np.arange(ROWS) % 3,
        cluster_ids=["csv", "xml", "größer", "never asked"],
        train_rows=np.delete(np.arange(ROWS + 2), [4, 7]),
        held_out_rows=np.array([4, 7]),
        manifest={"temperature": 0.03, "split": "query", "seed": 1},
    )
    return replace(model, **changes)


ARRAYS = ("centroids", "answers", "maps", "queries", "targets", "cluster_of")


def same_arrays(one: LDA, other: LDA) -> None:
    """Assert that both hold the same numbers, bit for bit."""
    for name in ARRAYS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert one.cluster_ids == other.cluster_ids
    assert one.temperature == other.temperature
