"""How many batches a training has, of what, and at which learning rate. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.specs.training import PLATEAU_FACTOR, Training

STEP_AT = (0.5, 0.75)
"""Shares of the run after which scheduler ``step`` divides the learning rate by ten."""


@dataclass(frozen=True)
class BatchPlan:
    """Which rows a batch has, and how many batches each epoch: a function of sizes alone."""

    real: int
    """Training queries in a batch, at least 1."""
    made: int
    """Made queries beside them."""
    replayed: int
    """Centroids beside those."""
    batch_size: int
    """Rows of a batch; an epoch's last one has fewer real ones."""
    warmup_epochs: int
    """The first epochs, of centroids alone."""
    epochs: int
    """All of them."""
    warmup_steps: int
    """Batches of an epoch of centroids."""
    steps: int
    """Batches of any other epoch: they show every training query once."""

    @classmethod
    def of(
        cls, training: Training, *, rows: int, centroids: int, answers_new: bool = True
    ) -> BatchPlan:
        """Plan a training.

        Args:
            training: the settings.
            rows: training queries, without those held out; more give more batches.
            centroids: that are shown; more give more batches.
            answers_new: whether the teacher answers queries that are not stored.
        """
        size = training.batch_size
        made = round(size * training.made_share(answers_new=answers_new))
        replayed = round(size * training.centroid_replay)
        real = max(1, size - made - replayed)
        made = min(made, size - real)
        return cls(
            real=real,
            made=made,
            replayed=size - real - made,
            batch_size=size,
            warmup_epochs=training.centroid_warmup_epochs,
            epochs=training.epochs,
            warmup_steps=math.ceil(centroids / size),
            steps=math.ceil(rows / real),
        )

    def steps_of(self, epoch: int) -> int:
        """Return the batches of an epoch, counted from 0."""
        return self.warmup_steps if epoch < self.warmup_epochs else self.steps

    def steps_before(self, epoch: int) -> int:
        """Return the batches of all epochs before this one."""
        warm = min(epoch, self.warmup_epochs)
        return warm * self.warmup_steps + (epoch - warm) * self.steps

    @property
    def total_steps(self) -> int:
        """Batches of the whole training, if it is not stopped early."""
        return self.steps_before(self.epochs)


def learning_rate(training: Training, step: int, total_steps: int, *, cuts: int = 0) -> float:
    """Learning rate of a step: linear warm-up, then the schedule over the steps that remain.

    Args:
        training: the settings.
        step: from 0.
        total_steps: of the whole training.
        cuts: how often scheduler ``plateau`` has reduced it.
    """
    warm = min(training.warmup_steps, total_steps // 2)
    if step < warm:
        return training.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, total_steps - warm)
    factors = {
        "none": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "plateau": (training.plateau_factor or PLATEAU_FACTOR) ** cuts,
        "step": 0.1 ** sum(share >= at for at in STEP_AT),
    }
    return training.learning_rate * factors[training.scheduler]
