"""Document 000's own student: rotations in a codebook's planes, by attention weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from core.distill.graph import Graph
from core.distill.students._base import (
    Routed,
    Shown,
    Student,
    StudentModule,
    plane_parameters,
    sizes_of,
)
from core.distill.students._sphere import emit_keep_length
from core.distill.students._turns import TurnGraph, turn, turn_angles
from core.distill.teachers._base import RotationTeacher
from core.errors import DataInvalid
from core.rotations.codebook import build as build_codebook
from core.rotations.codebook import canonical
from core.rotations.sphere import keep_length
from core.specs.canonical import Canonical
from core.specs.codebooks import MOST_PLANES, CanonicalPlanes, check_planes
from core.tensors.codebooks import Codebook

BLOCK_ROWS = 4096
"""Queries mapped at a time where no gradient is kept."""
CANCELLED = 1e-4
"""Length of a sum of rotations, over the query's, below which it is rounding."""
SCALE_OF_ONE = math.log(math.e - 1)
"""What softplus maps to 1."""


class CanonicalLayer(nn.Module):
    """Attend from the query to one learnt key per plane; turn each plane by its weight."""

    def __init__(self, dim: int, spec: Canonical, *, planes: int, disjoint: bool) -> None:
        super().__init__()
        self.heads, self.width, self.planes = spec.heads, dim // spec.heads, planes
        self.form, self.disjoint = spec.transformer_type, disjoint
        self.angle_scale = spec.angle_scale
        self.query = nn.Linear(dim, dim)
        self.keys = nn.Parameter(torch.randn(planes, dim) * dim**-0.5)
        self.angles = nn.Parameter(torch.zeros(planes)) if spec.bias == "angle" else None
        self.vector = nn.Parameter(torch.zeros(dim)) if spec.bias == "vector" else None

    def forward(self, x: Tensor, planes: Tensor) -> Tensor:
        """[B, d] -> [B, d] of the same lengths."""
        weights = self.weights(x)
        turned = turn(
            self.form,
            x,
            planes,
            weights,
            turn_angles(self.form, weights, self.angle_scale, self.angles),
            disjoint=self.disjoint,
            radius=self.radius(),
        )
        if self.vector is not None:
            turned = turned + x.norm(dim=1, keepdim=True) * self.vector
        if self.form == "additive" or self.vector is not None:
            least = CANCELLED * x.norm(dim=1, keepdim=True)
            turned = torch.where(turned.norm(dim=1, keepdim=True) > least, turned, x)
        return keep_length(turned, x)

    def weights(self, x: Tensor) -> Tensor:
        """Return the mean softmax weights of the heads: [B, planes], rows sum to 1."""
        B = len(x)
        asked = self.query(x).view(B, self.heads, self.width).transpose(0, 1)  # [H, B, d/H]
        weights: Tensor = (asked @ self._keys() * self.width**-0.5).softmax(-1).mean(0)
        return weights

    def radius(self) -> float:
        """Bound the sum of a row's |angles|."""
        constant = 0.0 if self.angles is None else float(self.angles.detach().abs().sum())
        return self.angle_scale + constant

    def _keys(self) -> Tensor:
        return self.keys.view(self.planes, self.heads, self.width).permute(1, 2, 0)

    def emit(self, graph: Graph, x: str, turns: TurnGraph) -> str:
        """Add the layer to an ONNX graph."""
        weights = self._emit_weights(graph, x)
        angles = self._emit_angles(graph, weights)
        turned = turns.turn(
            self.form, x, weights, angles, disjoint=self.disjoint, radius=self.radius()
        )
        if self.vector is not None:
            moved = graph.op("Mul", graph.norm(x), graph.constant(self.vector))
            turned = graph.op("Add", turned, moved)
        if self.form == "additive" or self.vector is not None:
            least = graph.op("Mul", graph.norm(x), graph.constant(CANCELLED))
            kept = graph.op("Greater", graph.norm(turned), least)
            turned = graph.op("Where", kept, turned, x)
        return emit_keep_length(graph, turned, x)

    def _emit_weights(self, graph: Graph, x: str) -> str:
        # A product per head: onnxruntime's batched one divides by zero where no query is asked.
        asked = graph.linear(self.query, x)
        sizes = graph.axes(*[self.width] * self.heads)
        parts = graph.op("Split", asked, sizes, outputs=self.heads, axis=1)
        weights = []
        for head, keys in enumerate(self._keys() * self.width**-0.5):  # [d/H, planes] each
            part = f"{parts}.{head}" if head else parts
            scores = graph.op("MatMul", part, graph.constant(keys))
            weights.append(graph.op("Softmax", scores, axis=-1))
        return graph.op("Mul", graph.op("Sum", *weights), graph.constant(1 / self.heads))

    def _emit_angles(self, graph: Graph, weights: str) -> str:
        constant = torch.zeros(self.planes) if self.angles is None else self.angles.detach().cpu()
        if self.form == "additive":
            return graph.constant(self.angle_scale + constant)
        angles = graph.op("Mul", weights, graph.constant(self.angle_scale))
        return graph.op("Add", angles, graph.constant(constant))


