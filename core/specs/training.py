"""How a student is trained: the one loop's settings, all of them saved in every checkpoint."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from core.errors import SpecInvalid
from core.specs.base import Closed
from core.specs.losses import Losses
from core.specs.schedules import COLDEST, HOTTEST, ScheduleType, TauSchedule

MADE_SHARE = 0.25
"""Share of made queries that ``augment: null`` means where the teacher can answer them."""
MADE_NOISE = 0.1
"""What ``augment_noise: null`` means."""
PLATEAU_FACTOR = 0.5
"""What ``plateau_factor: null`` means."""
PLATEAU_PATIENCE = 1
"""What ``plateau_patience: null`` means: jobs have few epochs."""


WORK = frozenset({"targets", "epochs_per_chunk", "checkpoint_interval"})
"""Settings that say how the work is done and cut; the student is the same for all of them."""


class Curriculum(Closed):
    """Stages of a training, from warm to cool: document 004's temperatures, and easy rows first."""

    stages: int = Field(5, ge=1, le=256, description="Each ends with a checkpoint that is kept.")
    start_tau: float = Field(
        4.0, ge=COLDEST, le=HOTTEST, description="Temperature of the first stage."
    )
    end_tau: float = Field(
        0.5, ge=COLDEST, le=HOTTEST, description="Temperature of the last stage."
    )
    schedule: ScheduleType = Field(
        "linear", description="How the temperature falls (or rises) between them."
    )
    order: Literal["shuffled", "easy_first"] = Field(
        "shuffled",
        description="'easy_first': stage s of S draws from the share (s + 1) / S of the training "
        "rows whose neighbours are nearest; every stage shows as many rows. Made queries lie "
        "between any of them.",
    )

    @model_validator(mode="after")
    def _one_stage_orders_nothing(self) -> Curriculum:
        if self.order == "easy_first" and self.stages == 1:
            raise ValueError("order 'easy_first' with stages 1 shows all rows; allowed: 2 and more")
        return self


