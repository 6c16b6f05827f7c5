"""Rotations with known angles, and what hypothesis draws: shared by the facts beside it."""

from __future__ import annotations

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from core.rotations.mixture import Mixture
from core.rotations.skew import from_planes

quick = settings(max_examples=15, deadline=None)

ANGLES = st.one_of(
    st.sampled_from([0.0, math.pi, math.pi, 1e-9, math.pi - 1e-9, math.pi - 1e-4, math.pi / 2]),
    st.floats(0, math.pi),
)


@st.composite
def angle_lists(draw: st.DrawFn) -> tuple[int, list[float]]:
    """A width and an angle for each of its planes."""
    width = draw(st.integers(1, 12))
    return width, draw(st.lists(ANGLES, min_size=width // 2, max_size=width // 2))


def basis(width: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(
        torch.randn(width, width, generator=generator, dtype=torch.float64)
    ).Q.contiguous()


def bivector(width: int, angles: list[float], *, seed: int = 0) -> Tensor:
    """[d, d] float64 with these angles in random planes."""
    columns = basis(width, seed=seed)[:, : 2 * len(angles)]
    return from_planes(columns, torch.tensor(angles, dtype=torch.float64))


def rotation(width: int, angles: list[float], *, seed: int = 0) -> Tensor:
    """[d, d] float64, exp of ``bivector``, written in cosines and sines."""
    Q = basis(width, seed=seed)
    turned = torch.eye(width, dtype=torch.float64)
    for plane, angle in enumerate(angles):
        at = slice(2 * plane, 2 * plane + 2)
        cosine, sine = math.cos(angle), math.sin(angle)
        turned[at, at] = torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)
    return Q @ turned @ Q.mT


def bivectors(count: int, width: int, *, largest: float = math.pi) -> Tensor:
    """[C, d, d] float64 with angles spread up to ``largest``."""
    angles = torch.linspace(0.1, largest, width // 2, dtype=torch.float64).tolist()
    return torch.stack([bivector(width, angles, seed=seed) for seed in range(count)])


def mixture(query_count: int, cluster_count: int, *, entries: int = 3, seed: int = 0) -> Mixture:
    """Convex float64 weights over a few distinct clusters a query."""
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.rand(query_count, cluster_count, generator=generator).topk(entries).indices
    weights = torch.rand(query_count, entries, generator=generator, dtype=torch.float64)
    return Mixture.from_topk(clusters, weights / weights.sum(1, keepdim=True), cluster_count)


def unit_queries(count: int, width: int, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)
