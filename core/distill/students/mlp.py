"""A multilayer perceptron, to the teacher's width or to a narrower one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from core.distill.graph import Graph
from core.distill.students._base import PlainModule, Student, sizes_of
from core.distill.students._layers import Perceptron
from core.distill.teachers._base import TeacherModel
from core.specs.losses import Compares
from core.specs.plain_students import Mlp


class MlpStudent(PlainModule):
    """Hidden layers with GELU between a query and its answer."""

    def __init__(
        self,
        *,
        dim: int,
        target_dim: int,
        hidden: int,
        layers: int,
        dropout: float,
        noise: float,
        compares: Compares,
    ) -> None:
        super().__init__()
        self.config = {
            "name": "mlp",
            "dim": dim,
            "target_dim": target_dim,
            "hidden": hidden,
            "layers": layers,
            "dropout": dropout,
            "noise": noise,
            "compares": compares,
        }
        self.compares, self.draws = compares, bool(dropout or noise)
        self.body = Perceptron(
            dim=dim, hidden=hidden, layers=layers, width=target_dim, dropout=dropout, noise=noise
        )

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to [B, m]."""
        answers: Tensor = self.body(queries)
        return answers

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph."""
        return self.body.emit(graph, queries)


def build(spec: Mlp, teacher: TeacherModel, seed: int) -> MlpStudent:
    """Draw the layers as torch does; the caller seeded it."""
    del seed
    sizes = sizes_of(teacher)
    student = MlpStudent(
        dim=sizes.dim,
        target_dim=spec.output(sizes),
        hidden=spec.hidden,
        layers=spec.layers,
        dropout=spec.dropout,
        noise=spec.noise,
        compares=spec.compares(sizes),
    )
    student.body.fit_input(teacher.queries)
    return student


def restore(config: Mapping[str, Any]) -> MlpStudent:
    """Build from a saved config, on fresh layers whose state is then loaded."""
    return MlpStudent(**{key: value for key, value in config.items() if key != "name"})


STUDENT = Student(spec=Mlp, build=build, restore=restore)