class Training(Closed):
    """Optimizer, schedule, data, arithmetic, and when to stop."""

    epochs: int = Field(8, ge=1, le=100_000)
    batch_size: int = Field(256, ge=1, le=65_536)
    learning_rate: float = Field(2e-3, gt=0, le=10)
    weight_decay: float = Field(0.01, ge=0, le=10)
    scheduler: Literal["none", "cosine", "plateau", "step"] = Field(
        "cosine",
        description="After the warm-up: constant; half a cosine down to 0; multiplied by "
        "plateau_factor whenever the validation cosine gained less than min_delta for "
        "plateau_patience epochs; divided by ten after a half and after three quarters.",
    )
    plateau_factor: float | None = Field(
        None, gt=0, lt=1, description=f"Of scheduler 'plateau' alone; null: {PLATEAU_FACTOR}."
    )
    plateau_patience: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description=f"Epochs, of scheduler 'plateau' alone; null: {PLATEAU_PATIENCE}.",
    )
    warmup_steps: int = Field(
        50, ge=0, le=1_000_000, description="Of rising learning rate; at most half of all steps."
    )
    ema_decay: float = Field(0.99, ge=0, lt=1, description="0 turns averaging off.")
    validation_fraction: float = Field(0.1, gt=0, lt=0.9)
    patience: int | None = Field(
        None, ge=1, le=100_000, description="Epochs without gain before stopping; null: never."
    )
    min_delta: float = Field(1e-4, ge=0, le=10, description="Validation cosine gain that counts.")
    augment: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of each batch that is made: SLERP between neighbours + tangent noise. "
        f"null: {MADE_SHARE} where the teacher can answer new queries, 0 where it cannot.",
    )
    augment_noise: float | None = Field(
        None,
        ge=0,
        le=10,
        description=f"Length of a made query's tangent noise, of its own; null: {MADE_NOISE}. An "
        "LDA, which is smooth all over the sphere, teaches more by 1.",
    )
    centroid_warmup_epochs: int = Field(
        0,
        ge=0,
        le=100_000,
        description="The first of the epochs, which show nothing but every cluster's centroid, "
        "once each. They count neither for patience nor for a plateau.",
    )
    centroid_replay: float = Field(
        0.0, ge=0, lt=1, description="Share of each later batch that is drawn from the centroids."
    )
    targets: Literal["cache", "on_the_fly"] = Field(
        "cache",
        description="Whether the teacher's answers to the training queries come from the cache "
        "(and go there), or are computed by every process that trains, and kept nowhere. Same "
        "student. Made queries are always answered on the fly.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Of the student's products while it trains (autocast); parameters, optimizer, "
        "losses and validation stay float32. Meant for devices that have bfloat16 in hardware.",
    )
    epochs_per_chunk: int = Field(1, ge=1, le=100_000, description="A checkpoint after each chunk.")
    checkpoint_interval: int | None = Field(
        None,
        ge=1,
        le=1_000_000_000,
        description="Steps (batches) between checkpoints, also inside an epoch; null: one after "
        "every epochs_per_chunk epochs. The student does not depend on it.",
    )
    accumulate: int = Field(
        1,
        ge=1,
        le=65_536,
        description="Parts in which a batch's gradient is computed, one after another, to need "
        "less memory. Terms that compare or average over rows of a batch (mse: the answers' size) "
        "see one part's at a time.",
    )
    tau: float | None = Field(
        None,
        ge=COLDEST,
        le=HOTTEST,
        description="Temperature of the relational terms; null: 1, or the curriculum's.",
    )
    curriculum: Curriculum | None = Field(
        None, description="null: every epoch alike. Patience counts in its last stage alone."
    )
    losses: Losses = Losses()

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Training:
        """Refuse settings that others leave without effect."""
        # Not model_fields_set: a stored job's spec names every field.
        for name in ("plateau_factor", "plateau_patience"):
            value = getattr(self, name)
            if self.scheduler != "plateau" and value is not None:
                raise ValueError(
                    f"{name} {value} is scheduler 'plateau''s: leave it null with "
                    f"scheduler '{self.scheduler}'"
                )
        if self.augment_noise is not None and self.augment == 0:
            raise ValueError(
                f"augment_noise {self.augment_noise:g} with augment 0, which makes no query: leave "
                "it null"
            )
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate {self.accumulate} of batch_size {self.batch_size}: a part needs a row"
            )
        if self.checkpoint_interval is not None and self.epochs_per_chunk != 1:
            raise ValueError(
                f"checkpoint_interval {self.checkpoint_interval} and epochs_per_chunk "
                f"{self.epochs_per_chunk} both say when a chunk ends: give one of them"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Training:
        """Refuse a curriculum that other settings contradict."""
        if self.curriculum is None:
            return self
        if self.tau is not None:
            raise ValueError(f"tau {self.tau:g} beside a curriculum, which has its own: leave it")
        if self.curriculum.stages > self.epochs:
            raise ValueError(
                f"curriculum.stages {self.curriculum.stages} of {self.epochs} epochs; allowed: 1 "
                f"to {self.epochs}, or raise epochs"
            )
        if self.checkpoint_interval is not None:
            raise ValueError(
                f"checkpoint_interval {self.checkpoint_interval} beside a curriculum, whose stages "
                "end with a checkpoint: leave it null and say epochs_per_chunk"
            )
        return self

    @model_validator(mode="after")
    def _shares_are_rows(self) -> Training:
        """Refuse a share so small that no batch would hold a row of it."""
        for name in ("augment", "centroid_replay"):
            share = getattr(self, name)
            if share and round(share * self.batch_size) == 0:
                raise ValueError(
                    f"{name} {share} of batch_size {self.batch_size} is no whole row; allowed: 0, "
                    f"or at least {0.5 / self.batch_size:.2g} (one row)"
                )
        return self

    @model_validator(mode="after")
    def _something_real_is_shown(self) -> Training:
        if self.centroid_warmup_epochs >= self.epochs:
            raise ValueError(
                f"centroid_warmup_epochs {self.centroid_warmup_epochs} of {self.epochs} epochs "
                f"leave none for the training queries; allowed: 0 to {self.epochs - 1}"
            )
        made = self.made_share(answers_new=True)
        if made + self.centroid_replay >= 1:
            raise ValueError(
                f"augment {made} and centroid_replay {self.centroid_replay} leave no room for "
                "training queries; allowed: a sum below 1"
            )
        return self

    def stage_of(self, epoch: int) -> int:
        """Return the curriculum's stage of an epoch, both from 0; 0 where there is none."""
        return 0 if self.curriculum is None else epoch * self.curriculum.stages // self.epochs

    def tau_of(self, epoch: int) -> float:
        """Return the temperature of an epoch's relational terms."""
        if self.curriculum is None:
            return 1.0 if self.tau is None else self.tau
        told = self.curriculum
        schedule = TauSchedule(told.start_tau, told.end_tau, told.stages, told.schedule)
        return schedule(self.stage_of(epoch))

    def ends_stage(self, epoch: int) -> bool:
        """Whether a curriculum's stage is over after so many epochs."""
        if self.curriculum is None or not 0 < epoch <= self.epochs:
            return False
        return epoch == self.epochs or self.stage_of(epoch) != self.stage_of(epoch - 1)

    def epoch_blocks(self) -> list[tuple[int, int]]:
        """Cut the epochs into the chunks that train them: (first, last + 1), never over a stage."""
        cuts = [0]
        for epoch in range(1, self.epochs):
            if self.ends_stage(epoch) or epoch - cuts[-1] == self.epochs_per_chunk:
                cuts.append(epoch)
        return list(zip(cuts, [*cuts[1:], self.epochs], strict=True))

    def recipe(self) -> dict[str, Any]:
        """Return, as JSON values, the settings that the student's bytes may depend on."""
        return self.model_dump(mode="json", exclude=set(WORK))

    def made_share(self, *, answers_new: bool) -> float:
        """Return ``augment`` with its null resolved: by whether the teacher answers new queries."""
        if self.augment is None:
            return MADE_SHARE if answers_new else 0.0
        return self.augment

    def made_noise(self) -> float:
        """Return ``augment_noise`` with its null resolved."""
        return MADE_NOISE if self.augment_noise is None else self.augment_noise

    def check_teacher(self, *, answers_new: bool) -> None:
        """Refuse what needs answers to new queries from a teacher that gives none.

        Raises:
            SpecInvalid: which setting, and what is allowed.
        """
        for name in ("augment", "augment_noise", "centroid_warmup_epochs", "centroid_replay"):
            value = getattr(self, name)
            if value and not answers_new:
                allowed = "null or 0" if name.startswith("augment") else "0"
                raise SpecInvalid(
                    f"training.{name} {value}: the teacher has stored answers alone and can "
                    f"answer no new query; allowed: {allowed}",
                    pointer=f"/training/{name}",
                )
