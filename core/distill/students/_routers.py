"""What weighs the clusters for a query: attention over training queries, or a small network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.graph import Graph
from core.distill.routing import nearest
from core.distill.teachers._base import TeacherModel
from core.errors import SpecInvalid

START_SHARPNESS = 10.0
"""Inverse temperature over the centroids that an untrained learnt router starts from."""


class ExactRouter(nn.Module):
    """The teacher's own routing: softmax over the nearest training queries, merged by cluster."""

    def __init__(
        self, *, dim: int, rows: int, clusters: int, top_k: int, temperature: float
    ) -> None:
        super().__init__()
        self.config = {
            "kind": "exact",
            "dim": dim,
            "rows": rows,
            "clusters": clusters,
            "top_k": top_k,
            "temperature": temperature,
        }
        self.clusters, self.top_k, self.temperature = clusters, min(top_k, rows), temperature
        self.keys: Tensor
        self.cluster_of: Tensor
        self.register_buffer("keys", torch.zeros(rows, dim))
        self.register_buffer("cluster_of", torch.zeros(rows, dtype=torch.int64))

    @classmethod
    def of(cls, teacher: TeacherModel) -> ExactRouter:
        """Copy the teacher's training queries."""
        if teacher.routes_over != "queries":
            raise SpecInvalid(
                f"student.router 'exact' copies a routing over training queries; this teacher "
                f"routes over {teacher.routes_over}: allowed for it: 'learnt'",
                pointer="/student/router",
            )
        rows, dim = teacher.model.queries.shape
        router = cls(
            dim=dim,
            rows=rows,
            clusters=len(teacher.model.rotations),
            top_k=teacher.top_k,
            temperature=teacher.temperature,
        )
        router.keys.copy_(torch.from_numpy(teacher.model.queries))
        router.cluster_of.copy_(torch.from_numpy(teacher.model.cluster_of))
        return router

    def log_weights(self, queries: Tensor) -> Tensor:
        """[B, d] -> [B, C]; -inf where a cluster has no kept neighbour."""
        rows, similarity = nearest(queries, self.keys, top_k=self.top_k)
        weights = (similarity / self.temperature).softmax(dim=1)  # [B, k]
        dense = weights.new_zeros(len(queries), self.clusters)
        return dense.scatter_add(1, self.cluster_of[rows], weights).log()

    def emit(self, graph: Graph, queries: str) -> str:
        """Add the weights [B, C] to an ONNX graph."""
        scores = graph.op("MatMul", queries, graph.constant(self.keys.T))
        values = graph.op("TopK", scores, graph.axes(self.top_k), outputs=2, axis=-1)
        rows = f"{values}.1"
        sharp = graph.op("Div", values, graph.constant(float(self.temperature)))
        weights = graph.op("Softmax", sharp, axis=-1)  # [B, k]
        clusters = graph.op("Gather", graph.constant(self.cluster_of), rows, axis=0)
        clusters = graph.op("Unsqueeze", clusters, graph.axes(2))  # [B, k, 1]
        same = graph.op("Equal", clusters, graph.constant(torch.arange(self.clusters)))
        same = graph.op("Cast", same, to=1)  # [B, k, C] float32
        shares = graph.op("Mul", same, graph.op("Unsqueeze", weights, graph.axes(2)))
        return graph.op("ReduceSum", shares, graph.axes(1), keepdims=0)


class LearntRouter(nn.Module):
    """Softmax over clusters of a linear map plus one hidden layer: d - hidden - C.

    It sees queries over the length the training queries have on average (root mean square), so
    that the same data in other units trains the same router.
    """

    def __init__(self, *, dim: int, hidden: int, clusters: int) -> None:
        super().__init__()
        self.config = {"kind": "learnt", "dim": dim, "hidden": hidden, "clusters": clusters}
        self.length: Tensor
        self.register_buffer("length", torch.ones(()))
        self.straight = nn.Linear(dim, clusters)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, clusters, bias=False)

    @classmethod
    def of(cls, teacher: TeacherModel, *, hidden: int, seed: int) -> LearntRouter:
        """Start from the clusters' centroids; the hidden layer adds nothing yet."""
        clusters, dim = teacher.model.centroids.shape
        router = cls(dim=dim, hidden=hidden, clusters=clusters)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            units = functional.normalize(torch.from_numpy(teacher.model.centroids), dim=1)
            router.straight.weight.copy_(START_SHARPNESS * units)
            router.straight.bias.zero_()
            squares = torch.from_numpy(teacher.model.queries).double().square().sum(1)
            router.length.copy_(squares.mean().sqrt())
            # Scaled queries have length 1: entries of size 1 give hidden units inputs of size 1.
            router.up.weight.copy_(torch.randn(hidden, dim, generator=generator))
            router.up.bias.zero_()
            router.down.weight.zero_()
        return router

    def log_weights(self, queries: Tensor) -> Tensor:
        """[B, d] -> [B, C] log weights."""
        scaled = queries / self.length
        hidden = functional.gelu(self.up(scaled))
        logits = self.straight(scaled) + self.down(hidden)
        return functional.log_softmax(logits, dim=-1)

    def emit(self, graph: Graph, queries: str) -> str:
        """Add the weights [B, C] to an ONNX graph."""
        scaled = graph.op("Div", queries, graph.constant(self.length))
        hidden = graph.op("Gelu", graph.linear(self.up, scaled))
        logits = graph.op(
            "Add", graph.linear(self.straight, scaled), graph.linear(self.down, hidden)
        )
        return graph.op("Softmax", logits, axis=-1)
