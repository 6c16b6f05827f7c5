"""Students that say their own lengths and widths: documents 001, 003 and 004."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from core.errors import SpecInvalid
from core.specs.architectures import covering_architecture, optimal_architecture
from core.specs.counts import linear, perceptron, perceptron_units
from core.specs.losses import Compares
from core.specs.shaped import Shaped
from core.specs.sizes import Sizes
from core.specs.teachers import ModelFormat

Formats = tuple[ModelFormat, ...]
MOST_SLOTS = 65_536
Levels = Annotated[tuple[Annotated[int, Field(ge=1, le=16_384)], ...], Field(max_length=8)]


class Plain(Shaped):
    """A map of queries to vectors of their own lengths, of the teacher's width unless it says."""

    learns_from: ClassVar[Formats] = ("federated_model", "lda_model", "embeddings")

    def check_sizes(self, sizes: Sizes) -> None:
        """Raise SpecInvalid where the sizes do not allow what is told; most allow any."""

    def compares(self, sizes: Sizes) -> Compares:
        """All of an answer, where it has the teacher's width."""
        return "vectors" if self.output(sizes) == sizes.width else "relations"

    def output(self, sizes: Sizes) -> int:
        """Return the width of an answer."""
        return sizes.width


class ProjectionTransformer(Plain):
    """Documents 001 and 003: a transformer encoder over one query.

    A sequence of length 1 has one key, so attention weighs it by 1 whatever the heads: L decides
    what it can learn, H does not.
    """

    name: Literal["projection_transformer"] = "projection_transformer"
    num_heads: int | None = Field(
        4, ge=1, le=256, description="H; null: by optimal_architecture of the teacher's clusters."
    )
    num_layers: int | None = Field(2, ge=1, le=64, description="L; null: as H.")
    ff_dim: int = Field(512, ge=1, le=65_536, description="Width of each feed-forward layer.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Document 001's layers have torch's default, 0.1."
    )

    def check_sizes(self, sizes: Sizes) -> None:
        """Raise SpecInvalid where the heads do not divide the width, or nothing says them."""
        if None in (self.num_heads, self.num_layers) and not sizes.clusters:
            raise SpecInvalid(
                "student.num_heads and num_layers null: the model has no clusters to tell them by; "
                "allowed: numbers",
                pointer="/student/num_heads",
            )
        heads = self.as_built(sizes).num_heads
        if heads is None or sizes.dim % heads:
            raise SpecInvalid(
                f"student.num_heads {heads} does not divide the width {sizes.dim}",
                pointer="/student/num_heads",
            )

    def as_built(self, sizes: Sizes) -> Self:
        """Tell H and L; see Shaped."""
        if None not in (self.num_heads, self.num_layers):
            return self
        heads, layers = optimal_architecture(sizes.clusters)
        told = {"num_heads": self.num_heads or heads, "num_layers": self.num_layers or layers}
        return self.model_copy(update=told)

    def parameters(self, sizes: Sizes) -> int:
        """Count the layers: attention 4 d^2, the feed-forward part, two norms; see Shaped."""
        layers, d = self.as_built(sizes).num_layers or 1, sizes.dim
        layer = 4 * linear(d, d) + linear(d, self.ff_dim) + linear(self.ff_dim, d) + 4 * d
        return linear(d, d) + layers * layer + linear(d, sizes.width)

    def units(self, sizes: Sizes) -> int:
        """See Shaped."""
        layers = self.as_built(sizes).num_layers or 1
        return layers * (16 * sizes.dim + 3 * self.ff_dim) + 2 * (sizes.dim + sizes.width)


