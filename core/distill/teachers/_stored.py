"""Answers that are looked up: a query stored several times has the mean of its answers."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from core.distill.routing import EqualRows
from core.errors import DataInvalid
from core.tensors.shards import Array


class StoredAnswers:
    """Queries and what is answered to each: 8 m bytes a row, and the digests of the queries."""

    def __init__(self, queries: Array, targets: Array, *, teacher: str) -> None:
        """Take [n, d] queries and their [n, m] answers; ``teacher`` is named in errors."""
        self._teacher = teacher
        self._rows = EqualRows.among(queries)
        sums = np.zeros(targets.shape)
        np.add.at(sums, self._rows.first, targets)
        counts = np.bincount(self._rows.first, minlength=len(sums)).clip(min=1)
        self._means = sums / counts[:, None]

    def look_up(self, queries: Tensor | Array) -> Array:
        """Return the answers of [Q, d] queries: [Q, m] float64.

        Raises:
            DataInvalid: a query is not stored.
        """
        given = queries.cpu().numpy() if isinstance(queries, Tensor) else queries
        found = self._rows.rows(given)
        if (found < 0).any():
            unknown = int(np.argmax(found < 0))
            raise DataInvalid(
                f"queries: row {unknown} is not stored ({int((found < 0).sum())} of {len(found)} "
                f"are not); the teacher {self._teacher!r} answers what is stored alone"
            )
        means: Array = self._means[found]
        return means
