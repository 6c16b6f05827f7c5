"""How a student is trained: the one loop's settings, all of them saved in every checkpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from core.specs.base import Closed


class Losses(Closed):
    """Weights of the terms that are summed; a zero leaves a term out."""

    geodesic: float = Field(1.0, ge=0, le=1e6, description="Mean squared geodesic angle, rad^2.")
    cvar: float = Field(0.25, ge=0, le=1e6, description="Mean squared angle of the worst 5 %.")
    retrieval_kl: float = Field(0.05, ge=0, le=1e6, description="KL of in-batch retrieval, nats.")
    router_kl: float = Field(0.1, ge=0, le=1e6, description="KL(teacher weights || router), nats.")

    @model_validator(mode="after")
    def _something_to_minimise(self) -> Losses:
        if not any(self.model_dump().values()):
            raise ValueError("all weights are 0; at least one term must weigh something")
        return self


class Training(Closed):
    """Optimizer, schedule, data and when to stop."""

    epochs: int = Field(8, ge=1, le=100_000)
    batch_size: int = Field(256, ge=1, le=65_536)
    learning_rate: float = Field(2e-3, gt=0, le=10)
    weight_decay: float = Field(0.01, ge=0, le=10)
    scheduler: Literal["none", "cosine", "step"] = "cosine"
    warmup_steps: int = Field(50, ge=0, le=1_000_000)
    ema_decay: float = Field(0.99, ge=0, lt=1, description="0 turns averaging off.")
    validation_fraction: float = Field(0.1, gt=0, lt=0.9)
    patience: int | None = Field(
        None, ge=1, le=100_000, description="Epochs without gain before stopping; null: never."
    )
    min_delta: float = Field(1e-4, ge=0, le=10, description="Validation cosine gain that counts.")
    augment: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="Share of each batch that is made: SLERP between neighbours + tangent noise.",
    )
    epochs_per_chunk: int = Field(1, ge=1, le=100_000, description="A checkpoint after each chunk.")
    losses: Losses = Losses()
