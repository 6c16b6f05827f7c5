"""Document 001's training of a transformer on another module's answers.

Any teacher and student that map [B, d] to [B, m] will do; both are left in the modes they came in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.agreement import evaluate_distillation
from core.distill.answering import Answering, ask, checked_rows, in_mode, place_of, unfit
from core.distill.curriculum import NEIGHBOURS, jitter, slerp
from core.distill.routing import nearest
from core.errors import DataInvalid, SpecInvalid
from core.specs.architectures import whole_number

__all__ = ["evaluate_distillation", "train_distillation"]

MSEReduction = Literal["sum", "mean"]
NOISE = 1.0
"""Length of the tangent noise on a made query, of its own length. Large, for questions not asked
yet lie far from those that were: on 192 MiniLM questions, 48 held out, 30 clusters at temperature
0.1, the mean held-out cosine is 0.919 at 0.1, 0.941 at 0.5, 0.962 at 1 (a ridge's is 0.940)."""


def train_distillation(  # noqa: PLR0913 - document 001's six, and what a sound training needs
    transformer: nn.Module,
    lda_projection: Answering,
    query_embeddings: Tensor,
    num_epochs: int = 200,
    cosine_weight: float = 0.7,
    learning_rate: float = 1e-4,
    *,
    batch_size: int | None = 256,
    seed: int = 0,
    validation_fraction: float = 0.0,
    mse_reduction: MSEReduction = "sum",
    augment: float = 0.5,
    on_epoch: Callable[[int, Mapping[str, float]], None] | None = None,
) -> dict[str, list[float]]:
    """Train by AdamW on ``(1 - w) MSE + w (1 - cos)`` against the teacher's answers.

    Document 001's own training is ``batch_size=None, mse_reduction="mean", augment=0`` with a
    student that has dropout: one step an epoch on the given queries alone, and an MSE averaged over
    the m coordinates, which for unit vectors of 384 coordinates is 1/384 of the squared distance
    and weighs nothing beside the cosine. A function of its arguments alone: all randomness comes
    from ``seed``.

    Args:
        transformer: the student, changed in place.
        lda_projection: the teacher; never changed.
        query_embeddings: [n, d], moved to the student's device and dtype.
        num_epochs: from 1 up.
        cosine_weight: w, in [0, 1].
        learning_rate: > 0, constant.
        batch_size: real and made queries of a step; None: all real ones in a single step.
        seed: of batches, made queries, dropout and the held-out rows.
        validation_fraction: in [0, 1): share of the distinct queries that is never trained on.
        mse_reduction: "sum": squared distance over the teacher's mean squared length, so 1 is the
            error of answering zero; "mean": over the coordinates too, as document 001.
        augment: in [0, 1): share of each batch that is made anew, on great circles between a query
            and one of its neighbours with some noise, and answered by the teacher.
        on_epoch: called after each epoch with its number from 1 and its row; may raise to stop.

    Returns:
        ``loss``, ``mse`` and ``cosine`` (the cosine *loss*), one mean over the epoch's rows each,
        as the student was before each step; with held-out rows also ``validation_cosine``, the
        mean cosine after the epoch.

    Raises:
        SpecInvalid: an argument out of range, a student that does not fit, or a loss that grew
            beyond numbers.
        DataInvalid: queries or answers of the wrong shape, or not finite.
    """
    asked = _Asked.checked(
        num_epochs, cosine_weight, learning_rate, batch_size, validation_fraction,
        mse_reduction, augment,
    )  # fmt: skip
    place = place_of(transformer)
    queries = checked_rows(query_embeddings, "query_embeddings").to(place)
    with in_mode(lda_projection, training=False), in_mode(transformer, training=False):
        answers = ask(lda_projection, queries, "lda_projection").to(place)
        _check_fit(transformer, queries, answers)
    data = _Data.split(queries, answers, lda_projection, asked, seed)
    history: dict[str, list[float]] = {"loss": [], "mse": [], "cosine": []}
    devices = [place.device] if place.is_cuda else []
    generator = torch.Generator().manual_seed(seed)
    with in_mode(lda_projection, training=False), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        with in_mode(transformer, training=True):
            optimizer = torch.optim.AdamW(transformer.parameters(), lr=learning_rate)
            for epoch in range(1, asked.epochs + 1):
                row = _epoch(transformer, data, asked, optimizer, generator)
                if not math.isfinite(row["loss"]):
                    raise SpecInvalid(
                        f"learning_rate {learning_rate}: the loss is {row['loss']} in epoch "
                        f"{epoch}; take a smaller one",
                        pointer="/learning_rate",
                    )
                for name, value in row.items():
                    history.setdefault(name, []).append(value)
                if on_epoch is not None:
                    on_epoch(epoch, row)
    return history


@dataclass(frozen=True)
class _Asked:
    """What a training was asked for, checked."""

    epochs: int
    cosine_weight: float
    batch_size: int | None
    validation_fraction: float
    mse_reduction: MSEReduction
    augment: float

    @classmethod
    def checked(
        cls,
        epochs: int,
        cosine_weight: float,
        learning_rate: float,
        batch_size: int | None,
        validation_fraction: float,
        mse_reduction: MSEReduction,
        augment: float,
    ) -> _Asked:
        epochs = whole_number(epochs, "num_epochs", least=1)
        _in_range(cosine_weight, "cosine_weight", "from 0 to 1", lambda w: 0 <= w <= 1)
        _in_range(learning_rate, "learning_rate", "above 0", lambda r: 0 < r < math.inf)
        below_one = "from 0 to below 1"
        _in_range(validation_fraction, "validation_fraction", below_one, lambda v: 0 <= v < 1)
        _in_range(augment, "augment", below_one, lambda a: 0 <= a < 1)
        if mse_reduction not in ("sum", "mean"):
            raise SpecInvalid(
                f"mse_reduction {mse_reduction!r}; allowed: sum, mean", pointer="/mse_reduction"
            )
        if batch_size is not None:
            batch_size = whole_number(batch_size, "batch_size", least=1)
        return cls(epochs, cosine_weight, batch_size, validation_fraction, mse_reduction, augment)


@dataclass(frozen=True)
class _Data:
    """Real queries with their answers, what is held out of them, and who answers made ones."""

    queries: Tensor
    answers: Tensor
    train: Tensor
    """Row numbers, on the CPU."""
    held_out: Tensor
    teacher: Answering
    size: float
    """Mean squared length of the training answers."""
    parents: Tensor
    """[p, d] on the CPU: training queries that have a direction; none where none are made."""
    neighbours: Tensor
    """[p, k] rows of ``parents``."""

    @classmethod
    def split(
        cls, queries: Tensor, answers: Tensor, teacher: Answering, asked: _Asked, seed: int
    ) -> _Data:
        _, which = queries.cpu().unique(dim=0, return_inverse=True)
        distinct = int(which.max()) + 1
        held = math.ceil(asked.validation_fraction * distinct)
        if held >= distinct:
            raise DataInvalid(
                f"query_embeddings: {distinct} distinct; validation_fraction "
                f"{asked.validation_fraction} leaves none to train on"
            )
        order = torch.randperm(distinct, generator=torch.Generator().manual_seed(seed))
        hidden = torch.zeros(distinct, dtype=torch.bool)
        hidden[order[:held]] = True
        train = (~hidden[which]).nonzero().flatten()
        size = float(answers[train.to(answers.device)].double().square().sum(1).mean())
        if size == 0:
            raise DataInvalid(
                "lda_projection answers every query with zero, which has no direction"
            )
        parents = queries.cpu()[train]
        parents = parents[parents.any(dim=1)] if asked.augment else parents[:0]
        return cls(
            queries,
            answers,
            train,
            hidden[which].nonzero().flatten(),
            teacher,
            size,
            parents,
            _neighbours(parents) if len(parents) else torch.zeros(0, 0, dtype=torch.int64),
        )

    def batches(self, asked: _Asked, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch: every training query once, made ones beside it where asked."""
        if asked.batch_size is None:
            real, rows = len(self.train), [self.train]
        else:
            real = max(1, asked.batch_size - round(asked.augment * asked.batch_size))
            order = torch.randperm(len(self.train), generator=generator)
            rows = list(self.train[order].split(real))
        for part in rows:
            queries, answers = self._at(part)
            made = round(len(part) * asked.augment / (1 - asked.augment))
            if made and len(self.parents):
                between = self._made(made, generator)
                told = ask(self.teacher, between, "lda_projection").to(answers)
                queries, answers = torch.cat([queries, between]), torch.cat([answers, told])
            yield queries, answers

    def validation(self) -> tuple[Tensor, Tensor]:
        return self._at(self.held_out)

    def _at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.to(self.queries.device)
        return self.queries[rows], self.answers[rows]

    def _made(self, count: int, generator: torch.Generator) -> Tensor:
        own = self.parents
        first = torch.randint(len(own), (count,), generator=generator)
        which = torch.randint(self.neighbours.shape[1], (count,), generator=generator)
        share = torch.rand(count, 1, generator=generator).to(own.dtype)
        noise = torch.randn(count, own.shape[1], generator=generator).to(own.dtype)
        between = slerp(own[first], own[self.neighbours[first, which]], share)
        return jitter(between, noise, size=NOISE).to(self.queries)


def _epoch(
    student: nn.Module,
    data: _Data,
    asked: _Asked,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> dict[str, float]:
    """Train one epoch; return its means."""
    sums, rows = dict.fromkeys(("loss", "mse", "cosine"), 0.0), 0
    for queries, wanted in data.batches(asked, generator):
        optimizer.zero_grad()
        found = student(queries)
        if asked.mse_reduction == "mean":
            mse = functional.mse_loss(found, wanted)
        else:
            mse = (found - wanted).square().sum(-1).mean() / data.size
        cosine = 1 - functional.cosine_similarity(found, wanted, dim=-1).mean()
        loss = (1 - asked.cosine_weight) * mse + asked.cosine_weight * cosine
        loss.backward()
        optimizer.step()
        rows += len(queries)
        for name, value in (("loss", loss), ("mse", mse), ("cosine", cosine)):
            sums[name] += value.item() * len(queries)
    means = {name: value / rows for name, value in sums.items()}
    if len(data.held_out):
        queries, wanted = data.validation()
        with in_mode(student, training=False):
            found = ask(student, queries, "transformer")
        means["validation_cosine"] = float(functional.cosine_similarity(found, wanted).mean())
    return means


def _neighbours(queries: Tensor) -> Tensor:
    """Positions of each query's nearest others, equal ones counted once: [n, k], k >= 1.

    Where no other differs, its own.
    """
    own = torch.arange(len(queries))
    _, which = queries.unique(dim=0, return_inverse=True)
    distinct = int(which.max()) + 1
    if distinct < 2:
        return own[:, None]
    units = functional.normalize(queries, dim=1)
    firsts = torch.full((distinct,), len(queries)).scatter_reduce(0, which, own, "amin")
    k = min(NEIGHBOURS, distinct - 1)
    found, _ = nearest(units, units[firsts], top_k=k, exclude_rows=which)
    return firsts[found]


def _check_fit(student: nn.Module, queries: Tensor, answers: Tensor) -> None:
    if not any(value.requires_grad for value in student.parameters()):
        raise SpecInvalid("transformer: has no parameter to train", pointer="/transformer")
    found = ask(student, queries[:1], "transformer")
    if found.shape[1] != answers.shape[1]:
        raise unfit(found, answers)


def _in_range(value: float, name: str, allowed: str, holds: Callable[[float], bool]) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not holds(value):
        raise SpecInvalid(f"{name} {value!r}; allowed: {allowed}", pointer=f"/{name}")
