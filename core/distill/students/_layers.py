"""A multilayer perceptron over queries: what several students are or have inside."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.graph import Graph
from core.rotations.sphere import typical_length
from core.tensors.shards import Array


class Perceptron(nn.Module):
    """Linear layers with GELU between them, of queries over their typical length.

    Args:
        dim: d, width of the queries.
        hidden: of each hidden layer.
        layers: hidden ones.
        width: m, of the answers.
        dropout: of hidden units, while it trains.
        noise: length of what is added to a query while it trains, over its own.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        layers: int,
        width: int,
        dropout: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout, self.noise = dropout, noise
        self.length: Tensor
        self.register_buffer("length", torch.ones(()))
        widths = [dim, *[hidden] * layers, width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] to [B, m]."""
        x = queries / self.length
        if self.training and self.noise:
            added = torch.randn_like(x) * (self.noise * x.shape[1] ** -0.5)
            x = x + added * x.norm(dim=1, keepdim=True)
        *inner, last = self.layers
        for layer in inner:
            x = functional.dropout(functional.gelu(layer(x)), self.dropout, self.training)
        answers: Tensor = last(x)
        return answers

    def fit_length(self, queries: Array) -> None:
        """Take the typical length of [n, d] training queries."""
        with torch.no_grad():
            self.length.copy_(typical_length(torch.from_numpy(queries)))

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph."""
        x = graph.op("Div", queries, graph.constant(self.length))
        *inner, last = self.layers
        for layer in inner:
            assert isinstance(layer, nn.Linear)
            x = graph.op("Gelu", graph.linear(layer, x))
        assert isinstance(last, nn.Linear)
        return graph.linear(last, x)
