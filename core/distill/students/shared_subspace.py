"""All clusters rotate inside one learnt subspace: the smallest exactly orthogonal student."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.distill.graph import Graph
from core.distill.students._base import Routed, Shown, Student, StudentModule
from core.distill.students._routers import Router, build_router, restore_router
from core.distill.students._sphere import emit_keep_length
from core.distill.teachers._base import RotationTeacher
from core.rotations.chebyshev import RADIUS_STEP, series
from core.specs.students import SharedSubspace

TOLERANCE = 1e-7
"""Of the series of the exponential, relative to the length of a query."""
BLOCK_ENTRIES = 2 * 2**20
"""Entries of blended bivectors in memory at a time where no gradient is kept (8 MiB)."""


class SharedSubspaceStudent(StudentModule):
    """``q G exp(sum_c w_c U S_c U^T)``, U [d, r] orthonormal, S_c in so(r).

    With x = q G and z = x U this is ``x + (z exp(B) - z) U^T``, B = sum_c w_c S_c: what lies
    outside the subspace stays, so the map is orthogonal for any S_c. Of S_c the upper triangle is
    kept, which is skew whatever it learns. exp(B) acts by the Chebyshev series of rotations/
    chebyshev in r dimensions, at one radius for all queries: no norm of a convex blend is above
    the largest ||S_c||. Batched matrix_exp would need some 16 r^3 operations a query, this
    2 r^2 for each of about 8 terms.
    """

    def __init__(self, router: Router, *, dim: int, clusters: int, subspace: int) -> None:
        super().__init__()
        self.config = {
            "name": "shared_subspace",
            "dim": dim,
            "clusters": clusters,
            "subspace": subspace,
            "router": router.config,
        }
        self.router = router
        self.takes_weights, self.has_router = router.takes_weights, router.has_weights
        self.anchor: Tensor
        self.register_buffer("anchor", torch.eye(dim))
        self.basis = nn.Parameter(torch.eye(dim, subspace))
        self.upper = nn.Parameter(torch.zeros(clusters, subspace * (subspace - 1) // 2))

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to [B, d]."""
        return self.with_lengths(self.bare(queries), queries)

    def bare(self, queries: Tensor) -> Tensor:
        """Rotate [B, d] queries, before lengths are put right: what they are off is rounding."""
        rows = max(1, BLOCK_ENTRIES // self.basis.shape[1] ** 2)
        bivectors = self.bivectors()
        parts = [
            self._rotate(part @ self.anchor, self.router.log_weights(part).exp(), bivectors)
            for part in queries.split(rows)
        ]
        return torch.cat(parts)

    def free_parameters(self) -> int:
        """Count the router, all S_c, and where U lies: r (d - r), the subspaces' dimension.

        Which basis it has says nothing: turned with every S_c it is the same map.
        """
        rank = self.basis.shape[1]
        return super().free_parameters() - rank * rank

    def routed(self, shown: Shown) -> Routed:
        """Map training queries, routed as their router does in training."""
        weights, log_weights = self.router.training_weights(shown)
        return Routed(self._rotate(shown.anchored, weights, self.bivectors()), log_weights)

    def retract(self) -> None:
        """Make U's columns orthonormal again: Q of U = Q R with positive diagonal."""
        with torch.no_grad():
            q, r = torch.linalg.qr(self.basis)
            self.basis.copy_(q * torch.where(r.diagonal() < 0, -1.0, 1.0))

    def gentle(self) -> list[nn.Parameter]:
        """The subspace and the bivectors in it."""
        return [self.basis, self.upper]

    def bivectors(self) -> Tensor:
        """All S_c: [C, r, r], exactly skew."""
        r = self.basis.shape[1]
        row, column = torch.triu_indices(r, r, 1, device=self.upper.device).unbind()
        half = self.upper.new_zeros(len(self.upper), r, r)
        half[:, row, column] = self.upper
        return half - half.mT

    def _rotate(self, x: Tensor, weights: Tensor, bivectors: Tensor) -> Tensor:
        z = x @ self.basis  # [B, r]
        r = z.shape[1]
        blend = (weights @ bivectors.flatten(1)).view(-1, r, r)
        return x + (_exp_action(z, blend, radius_step(bivectors)) - z) @ self.basis.T

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph: the terms of the series one after another."""
        bivectors = self.bivectors().detach()
        r = self.basis.shape[1]
        weights = self.router.emit(graph, queries)
        x = graph.op("MatMul", queries, graph.constant(self.anchor))
        basis = graph.constant(self.basis)
        z = graph.op("Unsqueeze", graph.op("MatMul", x, basis), graph.axes(1))  # [B, 1, r]
        step = radius_step(bivectors)
        scaled = graph.constant(bivectors.flatten(1) * (2 / (step * RADIUS_STEP)))
        blend = graph.op("Reshape", graph.op("MatMul", weights, scaled), graph.axes(-1, r, r))
        first, *others = series(step, TOLERANCE)
        change = graph.op("Mul", z, graph.constant(first - 1.0))
        previous, current = "", z
        for k, coefficient in enumerate(others, 1):
            following = graph.op("MatMul", current, blend)
            if k == 1:
                following = graph.op("Mul", following, graph.constant(0.5))
            else:
                following = graph.op("Add", following, previous)
            term = graph.op("Mul", following, graph.constant(coefficient))
            change = graph.op("Add", change, term)
            previous, current = current, following
        change = graph.op("Squeeze", change, graph.axes(1))
        back = graph.op("MatMul", change, graph.constant(self.basis.T))
        return emit_keep_length(graph, graph.op("Add", x, back), queries)


def radius_step(bivectors: Tensor) -> int:
    """Bound ||B||_2 of every convex blend of [C, r, r] skew matrices, in RADIUS_STEP, rounded up.

    The eighth root of half the trace of (S^T S)^4, for their singular values come in pairs: at
    most (r / 2)^(1/8) times the largest, for two products and no decomposition.
    """
    with torch.no_grad():
        gram = bivectors.mT @ bivectors
        eighth = (gram @ gram).square().sum((1, 2)) / 2
        bound = float(eighth.max()) ** 0.125 if len(bivectors) else 0.0
    return max(1, math.ceil(bound * (1 + 1e-5) / RADIUS_STEP))


def _exp_action(z: Tensor, blend: Tensor, step: int) -> Tensor:
    """Turn [B, r] rows to z exp(B), each with its own [r, r] of norm at most step RADIUS_STEP."""
    first, *others = series(step, TOLERANCE)
    doubled = blend * (2 / (step * RADIUS_STEP))
    previous, current = z, z
    result = first * z
    for k, coefficient in enumerate(others, 1):
        following = (current[:, None] @ doubled)[:, 0]
        following = following * 0.5 if k == 1 else following + previous
        result = result + coefficient * following
        previous, current = current, following
    return result


def principal_subspace(teacher: RotationTeacher, rank: int) -> Tensor:
    """Return where the teacher's bivectors move its own training queries: [d, rank] float64.

    The leading eigenvectors of sum_q (q G L)^T (q G L), L the bivector of q's cluster.
    """
    model = teacher.model
    x = torch.from_numpy(model.queries).double() @ teacher.anchor.cpu().double()
    cluster_of = torch.from_numpy(model.cluster_of)
    moment = x.new_zeros(x.shape[1], x.shape[1])
    for number, bivector in enumerate(teacher.bivectors.cpu()):
        moved = x[cluster_of == number] @ bivector.double()
        moment += moved.T @ moved
    found: Tensor = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank]
    return found


def build(spec: SharedSubspace, teacher: RotationTeacher, seed: int) -> SharedSubspaceStudent:
    """Take G, U and S_c = U^T L_c U from the teacher."""
    clusters, dim, _ = teacher.bivectors.shape
    rank = spec.subspace
    student = SharedSubspaceStudent(
        build_router(spec, teacher, seed), dim=dim, clusters=clusters, subspace=rank
    )
    basis = principal_subspace(teacher, rank)
    row, column = torch.triu_indices(rank, rank, 1).unbind()
    with torch.no_grad():
        student.anchor.copy_(teacher.anchor)
        student.basis.copy_(basis)
        for number, bivector in enumerate(teacher.bivectors.cpu()):
            inside = basis.T @ bivector.double() @ basis
            student.upper[number] = ((inside - inside.T) / 2)[row, column]
    return student


def restore(config: Mapping[str, Any]) -> SharedSubspaceStudent:
    """Build from a saved config, on zeros."""
    values = {key: value for key, value in config.items() if key not in ("name", "router")}
    return SharedSubspaceStudent(restore_router(config["router"]), **values)


STUDENT = Student(spec=SharedSubspace, build=build, restore=restore)
