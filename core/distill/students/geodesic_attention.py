"""Cross-attention to learnt slots and a gated MLP, which say a step along the sphere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.graph import Graph
from core.distill.students._base import Routed, Shown, Student, StudentModule
from core.distill.students._sphere import emit_keep_length, emit_step, emit_unit
from core.distill.teachers._base import RotationTeacher
from core.rotations.planes import leading_planes
from core.rotations.sphere import step_along, typical_length, unit
from core.specs.students import GeodesicAttention

SHARPNESS = 20.0
"""Inverse temperature over the slots at the start, for queries of length 1."""
OWN = 6.0
"""Log odds, at the start, of a slot's own cluster over any other."""
GAIN = 4.0
"""What a cluster of weight 1 multiplies its hidden units by at the start."""
BLOCK_ROWS = 4096
"""Queries mapped at a time where no gradient is kept."""


class GeodesicAttentionStudent(StudentModule):
    """``w = softmax(q K^T) softmax(V)``; ``step = ((q P) * (w M)) D``; the exponential map at q G.

    Each of S slots holds a key and a distribution over the clusters, so that the attention is a
    convex w that the teacher's own can teach. The MLP is a bilinear gated one (Shazeer 2020,
    section 2): linear in the query for given w, as the teacher's small rotations are. D starts at
    zero, so that untrained this is the anchor's map.
    """

    takes_weights = False

    def __init__(self, *, dim: int, clusters: int, slots: int, hidden: int) -> None:
        super().__init__()
        self.config = {
            "name": "geodesic_attention",
            "dim": dim,
            "clusters": clusters,
            "slots": slots,
            "hidden": hidden,
        }
        self.anchor: Tensor
        self.length: Tensor
        self.register_buffer("anchor", torch.eye(dim))
        self.register_buffer("length", torch.ones(()))
        self.keys = nn.Parameter(torch.zeros(slots, dim))
        self.values = nn.Parameter(torch.zeros(slots, clusters))
        self.mix = nn.Parameter(torch.zeros(clusters, hidden))
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to [B, d]."""
        parts = [self._map(part, part @ self.anchor).vectors for part in queries.split(BLOCK_ROWS)]
        return self.with_lengths(torch.cat(parts), queries)

    def routed(self, shown: Shown) -> Routed:
        """Map training queries; its own attention is the router."""
        return self._map(shown.queries, shown.anchored)

    def _map(self, queries: Tensor, x: Tensor) -> Routed:
        # Queries over their typical length, divided where the rows are narrower.
        attention = (queries @ self.keys.T / self.length).softmax(-1)  # [B, S]
        own = attention @ self.values.softmax(-1)  # [B, C]
        step = self.down(self.up(queries) / self.length * (own @ self.mix))
        vectors = step_along(unit(x), step)
        smallest = torch.finfo(own.dtype).tiny
        return Routed(vectors, own.clamp(min=smallest).log())

    def gentle(self) -> list[nn.Parameter]:
        """What goes into the step: its entries are a few hundredths."""
        return [*self.up.parameters(), *self.down.parameters()]

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph."""
        scaled = graph.op("Div", queries, graph.constant(self.length))
        scores = graph.op("MatMul", scaled, graph.constant(self.keys.T))
        attention = graph.op("Softmax", scores, axis=-1)
        own = graph.op("MatMul", attention, graph.constant(self.values.softmax(-1)))
        gate = graph.op("MatMul", own, graph.constant(self.mix))
        hidden = graph.op("Mul", graph.linear(self.up, scaled), gate)
        x = graph.op("MatMul", queries, graph.constant(self.anchor))
        vectors = emit_step(graph, emit_unit(graph, x), graph.linear(self.down, hidden))
        return emit_keep_length(graph, vectors, queries)


def build(spec: GeodesicAttention, teacher: RotationTeacher, seed: int) -> GeodesicAttentionStudent:
    """Take slots from training queries that the seed picks, hidden units from clusters' planes."""
    rows, dim = teacher.model.queries.shape
    clusters = len(teacher.bivectors)
    student = GeodesicAttentionStudent(
        dim=dim, clusters=clusters, slots=spec.slots, hidden=spec.hidden
    )
    queries = torch.from_numpy(teacher.model.queries)
    cluster_of = torch.from_numpy(teacher.model.cluster_of)
    picked = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    picked = picked[: len(student.keys)]
    with torch.no_grad():
        student.anchor.copy_(teacher.anchor)
        student.length.copy_(typical_length(queries))
        student.keys.copy_(SHARPNESS / student.length * queries[picked])
        student.values.copy_(OWN * functional.one_hot(cluster_of[picked], clusters))
        numbers = torch.arange(spec.hidden)
        student.mix.copy_(GAIN * functional.one_hot(numbers % clusters, clusters).T)
        student.up.weight.copy_(_directions(teacher, spec.hidden))
        student.down.weight.zero_()
    return student


def _directions(teacher: RotationTeacher, hidden: int) -> Tensor:
    """[hidden, d]: unit i measures direction i // C of cluster i % C's planes, after the anchor.

    Where a cluster has no further direction, the caller's generator draws one.
    """
    clusters, dim, _ = teacher.bivectors.shape
    each = -(-hidden // clusters)
    planes = min(-(-each // 2), dim // 2)
    bases = leading_planes(teacher.bivectors.cpu(), planes).bases.mT  # [C, 2m, d]
    rest = torch.randn(clusters, max(0, each - 2 * planes), dim) * dim**-0.5
    wide = torch.cat([bases.float(), rest], dim=1)[:, :each]  # [C, each, d]
    return wide.transpose(0, 1).reshape(-1, dim)[:hidden] @ teacher.anchor.cpu().float().T


def restore(config: Mapping[str, Any]) -> GeodesicAttentionStudent:
    """Build from a saved config, on zeros."""
    return GeodesicAttentionStudent(**{k: value for k, value in config.items() if k != "name"})


STUDENT = Student(spec=GeodesicAttention, build=build, restore=restore)
