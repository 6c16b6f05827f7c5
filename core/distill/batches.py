"""The batches of one epoch, from any of its steps on: a function of a generator's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from core.distill.curriculum import MADE_ROWS, Examples, TrainingData
from core.distill.schedules import BatchPlan
from core.distill.students._base import StudentModule
from core.specs.training import Training

SEEDS = 2**62
"""Blocks of made queries are drawn from seeds below this."""


def batch_plan(data: TrainingData, training: Training) -> BatchPlan:
    """Count the batches of a training on this data."""
    shown = bool(training.centroid_warmup_epochs or training.centroid_replay)
    return BatchPlan.of(
        training,
        rows=len(data.train),
        centroids=len(data.centroids) if shown else 0,
        answers_new=data.teacher.answers_new,
    )


def epoch_batches(
    data: TrainingData,
    plan: BatchPlan,
    generator: torch.Generator,
    *,
    weights: bool,
    first: int,
    on_block: Callable[[], None],
) -> Iterator[list[Examples]]:
    """Yield the batches ``first`` and later of an epoch that shows the training queries.

    Every training query once; beside them made queries and centroids, in parts. All randomness
    is drawn before the first batch, so the generator ends up the same wherever one begins.

    Args:
        data: what is shown.
        plan: from ``batch_plan``.
        generator: on the CPU, as it stood when the epoch began.
        weights: whether the teacher's weights are wanted.
        first: batches that were shown before.
        on_block: called before the teacher answers a block of made queries.
    """
    device = data.train.device
    order = data.train[torch.randperm(len(data.train), generator=generator).to(device)]
    span = max(1, MADE_ROWS // plan.made) if plan.made else 1  # batches of a block of made queries
    seeds = torch.randint(SEEDS, (-(-plan.steps // span),), generator=generator).tolist()
    replayed = None
    if plan.replayed:
        drawn = (plan.steps, plan.replayed)
        replayed = torch.randint(len(data.centroids), drawn, generator=generator).to(device)
    made: Examples | None = None
    for step in range(first, plan.steps):
        rows = order[step * plan.real : (step + 1) * plan.real]
        batch = [real_rows(data, rows, weights=weights)]
        if plan.made:
            if made is None or step % span == 0:
                block = step // span
                rows_made = min(span, plan.steps - block * span) * plan.made
                made = data.made(rows_made, _seeded(seeds[block]), on_block)
            start = step % span * plan.made
            batch.append(take(made, torch.arange(start, start + plan.made, device=device)))
        if replayed is not None:
            batch.append(take(data.centroids, replayed[step]))
        yield batch


def centroid_batches(
    data: TrainingData, plan: BatchPlan, generator: torch.Generator, *, first: int
) -> Iterator[list[Examples]]:
    """Yield the batches ``first`` and later of an epoch that shows every centroid once."""
    order = torch.randperm(len(data.centroids), generator=generator).to(data.train.device)
    for rows in order.split(plan.batch_size)[first:]:
        yield [take(data.centroids, rows)]


def validation_batches(data: TrainingData, size: int, *, weights: bool) -> Iterator[Examples]:
    """Yield the validation rows in batches of ``size``, in order."""
    for rows in data.validation.split(size):
        yield real_rows(data, rows, weights=weights)


def take(examples: Examples, rows: Tensor) -> Examples:
    """Return some of the examples, in the order of ``rows``."""
    return Examples(
        queries=examples.queries[rows],
        teacher=examples.teacher[rows],
        mixture=None if examples.mixture is None else examples.mixture.rows(rows),
        candidates=examples.candidates[rows],
        exclude=examples.exclude[rows],
    )


def dense_weights(batch: list[Examples], *, weights: bool) -> Tensor:
    """Return the teacher's weights of a batch's parts: [B, C] float32; [B, 0] where not wanted."""
    if not weights:
        return batch[0].queries.new_zeros(sum(map(len, batch)), 0)
    mixtures = [part.mixture for part in batch if part.mixture is not None]
    return torch.cat([mixture.dense() for mixture in mixtures])


def excluded_rows(batch: list[Examples]) -> Tensor:
    """Return what the parts of a batch may not find: [B, e] int64, -1 for none."""
    widest = max(part.exclude.shape[1] for part in batch)
    parts = [
        functional.pad(part.exclude, (0, widest - part.exclude.shape[1]), value=-1)
        for part in batch
    ]
    return torch.cat(parts)


def left_out_answers(student: StudentModule, data: TrainingData, rows: Tensor) -> Tensor:
    """Map some rows of ``data.real``, none routed through itself: [R, d]."""
    some = [real_rows(data, rows, weights=student.takes_weights)]
    weights = dense_weights(some, weights=student.takes_weights)
    with torch.no_grad():
        return student.routed(some[0].queries, weights, excluded_rows(some)).vectors


def real_rows(data: TrainingData, rows: Tensor, *, weights: bool) -> Examples:
    """Return some rows of ``data.real``, with the teacher's weights where they are wanted."""
    return Examples(
        queries=data.real.queries[rows],
        teacher=data.real.teacher[rows],
        mixture=data.mixture.rows(rows) if weights else None,
        candidates=data.real.candidates[rows],
        exclude=data.real.exclude[rows],
    )


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
