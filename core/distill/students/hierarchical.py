"""Document 004's student: nested low-dimensional codes, and a decoder to check what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from core.distill.graph import Graph
from core.distill.students._base import PlainModule, Routed, Shown, Student, sizes_of
from core.distill.students._layers import Perceptron
from core.distill.teachers._base import TeacherModel
from core.specs.losses import Compares
from core.specs.plain_students import Hierarchical


class HierarchicalStudent(PlainModule):
    """An encoder to the longest code, of which every level is the first columns; and a decoder.

    The decoder belongs to training and to reading codes back (``decode``); an exported ONNX
    holds the encoder alone.
    """

    compares: Compares = "relations"

    def __init__(  # noqa: PLR0913 - what its config holds, by keyword
        self,
        *,
        dim: int,
        levels: Sequence[int],
        level_weights: Sequence[float],
        hidden: int,
        layers: int,
        dropout: float,
        noise: float,
        decoder: int,
        embedding_dim: int,
    ) -> None:
        super().__init__()
        self.config = {
            "name": "hierarchical",
            "dim": dim,
            "target_dim": levels[-1],
            "levels": list(levels),
            "level_weights": list(level_weights),
            "hidden": hidden,
            "layers": layers,
            "dropout": dropout,
            "noise": noise,
            "decoder": decoder,
            "embedding_dim": embedding_dim,
        }
        self.levels = tuple(zip(levels, level_weights, strict=True))
        self.decodes, self.draws = decoder > 0, bool(dropout or noise)
        self.encoder = Perceptron(
            dim=dim, hidden=hidden, layers=layers, width=levels[-1], dropout=dropout, noise=noise
        )
        self.decoder = (
            Perceptron(dim=levels[-1], hidden=decoder, layers=1, width=embedding_dim)
            if decoder
            else None
        )

    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to the longest codes."""
        codes: Tensor = self.encoder(queries)
        return codes

    def decode(self, codes: Tensor) -> Tensor | None:
        """Bring codes [B, k] back to the teacher's embeddings [B, D]; None without a decoder."""
        if self.decoder is None:
            return None
        embeddings: Tensor = self.decoder(codes)
        return embeddings

    def routed(self, shown: Shown) -> Routed:
        """Map training queries and decode them."""
        codes = self(shown.queries)
        return Routed(codes, decoded=self.decode(codes))

    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph."""
        return self.encoder.emit(graph, queries)


def build(spec: Hierarchical, teacher: TeacherModel, seed: int) -> HierarchicalStudent:
    """Draw the layers as torch does; the caller seeded it."""
    del seed
    sizes = sizes_of(teacher)
    student = HierarchicalStudent(
        dim=sizes.dim,
        levels=spec.levels,
        level_weights=spec.level_weights,
        hidden=spec.hidden,
        layers=spec.layers,
        dropout=spec.dropout,
        noise=spec.noise,
        decoder=spec.decoder,
        embedding_dim=sizes.width,
    )
    student.encoder.fit_input(teacher.queries)
    return student


def restore(config: Mapping[str, Any]) -> HierarchicalStudent:
    """Build from a saved config, on fresh layers whose state is then loaded."""
    derived = ("name", "target_dim")
    return HierarchicalStudent(
        **{key: value for key, value in config.items() if key not in derived}
    )


STUDENT = Student(spec=Hierarchical, build=build, restore=restore)