class HierarchicalRouter(Plain):
    """H^L slots addressed by L levels of H keys: what documents 001 and 003 mean by H^L = N.

    A slot's score is the sum of its keys' scores, one key a level, and of its own correction, so
    that it starts as the teacher itself. With ``candidates`` the keys alone choose which slots are
    looked at: d (H L + candidates) multiplications where the teacher needs d N.
    """

    learns_from: ClassVar[Formats] = ("lda_model",)
    name: Literal["hierarchical_router"] = "hierarchical_router"
    heads: int | None = Field(
        None, ge=2, le=4096, description="H, keys a level; null: by covering_architecture."
    )
    levels: int | None = Field(None, ge=1, le=16, description="L; null: as H.")
    own_rank: int | None = Field(
        None,
        ge=0,
        le=16_384,
        description="Rank of the slots' own corrections; null: full, exact at the start. 0: none, "
        "H L keys alone tell all H^L slots apart.",
    )
    candidates: int | None = Field(
        None, ge=1, le=MOST_SLOTS, description="Slots scored for a query; null: all."
    )

    def routes(self) -> bool:
        """Its slots are the teacher's heads."""
        return True

    def check_sizes(self, sizes: Sizes) -> None:
        """Raise SpecInvalid where H^L slots do not hold the teacher's heads, or are too many."""
        built = self.as_built(sizes)
        assert built.heads is not None
        assert built.levels is not None
        slots = built.heads**built.levels
        if not sizes.clusters <= slots <= MOST_SLOTS:
            raise SpecInvalid(
                f"student.heads {built.heads}, levels {built.levels}: {slots} slots; the model has "
                f"{sizes.clusters} heads, allowed: {sizes.clusters} to {MOST_SLOTS} slots",
                pointer="/student/heads",
            )

    def as_built(self, sizes: Sizes) -> Self:
        """Tell H and L, and cut what exceeds the slots and the width; see Shaped."""
        heads, levels = self.heads, self.levels
        if heads is None and levels is None:
            heads, levels = covering_architecture(max(2, sizes.clusters))
        elif levels is None:
            levels = next(n for n in range(1, 32) if (heads or 2) ** n >= sizes.clusters)
        elif heads is None:
            fitting = (n for n in range(2, MOST_SLOTS + 1) if n**levels >= sizes.clusters)
            heads = next(fitting, MOST_SLOTS)
        slots = (heads or 2) ** levels
        bound: dict[str, int | None] = {"heads": heads, "levels": levels}
        if self.candidates is not None and self.candidates >= slots:
            bound["candidates"] = None
        if self.own_rank is not None and self.own_rank >= min(sizes.dim, slots):
            bound["own_rank"] = None
        return self.model_copy(update=bound)

    def parameters(self, sizes: Sizes) -> int:
        """Count keys, each slot's head, bias and correction, and the slots' values; see Shaped."""
        heads, levels, rank = self._built_sizes(sizes)
        slots: int = heads**levels
        own = sizes.dim if rank is None else rank
        slot = 2 + own + (sizes.dim if sizes.maps else 1) * sizes.width
        axes = sizes.dim * (rank or 0)
        return levels * heads * sizes.dim + slots * slot + axes

    def units(self, sizes: Sizes) -> int:
        """See Shaped: slots' scores, the corrections of candidates, the query for every map."""
        heads, levels, rank = self._built_sizes(sizes)
        slots: int = heads**levels
        own = sizes.dim if rank is None else rank
        gathered = (self.as_built(sizes).candidates or 0) * (own + 4)
        return slots * (8 + (sizes.dim if sizes.maps else 0)) + gathered + 4 * sizes.dim

    def _built_sizes(self, sizes: Sizes) -> tuple[int, int, int | None]:
        """Return H, L and the corrections' rank, None for full."""
        built = self.as_built(sizes)
        return built.heads or 2, built.levels or 1, built.own_rank


class Narrowing(Plain):
    """A student that may be told its width."""

    dim: int | None = Field(
        None, ge=1, le=16_384, description="Width of its answers; null: the teacher's."
    )

    def output(self, sizes: Sizes) -> int:
        """Return the width of an answer."""
        return self.dim or sizes.width

    def as_built(self, sizes: Sizes) -> Self:
        """Tell the width; see Shaped."""
        return self.model_copy(update={"dim": self.output(sizes)})


