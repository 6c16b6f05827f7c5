"""A product of the clusters' rotations, each in its few planes, weighed by a router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from core.distill.graph import Graph
from core.distill.students._base import Routed, Shown, Student, StudentModule, plane_parameters
from core.distill.students._routers import Router, build_router, restore_router
from core.distill.students._sphere import emit_keep_length
from core.distill.students._strang import strang_product
from core.distill.teachers._base import RotationTeacher
from core.rotations.planes import leading_planes
from core.specs.students import RotorProduct

BLOCK_ROWS = 2048
"""Queries mapped at a time where no gradient is kept."""


class RotorProductStudent(StudentModule):
    """``q G prod_c exp(w_c L_c / 2)``, forward then reversed.

    G and the planes come from the teacher, so that untrained, with the exact router, only the
    splitting and the planes left out separate it from the teacher.
    """

    def __init__(
        self,
        router: Router,
        *,
        dim: int,
        clusters: int,
        planes: int,
        train_planes: bool,
    ) -> None:
        super().__init__()
        self.config = {
            "name": "rotor_product",
            "dim": dim,
            "clusters": clusters,
            "planes": planes,
            "train_planes": train_planes,
            "router": router.config,
        }
        self.router = router
        self.takes_weights, self.has_router = router.takes_weights, router.has_weights
        self.anchor: Tensor
        self.register_buffer("anchor", torch.eye(dim))
        self.bases = nn.Parameter(torch.zeros(clusters, dim, 2 * planes), train_planes)
        self.angles = nn.Parameter(torch.zeros(clusters, planes), train_planes)

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to [B, d]."""
        return self.with_lengths(self.product(queries), queries)

    def product(self, queries: Tensor) -> Tensor:
        """Multiply [B, d] queries by their factors alone, before lengths are put right.

        Every factor is a rotation, so what the lengths are off here is rounding.
        """
        parts = [
            self._rotate(part @ self.anchor, self.router.log_weights(part).exp())
            for part in queries.split(BLOCK_ROWS)
        ]
        return torch.cat(parts)

    def routed(self, shown: Shown) -> Routed:
        """Map training queries, routed as their router does in training."""
        weights, log_weights = self.router.training_weights(shown)
        return Routed(self._rotate(shown.anchored, weights), log_weights)

    def retract(self) -> None:
        """Make the planes' columns orthonormal again, by the QR of their Gram matrix's root."""
        if self.bases.requires_grad:
            with torch.no_grad():
                self.bases.copy_(orthonormal(self.bases))

    def gentle(self) -> list[nn.Parameter]:
        """Bases and angles."""
        return [self.bases, self.angles] if self.bases.requires_grad else []

    def free_parameters(self) -> int:
        """Count the router, and per cluster its planes and angles, trained or not."""
        clusters, dim, columns = self.bases.shape
        router = sum(value.numel() for value in self.router.parameters())
        return router + clusters * plane_parameters(dim, columns // 2)

    def _rotate(self, x: Tensor, weights: Tensor) -> Tensor:
        return strang_product(x, weights, self.bases, self.angles)

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph: one Scan over the clusters each way."""
        weights = self.router.emit(graph, queries)  # [B, C]
        weights = graph.op("Transpose", weights, perm=[1, 0])
        weights = graph.op("Unsqueeze", weights, graph.axes(2))  # [C, B, 1]
        x = graph.op("MatMul", queries, graph.constant(self.anchor))
        inputs = [graph.constant(self.bases), graph.constant(self.angles / 2), weights]
        for backwards in (False, True):
            body = _factor_graph(self.config, f"{'back' if backwards else 'forth'}_")
            x = graph.scan(body, x, inputs, backwards=backwards)
        return emit_keep_length(graph, x, queries)


def orthonormal(bases: Tensor) -> Tensor:
    """Return Q of B = Q R with positive diagonal, through the Cholesky factor of B^T B.

    Args:
        bases: [C, d, 2m], columns near orthonormal (off by less than 0.1).
    """
    root = torch.linalg.cholesky(bases.mT @ bases)  # lower: B^T B = R^T R
    columns: Tensor = torch.linalg.solve_triangular(root.mT, bases, upper=True, left=False)
    return columns


def _factor_graph(config: Mapping[str, Any], prefix: str) -> onnx.GraphProto:
    """One factor: (x [B, d]; basis [d, 2m], half angles [m], weight [B, 1]) -> x."""
    dim, m = config["dim"], config["planes"]
    graph = Graph(prefix)
    state, basis, half, weight = (f"{prefix}{name}" for name in ("x", "basis", "half", "weight"))
    angle = graph.op("Mul", weight, half)  # [B, m]
    sine = graph.op("Sin", angle)
    quarter = graph.op("Sin", graph.op("Mul", angle, graph.constant(0.5)))
    versine = graph.op("Mul", graph.op("Mul", quarter, quarter), graph.constant(-2.0))
    coordinates = graph.op("MatMul", state, basis)
    sizes = graph.axes(m, m)
    along = graph.op("Split", coordinates, sizes, outputs=2, axis=1)
    across = f"{along}.1"
    first = graph.op("Sub", graph.op("Mul", along, versine), graph.op("Mul", across, sine))
    second = graph.op("Add", graph.op("Mul", along, sine), graph.op("Mul", across, versine))
    change = graph.op("Concat", first, second, axis=1)
    moved = graph.op("MatMul", change, graph.op("Transpose", basis, perm=[1, 0]))
    result = graph.op("Add", state, moved)
    shapes = {state: ["batch", dim], basis: [dim, 2 * m], half: [m], weight: ["batch", 1]}
    return helper.make_graph(
        graph.nodes,
        f"{prefix}factor",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, ["batch", dim])],
        initializer=graph.constants,
    )


def build(spec: RotorProduct, teacher: RotationTeacher, seed: int) -> RotorProductStudent:
    """Take G and the planes from the teacher, and its routing where that is exact."""
    clusters, dim, _ = teacher.bivectors.shape
    planes = spec.planes or dim // 2
    student = RotorProductStudent(
        build_router(spec, teacher, seed),
        dim=dim,
        clusters=clusters,
        planes=planes,
        train_planes=spec.train_planes,
    )
    factors = leading_planes(teacher.bivectors.cpu(), planes)
    with torch.no_grad():
        halves = [factors.bases[..., 0::2], factors.bases[..., 1::2]]
        student.bases.copy_(torch.cat(halves, dim=-1))
        student.angles.copy_(factors.angles)
        student.anchor.copy_(teacher.anchor)
    return student


def restore(config: Mapping[str, Any]) -> RotorProductStudent:
    """Build from a saved config, on zeros."""
    values = {key: value for key, value in config.items() if key not in ("name", "router")}
    return RotorProductStudent(restore_router(config["router"]), **values)


STUDENT = Student(spec=RotorProduct, build=build, restore=restore)
