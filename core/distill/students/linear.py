"""One matrix and a bias: the baseline that every other student must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.distill.graph import Graph
from core.distill.nulls import fit_ridge
from core.distill.students._base import PlainModule, Student, sizes_of
from core.distill.teachers._base import TeacherModel
from core.specs.losses import Compares
from core.specs.plain_students import Linear


class LinearStudent(PlainModule):
    """``y = q W + b``."""

    def __init__(self, *, dim: int, target_dim: int, compares: Compares) -> None:
        super().__init__()
        self.config = {
            "name": "linear",
            "dim": dim,
            "target_dim": target_dim,
            "compares": compares,
        }
        self.compares = compares
        self.layer = nn.Linear(dim, target_dim)

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to [B, m]."""
        answers: Tensor = self.layer(queries)
        return answers

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph."""
        return graph.linear(self.layer, queries)


def build(spec: Linear, teacher: TeacherModel, seed: int) -> LinearStudent:
    """Start from a ridge regression onto the true answers, or from torch's random layer."""
    sizes = sizes_of(teacher)
    student = LinearStudent(
        dim=sizes.dim, target_dim=spec.output(sizes), compares=spec.compares(sizes)
    )
    if spec.start == "fitted":
        queries, truths = torch.from_numpy(teacher.queries), torch.from_numpy(teacher.truths)
        wanted = truths.double()
        if spec.output(sizes) < sizes.width:
            wanted = (wanted - wanted.mean(0)) @ principal_axes(truths, spec.output(sizes))
        ridge = fit_ridge(queries, wanted, seed=seed)
        with torch.no_grad():
            student.layer.weight.copy_(ridge.weight.T)
            student.layer.bias.copy_(ridge.bias)
    return student


def principal_axes(vectors: Tensor, count: int) -> Tensor:
    """Return the leading principal axes of [n, D] rows: [D, count] float64, signs made plain.

    The entry of each axis that is largest in absolute value is positive.
    """
    centred = vectors.double() - vectors.double().mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    leading = axes.flip(1)[:, :count]
    largest = leading.abs().argmax(dim=0)
    signed: Tensor = leading * leading[largest, torch.arange(leading.shape[1])].sign()
    return signed


def restore(config: Mapping[str, Any]) -> LinearStudent:
    """Build from a saved config, on a fresh layer whose state is then loaded."""
    return LinearStudent(**{key: value for key, value in config.items() if key != "name"})


STUDENT = Student(spec=Linear, build=build, restore=restore)
