"""A multilayer perceptron over queries: what several students are or have inside."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.graph import Graph
from core.rotations.sphere import keep_length
from core.tensors.shards import Array


class Perceptron(nn.Module):
    """Linear layers with GELU between them, of queries less their mean, entries of size 1.

    Args:
        dim: d, width of the queries.
        hidden: of each hidden layer.
        layers: hidden ones.
        width: m, of the answers.
        dropout: of hidden units, while it trains.
        noise: length of what is added to a query while it trains, over its own; its length stays.
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
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        widths = [dim, *[hidden] * layers, width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] to [B, m]."""
        x = queries
        if self.training and self.noise:
            added = torch.randn_like(x) * (self.noise * x.shape[1] ** -0.5)
            x = keep_length(x + added * x.norm(dim=1, keepdim=True), x)
        x = (x - self.mean) / self.scale
        *inner, last = self.layers
        for layer in inner:
            x = functional.dropout(functional.gelu(layer(x)), self.dropout, self.training)
        answers: Tensor = last(x)
        return answers

    def fit_input(self, queries: Array) -> None:
        """Take the mean of [n, d] training queries, and how far their entries are from it."""
        wide = torch.from_numpy(queries).double()
        spread = (wide - wide.mean(0)).square().mean().sqrt()
        with torch.no_grad():
            self.mean.copy_(wide.mean(0))
            self.scale.copy_(spread if spread > 0 else torch.ones(()))

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph."""
        x = graph.op("Sub", queries, graph.constant(self.mean))
        x = graph.op("Div", x, graph.constant(self.scale))
        *inner, last = self.layers
        for layer in inner:
            assert isinstance(layer, nn.Linear)
            x = graph.op("Gelu", graph.linear(layer, x))
        assert isinstance(last, nn.Linear)
        return graph.linear(last, x)
