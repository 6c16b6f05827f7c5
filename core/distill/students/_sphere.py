"""Lengths kept, and steps along the sphere, as nodes of an ONNX graph."""

from __future__ import annotations

import torch

from core.distill.graph import Graph
from core.rotations.sphere import SMALLEST


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
