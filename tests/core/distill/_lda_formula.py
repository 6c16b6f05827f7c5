"""The formula of an LDA teacher in float64, and what it is tried on."""

from __future__ import annotations

import itertools

import numpy as np

from core.tensors.shards import Array


def reference(
    queries: Array, centroids: Array, heads: Array, temperature: float
) -> tuple[Array, Array]:
    """The formula in float64, a head at a time: weights [B, N], answers [B, m]."""
    q, c, heads = (array.astype(np.float64) for array in (queries, centroids, heads))
    weights = np.empty((len(q), len(c)))
    for row, number in itertools.product(range(len(q)), range(len(c))):
        cosine = q[row] @ c[number] / np.linalg.norm(q[row]) / np.linalg.norm(c[number])
        weights[row, number] = cosine / temperature
    weights = np.exp(weights - weights.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    answers = np.zeros((len(q), heads.shape[-1]))
    for number, head in enumerate(heads):
        said = head if head.ndim == 1 else q @ head
        answers += weights[:, number, None] * said
    return weights, answers


def drawn(seed: int, *shape: int) -> Array:
    array: Array = np.random.default_rng(seed).normal(size=shape)
    return array