class CanonicalStudent(StudentModule):
    """Layers of such turns. Lengths stay, for every form and every bias.

    Softmax weights sum to 1 over the planes, so on canonical planes and at an ``angle_scale`` of
    1 a layer moves a query by little whatever it learns: the cosine to the teacher stays near
    that of the query itself. Document 000 also multiplies by a learnt softplus scale;
    ``compat="legacy"`` does so. No cosine and no ranking sees that scale, so the raw figures stay
    what they are; it only breaks the lengths, by one factor for all queries. What the source
    documents leave open (where the scale stands, how ``additive`` weighs) is chosen here.

    ``additive`` has no direction where its rotations cancel, as half of a plane at pi with half
    of another can, nor has a sum with a bias vector: a layer then leaves its query as it is.
    """

    takes_weights = has_router = False

    def free_parameters(self) -> int:
        """Count the planes too where they are the teacher's, not the axes."""
        own = super().free_parameters()
        if self.anchor is None:
            return own
        m, _, dim = self.planes.shape
        disjoint = self.config["disjoint"]
        return own + (plane_parameters(dim, m) if disjoint else 2 * m * (dim - 2))

    def __init__(
        self,
        spec: Canonical,
        *,
        dim: int,
        planes: int | None = None,
        method: str = "canonical",
        disjoint: bool = True,
    ) -> None:
        """Build on zero planes, unless they are canonical.

        Args:
            spec: what is asked, but for the planes where their number is given.
            dim: d.
            planes: of the codebook that ``planes`` are copied from; None: canonical ones.
            method: of that codebook.
            disjoint: whether its planes are.

        Raises:
            SpecInvalid: more planes than allowed, or heads that do not divide the width.
        """
        super().__init__()
        spec.check_heads(dim)
        own = planes is None
        n_components = spec.planes().n_components if planes is None else planes
        check_planes(n_components, dim, "/codebook", most=None if own else MOST_PLANES)
        self.config = {
            **spec.model_dump(mode="json", exclude={"codebook"}),
            "n_components": n_components,
            "dim": dim,
            "method": method,
            "disjoint": disjoint,
        }
        self.layers = nn.ModuleList(
            CanonicalLayer(dim, spec, planes=n_components, disjoint=disjoint)
            for _ in range(spec.layers)
        )
        self.scale = nn.Parameter(torch.tensor(SCALE_OF_ONE)) if spec.compat == "legacy" else None
        self.planes: Tensor
        self.anchor: Tensor | None
        axes = canonical(dim, n_components).planes if own else np.zeros((n_components, 2, dim))
        # Canonical planes are not kept: they follow from the config.
        self.register_buffer("planes", torch.tensor(axes, dtype=torch.float32), persistent=not own)
        self.register_buffer("anchor", None if own else torch.eye(dim))
        self.takes_anchored = not own

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to [B, d]."""
        parts = [self._map(self._start(part)) for part in queries.split(BLOCK_ROWS)]
        return self.with_lengths(torch.cat(parts), queries)

    def _start(self, queries: Tensor) -> Tensor:
        return queries if self.anchor is None else queries @ self.anchor

    def _map(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.planes)
        return x

    def with_lengths(self, vectors: Tensor, queries: Tensor) -> Tensor:
        """Give the lengths of the queries, times the legacy scale, which training cannot see."""
        kept = super().with_lengths(vectors, queries)
        return kept if self.scale is None else kept * functional.softplus(self.scale)

    def routed(self, shown: Shown) -> Routed:
        """Map training queries; there is no router over clusters: it finds nothing."""
        return Routed(self._map(shown.anchored if self.takes_anchored else shown.queries))

    def gentle(self) -> list[nn.Parameter]:
        """The scale: no angle between vectors pulls at it, so decay alone would move it."""
        return [] if self.scale is None else [self.scale]

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph."""
        turns = TurnGraph(graph, self.planes)
        x = queries
        if self.anchor is not None:
            x = graph.op("MatMul", x, graph.constant(self.anchor))
        for layer in self.layers:
            assert isinstance(layer, CanonicalLayer)
            x = layer.emit(graph, x, turns)
        x = emit_keep_length(graph, x, queries)
        if self.scale is None:
            return x
        return graph.op("Mul", x, graph.constant(functional.softplus(self.scale)))


