"""Document 000's own student: rotations in the fixed planes (2i, 2i+1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.distill.graph import Graph
from core.distill.students._base import Routed, Student, StudentModule
from core.distill.teachers._base import BlendingTeacher
from core.specs.students import Canonical

RADIANS = 1.0
"""All of a layer's weight in one plane turns it by this much."""


class CanonicalLayer(nn.Module):
    """Attend from the query to one learnt key per plane; rotate each plane by its weight."""

    def __init__(self, dim: int, planes: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width, self.planes = heads, dim // heads, planes
        self.query = nn.Linear(dim, dim)
        self.keys = nn.Parameter(torch.randn(planes, dim) * dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, d] -> [B, d], each plane turned by its softmax weight times 1 rad."""
        B = len(x)
        asked = self.query(x).view(B, self.heads, self.width).transpose(0, 1)  # [H, B, d/H]
        keys = self.keys.view(self.planes, self.heads, self.width).permute(1, 2, 0)
        weights = (asked @ keys * self.width**-0.5).softmax(-1).mean(0)  # [B, planes]
        angle = weights * RADIANS
        cosine, sine = angle.cos(), angle.sin()
        pairs = x[:, : 2 * self.planes].view(B, self.planes, 2)
        along, across = pairs.unbind(-1)
        turned = torch.stack(
            [along * cosine - across * sine, along * sine + across * cosine], dim=-1
        )
        return torch.cat([turned.flatten(1), x[:, 2 * self.planes :]], dim=-1)

    def emit(self, graph: Graph, x: str) -> str:
        """Add the layer to an ONNX graph."""
        shape = graph.axes(0, self.heads, self.width)
        asked = graph.op("Reshape", graph.linear(self.query, x), shape)
        asked = graph.op("Transpose", asked, perm=[1, 0, 2])
        keys = self.keys.view(self.planes, self.heads, self.width).permute(1, 2, 0)
        scores = graph.op("MatMul", asked, graph.constant(keys * self.width**-0.5))
        weights = graph.op("Softmax", scores, axis=-1)
        angle = graph.op("ReduceMean", weights, graph.axes(0), keepdims=0)
        angle = graph.op("Mul", angle, graph.constant(RADIANS))
        cosine, sine = graph.op("Cos", angle), graph.op("Sin", angle)
        split = graph.op("Slice", x, graph.axes(0), graph.axes(2 * self.planes), graph.axes(1))
        rest = graph.op("Slice", x, graph.axes(2 * self.planes), graph.axes(2**31), graph.axes(1))
        pairs = graph.op("Reshape", split, graph.axes(0, self.planes, 2))
        along = graph.op("Gather", pairs, graph.constant(torch.tensor(0)), axis=2)
        across = graph.op("Gather", pairs, graph.constant(torch.tensor(1)), axis=2)
        first = graph.op("Sub", graph.op("Mul", along, cosine), graph.op("Mul", across, sine))
        second = graph.op("Add", graph.op("Mul", along, sine), graph.op("Mul", across, cosine))
        ends = [graph.op("Unsqueeze", end, graph.axes(2)) for end in (first, second)]
        turned = graph.op(
            "Reshape", graph.op("Concat", *ends, axis=2), graph.axes(0, 2 * self.planes)
        )
        return graph.op("Concat", turned, rest, axis=1)


class CanonicalStudent(StudentModule):
    """Layers of such rotations, composed; exact in disjoint planes, no learnt scale.

    Softmax weights sum to 1 over the planes, so a layer moves a query by little whatever it
    learns: the cosine to the teacher stays near that of the query itself. Document 000 adds a
    softplus scale, which cosines do not see and which breaks the length; it is left out.
    """

    takes_weights = has_router = False

    def __init__(self, *, dim: int, n_components: int, layers: int, heads: int) -> None:
        super().__init__()
        Canonical(n_components=n_components, layers=layers, heads=heads).check_width(dim)
        self.config = {
            "name": "canonical",
            "dim": dim,
            "n_components": n_components,
            "layers": layers,
            "heads": heads,
        }
        self.layers = nn.ModuleList(
            [CanonicalLayer(dim, n_components, heads) for _ in range(layers)]
        )

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to [B, d]."""
        for layer in self.layers:
            queries = layer(queries)
        return queries

    def routed(self, queries: Tensor, weights: Tensor) -> Routed:
        """Map training queries; there is no router over clusters, so weights say nothing."""
        del weights
        return Routed(self(queries))

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph."""
        for layer in self.layers:
            assert isinstance(layer, CanonicalLayer)
            queries = layer.emit(graph, queries)
        return queries


def build(spec: Canonical, teacher: BlendingTeacher, seed: int) -> CanonicalStudent:
    """Start near the identity, as document 000 does: nothing is taken from the teacher."""
    del seed  # the caller seeded torch with it
    return CanonicalStudent(
        dim=teacher.model.queries.shape[1],
        n_components=spec.n_components,
        layers=spec.layers,
        heads=spec.heads,
    )


def restore(config: Mapping[str, Any]) -> CanonicalStudent:
    """Build from a saved config."""
    return CanonicalStudent(**{key: value for key, value in config.items() if key != "name"})


STUDENT = Student(spec=Canonical, build=build, restore=restore)
