"""What a teacher may be told. One class per file in core/distill/teachers."""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, TypeAdapter, model_validator

from core.errors import SpecInvalid
from core.specs.base import Closed
from core.specs.codebooks import Codebook, PrincipalPlanes

FLOAT32_TOLERANCE = 1e-6
"""What float32 holds; below it a tolerance would be a promise that rounding breaks."""
FLOAT64_TOLERANCE = 1e-13
Compat = Literal["legacy"] | None
ModelFormat = Literal["federated_model", "lda_model", "embeddings"]


class Answering(Closed):
    """What every teacher may be told."""

    reads: ClassVar[ModelFormat] = "federated_model"
    """The format of the models it answers over."""
    routes_over: ClassVar[Literal["queries", "sources", "centroids", "nothing"]] = "queries"
    """What a query is compared with: a student's exact router copies ``queries`` alone."""
    answers_new: ClassVar[bool] = True
    """Whether it answers queries that nobody stored: made ones, held-out ones."""
    needs_logs: ClassVar[bool] = False
    """Whether every answer needs the logarithms; others compute them if a student asks."""

    dtype: Literal["float32", "float64"] = "float32"

    def check_width(self, dim: int) -> None:
        """Raise SpecInvalid where the model's width does not allow what is told; most allow any."""

    def exactness(self) -> float:
        """How far a unit-length target may be from its formula's value: rounding."""
        return FLOAT32_TOLERANCE if self.dtype == "float32" else FLOAT64_TOLERANCE


class Weighing(Answering):
    """What every teacher may be told that weighs the clusters of a model."""

    temperature: float | None = Field(
        None, gt=0, le=100, description="Of the routing softmax; null takes the model's own."
    )

    def whole_logs(self) -> bool:
        """Whether log W is blended, not log(G^T W) after G."""
        return False


class Routing(Weighing):
    """What every teacher may be told that routes over training queries."""

    top_k: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Training queries a query routes through; null takes the model's own "
        "(10 where it has none).",
    )


class Exponential(Routing):
    """What every teacher may be told that rotates by the exponential of a blend."""

    needs_logs = True

    tolerance: float = Field(
        1e-6,
        ge=FLOAT64_TOLERANCE,
        le=1e-2,
        description="Absolute error allowed per unit-length target; with float32 at least 1e-6.",
    )

    def exactness(self) -> float:
        """How far a unit-length target may be from its formula's value: as told."""
        return self.tolerance

    @model_validator(mode="after")
    def _float32_holds_the_tolerance(self) -> Self:
        if self.dtype == "float32" and self.tolerance < FLOAT32_TOLERANCE:
            raise ValueError(
                f"tolerance {self.tolerance:g} with dtype 'float32'; allowed: tolerance from "
                f"{FLOAT32_TOLERANCE:g} up, or dtype 'float64' from 1e-13 up"
            )
        return self


class Blending(Exponential):
    """What ``rotational`` may be told, whatever computes it."""

    compat: Compat = Field(
        None, description="'legacy' blends log W as document 000 does, not log(G^T W) after G."
    )

    def whole_logs(self) -> bool:
        """Whether log W is blended, as document 000 does."""
        return self.compat == "legacy"


class Rotational(Blending):
    """Blend the logarithms of the clusters' rotations, then rotate by the exponential."""

    name: Literal["rotational"] = "rotational"


class RotationalJax(Blending):
    """Rotational, its exponential on JAX: the same answers but for their last bits.

    Workers need the extra: ``pip install 'stillroom[jax]'``.
    """

    name: Literal["rotational_jax"] = "rotational_jax"


class MultiSource(Exponential):
    """Rotational over several federated models at once, each with its own clusters and routing.

    The model comes from ``combine_models``; over any other it has one source and is ``rotational``.
    """

    routes_over = "sources"
    name: Literal["multi_source"] = "multi_source"
    source_weights: Literal["similarity", "equal"] = Field(
        "similarity",
        description="What a source weighs: a softmax over how near its nearest training query "
        "is, at the sources' mean temperature, or all the same.",
    )


class Direct(Routing):
    """Blend the clusters' maps themselves: ``sum_c w_c q W_c``; no logarithm, no exponential."""

    name: Literal["direct"] = "direct"
    blend: Literal["top_k", "top1"] = Field(
        "top_k", description="All clusters routed to, by weight, or the heaviest alone."
    )
    compat: Compat = Field(
        None,
        description="'legacy' leaves the sum as short as rotations that disagree make it; "
        "otherwise the answer has the query's length.",
    )


class WeightedBaseline(Weighing):
    """Blend all clusters' maps by how near the query is to each centroid: the plainest blend."""

    routes_over = "centroids"
    name: Literal["weighted_baseline"] = "weighted_baseline"
    compat: Compat = Field(
        None, description="'legacy' leaves the sum as short as it comes, as for 'direct'."
    )


class Paired(Routing):
    """Answer a stored query by its own stored target; nothing is computed."""

    answers_new = False
    name: Literal["paired"] = "paired"


class Lda(Weighing):
    """Multi-head LDA: blend the heads' answers by a softmax over their centroids."""

    reads = "lda_model"
    routes_over = "centroids"
    name: Literal["lda"] = "lda"


class Checkpoint(Answering):
    """Embeddings that a teacher computed before: every stored input has its own."""

    reads = "embeddings"
    routes_over = "nothing"
    answers_new = False
    name: Literal["checkpoint"] = "checkpoint"


class Orthogonal(Routing):
    """Blend the logarithms as ``rotational`` does, kept to the planes of a codebook."""

    needs_logs = True
    name: Literal["orthogonal"] = "orthogonal"
    codebook: Codebook = PrincipalPlanes()

    def check_width(self, dim: int) -> None:
        """Raise SpecInvalid where the width has too few planes."""
        self.codebook.check_width(dim, "/teacher/codebook")


_OfRotations = (
    Rotational | RotationalJax | Direct | WeightedBaseline | Paired | Orthogonal | MultiSource
)
OfRotations = Annotated[_OfRotations, Field(discriminator="name")]
"""Those over a federated model: what has logarithms to cache."""
Teacher = Annotated[_OfRotations | Lda | Checkpoint, Field(discriminator="name")]
_TEACHER: TypeAdapter[Any] = TypeAdapter(Teacher)


def default_teacher(model: str) -> Any:
    """Return the spec of the teacher that is meant over a model of this format."""
    defaults = {"federated_model": Rotational, "lda_model": Lda, "embeddings": Checkpoint}
    return defaults[model]()


def check_reads(teacher: Answering, model: str) -> None:
    """Raise SpecInvalid where a teacher does not answer over models of this format."""
    if teacher.reads != model:
        allowed = [
            member.model_fields["name"].default
            for member in get_args(get_args(Teacher)[0])
            if member.reads == model
        ]
        raise SpecInvalid(
            f"teacher.name {teacher.model_dump()['name']!r} answers over a '{teacher.reads}', the "
            f"model is of format '{model}'; allowed for it: {', '.join(allowed)}",
            pointer="/teacher/name",
        )


def parse_teacher(stored: Any) -> Any:
    """Return the spec of a teacher from its stored JSON values."""
    return _TEACHER.validate_python(stored)
