"""The batches of one epoch, from any of its steps on: a function of a generator's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from core.distill.curriculum import MADE_ROWS, Examples, TrainingData
from core.distill.schedules import BatchPlan
from core.distill.students._base import Shown, StudentModule
from core.specs.training import Training

SEEDS = 2**62
"""Blocks of made queries are drawn from seeds below this."""


@dataclass(frozen=True)
class Wanted:
    """What a batch must hold beside queries and answers."""

    weights: bool = False
    """The teacher's weights over the clusters."""
    anchored: bool = False
    """The queries by the teacher's anchor."""
    candidates: bool = False
    """Targets to retrieve among, one per real row."""


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
    wanted: Wanted,
    pool: Tensor,
    first: int,
    on_block: Callable[[], None],
) -> Iterator[list[Examples]]:
    """Yield the batches ``first`` and later of an epoch that shows the training queries.

    Every row of the pool once; beside them made queries and centroids, in parts. All randomness
    is drawn before the first batch, so the generator ends up the same wherever one begins.

    Args:
        data: what is shown.
        plan: from ``batch_plan``.
        generator: on the CPU, as it stood when the epoch began.
        wanted: what else is read of them.
        pool: [t] int64 rows of ``data.real``, from ``epoch_pool``.
        first: batches that were shown before.
        on_block: called before the teacher answers a block of made queries.
    """
    device = data.train.device
    order = pool[torch.randperm(len(pool), generator=generator).to(device)]
    span = max(1, MADE_ROWS // plan.made) if plan.made else 1  # batches of a block of made queries
    seeds = torch.randint(SEEDS, (-(-plan.steps // span),), generator=generator).tolist()
    replayed = None
    if plan.replayed:
        drawn = (plan.steps, plan.replayed)
        replayed = torch.randint(len(data.centroids), drawn, generator=generator).to(device)
    made: Examples | None = None
    for step in range(first, plan.steps):
        rows = order[step * plan.real : (step + 1) * plan.real]
        batch = [real_rows(data, rows, wanted)]
        if plan.made:
            if made is None or step % span == 0:
                block = step // span
                rows_made = min(span, plan.steps - block * span) * plan.made
                made = data.made(
                    rows_made,
                    _seeded(seeds[block]),
                    on_block,
                    with_anchor=wanted.anchored,
                    with_weights=wanted.weights,
                )
            start = step % span * plan.made
            batch.append(take(made, torch.arange(start, start + plan.made, device=device)))
        if replayed is not None:
            batch.append(take(data.centroids, replayed[step]))
        yield batch


def epoch_pool(data: TrainingData, training: Training, epoch: int) -> Tensor:
    """Return the rows that an epoch shows: [t] int64, all of ``data.train`` unless told easy first.

    Easy first: the share that the stage allows, the easiest rows, repeated until there are as many
    as in any other epoch (Bengio et al. 2009).
    """
    told = training.curriculum
    if told is None or told.order == "shuffled":
        return data.train
    share = (training.stage_of(epoch) + 1) / told.stages
    easy = data.by_ease[: max(1, round(share * len(data.train)))]
    return easy.repeat(-(-len(data.train) // len(easy)))[: len(data.train)]


def centroid_batches(
    data: TrainingData, plan: BatchPlan, generator: torch.Generator, *, first: int
) -> Iterator[list[Examples]]:
    """Yield the batches ``first`` and later of an epoch that shows every centroid once."""
    order = torch.randperm(len(data.centroids), generator=generator).to(data.train.device)
    for rows in order.split(plan.batch_size)[first:]:
        yield [take(data.centroids, rows)]


def validation_batches(data: TrainingData, size: int, wanted: Wanted) -> Iterator[Examples]:
    """Yield the validation rows in batches of ``size``, in order."""
    for rows in data.validation.split(size):
        yield real_rows(data, rows, wanted)


def take(examples: Examples, rows: Tensor) -> Examples:
    """Return some of the examples, in the order of ``rows``."""
    return Examples(
        queries=examples.queries.index_select(0, rows),
        teacher=examples.teacher.index_select(0, rows),
        mixture=None if examples.mixture is None else examples.mixture.rows(rows),
        candidates=_rows(examples.candidates, rows),
        exclude=examples.exclude.index_select(0, rows),
        anchored=_rows(examples.anchored, rows),
    )


def parts(batch: list[Examples], count: int) -> list[tuple[list[Examples], float]]:
    """Cut a batch into ``count`` parts of rows, each with its share of them; real rows stay first.

    Fewer where it has fewer real rows: a part without any has nothing to retrieve among. Of made
    queries and centroids a part may have none.
    """
    count = min(count, len(batch[0]))
    if count == 1:
        return [(batch, 1.0)]
    device, total = batch[0].queries.device, sum(len(part) for part in batch)
    cut = [torch.arange(len(part), device=device).tensor_split(count) for part in batch]
    found = []
    for number in range(count):
        rows_of = zip(batch, (rows[number] for rows in cut), strict=True)
        some = [take(part, rows) for part, rows in rows_of if len(rows)]
        found.append((some, sum(len(part) for part in some) / total))
    return found


def shown(batch: list[Examples], wanted: Wanted) -> Shown:
    """Return what a student is shown of a batch's parts, one after another."""
    queries = joined([part.queries for part in batch])
    anchored = weights = queries.new_zeros(len(queries), 0)
    if wanted.anchored:
        anchored = joined([part.anchored for part in batch if part.anchored is not None])
    if wanted.weights:
        weights = joined([part.mixture.dense() for part in batch if part.mixture is not None])
    return Shown(queries, anchored, weights, exclude=_excluded_rows(batch))


def joined(parts: list[Tensor]) -> Tensor:
    """Concatenate, without a copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def left_out_answers(student: StudentModule, data: TrainingData, rows: Tensor) -> Tensor:
    """Map some rows of ``data.real``, none routed through itself: [R, d]."""
    wanted = Wanted(weights=student.takes_weights, anchored=student.takes_anchored)
    with torch.no_grad():
        asked = shown([real_rows(data, rows, wanted)], wanted)
        return student.with_lengths(student.routed(asked).vectors, asked.queries)


def real_rows(data: TrainingData, rows: Tensor, wanted: Wanted) -> Examples:
    """Return some rows of ``data.real``, with what else is wanted."""
    return Examples(
        queries=data.real.queries.index_select(0, rows),
        teacher=data.real.teacher.index_select(0, rows),
        mixture=data.mixture.rows(rows) if wanted.weights else None,
        candidates=_rows(data.real.candidates if wanted.candidates else None, rows),
        exclude=data.real.exclude.index_select(0, rows),
        anchored=_rows(data.anchored if wanted.anchored else None, rows),
    )


def _rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values.index_select(0, rows)


def _excluded_rows(batch: list[Examples]) -> Tensor:
    """Return what the parts of a batch may not find: [B, e] int64, -1 for none."""
    widest = max(part.exclude.shape[1] for part in batch)
    parts = [
        functional.pad(part.exclude, (0, widest - part.exclude.shape[1]), value=-1)
        for part in batch
    ]
    return joined(parts)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
