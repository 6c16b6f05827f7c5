"""A small LDA teacher whose heads are drawn, questions near its heads, and what is asked of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from core.distill.lda import MultiHeadLDA
from core.distill.students.projection_transformer import ProjectionTransformer

DIM, HEADS, WIDTH = 16, 6, 10


def drawn(rows: int, dim: int, *, seed: int) -> Tensor:
    """Unit rows."""
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def make_lda(*, heads: int = HEADS, width: int = DIM, temperature: float = 0.3) -> MultiHeadLDA:
    return MultiHeadLDA(
        drawn(heads, DIM, seed=1), drawn(heads, width, seed=2), temperature=temperature
    )


def questions(rows: int = 60, *, seed: int = 3) -> Tensor:
    near = drawn(HEADS, DIM, seed=1)[torch.arange(rows) % HEADS]
    return functional.normalize(near + 0.7 * drawn(rows, DIM, seed=seed), dim=1)


def make_transformer(*, seed: int = 0, **changes: object) -> ProjectionTransformer:
    torch.manual_seed(seed)
    sizes: dict[str, object] = {"num_heads": 4, "num_layers": 2, "ff_dim": 32, **changes}
    return ProjectionTransformer(DIM, **sizes)  # type: ignore[arg-type]
