"""What a student may be told. One class per file in core/distill/students."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, TypeAdapter, model_validator

from core.errors import SpecInvalid
from core.specs.base import Closed
from core.specs.canonical import Canonical
from core.specs.counts import linear
from core.specs.plain_students import (
    Hierarchical,
    HierarchicalRouter,
    Linear,
    Mlp,
    ProjectionTransformer,
)
from core.specs.shaped import Shaped
from core.specs.sizes import Sizes
from core.specs.teachers import Answering

ROUTER_HIDDEN = 256
"""Width of a learnt router that is told none."""
ROUTER_RANK = 128
"""Rank of a projected router that is told none."""


class Routing(Shaped):
    """How a student weighs the clusters of a query: shared by all that blend them.

    ``exact`` is the teacher's own attention over its n training queries: 4 bytes per query and
    dimension, 2 n d operations a query. ``projected`` is the same attention inside the principal
    subspace of those queries, ``router_rank`` wide: 4 bytes per query and rank, 2 (n + d) rank
    operations, no training; the more rank, the nearer to exact. ``learnt`` is a small network,
    2 d (hidden + C) operations and the smallest, which has to be trained.
    """

    router: Literal["exact", "projected", "learnt"] = "learnt"
    router_hidden: int | None = Field(
        None,
        ge=1,
        le=8192,
        description=f"Width of the learnt router; null: {ROUTER_HIDDEN}. The others have none.",
    )
    router_rank: int | None = Field(
        None,
        ge=1,
        le=8192,
        description=f"Dimensions the projected router searches in; null: {ROUTER_RANK}; all where "
        "the width is less. The others have none.",
    )

    @model_validator(mode="after")
    def _each_router_has_its_own(self) -> Routing:
        # Not model_fields_set: a stored job's spec names every field.
        owners = (("router_hidden", "learnt"), ("router_rank", "projected"))
        for field, owner in owners:
            value = getattr(self, field)
            if self.router != owner and value is not None:
                raise ValueError(
                    f"{field} {value} is the {owner} router's: leave it null with router "
                    f"{self.router!r}"
                )
        return self

    def routes(self) -> bool:
        """Whether the router is learnt."""
        return self.router == "learnt"

    def as_built(self, sizes: Sizes) -> Self:
        """Tell the router's size, and what else is bound by the width; see Shaped."""
        told: dict[str, int] = {}
        if self.router == "projected":
            told["router_rank"] = min(self.router_rank or ROUTER_RANK, sizes.dim)
        elif self.router == "learnt":
            told["router_hidden"] = self.router_hidden or ROUTER_HIDDEN
        return self.model_copy(update={**told, **self._bound(sizes.dim)})

    def parameters(self, sizes: Sizes) -> int:
        """Count the router, the anchor and the queries' length; see Shaped."""
        built, dim = self.as_built(sizes), sizes.dim
        if self.router == "learnt":
            hidden = built.router_hidden or ROUTER_HIDDEN
            router = linear(dim, sizes.clusters) + hidden * (dim + 1 + sizes.clusters) + 1
        else:
            router = self.copied(sizes) + dim * (built.router_rank or 0)
        return router + dim * dim + 1

    def copied(self, sizes: Sizes) -> int:
        """Count the keys, whole queries where the router is exact, and their clusters."""
        if self.router == "learnt":
            return 0
        return sizes.rows * ((self.as_built(sizes).router_rank or sizes.dim) + 1)

    def units(self, sizes: Sizes) -> int:
        """See Shaped: the router's units and the rows it turns."""
        hidden = self.as_built(sizes).router_hidden or 0
        return 8 * sizes.dim + 3 * hidden + 6 * sizes.clusters

    def _bound(self, dim: int) -> dict[str, int]:
        """Fields of the student's own that the width bounds."""
        del dim
        return {}


