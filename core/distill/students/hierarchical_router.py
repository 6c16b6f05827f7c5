"""An LDA's heads behind L levels of H keys: H^L = N made true (documents 001 and 003)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.graph import Graph
from core.distill.students._base import PlainModule, Routed, Shown, Student
from core.distill.students._slots import digits, place
from core.distill.students._sphere import emit_unit
from core.distill.teachers.lda import LdaTeacher
from core.rotations.sphere import unit
from core.specs.plain_students import HierarchicalRouter

BLOCK_ENTRIES = 16 * 2**20
"""Numbers of weighted queries, or of candidates' own keys, in memory at a time; or a row's."""


class HierarchicalRouterStudent(PlainModule):
    """``softmax_s(q . (sum_l key[l, digit_l(s)] + own[s]) + bias[s])`` blends the slots' values.

    q has length 1 there (of stored queries: entries from 1e-15 to 1e15), and keys hold the inverse
    temperature. Untrained, with full own keys and all slots scored, the slots' keys are the
    teacher's centroids: it is the teacher, to 1e-5 at temperatures of 0.01 and more. Slots that
    share a head share its weight. With ``candidates`` the slots of largest sum of keys (and bias)
    are scored alone; of equal sums, as a zero query has them, any.
    """

    takes_weights, has_router = False, True

    def __init__(
        self,
        *,
        dim: int,
        target_dim: int,
        clusters: int,
        heads: int,
        levels: int,
        own_rank: int | None,
        candidates: int | None,
        mode: str,
    ) -> None:
        super().__init__()
        self.config = {
            "name": "hierarchical_router",
            "dim": dim,
            "target_dim": target_dim,
            "clusters": clusters,
            "heads": heads,
            "levels": levels,
            "own_rank": own_rank,
            "candidates": candidates,
            "mode": mode,
        }
        slots = heads**levels
        self.candidates = candidates
        self.head_of: Tensor
        self.register_buffer("head_of", torch.zeros(slots, dtype=torch.int64))
        self.keys = nn.Parameter(torch.zeros(levels, heads, dim))
        self.bias = nn.Parameter(torch.zeros(slots))
        width = dim if own_rank is None else own_rank
        self.own = nn.Parameter(torch.zeros(slots, width)) if width else None
        self.axes = nn.Parameter(torch.zeros(dim, width)) if own_rank else None
        shape = (slots, target_dim) if mode == "answers" else (slots, dim, target_dim)
        self.values = nn.Parameter(torch.zeros(shape))
        self._digits: Tensor
        self.register_buffer("_digits", digits(heads, levels), persistent=False)

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to [B, m]."""
        return self._map(queries)[0]

    def routed(self, shown: Shown) -> Routed:
        """Map training queries; its slots' weights, summed by head, are the router's."""
        vectors, weights = self._map(shown.queries)
        heads = weights.new_zeros(len(weights), self.config["clusters"])
        heads = heads.index_add(1, self.head_of, weights)
        return Routed(vectors, heads.clamp(min=torch.finfo(heads.dtype).tiny).log())

    def gentle(self) -> list[nn.Parameter]:
        """All of it: it starts where it should end."""
        return list(self.parameters())

    def weights(self, queries: Tensor) -> Tensor:
        """Weigh the slots: [B, d] -> [B, S], rows sum to 1; 0 for slots that are no candidates."""
        directions = unit(queries)
        coarse = self._coarse(directions)
        if self.candidates is None:
            return (coarse + self._own(directions)).softmax(dim=-1)
        best = coarse.detach().topk(self.candidates, dim=1).indices  # [B, m]
        scores = coarse.gather(1, best) + self._own_of(directions, best)
        return torch.zeros_like(coarse).scatter(1, best, scores.softmax(dim=-1))

    def _map(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.weights(queries)
        if self.values.ndim == 2:
            return weights @ self.values, weights
        slots, dim, width = self.values.shape
        stacked = self.values.reshape(slots * dim, width)
        rows = max(1, BLOCK_ENTRIES // (slots * dim))
        blocks = [
            (w[:, :, None] * q[:, None, :]).flatten(1) @ stacked
            for q, w in zip(queries.split(rows), weights.split(rows), strict=True)
        ]
        return torch.cat(blocks), weights

    def _coarse(self, directions: Tensor) -> Tensor:
        """Sum the scores of each slot's keys, and its bias: [B, S]."""
        levels, heads, dim = self.keys.shape
        scores = (directions @ self.keys.reshape(-1, dim).T).unflatten(1, (levels, heads))
        total = self.bias.expand(len(directions), -1)
        for level in range(levels):
            total = total + scores[:, level].index_select(1, self._digits[:, level])
        return total

    def _own(self, directions: Tensor) -> Tensor:
        """[B, S]."""
        if self.own is None:
            return self.bias.new_zeros(())
        return self._turned(directions) @ self.own.T

    def _own_of(self, directions: Tensor, slots: Tensor) -> Tensor:
        """[B, m] of the slots [B, m] alone."""
        if self.own is None:
            return self.bias.new_zeros(())
        x = self._turned(directions)
        rows = max(1, BLOCK_ENTRIES // (slots.shape[1] * self.own.shape[1]))
        parts = [
            torch.einsum("bk,bmk->bm", some, functional.embedding(at, self.own))
            for some, at in zip(x.split(rows), slots.split(rows), strict=True)
        ]
        return torch.cat(parts)

    def _turned(self, directions: Tensor) -> Tensor:
        return directions if self.axes is None else directions @ self.axes

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph."""
        weights = self._emit_weights(graph, emit_unit(graph, queries))
        if self.values.ndim == 2:
            return graph.op("MatMul", weights, graph.constant(self.values))
        slots, dim, width = self.values.shape
        weighed = graph.op(
            "Mul",
            graph.op("Unsqueeze", weights, graph.axes(2)),
            graph.op("Unsqueeze", queries, graph.axes(1)),
        )
        flat = graph.op("Reshape", weighed, graph.axes(-1, slots * dim))
        return graph.op("MatMul", flat, graph.constant(self.values.reshape(slots * dim, width)))

    def _emit_weights(self, graph: Graph, directions: str) -> str:
        levels, heads, dim = self.keys.shape
        scores = graph.op(
            "MatMul", directions, graph.constant(self.keys.reshape(levels * heads, dim).T)
        )
        total = graph.constant(self.bias)
        for level in range(levels):
            columns = graph.constant(self._digits[:, level] + level * heads)
            total = graph.op("Add", total, graph.op("Gather", scores, columns, axis=1))
        own = self._emit_own(graph, directions)
        fine = total if own is None else graph.op("Add", total, own)
        if self.candidates is None:
            return graph.op("Softmax", fine, axis=-1)
        best = graph.op("TopK", total, graph.axes(self.candidates), outputs=2, axis=-1)
        scored = graph.op("GatherElements", fine, f"{best}.1", axis=1)
        zeros = graph.op("Mul", total, graph.constant(0.0))
        kept = graph.op("Softmax", scored, axis=-1)
        return graph.op("ScatterElements", zeros, f"{best}.1", kept, axis=1)

    def _emit_own(self, graph: Graph, directions: str) -> str | None:
        if self.own is None:
            return None
        if self.axes is not None:
            directions = graph.op("MatMul", directions, graph.constant(self.axes))
        return graph.op("MatMul", directions, graph.constant(self.own.T))


def build(spec: HierarchicalRouter, teacher: LdaTeacher, seed: int) -> HierarchicalRouterStudent:
    """Put the teacher's heads onto the slots; nothing is drawn."""
    del seed
    assert spec.heads is not None
    assert spec.levels is not None
    model, lda = teacher.model, teacher.heads
    values = lda.maps if lda.answers is None else lda.answers
    assert values is not None
    clusters, dim = model.centroids.shape
    student = HierarchicalRouterStudent(
        dim=dim,
        target_dim=teacher.truths.shape[1],
        clusters=clusters,
        heads=spec.heads,
        levels=spec.levels,
        own_rank=spec.own_rank,
        candidates=spec.candidates,
        mode=model.mode,
    )
    slots = place(lda.directions.cpu(), heads=spec.heads, levels=spec.levels)
    times = slots.head_of.bincount(minlength=clusters)[slots.head_of].double()
    with torch.no_grad():
        student.head_of.copy_(slots.head_of)
        student.keys.copy_(slots.keys / teacher.temperature)
        student.bias.copy_(-times.log())
        student.values.copy_(values.cpu()[slots.head_of])
        _copy_own(student, slots.own / teacher.temperature)
    return student


def _copy_own(student: HierarchicalRouterStudent, own: Tensor) -> None:
    """Keep the slots' corrections, or the best of their rank (Eckart and Young 1936)."""
    if student.own is None:
        return
    if student.axes is None:
        student.own.copy_(own)
        return
    rank = student.own.shape[1]
    left, sizes, right = torch.linalg.svd(own, full_matrices=False)
    roots = sizes[:rank].sqrt()
    student.own[:, : len(roots)].copy_(left[:, :rank] * roots)
    student.axes[:, : len(roots)].copy_(right[:rank].T * roots)


def restore(config: Mapping[str, Any]) -> HierarchicalRouterStudent:
    """Build from a saved config, on zeros."""
    return HierarchicalRouterStudent(**{k: value for k, value in config.items() if k != "name"})


STUDENT = Student(spec=HierarchicalRouter, build=build, restore=restore)
