"""Lengths kept, and steps along the sphere, whose exponential map keeps them itself."""

from __future__ import annotations

import torch
from torch import Tensor

from core.distill.graph import Graph

SMALLEST = 1e-12
"""Squared length of a step below which it is taken for this: sin(t) / t is 1 there to float32."""


def step_along(units: Tensor, steps: Tensor) -> Tensor:
    """Walk from each unit vector along the part of its step that is tangent to it.

    exp_u(t) = cos(|t|) u + sin(|t|) t / |t|, t = s - (s u) u. A step of 0 stays; so does its
    gradient finite. From a zero row the step itself is the tangent: give the length back after.

    Args:
        units: [B, d], length 1 (or 0).
        steps: [B, d], radians.

    Returns:
        [B, d], length 1 where ``units`` has it.
    """
    tangent = steps - (steps * units).sum(-1, keepdim=True) * units
    length = tangent.square().sum(-1, keepdim=True).clamp(min=SMALLEST).sqrt()
    moved: Tensor = length.cos() * units + (length.sin() / length) * tangent
    return moved


def unit(vectors: Tensor) -> Tensor:
    """Scale rows to length 1; zero rows stay zero."""
    tiny = torch.finfo(vectors.dtype).tiny
    scaled: Tensor = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=tiny)
    return scaled


def keep_length(vectors: Tensor, like: Tensor) -> Tensor:
    """Scale rows to the lengths of ``like``: takes away what rounding added over many factors.

    Entries from 1e-15 to 1e15, all that stored embeddings have: squares of others leave float32.
    """
    own = vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
    kept: Tensor = vectors * (like.norm(dim=-1, keepdim=True) / own)
    return kept


def emit_step(graph: Graph, units: str, steps: str) -> str:
    """Add ``step_along`` to an ONNX graph."""
    axes = graph.axes(-1)
    inner = graph.op("ReduceSum", graph.op("Mul", steps, units), axes, keepdims=1)
    tangent = graph.op("Sub", steps, graph.op("Mul", inner, units))
    square = graph.op("ReduceSumSquare", tangent, axes, keepdims=1)
    length = graph.op("Sqrt", graph.op("Max", square, graph.constant(SMALLEST)))
    sinc = graph.op("Div", graph.op("Sin", length), length)
    stay = graph.op("Mul", graph.op("Cos", length), units)
    return graph.op("Add", stay, graph.op("Mul", sinc, tangent))


def emit_unit(graph: Graph, vectors: str) -> str:
    """Add ``unit`` to an ONNX graph."""
    return graph.op("Div", vectors, _emit_own(graph, vectors))


def emit_keep_length(graph: Graph, vectors: str, like: str) -> str:
    """Add ``keep_length`` to an ONNX graph; a zero query stays zero."""
    scale = graph.op("Div", graph.norm(like), _emit_own(graph, vectors))
    return graph.op("Mul", vectors, scale)


def _emit_own(graph: Graph, vectors: str) -> str:
    """Lengths by which a row can be divided."""
    tiny = graph.constant(torch.finfo(torch.float32).tiny)
    return graph.op("Max", graph.norm(vectors), tiny)
