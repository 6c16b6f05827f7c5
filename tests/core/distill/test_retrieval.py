"""Searching targets: what counts as found, and how much memory it takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import log_softmax

from core.distill import retrieval
from core.distill.retrieval import SHARPNESS, Index
from core.errors import DataInvalid
from core.tensors.shards import Array


def normal(rows: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize(
    "search",
    [
        lambda index, answers, rows: index.ranks(answers, rows),
        lambda index, answers, rows: index.log_score(answers, rows),
        lambda index, answers, rows: index.cosine(answers, rows),
        lambda index, answers, _: index.nearest(answers, 2),
    ],
    ids=["ranks", "log_score", "cosine", "nearest"],
)
def test_an_answer_without_direction_is_refused_by_its_row(
    search: Callable[[Index, Array, Array], object], bad: float
) -> None:
    targets, answers = normal(9, 4), normal(9, 4, seed=1)
    answers[7] = bad
    with pytest.raises(DataInvalid, match="answers: row 7 holds NaN, infinity or only zeros"):
        search(Index(targets), answers, np.arange(9))


def test_a_target_without_direction_is_refused() -> None:
    targets = normal(9, 4)
    targets[3] = 0
    with pytest.raises(DataInvalid, match="targets: row"):
        Index(targets)


def test_a_score_that_compares_with_nothing_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(normal(9, 4))
    scores = np.full((2, 9), np.nan, dtype=np.float32)
    monkeypatch.setattr(Index, "_blocks", lambda *_: iter([(scores, np.zeros(2, np.int64))]))
    assert index.ranks(normal(2, 4), np.zeros(2, np.int64)).min() > 0


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, answers, rows = normal(40, 8), normal(30, 8, seed=1), np.arange(30)
    index = Index(targets)
    ranks, score, near = index.ranks(answers, rows), index.log_score(answers, rows), index.nearest
    nearest = np.sort(near(answers, 5), axis=1)
    units = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (answers, targets)]
    wanted = log_softmax(SHARPNESS * (units[0] @ units[1].T).astype(np.float64), axis=1)
    assert score == pytest.approx(wanted[rows, rows].mean(), rel=1e-5)

    monkeypatch.setattr(retrieval, "BLOCK_ENTRIES", 90)

    assert (index.ranks(answers, rows) == ranks).all()
    assert index.log_score(answers, rows) == pytest.approx(score, rel=1e-6)
    assert (np.sort(near(answers, 5), axis=1) == nearest).all()


@pytest.mark.parametrize("search", ["ranks", "log_score", "nearest"])
def test_memory_does_not_grow_with_the_targets(search: str) -> None:
    index, answers = Index(normal(60_000, 4)), normal(1024, 4, seed=1)
    arguments = (answers, 10) if search == "nearest" else (answers, np.arange(1024))

    tracemalloc.start()
    getattr(index, search)(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 120 * 2**20  # one float64 [1024, N] would be 470 MiB
