"""What weighs the clusters for a query: attention over training queries, or a small network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.graph import Graph
from core.distill.routing import EqualRows, nearest
from core.distill.students._base import Shown
from core.distill.teachers._base import RotationTeacher
from core.errors import SpecInvalid
from core.rotations.sphere import typical_length
from core.specs.students import ROUTER_HIDDEN, ROUTER_RANK, Routing

START_SHARPNESS = 10.0
"""Inverse temperature over the centroids that an untrained learnt router starts from."""


class KeyRouter(nn.Module):
    """Softmax over the nearest of some keys, merged by cluster."""

    config: dict[str, Any]
    takes_weights = has_weights = False
    keys: Tensor
    """[n, r]."""
    cluster_of: Tensor
    """[n] int64."""

    def __init__(
        self, *, width: int, rows: int, clusters: int, top_k: int, temperature: float
    ) -> None:
        super().__init__()
        self.clusters, self.top_k, self.temperature = clusters, min(top_k, rows), temperature
        self.register_buffer("keys", torch.zeros(rows, width))
        self.register_buffer("cluster_of", torch.zeros(rows, dtype=torch.int64))

    def log_weights(self, queries: Tensor) -> Tensor:
        """[B, d] -> [B, C]; -inf where a cluster has no kept neighbour."""
        rows, similarity = nearest(self.project(queries), self.keys, top_k=self.top_k)
        return self._merged(rows, similarity)

    def project(self, queries: Tensor) -> Tensor:
        """Bring [B, d] queries to where the keys are: [B, r]."""
        return queries

    def emit_project(self, graph: Graph, queries: str) -> str:
        """Add ``project`` to an ONNX graph."""
        del graph
        return queries

    def emit(self, graph: Graph, queries: str) -> str:
        """Add the weights [B, C] to an ONNX graph."""
        queries = self.emit_project(graph, queries)
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

    def _merged(self, rows: Tensor, similarity: Tensor) -> Tensor:
        """[B, k] neighbours and inner products -> [B, C] log weights."""
        weights = (similarity / self.temperature).softmax(dim=1)
        dense = weights.new_zeros(len(rows), self.clusters)
        return dense.scatter_add(1, self.cluster_of[rows], weights).log()


class ExactRouter(KeyRouter):
    """The teacher's own routing: all its training queries are the keys."""

    takes_weights = True
    """In training it takes the teacher's weights."""

    def __init__(
        self, *, dim: int, rows: int, clusters: int, top_k: int, temperature: float
    ) -> None:
        super().__init__(
            width=dim, rows=rows, clusters=clusters, top_k=top_k, temperature=temperature
        )
        self.config = {
            "kind": "exact",
            "dim": dim,
            "rows": rows,
            "clusters": clusters,
            "top_k": top_k,
            "temperature": temperature,
        }

    @classmethod
    def of(cls, teacher: RotationTeacher) -> ExactRouter:
        """Copy the teacher's training queries."""
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

    def training_weights(self, shown: Shown) -> tuple[Tensor, Tensor | None]:
        """Take the teacher's weights: a training query must not find itself."""
        return shown.weights, None


class ProjectedRouter(KeyRouter):
    """The teacher's routing in the principal subspace of its training queries.

    P holds the leading right singular vectors of the keys K, uncentred: of all rank r maps
    (q P) (K P)^T is nearest to q K^T over the training queries (Eckart and Young 1936). Nothing
    is trained. On the WordNet pairs 128 of 384 dimensions keep 79 % of the squared length, and
    the blend closes 0.93 of the gap; 64 close 0.86.
    """

    def __init__(
        self, *, dim: int, rank: int, rows: int, clusters: int, top_k: int, temperature: float
    ) -> None:
        super().__init__(
            width=rank, rows=rows, clusters=clusters, top_k=top_k, temperature=temperature
        )
        self.config = {
            "kind": "projected",
            "dim": dim,
            "rank": rank,
            "rows": rows,
            "clusters": clusters,
            "top_k": top_k,
            "temperature": temperature,
        }
        self.projection: Tensor
        self.register_buffer("projection", torch.zeros(dim, rank))

    @classmethod
    def of(cls, teacher: RotationTeacher, *, rank: int) -> ProjectedRouter:
        """Project the teacher's training queries; ``rank`` is cut to their width."""
        rows, dim = teacher.model.queries.shape
        router = cls(
            dim=dim,
            rank=min(rank, dim),
            rows=rows,
            clusters=len(teacher.model.rotations),
            top_k=teacher.top_k,
            temperature=teacher.temperature,
        )
        queries = torch.from_numpy(teacher.model.queries).double()
        vectors = torch.linalg.eigh(queries.T @ queries).eigenvectors.flip(1)  # descending
        projection = vectors[:, : min(rank, dim)]
        router.projection.copy_(projection)
        # Equal queries have equal keys, to the bit: in training they are left out together.
        distinct, which = queries.unique(dim=0, return_inverse=True)
        router.keys.copy_((distinct @ projection)[which])
        router.cluster_of.copy_(torch.from_numpy(teacher.model.cluster_of))
        return router

    def project(self, queries: Tensor) -> Tensor:
        """[B, d] -> [B, r]."""
        return queries @ self.projection

    def emit_project(self, graph: Graph, queries: str) -> str:
        """Add ``project`` to an ONNX graph."""
        return graph.op("MatMul", queries, graph.constant(self.projection))

    def training_weights(self, shown: Shown) -> tuple[Tensor, Tensor | None]:
        """Route as ever, but past the excluded rows and their duplicates, as the teacher does.

        Not by the teacher's weights: what is trained behind this router should see its errors. In
        float32 whatever the rest of
        the training narrows to: neighbours are found by what the router does when it is used.
        """
        with torch.autocast(shown.queries.device.type, enabled=False):
            asked = self.project(shown.queries.float())
            rows, similarity = nearest(
                asked,
                self.keys,
                top_k=self.top_k,
                exclude_rows=shown.exclude,
                equal_to=self._equal_to.to(shown.exclude.device),
            )
            return self._merged(rows, similarity).exp(), None

    @cached_property
    def _equal_to(self) -> Tensor:
        """[n] int64: the first key equal to each, found where training asks for it."""
        return torch.from_numpy(EqualRows.among(self.keys.cpu().numpy()).first)


