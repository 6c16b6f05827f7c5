"""Three ways to turn a query by one weight per plane, in torch and in ONNX.

Each puts the whole weight in one plane to the same rotation of it; they differ where several
planes have a share. Disjoint planes commute, so that two of the three agree on them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from onnx import GraphProto, TensorProto, helper
from torch import Tensor

from core.distill.graph import Graph
from core.rotations.plane_turns import (
    bases_of,
    blend_series,
    rotate,
    rotate_by_blend,
    rotate_in_order,
)


def turn_angles(form: str, weights: Tensor, scale: float, constant: Tensor | None) -> Tensor:
    """Return the angles [B, m] (or [m] for ``additive``, which weighs rotations) in radians."""
    angles = weights.new_full(weights.shape[1:], scale) if form == "additive" else weights * scale
    return angles if constant is None else angles + constant


def turn(
    form: str,
    x: Tensor,
    planes: Tensor,
    weights: Tensor,
    angles: Tensor,
    *,
    disjoint: bool,
    radius: float,
) -> Tensor:
    """Turn each row by its own weights.

    Args:
        form: additive, sum_i w_i R_i(theta_i) q, which is shorter than q; composed, the product
            of R_i(theta_i), first to last; bivector_blend, exp(sum_i theta_i P_i).
        x: [B, d].
        planes: [m, 2, d].
        weights: [B, m], convex.
        angles: of ``turn_angles``.
        disjoint: whether the planes are orthogonal to each other; both rotations are then one.
        radius: a bound of the sum of a row's |angles|; the same for every batch, so that a row's
            answer is its own.
    """
    if form == "additive":
        # sum_i w_i R_i q = q + sum_i w_i (R_i q - q), and R_i q - q lies in plane i.
        bases = bases_of(planes)
        return x + _weighed_change(x @ bases, weights, angles) @ bases.mT
    if disjoint:
        return rotate(x, planes, angles)
    if form == "composed":
        return rotate_in_order(x, planes, angles)
    return rotate_by_blend(x, planes, angles, radius=radius)


def _weighed_change(coordinates: Tensor, weights: Tensor, angles: Tensor) -> Tensor:
    along, across = coordinates[:, 0::2], coordinates[:, 1::2]
    versine, sine = -2 * (angles / 2).sin().square(), angles.sin()
    change = [along * versine - across * sine, along * sine + across * versine]
    return (torch.stack(change, dim=-1) * weights[..., None]).flatten(-2)


class TurnGraph:
    """The same, node by node."""

    def __init__(self, graph: Graph, planes: Tensor) -> None:
        self.graph, self.planes = graph, planes.detach()

    # Constants that a form does not use would stand in the file all the same.

    @cached_property
    def first(self) -> str:
        """[d, m]: every plane's first vector."""
        return self.graph.constant(self.planes[:, 0].T)

    @cached_property
    def second(self) -> str:
        """[d, m]: every plane's second vector."""
        return self.graph.constant(self.planes[:, 1].T)

    @cached_property
    def back(self) -> str:
        """[2m, d]: all first vectors, then all second ones."""
        return self.graph.constant(torch.cat([self.planes[:, 0], self.planes[:, 1]]))

    def turn(
        self, form: str, x: str, weights: str, angles: str, *, disjoint: bool, radius: float
    ) -> str:
        """Add ``turn``; ``radius`` bounds the sum of a row's angles."""
        if form == "additive" or disjoint:
            weighed = weights if form == "additive" else None
            change = self._change(self._coordinates(x), angles, weighed)
            return self.graph.op("Add", x, change)
        if form == "composed":
            return self._in_order(x, angles)
        return self._blend(x, angles, radius)

    def _coordinates(self, x: str) -> tuple[str, str]:
        graph = self.graph
        return graph.op("MatMul", x, self.first), graph.op("MatMul", x, self.second)

    def _change(self, coordinates: tuple[str, str], angles: str, weights: str | None) -> str:
        """What the rotations add to a row: [B, d]."""
        ends: Iterable[str] = plane_change(self.graph, *coordinates, angles)
        if weights is not None:
            ends = (self.graph.op("Mul", end, weights) for end in ends)
        return self.graph.op("MatMul", self.graph.op("Concat", *ends, axis=1), self.back)

    def _in_order(self, x: str, angles: str) -> str:
        """One Scan over the planes."""
        graph = self.graph
        steps = graph.op("Transpose", angles, perm=[1, 0])
        steps = graph.op("Unsqueeze", steps, graph.axes(2))  # [m, B, 1]
        body = _plane_graph(self.planes.shape[2], f"{graph.prefix}plane_{len(graph.nodes)}_")
        return graph.scan(body, x, [graph.constant(self.planes), steps], backwards=False)

    def _blend(self, x: str, angles: str, radius: float) -> str:
        """The Chebyshev action, written out for one radius."""
        graph = self.graph
        coefficients, reach = blend_series(radius)
        result = graph.op("Mul", x, graph.constant(coefficients[0]))
        if len(coefficients) == 1:
            return result
        before, now = x, self._moved(x, angles, 1 / reach)
        for index, coefficient in enumerate(coefficients[1:]):
            if index:
                step = self._moved(now, angles, 2 / reach)
                now, before = graph.op("Add", step, before), now
            share = graph.op("Mul", now, graph.constant(coefficient))
            result = graph.op("Add", result, share)
        return result

    def _moved(self, x: str, angles: str, scale: float) -> str:
        graph = self.graph
        along, across = self._coordinates(x)
        turned = graph.op("Mul", angles, graph.constant(scale))
        ends = [graph.op("Neg", graph.op("Mul", across, turned)), graph.op("Mul", along, turned)]
        return graph.op("MatMul", graph.op("Concat", *ends, axis=1), self.back)


def plane_change(graph: Graph, along: str, across: str, angles: str) -> tuple[str, str]:
    """Add what a rotation changes of both coordinates in its planes; cos - 1 by a half angle."""
    sine = graph.op("Sin", angles)
    half = graph.op("Sin", graph.op("Mul", angles, graph.constant(0.5)))
    versine = graph.op("Mul", graph.op("Mul", half, half), graph.constant(-2.0))
    first = graph.op("Sub", graph.op("Mul", along, versine), graph.op("Mul", across, sine))
    second = graph.op("Add", graph.op("Mul", along, sine), graph.op("Mul", across, versine))
    return first, second


def _plane_graph(dim: int, prefix: str) -> GraphProto:
    """One plane: (x [B, d]; plane [2, d], angle [B, 1]) -> x."""
    graph = Graph(prefix)
    state, plane, angle = (f"{prefix}{name}" for name in ("x", "plane", "angle"))
    coordinates = graph.op("MatMul", state, graph.op("Transpose", plane, perm=[1, 0]))
    along = graph.op("Split", coordinates, graph.axes(1, 1), outputs=2, axis=1)
    ends = plane_change(graph, along, f"{along}.1", angle)
    moved = graph.op("MatMul", graph.op("Concat", *ends, axis=1), plane)
    result = graph.op("Add", state, moved)
    shapes: dict[str, list[str | int]] = {
        state: ["batch", dim],
        plane: [2, dim],
        angle: ["batch", 1],
    }
    return helper.make_graph(
        graph.nodes,
        f"{prefix}turn",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, ["batch", dim])],
        initializer=graph.constants,
    )