class Linear(Narrowing):
    """One matrix and a bias: what every other student must beat."""

    name: Literal["linear"] = "linear"
    start: Literal["fitted", "random"] = Field(
        "fitted",
        description="'fitted': ridge regression onto the answers, or onto their leading principal "
        "components where it is narrower. Where queries are the answers that is PCA.",
    )

    def check_sizes(self, sizes: Sizes) -> None:
        """Raise SpecInvalid where there is nothing to fit a wider answer to."""
        if self.start == "fitted" and self.output(sizes) > sizes.width:
            raise SpecInvalid(
                f"student.dim {self.dim} with start 'fitted'; the teacher's answers have "
                f"{sizes.width}, allowed: 1 to {sizes.width}, or start 'random'",
                pointer="/student/dim",
            )

    def parameters(self, sizes: Sizes) -> int:
        """Count the layer; see Shaped."""
        return linear(sizes.dim, self.output(sizes))

    def units(self, sizes: Sizes) -> int:
        """See Shaped."""
        return sizes.dim + self.output(sizes)


class Mlp(Narrowing):
    """A multilayer perceptron."""

    name: Literal["mlp"] = "mlp"
    hidden: int = Field(512, ge=1, le=65_536)
    layers: int = Field(2, ge=1, le=32, description="Hidden ones.")
    dropout: float = Field(0.0, ge=0, lt=1)
    noise: float = Field(
        0.0, ge=0, le=10, description="Length of the noise on a training query, of its own."
    )

    def parameters(self, sizes: Sizes) -> int:
        """Count the perceptron; see Shaped."""
        return perceptron(sizes.dim, self.hidden, self.layers, self.output(sizes))

    def units(self, sizes: Sizes) -> int:
        """See Shaped."""
        return perceptron_units(sizes.dim, self.hidden, self.layers, self.output(sizes))


class Hierarchical(Plain):
    """Document 004: nested codes, the first 5 dimensions of 25, and a decoder."""

    name: Literal["hierarchical"] = "hierarchical"
    levels: Levels = Field(
        (5, 25), min_length=1, description="Widths of the nested codes, each longer than the last."
    )
    level_weights: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] = Field(
        (0.7, 0.3), min_length=1, max_length=8, description="What each level weighs in the loss."
    )
    hidden: int = Field(512, ge=1, le=65_536)
    layers: int = Field(2, ge=1, le=32, description="Hidden ones, of the encoder.")
    dropout: float = Field(0.0, ge=0, lt=1)
    noise: float = Field(
        0.7,
        ge=0,
        le=10,
        description="Length of the noise on a training query, of its own; the teacher's side has "
        "none. Without it a narrow code learns its training rows by heart.",
    )
    decoder: int = Field(
        256,
        ge=0,
        le=65_536,
        description="Width of the decoder's hidden layer, which brings the longest code back to "
        "the teacher's embedding; 0: no decoder.",
    )

    @model_validator(mode="after")
    def _levels_are_nested(self) -> Hierarchical:
        if list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels {list(self.levels)}: each must be longer than the one before")
        if len(self.level_weights) != len(self.levels):
            raise ValueError(
                f"level_weights has {len(self.level_weights)} entries for {len(self.levels)} "
                "levels; give one each"
            )
        return self

    def output(self, sizes: Sizes) -> int:
        """Return the width of the longest code."""
        del sizes
        return self.levels[-1]

    def compares(self, sizes: Sizes) -> Compares:
        """How codes lie to each other, whatever their width."""
        del sizes
        return "relations"

    def decodes(self) -> bool:
        """Whether there is a decoder."""
        return self.decoder > 0

    def parameters(self, sizes: Sizes) -> int:
        """Count encoder and decoder; see Shaped."""
        code = self.output(sizes)
        encoder = perceptron(sizes.dim, self.hidden, self.layers, code)
        return encoder + (perceptron(code, self.decoder, 1, sizes.width) if self.decoder else 0)

    def units(self, sizes: Sizes) -> int:
        """See Shaped."""
        code = self.output(sizes)
        encoder = perceptron_units(sizes.dim, self.hidden, self.layers, code)
        return encoder + perceptron_units(code, self.decoder, 1, sizes.width)