class LearntRouter(nn.Module):
    """Softmax over clusters of a linear map plus one hidden layer: d - hidden - C.

    It sees queries over the length the training queries have on average (root mean square), so
    that the same data in other units trains the same router.
    """

    takes_weights = False
    has_weights = True
    """Its weights are its own, to be compared with the teacher's."""

    def __init__(self, *, dim: int, hidden: int, clusters: int) -> None:
        super().__init__()
        self.config = {"kind": "learnt", "dim": dim, "hidden": hidden, "clusters": clusters}
        self.length: Tensor
        self.register_buffer("length", torch.ones(()))
        self.straight = nn.Linear(dim, clusters)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, clusters, bias=False)

    @classmethod
    def of(cls, teacher: RotationTeacher, *, hidden: int, seed: int) -> LearntRouter:
        """Start from the clusters' centroids; the hidden layer adds nothing yet."""
        clusters, dim = teacher.model.centroids.shape
        router = cls(dim=dim, hidden=hidden, clusters=clusters)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            units = functional.normalize(torch.from_numpy(teacher.model.centroids), dim=1)
            router.straight.weight.copy_(START_SHARPNESS * units)
            router.straight.bias.zero_()
            router.length.copy_(typical_length(torch.from_numpy(teacher.model.queries)))
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

    def training_weights(self, shown: Shown) -> tuple[Tensor, Tensor | None]:
        """Route as ever; the log weights are there to be taught."""
        log_weights = self.log_weights(shown.queries)
        return log_weights.exp(), log_weights

    def emit(self, graph: Graph, queries: str) -> str:
        """Add the weights [B, C] to an ONNX graph."""
        scaled = graph.op("Div", queries, graph.constant(self.length))
        hidden = graph.op("Gelu", graph.linear(self.up, scaled))
        logits = graph.op(
            "Add", graph.linear(self.straight, scaled), graph.linear(self.down, hidden)
        )
        return graph.op("Softmax", logits, axis=-1)


Router = ExactRouter | ProjectedRouter | LearntRouter
KINDS: Mapping[str, type[Router]] = {
    "exact": ExactRouter,
    "projected": ProjectedRouter,
    "learnt": LearntRouter,
}


def build_router(spec: Routing, teacher: RotationTeacher, seed: int) -> Router:
    """Build the router a spec asks for, from the teacher.

    Raises:
        SpecInvalid: it copies a routing that the teacher does not have.
    """
    if spec.router != "learnt" and teacher.routes_over != "queries":
        raise SpecInvalid(
            f"student.router {spec.router!r} copies a routing over training queries; this teacher "
            f"routes over {teacher.routes_over}: allowed for it: 'learnt'",
            pointer="/student/router",
        )
    if spec.router == "exact":
        return ExactRouter.of(teacher)
    if spec.router == "projected":
        return ProjectedRouter.of(teacher, rank=spec.router_rank or ROUTER_RANK)
    return LearntRouter.of(teacher, hidden=spec.router_hidden or ROUTER_HIDDEN, seed=seed)


def restore_router(config: Mapping[str, Any]) -> Router:
    """Build a router from a saved config, on zeros.

    Raises:
        SpecInvalid: no such kind.
    """
    values = {key: value for key, value in config.items() if key != "kind"}
    kind = str(config.get("kind"))
    if kind not in KINDS:
        raise SpecInvalid(f"config.router.kind {kind!r}; allowed: {', '.join(KINDS)}")
    return KINDS[kind](**values)
