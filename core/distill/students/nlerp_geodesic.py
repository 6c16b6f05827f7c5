"""The weighted mean of the clusters' answers put back to its length, then a small learnt step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.graph import Graph
from core.distill.students._base import Routed, Shown, Student, StudentModule, plane_parameters
from core.distill.students._routers import Router, build_router, restore_router
from core.distill.students._sphere import emit_keep_length, emit_step, emit_unit
from core.distill.teachers._base import RotationTeacher
from core.rotations.planes import leading_planes
from core.rotations.sphere import step_along, typical_length, unit
from core.specs.students import NlerpGeodesic

CANCELLED = 1e-4
"""Length of the mean, over the query's, below which it is rounding and says no direction."""
BLOCK_ENTRIES = 4 * 2**20
"""Coordinates in memory at a time where no gradient is kept (16 MiB: they stay in cache)."""
SPARSE = 0.5
"""Share of zero weights from which only the rows that weigh a cluster are multiplied."""


class NlerpGeodesicStudent(StudentModule):
    """``normalise(sum_c w_c q W_c)``, W_c = G R_c, then a step along the sphere.

    R_c - 1 = A_c^T (T_c - 1) A_c lives in its planes A_c [2m, d], so with x = q G the sum is
    ``x + (w * (x A^T)) B``, B_c = (T_c - 1) A_c: two products of [C 2m, d]. Where the clusters'
    answers cancel (a mean of less than CANCELLED of the query's length) there is no direction to
    keep, and x itself is taken: the anchor's answer.

    The step is a network of the query. It starts at zero, so that untrained, with the exact
    router and all planes, this is the normalised linear blend itself.
    """

    def __init__(
        self, router: Router, *, dim: int, clusters: int, planes: int, correction_hidden: int
    ) -> None:
        super().__init__()
        self.config = {
            "name": "nlerp_geodesic",
            "dim": dim,
            "clusters": clusters,
            "planes": planes,
            "correction_hidden": correction_hidden,
            "router": router.config,
        }
        self.router = router
        self.takes_weights, self.has_router = router.takes_weights, router.has_weights
        self.anchor: Tensor
        self.bases: Tensor
        self.angles: Tensor
        self.length: Tensor
        self.register_buffer("anchor", torch.eye(dim))
        self.register_buffer("bases", torch.zeros(clusters, 2 * planes, dim))
        self.register_buffer("angles", torch.zeros(clusters, planes))
        self.register_buffer("length", torch.ones(()))
        self.up = nn.Linear(dim, correction_hidden) if correction_hidden else None
        self.down = nn.Linear(correction_hidden, dim, bias=False) if correction_hidden else None

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to [B, d]."""
        clusters, width, _ = self.bases.shape
        rows = max(1, BLOCK_ENTRIES // (clusters * width))
        back = turned(self.bases, self.angles)
        parts = [
            self._map(part, part @ self.anchor, self.router.log_weights(part).exp(), back)
            for part in queries.split(rows)
        ]
        return self.with_lengths(torch.cat(parts), queries)

    def free_parameters(self) -> int:
        """Count router and step, and per cluster its planes and angles, the teacher's own."""
        clusters, columns, dim = self.bases.shape
        return super().free_parameters() + clusters * plane_parameters(dim, columns // 2)

    def routed(self, shown: Shown) -> Routed:
        """Map training queries, routed as their router does in training."""
        weights, log_weights = self.router.training_weights(shown)
        back = turned(self.bases, self.angles)
        return Routed(self._map(shown.queries, shown.anchored, weights, back), log_weights)

    def gentle(self) -> list[nn.Parameter]:
        """All of the step's: it corrects by a few hundredths of a radian over d dimensions."""
        step = (self.up, self.down)
        return [value for layer in step if layer is not None for value in layer.parameters()]

    def _map(self, queries: Tensor, x: Tensor, weights: Tensor, back: Tensor) -> Tensor:
        sparse = not weights.requires_grad and bool((weights == 0).float().mean() > SPARSE)
        total = (_sum_sparse if sparse else _sum)(x, weights, self.bases, back)
        total = _unless_cancelled(total, x)
        if self.up is None or self.down is None:
            return total
        hidden = functional.gelu(self.up(queries / self.length))
        return step_along(unit(total), self.down(hidden))

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph: the two products, whatever the router."""
        clusters, width, dim = self.bases.shape
        weights = graph.op("Unsqueeze", self.router.emit(graph, queries), graph.axes(2))
        x = graph.op("MatMul", queries, graph.constant(self.anchor))
        flat = graph.constant(self.bases.reshape(-1, dim).T)
        split = graph.op("Reshape", graph.op("MatMul", x, flat), graph.axes(0, clusters, width))
        weighed = graph.op("Mul", split, weights)
        weighed = graph.op("Reshape", weighed, graph.axes(0, clusters * width))
        back = graph.constant(turned(self.bases, self.angles).reshape(-1, dim))
        total = graph.op("Add", x, graph.op("MatMul", weighed, back))
        least = graph.op("Mul", graph.norm(queries), graph.constant(CANCELLED))
        kept = graph.op("Greater", graph.norm(total), least)
        units = emit_unit(graph, graph.op("Where", kept, total, x))
        if self.up is not None and self.down is not None:
            scaled = graph.op("Div", queries, graph.constant(self.length))
            hidden = graph.op("Gelu", graph.linear(self.up, scaled))
            units = emit_step(graph, units, graph.linear(self.down, hidden))
        return emit_keep_length(graph, units, queries)


def turned(bases: Tensor, angles: Tensor) -> Tensor:
    """What a whole turn adds along each basis vector: (T_c - 1) A_c.

    Args:
        bases: [C, 2m, d], the planes' first vectors before their second.
        angles: [C, m] radians.

    Returns:
        [C, 2m, d].
    """
    first, second = bases.chunk(2, dim=1)
    versine, sine = -2 * (angles / 2).sin().square()[..., None], angles.sin()[..., None]
    added = bases * versine.repeat(1, 2, 1)
    of_first, of_second = added.chunk(2, dim=1)
    of_first.addcmul_(second, sine)
    of_second.addcmul_(first, sine, value=-1)
    return added


def _sum(x: Tensor, weights: Tensor, bases: Tensor, back: Tensor) -> Tensor:
    """Sum over all clusters: [B, d]; two products, and the weights between them."""
    dim = x.shape[1]
    coordinates = (x @ bases.reshape(-1, dim).T).unflatten(1, bases.shape[:2])  # [B, C, 2m]
    weighed = (coordinates * weights[:, :, None]).flatten(1)
    return torch.addmm(x, weighed, back.reshape(-1, dim))


def _sum_sparse(x: Tensor, weights: Tensor, bases: Tensor, back: Tensor) -> Tensor:
    """Sum over the clusters that weigh something: [B, d]."""
    total = x.clone()
    for c, column in enumerate(weights.unbind(1)):
        rows = column.nonzero().flatten()
        if len(rows):
            part = (x[rows] @ bases[c].T) * column[rows, None]
            total.index_add_(0, rows, (part @ back[c]).to(total.dtype))
    return total


def _unless_cancelled(total: Tensor, x: Tensor) -> Tensor:
    """Take x where the clusters' answers cancel; x is as long as its query."""
    with torch.no_grad():
        kept = total.norm(dim=-1, keepdim=True) > CANCELLED * x.norm(dim=-1, keepdim=True)
    # To look first would wait for a GPU; on a CPU it spares three passes, and nothing else.
    return total if kept.is_cpu and bool(kept.all()) else torch.where(kept, total, x)


def build(spec: NlerpGeodesic, teacher: RotationTeacher, seed: int) -> NlerpGeodesicStudent:
    """Take G and the planes from the teacher; the step is zero."""
    clusters, dim, _ = teacher.bivectors.shape
    planes = spec.planes or dim // 2
    student = NlerpGeodesicStudent(
        build_router(spec, teacher, seed),
        dim=dim,
        clusters=clusters,
        planes=planes,
        correction_hidden=spec.correction_hidden,
    )
    factors = leading_planes(teacher.bivectors.cpu(), planes)
    with torch.no_grad():
        halves = [factors.bases[..., 0::2], factors.bases[..., 1::2]]
        student.bases.copy_(torch.cat(halves, dim=-1).mT)
        student.angles.copy_(factors.angles)
        student.anchor.copy_(teacher.anchor)
        student.length.copy_(typical_length(torch.from_numpy(teacher.model.queries)))
        if student.up is not None and student.down is not None:
            # Scaled queries have length 1: entries of size 1 give hidden units inputs of size 1.
            student.up.weight.normal_()
            student.up.bias.zero_()
            student.down.weight.zero_()
    return student


def restore(config: Mapping[str, Any]) -> NlerpGeodesicStudent:
    """Build from a saved config, on zeros."""
    values = {key: value for key, value in config.items() if key not in ("name", "router")}
    return NlerpGeodesicStudent(restore_router(config["router"]), **values)


STUDENT = Student(spec=NlerpGeodesic, build=build, restore=restore)
