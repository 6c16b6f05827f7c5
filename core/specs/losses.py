"""The terms of the training loss: what each may weigh, and where each has a meaning. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from core.specs.base import Closed

Compares = Literal["directions", "vectors", "relations"]
"""What of a student's answer is held against the teacher's: its direction (it keeps the query's
length), all of it, or how it lies to other answers (its width is another)."""
Weight = float | None

DEFAULTS: Mapping[Compares, Mapping[str, float]] = {
    "directions": {"geodesic": 1.0, "cvar": 0.25, "retrieval_kl": 0.05, "router_kl": 0.1},
    "vectors": {"mse": 0.3, "cosine": 0.7, "router_kl": 0.1},
    "relations": {"neighbour_kl": 0.7, "reconstruction": 0.3},
}
"""What null means; a term of a router or a decoder only where the student has one."""
EQUAL_WIDTH = frozenset(
    {"geodesic", "cvar", "retrieval_kl", "router_kl", "mse", "mse_mean", "cosine"}
)
"""Terms that hold coordinates against coordinates."""
OF_ROUTER = frozenset({"router_kl"})
OF_DECODER = frozenset({"reconstruction"})
RELATIONAL = frozenset({"relational_kl", "neighbour_kl", "rkd_distance", "rkd_angle", "gram"})
"""Terms that compare rows of a batch with each other."""
LEAST_ROWS = 3
"""Of a batch that has relations to learn: of 2 rows each has but one other."""
OF_BATCH = RELATIONAL | {"retrieval_kl"}
"""Terms that hold every row of a batch against every other: memory grows with its square."""
TEMPERED = frozenset({"relational_kl", "neighbour_kl"})
"""Terms that ``training.tau`` acts on."""


def _weight(description: str) -> Weight:
    weight: Weight = Field(None, ge=0, le=1e6, description=description)
    return weight


class Losses(Closed):
    """Weights of the terms that are summed; 0 leaves a term out, null takes the student's default.

    Students that keep lengths: geodesic 1, cvar 0.25, retrieval_kl 0.05, router_kl 0.1. Others of
    the teacher's width: mse 0.3, cosine 0.7 (documents 001 and 003), router_kl 0.1. Of another
    width: neighbour_kl 0.7, reconstruction 0.3 (document 004's alpha). Router and decoder terms
    only where the student has one.
    """

    geodesic: Weight = _weight("Mean squared geodesic angle, rad^2.")
    cvar: Weight = _weight("Mean squared angle of the worst 5 %.")
    retrieval_kl: Weight = _weight("KL of in-batch retrieval, nats.")
    router_kl: Weight = _weight("KL(teacher weights || router), nats.")
    mse: Weight = _weight("Squared difference summed over the width, over that of the answers.")
    mse_mean: Weight = _weight(
        "Squared difference averaged over the width, as document 001 has it: next to nothing for "
        "unit vectors."
    )
    cosine: Weight = _weight("1 - cosine.")
    relational_kl: Weight = _weight(
        "KL between the in-batch similarity distributions of teacher and student, tau^2 scaled."
    )
    neighbour_kl: Weight = _weight(
        "KL between who is near whom in the batch: the teacher's by cosine, the student's by "
        "distance with heavy tails, tau^2 scaled."
    )
    rkd_distance: Weight = _weight("Huber loss of relative in-batch distances.")
    rkd_angle: Weight = _weight("Huber loss of in-batch angles.")
    gram: Weight = _weight("Mean squared difference of in-batch cosines.")
    reconstruction: Weight = _weight("Of a student with a decoder: 1 - cosine to the embedding.")
    custom: dict[str, float] = Field(
        default_factory=dict,
        max_length=16,
        description="Weights of terms of your own, by name: installed plug-ins of the entry point "
        "group 'stillroom.losses', or files dropped into core/distill/losses.",
    )

    @model_validator(mode="after")
    def _something_to_minimise(self) -> Losses:
        for name, weight in self.custom.items():
            if name in OWN:
                raise ValueError(f"custom.{name} {weight:g}: say losses.{name}, which is the same")
            if not 0 <= weight <= 1e6:
                raise ValueError(f"custom.{name} {weight:g}; allowed: 0 to 1e6")
        own = self.model_dump(exclude={"custom"})
        if not any(weight is None or weight for weight in own.values()) and not any(
            self.custom.values()
        ):
            raise ValueError("all weights are 0; at least one term must weigh something")
        return self

    def told(self) -> dict[str, float]:
        """Return the weights that were given, custom ones among them."""
        own = self.model_dump(exclude={"custom"}, exclude_none=True)
        return {**own, **self.custom}

    def weights(self, compares: Compares, *, routes: bool, decodes: bool) -> dict[str, float]:
        """Return the weights above 0 in force for a student.

        Args:
            compares: what of its answers is compared.
            routes: whether it has a router of its own to teach.
            decodes: whether it has a decoder.
        """
        missing = (frozenset() if routes else OF_ROUTER) | (frozenset() if decodes else OF_DECODER)
        default = {name: w for name, w in DEFAULTS[compares].items() if name not in missing}
        return {name: w for name, w in {**default, **self.told()}.items() if w}


OWN = frozenset(Losses.model_fields) - {"custom"}
"""Terms that Stillroom brings."""