def build(spec: Canonical, teacher: RotationTeacher, seed: int) -> CanonicalStudent:
    """Start near the identity, or near G where the planes are the teacher's own.

    Args:
        spec: which planes, and how they turn.
        teacher: over a model of the training queries alone: clusters weigh by those.
        seed: of a randomized codebook; the caller seeded torch with it.
    """
    planes, dim = spec.planes(), teacher.model.queries.shape[1]
    spec.check_sizes(sizes_of(teacher))
    if isinstance(planes, CanonicalPlanes):  # made from nothing: no logarithm is asked for
        return CanonicalStudent(spec, dim=dim)
    codebook = build_codebook(
        planes, teacher.bivectors.cpu(), weights=_cluster_sizes(teacher), seed=seed
    )
    return build_on(spec, teacher, codebook)


def build_on(spec: Canonical, teacher: RotationTeacher, codebook: Codebook) -> CanonicalStudent:
    """Start near G, on the planes of a codebook.

    Raises:
        DataInvalid: it is of another width.
        SpecInvalid: it has too many planes, or the heads do not divide the width.
    """
    dim, disjoint = teacher.model.queries.shape[1], codebook.disjoint
    if codebook.dim != dim:
        raise DataInvalid(f"codebook: {codebook.dim} dimensions, the model {dim}")
    # Uploaded axes may be any planes: whatever made them, they are kept beside the weights.
    method = "given" if codebook.method == "canonical" else codebook.method
    count = len(codebook.planes)
    student = CanonicalStudent(spec, dim=dim, planes=count, method=method, disjoint=disjoint)
    student.planes.copy_(torch.from_numpy(codebook.planes))
    assert student.anchor is not None
    student.anchor.copy_(teacher.anchor)
    return student


def _cluster_sizes(teacher: RotationTeacher) -> Tensor:
    """[C]: training queries of each cluster."""
    sizes = np.bincount(teacher.model.cluster_of, minlength=len(teacher.bivectors))
    return torch.from_numpy(sizes)


def restore(config: Mapping[str, Any]) -> CanonicalStudent:
    """Build from a saved config, on zero planes where they are not canonical.

    A config of before there were codebooks says only dim, n_components, layers and heads.

    Raises:
        DataInvalid: a value is not what a spec allows.
    """
    told = dict(config)
    dim, count = told.pop("dim"), told.pop("n_components")
    method, disjoint = told.pop("method", "canonical"), told.pop("disjoint", True)
    try:
        if method == "canonical":
            return CanonicalStudent(Canonical(n_components=count, **told), dim=dim)
        spec = Canonical(**told)
    except ValidationError as error:
        raise DataInvalid(f"the student's config: {error}") from error
    return CanonicalStudent(spec, dim=dim, planes=count, method=method, disjoint=disjoint)


STUDENT = Student(spec=Canonical, build=build, restore=restore, build_on=build_on)
