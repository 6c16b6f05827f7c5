"""What a trained student is worth row by row, and what its rows are worth: for ``select``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from core.distill import fitting
from core.distill.batches import left_out_answers
from core.distill.curriculum import TrainingData
from core.distill.students._base import StudentModule
from core.distill.training import trainable
from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.shards import Array

BLOCK_ROWS = 1024
_ARRAYS = ("held_in", "held_out", "groups")


@dataclass(frozen=True)
class Judged:
    """What one candidate is worth, before it is compared."""

    name: str
    parameters: int
    """k: free parameters, those taken from the teacher among them."""
    stored_bytes: int
    """Of all its tensors: what it holds of the data (a router's training queries) too."""
    trained: bool
    """Whether anything of it was left to train."""
    held_in: Array
    """[t] float64 squared chords to the teacher's targets, of distinct training queries."""
    held_out: Array
    """[v] float64, of distinct validation queries; the same rows for every candidate."""
    groups: Array
    """[v] int64 cluster of each held-out row: what errs together."""
    effective_rows: float
    """n_eff of its held-in residuals, 1 to t."""
    effective_dim: float
    """d_eff of its held-in residuals, 1 to d - 1."""

    def save(self, path: Path) -> None:
        """Write as one .safetensors; equal values give equal bytes."""
        facts = {key: value for key, value in vars(self).items() if key not in _ARRAYS}
        shards.save(path, {name: getattr(self, name) for name in _ARRAYS}, facts)

    @classmethod
    def load(cls, path: Path) -> Judged:
        """Read what save wrote."""
        arrays, facts = shards.load(path)
        values: dict[str, Any] = {**facts, **arrays}
        return cls(**values)


def judge(
    name: str, student: StudentModule, data: TrainingData, on_block: Callable[[], None]
) -> Judged:
    """Measure a trained student on its training and validation rows, each query once.

    No training query routes through itself, as when it was trained.

    Args:
        name: in the comparison.
        student: on the device of the data, in eval mode.
        data: what it was trained on.
        on_block: called every BLOCK_ROWS rows.

    Raises:
        DataInvalid: an answer is NaN or infinite: its training diverged.
    """
    train, validation = _distinct(data, data.train), _distinct(data, data.validation)
    shown = _residuals(student, data, train, on_block)
    hidden = _residuals(student, data, validation, on_block)
    if not bool(torch.isfinite(shown.squares).all() and torch.isfinite(hidden.squares).all()):
        raise DataInvalid(
            f"{name}: the trained student answers NaN or infinity; lower training.learning_rate"
        )
    return Judged(
        name=name,
        parameters=student.free_parameters(),
        stored_bytes=student.stored_bytes(),
        trained=bool(trainable(student)),
        held_in=shown.squares.cpu().numpy(),
        held_out=hidden.squares.cpu().numpy(),
        groups=data.teacher.cluster_of[validation.cpu().numpy()],
        effective_rows=effective_rows(shown),
        effective_dim=effective_dim(shown),
    )


def _distinct(data: TrainingData, rows: Tensor) -> Tensor:
    """Keep the first row of every query."""
    return rows[data.same[rows] == rows]


@dataclass(frozen=True)
class Residuals:
    """What is kept of the chords from answers to targets: float64, and it adds up over blocks."""

    squares: Tensor
    """[n] squared lengths."""
    moment: Tensor
    """[d, d] sum of e e^T."""
    sums: Tensor
    """[C, d] sum of e per cluster."""

    @classmethod
    def of(cls, answers: Tensor, targets: Tensor, groups: Tensor, *, clusters: int) -> Residuals:
        """Take directions alone: answers and targets [n, d] of any length, groups [n] int64."""
        apart = functional.normalize(targets.double(), dim=1)
        apart = apart - functional.normalize(answers.double(), dim=1)
        sums = apart.new_zeros(clusters, apart.shape[1]).index_add_(0, groups, apart)
        return cls(apart.square().sum(1), apart.mT @ apart, sums)

    def __add__(self, other: Residuals) -> Residuals:
        return Residuals(
            torch.cat([self.squares, other.squares]),
            self.moment + other.moment,
            self.sums + other.sums,
        )


def _residuals(
    student: StudentModule, data: TrainingData, rows: Tensor, on_block: Callable[[], None]
) -> Residuals:
    cluster_of = data.teacher.cluster_of
    groups = torch.from_numpy(cluster_of).to(rows.device)
    found: list[Residuals] = []
    for part in rows.split(BLOCK_ROWS):
        on_block()
        answers = left_out_answers(student, data, part)
        block = Residuals.of(
            answers, data.real.teacher[part], groups[part], clusters=int(cluster_of.max()) + 1
        )
        found.append(found.pop() + block if found else block)
    return found[0]


def effective_rows(residuals: Residuals) -> float:
    """n_eff = n / design effect, the design effect at least 1 (Kish 1965, section 5.4).

    The variance of the residuals' sum, clusters taken as the independent units, over what it would
    be if rows were: sum_c |sum of residuals in c|^2 / sum_i |e_i|^2. It is 1 for rows that err each
    in their own way, and the size of a cluster where all its rows err alike.
    """
    total = float(residuals.squares.sum())
    effect = float(residuals.sums.square().sum()) / total if total > 0 else 1.0
    return len(residuals.squares) / max(1.0, effect)


def effective_dim(residuals: Residuals) -> float:
    """d_eff: participation ratio (tr S)^2 / tr S^2 of the residuals' second moment S.

    Both squares without the products of a row with itself, which would make n rows fill at most n
    directions: sum_{i != j} |e_i|^2 |e_j|^2 / sum_{i != j} (e_i . e_j)^2. Between 1 and d - 1.
    """
    dim = residuals.moment.shape[0]
    own = float(residuals.squares.square().sum())
    over = float(residuals.squares.sum()) ** 2 - own
    under = float(residuals.moment.square().sum()) - own
    ratio = over / under if under > over / dim else float(dim)
    return min(max(ratio, 1.0), dim - 1.0)


def baseline_chord(data: TrainingData) -> float:
    """Mean squared chord that one global rotation leaves on the held-in rows it is fitted to.

    Each query once, as candidates are judged.
    """
    rows = _distinct(data, data.train)
    queries, targets = (tensor[rows].cpu() for tensor in (data.real.queries, data.real.teacher))
    turn = torch.from_numpy(fitting.global_rotation(queries.numpy(), targets.numpy()))
    total = 0.0
    for some, wanted in zip(queries.split(BLOCK_ROWS), targets.split(BLOCK_ROWS), strict=True):
        one = torch.zeros(len(some), dtype=torch.int64)
        found = Residuals.of(some.double() @ turn, wanted, one, clusters=1)
        total += float(found.squares.sum())
    return total / len(queries)