class RotorProduct(Routing):
    """``q G prod_c exp(w_c L_c / 2)``, forward then reversed, each factor in its own planes.

    16 m C d operations a query with the learnt router; with the others, which weigh few clusters,
    as much for those alone.
    """

    name: Literal["rotor_product"] = "rotor_product"
    planes: int | None = Field(
        16,
        ge=1,
        le=4096,
        description="Planes kept per cluster, largest angles first; all dim // 2 where that "
        "is less, or null. A plane costs "
        "8 bytes per cluster and dimension: 16 planes of 64 clusters at 384 dimensions are 3.1 MB.",
    )
    train_planes: bool = Field(
        default=False,
        description="Whether plane bases and angles are trained beside the learnt router. They "
        "start from the teacher's own, so it seldom pays for the time it takes (about 1.7 times). "
        "With another router and false nothing is trained: losses and learning rate then say "
        "nothing, and one epoch judges the student.",
    )

    def parameters(self, sizes: Sizes) -> int:
        """Count planes and angles beside the router; see Shaped."""
        planes = min(self.planes or sizes.dim, sizes.dim // 2)
        return super().parameters(sizes) + sizes.clusters * planes * (2 * sizes.dim + 1)

    def units(self, sizes: Sizes) -> int:
        """See Shaped: coordinates in every plane, forward and reversed, and their turns."""
        planes = min(self.planes or sizes.dim, sizes.dim // 2)
        return super().units(sizes) + 8 * sizes.clusters * planes

    def _bound(self, dim: int) -> dict[str, int]:
        return {"planes": min(self.planes or dim // 2, dim // 2)}


class NlerpGeodesic(Routing):
    """``normalise(sum_c w_c q W_c)``, then a small learnt step along the sphere.

    All clusters at once in two matrix products: 8 m C d operations a query with the learnt router
    (half of rotor_product's), as much for the few clusters weighed with the others. The mean is
    near the blend of logarithms where rotations are near each other, as those of an anchored model
    are (gap closed 0.99); where they turn by up to pi (``compat`` legacy) it is not.
    """

    name: Literal["nlerp_geodesic"] = "nlerp_geodesic"
    router: Literal["exact", "projected", "learnt"] = "projected"
    planes: int | None = Field(
        16,
        ge=1,
        le=4096,
        description="Planes of G^T W_c kept per cluster, largest angles first; all dim // 2 where "
        "that is less, or null. 8 bytes per cluster and dimension each.",
    )
    correction_hidden: int = Field(
        0,
        ge=0,
        le=8192,
        description="Width of the network that says the step; 8 bytes and 4 operations per unit "
        "and dimension. 0: no step; then only a learnt router is trained. With 256 the step gained "
        "0.002 of the gap behind the exact router and lost 0.007 behind the projected one.",
    )

    def parameters(self, sizes: Sizes) -> int:
        """Count planes, angles and the step beside the router; see Shaped."""
        planes = min(self.planes or sizes.dim, sizes.dim // 2)
        step = self.correction_hidden * (2 * sizes.dim + 1)
        return super().parameters(sizes) + sizes.clusters * planes * (2 * sizes.dim + 1) + step

    def units(self, sizes: Sizes) -> int:
        """See Shaped: coordinates in every plane, also weighed, and the step's units."""
        planes = min(self.planes or sizes.dim, sizes.dim // 2)
        return super().units(sizes) + 6 * sizes.clusters * planes + 3 * self.correction_hidden

    def _bound(self, dim: int) -> dict[str, int]:
        return {"planes": min(self.planes or dim // 2, dim // 2)}


class SharedSubspace(Routing):
    """``q G exp(sum_c w_c U S_c U^T)``: every cluster rotates inside one learnt subspace U.

    4 d r bytes for U and 2 C r (r - 1) for all S_c (r = 64, 64 clusters, 384 dimensions: 0.6 MB,
    beside G and the router); 4 d r operations a query to go in and out, 2 C r^2 to blend, about
    16 r^2 to turn. Orthogonal to rounding whatever it learns.
    """

    name: Literal["shared_subspace"] = "shared_subspace"
    router: Literal["exact", "projected", "learnt"] = "projected"
    subspace: int = Field(
        64, ge=2, le=1024, description="r, dimensions of U; all where the width is less."
    )

    def parameters(self, sizes: Sizes) -> int:
        """Count U and the upper triangle of every S_c beside the router; see Shaped."""
        rank = min(self.subspace, sizes.dim)
        inside = sizes.dim * rank + sizes.clusters * rank * (rank - 1) // 2
        return super().parameters(sizes) + inside

    def units(self, sizes: Sizes) -> int:
        """See Shaped: its own blended bivector, doubled too, and the terms of the series."""
        rank = min(self.subspace, sizes.dim)
        return super().units(sizes) + 3 * rank * rank + 24 * rank

    def _bound(self, dim: int) -> dict[str, int]:
        return {"subspace": min(self.subspace, dim)}


class GeodesicAttention(Shaped):
    """Cross-attention from the query to learnt slots, a gated MLP, a step along the sphere.

    Dense matrix products alone. S slots and h hidden units take 4 (S (d + C) + h (2 d + C) + d^2)
    bytes, 5.8 MB for 1024 of each, 64 clusters and 384 dimensions, and half as many operations a
    query.
    """

    name: Literal["geodesic_attention"] = "geodesic_attention"
    slots: int = Field(
        1024,
        ge=1,
        le=65_536,
        description="Keys that start as training queries; all of those where there are fewer.",
    )
    hidden: int = Field(1024, ge=1, le=16_384, description="Width of the gated MLP.")

    def routes(self) -> bool:
        """Its attention over the slots says weights of the clusters."""
        return True

    def parameters(self, sizes: Sizes) -> int:
        """Count slots, gated MLP, anchor and the queries' length; see Shaped."""
        slots = min(self.slots, sizes.rows) * (sizes.dim + sizes.clusters)
        return slots + self.hidden * (2 * sizes.dim + sizes.clusters) + sizes.dim**2 + 1

    def units(self, sizes: Sizes) -> int:
        """See Shaped: attention, weights of the clusters and the MLP's units."""
        slots = min(self.slots, sizes.rows)
        return 8 * sizes.dim + 3 * slots + 4 * sizes.clusters + 4 * self.hidden

    def as_built(self, sizes: Sizes) -> Self:
        """Cut the slots to the queries there are; see Shaped."""
        return self.model_copy(update={"slots": min(self.slots, sizes.rows)})


def check_router(student: Closed, teacher: Answering) -> None:
    """Raise SpecInvalid where a student copies a routing that the teacher does not have."""
    router = getattr(student, "router", "learnt")
    if router != "learnt" and teacher.routes_over != "queries":
        raise SpecInvalid(
            f"student.router {router!r} copies a routing over training queries; this teacher "
            f"routes over {teacher.routes_over}, allowed for it: 'learnt'",
            pointer="/student/router",
        )


Student = Annotated[
    Canonical
    | RotorProduct
    | NlerpGeodesic
    | SharedSubspace
    | GeodesicAttention
    | ProjectionTransformer
    | HierarchicalRouter
    | Linear
    | Mlp
    | Hierarchical,
    Field(discriminator="name"),
]


_STUDENT: TypeAdapter[Any] = TypeAdapter(Student)


def parse_student(stored: Any) -> Any:
    """Return the spec of a student from its stored JSON values."""
    return _STUDENT.validate_python(stored)


def default_student(model: str) -> Student:
    """Return the student that is meant for a model of this format."""
    if model == "lda_model":
        return HierarchicalRouter()
    return Hierarchical() if model == "embeddings" else RotorProduct()


def check_learns(student: Student, model: str) -> None:
    """Raise SpecInvalid where a student cannot follow teachers over models of this format."""
    if model not in student.learns_from:
        members = get_args(get_args(Student)[0])
        allowed = [
            each.model_fields["name"].default for each in members if model in each.learns_from
        ]
        raise SpecInvalid(
            f"student.name {student.name!r} does not learn from models of format '{model}'; "
            f"allowed: {', '.join(allowed)}",
            pointer="/student/name",
        )
