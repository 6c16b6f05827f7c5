"""Document 001's transformer over one vector: attention to itself alone, so its layers are MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.graph import Graph
from core.distill.students._base import PlainModule, Student
from core.distill.teachers._base import TeacherModel
from core.errors import SpecInvalid
from core.rotations.sphere import typical_length
from core.specs.architectures import whole_number
from core.specs.plain_students import ProjectionTransformer as ProjectionTransformerSpec


class ProjectionTransformer(PlainModule):
    """Linear, L encoder layers (GELU, post-norm) on a sequence of length 1, linear.

    The parameters are those of ``nn.TransformerEncoder`` under document 001's names. A softmax over
    one key is 1, so a layer's attention is ``out(value(x))`` whatever H is: heads, queries and keys
    have no effect on the answer. ``forward`` multiplies just what has (1.4 to 1.9 times as fast as
    the encoder, on one thread); only dropout in training asks for the encoder itself. Rows of a
    batch never see each other (document 001 leaves ``batch_first`` out, by which they would).

    Args:
        embed_dim: d, width of the queries.
        num_heads: H of each layer; divides d.
        num_layers: L.
        ff_dim: hidden width of each layer's MLP.
        out_dim: m, width of the answers; None: d, as in document 001.
        dropout: in [0, 1). 0 by default, for a regression on exact targets gains nothing from
            noise; document 001 leaves it at torch's 0.1.

    Raises:
        SpecInvalid: a size is no positive integer, H does not divide d, dropout is out of range.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        ff_dim: int,
        *,
        out_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "ff_dim": ff_dim,
            "out_dim": embed_dim if out_dim is None else out_dim,
        }
        d, heads, layers, hidden, m = (
            whole_number(value, name, least=1) for name, value in sizes.items()
        )
        _check(d, heads, dropout)
        self.config = {
            "name": "projection_transformer",
            "dim": d,
            "target_dim": m,
            "num_heads": heads,
            "num_layers": layers,
            "ff_dim": hidden,
            "dropout": float(dropout),
        }
        self.draws = bool(dropout)
        self.input_proj = nn.Linear(d, d)
        layer = nn.TransformerEncoderLayer(
            d, heads, hidden, dropout=dropout, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output_proj = nn.Linear(d, m)
        self.start_at(1.0)

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to [B, m]."""
        x = self.input_proj(queries)
        if self.training and self.config["dropout"]:
            x = self.encoder(x.unsqueeze(1)).squeeze(1)
        else:
            for layer in self._layers():
                x = _layer(layer, x)
        answers: Tensor = self.output_proj(x)
        return answers

    def start_at(self, length: float) -> None:
        """Scale the last layer so that untrained answers are about so long.

        Its input is normalised, of length sqrt(d). Torch's own start gives answers of length
        sqrt(m / 3), 11 for 384, which training would first have to shrink.
        """
        with torch.no_grad():
            self.output_proj.weight.mul_(length * (3 / self.output_proj.out_features) ** 0.5)
            self.output_proj.bias.zero_()

    def free_parameters(self) -> int:
        """Count parameters that an answer depends on: queries' and keys' projections never do."""
        d, layers = int(self.config["dim"]), int(self.config["num_layers"])
        return super().free_parameters() - layers * 2 * d * (d + 1)

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph."""
        x = graph.linear(self.input_proj, queries)
        for layer in self._layers():
            weight, bias = _value(layer.self_attn)
            value = graph.op("MatMul", x, graph.constant(weight.T))
            value = graph.op("Add", value, graph.constant(bias))
            attended = graph.linear(layer.self_attn.out_proj, value)
            x = _emit_norm(graph, layer.norm1, graph.op("Add", x, attended))
            hidden = graph.op("Gelu", graph.linear(layer.linear1, x))
            x = _emit_norm(
                graph, layer.norm2, graph.op("Add", x, graph.linear(layer.linear2, hidden))
            )
        return graph.linear(self.output_proj, x)

    def _layers(self) -> list[Any]:
        return list(self.encoder.layers)


def build(
    spec: ProjectionTransformerSpec, teacher: TeacherModel, seed: int
) -> ProjectionTransformer:
    """Draw the layers as torch does, for answers as long as the teacher's; the caller seeded it."""
    del seed
    assert spec.num_heads is not None
    assert spec.num_layers is not None
    student = ProjectionTransformer(
        teacher.queries.shape[1],
        spec.num_heads,
        spec.num_layers,
        spec.ff_dim,
        out_dim=teacher.truths.shape[1],
        dropout=spec.dropout,
    )
    student.start_at(float(typical_length(torch.from_numpy(teacher.truths))))
    return student


def restore(config: Mapping[str, Any]) -> ProjectionTransformer:
    """Build the module a config describes; its state is then loaded."""
    return ProjectionTransformer(
        config["dim"],
        config["num_heads"],
        config["num_layers"],
        config["ff_dim"],
        out_dim=config["target_dim"],
        dropout=config["dropout"],
    )


def _check(dim: int, heads: int, dropout: float) -> None:
    if dim % heads:
        raise SpecInvalid(
            f"num_heads {heads} does not divide embed_dim {dim}; allowed: its divisors",
            pointer="/num_heads",
        )
    if isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise SpecInvalid(f"dropout {dropout!r}; allowed: from 0 to below 1", pointer="/dropout")


def _layer(layer: Any, x: Tensor) -> Tensor:
    """One post-norm encoder layer at sequence length 1, without dropout: [B, d] to [B, d]."""
    value = functional.linear(x, *_value(layer.self_attn))
    x = layer.norm1(x + layer.self_attn.out_proj(value))
    moved: Tensor = layer.norm2(x + layer.linear2(functional.gelu(layer.linear1(x))))
    return moved


def _value(attention: Any) -> tuple[Tensor, Tensor]:
    """The values' part of the joint projection: [d, d] and [d]."""
    d = attention.embed_dim
    return attention.in_proj_weight[2 * d :], attention.in_proj_bias[2 * d :]


def _emit_norm(graph: Graph, norm: Any, x: str) -> str:
    scale, shift = graph.constant(norm.weight), graph.constant(norm.bias)
    return graph.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=norm.eps)


STUDENT = Student(spec=ProjectionTransformerSpec, build=build, restore=restore)
