"""What a student is trained on: real training queries, and made ones between neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from core.distill.routing import nearest
from core.distill.teachers._base import TeacherModel
from core.errors import DataInvalid
from core.rotations.mixture import Mixture
from core.specs.training import Training
from core.tensors.shards import Array

NEIGHBOURS = 8
"""A made query lies between a training query and one of this many nearest."""
NOISE = 0.1
"""Length of the tangent noise on a made query, of its own length."""
MADE_ROWS = 1024
"""Made queries the teacher answers at a time."""


@dataclass(frozen=True)
class Examples:
    """Queries with all a teacher says about them."""

    queries: Tensor
    """[R, d] float32."""
    teacher: Tensor
    """[R, d] float32 targets."""
    mixture: Mixture
    """The teacher's weights."""
    candidates: Tensor
    """[R, d] float32: true targets to retrieve among (a made query has its first parent's)."""

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class TrainingData:
    """Training and validation rows of one model, and the teacher that answers made queries."""

    teacher: TeacherModel
    real: Examples
    """[n]: all training queries, none routed through itself or its duplicates."""
    train: Tensor
    """[t] int64 rows of ``real``."""
    validation: Tensor
    """[v] int64 rows of ``real``, never trained on nor mixed from; nor are their duplicates."""
    neighbours: Tensor
    """[n, k] int64: rows among ``train`` of the nearest other queries, one row for each."""
    same: Tensor
    """[n] int64: the first row of ``real`` with the same query; what a row must exclude."""

    def made(
        self, count: int, generator: torch.Generator, on_block: Callable[[], None]
    ) -> Examples:
        """Make queries by SLERP between neighbours plus tangent noise, and ask the teacher.

        A made query may not route through its two parents or their duplicates, as a real one not
        through itself: otherwise the student would learn a teacher that has always seen it.

        Args:
            count: how many.
            generator: on the CPU; advances by a fixed amount per query.
            on_block: called before each block is answered.
        """
        parents = self._parents(count, generator)
        device = self.real.queries.device
        queries = self._between(parents, generator).to(device)
        first = parents[:, 0].to(device)
        exclude = self.same[parents.to(device)]
        vectors, mixtures = [], []
        for start in range(0, count, MADE_ROWS):
            on_block()
            block = slice(start, start + MADE_ROWS)
            said = self.teacher.answers(queries[block], exclude_rows=exclude[block])
            mixtures.append(said.mixture)
            vectors.append(said.vectors.float())
        return Examples(
            queries=queries,
            teacher=torch.cat(vectors),
            mixture=concatenate(mixtures),
            candidates=self.real.candidates[first],
        )

    def _parents(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, 2] int64 rows of ``real``, on the CPU."""
        first = self.train.cpu()[torch.randint(len(self.train), (count,), generator=generator)]
        k = self.neighbours.shape[1]
        which = torch.randint(k, (count,), generator=generator)
        return torch.stack([first, self.neighbours.cpu()[first, which]], dim=1)

    def _between(self, parents: Tensor, generator: torch.Generator) -> Tensor:
        """[count, d] on the CPU."""
        own = self.real.queries.cpu()
        a, b = own[parents[:, 0]], own[parents[:, 1]]
        share = torch.rand(len(parents), 1, generator=generator)
        noise = torch.randn(a.shape, generator=generator)
        return jitter(slerp(a, b, share), noise, size=NOISE)


def training_data(
    teacher: TeacherModel, targets: Tensor | Array, training: Training, *, seed: int
) -> TrainingData:
    """Split off validation rows and find neighbours; a function of its arguments alone.

    Args:
        teacher: who answers made queries.
        targets: [n, d], the teacher's answers to its model's training queries, none routed through
            itself or its duplicates.
        training: for ``validation_fraction``, of the distinct queries.
        seed: of the split; equal queries stay on one side.

    Raises:
        DataInvalid: the targets are not one per training query, or too few queries differ.
    """
    model, device = teacher.model, teacher.device
    answers = targets if isinstance(targets, Tensor) else torch.from_numpy(targets)
    if tuple(answers.shape) != model.queries.shape:
        raise DataInvalid(
            f"targets: shape {list(answers.shape)}; needed {list(model.queries.shape)}, one per "
            "training query of the model"
        )
    same = torch.from_numpy(teacher.own_rows(model.queries))
    firsts, which = same.unique(return_inverse=True)  # a row per distinct query; its number
    if len(firsts) < 4:
        raise DataInvalid(
            f"the model has {len(firsts)} distinct training queries; at least 4 are needed to train"
        )
    order = torch.randperm(len(firsts), generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(training.validation_fraction * len(firsts))), len(firsts) - 2)
    hidden = torch.zeros(len(firsts), dtype=torch.bool)
    hidden[order[:held]] = True
    shown = firsts[~hidden]
    queries = torch.from_numpy(model.queries).to(device)
    mixture = teacher.mixture(queries, exclude_rows=same)
    position = torch.full((len(firsts),), -1)
    position[~hidden] = torch.arange(len(shown))
    at, _ = nearest(
        queries,
        queries[shown.to(device)],
        top_k=min(NEIGHBOURS, len(shown) - 1),
        exclude_rows=position[which].to(device),
    )
    real = Examples(
        queries=queries,
        teacher=answers.to(device).float(),
        mixture=Mixture(
            mixture.offsets, mixture.clusters, mixture.weights.float(), mixture.cluster_count
        ),
        candidates=torch.from_numpy(model.targets).to(device),
    )
    return TrainingData(
        teacher=teacher,
        real=real,
        train=(~hidden[which]).nonzero().flatten().to(device),
        validation=hidden[which].nonzero().flatten().to(device),
        neighbours=shown.to(device)[at],
        same=same.to(device),
    )


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Interpolate along the great circle from a to b; lengths interpolate geometrically.

    Opposite directions lie on many great circles: the one towards the coordinate axis that a is
    farthest from is taken.

    Args:
        a: [n, d], no zero rows.
        b: [n, d], no zero rows.
        share: [n, 1] in [0, 1]; 0 gives a.
    """
    length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    x, y = a / length_a, b / length_b
    angle = 2 * torch.atan2((x - y).norm(dim=1, keepdim=True), (x + y).norm(dim=1, keepdim=True))
    across = y - (x * y).sum(dim=1, keepdim=True) * x
    size = across.norm(dim=1, keepdim=True)
    axis = functional.one_hot(x.abs().argmin(dim=1), x.shape[1]).to(x.dtype)
    other = axis - (x * axis).sum(dim=1, keepdim=True) * x
    across = torch.where(size > 1e-6, across, other)
    across = across / across.norm(dim=1, keepdim=True)
    direction = (share * angle).cos() * x + (share * angle).sin() * across
    direction = direction / direction.norm(dim=1, keepdim=True)
    between: Tensor = direction * length_a ** (1 - share) * length_b**share
    return between


def jitter(vectors: Tensor, noise: Tensor, *, size: float) -> Tensor:
    """Move each row along its tangent space by ``size`` times its length; lengths stay.

    Args:
        vectors: [n, d].
        noise: [n, d] standard normal.
        size: of the move, before it is put back onto the sphere.
    """
    lengths = vectors.norm(dim=1, keepdim=True)
    units = vectors / lengths
    tangent = noise - (noise * units).sum(dim=1, keepdim=True) * units
    moved = units + size * tangent / tangent.norm(dim=1, keepdim=True).clamp(min=1e-12)
    put_back: Tensor = moved / moved.norm(dim=1, keepdim=True) * lengths
    return put_back


def concatenate(mixtures: list[Mixture]) -> Mixture:
    """Put the rows of several mixtures under each other."""
    lengths = torch.cat([mixture.lengths for mixture in mixtures])
    return Mixture(
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        torch.cat([mixture.clusters for mixture in mixtures]),
        torch.cat([mixture.weights for mixture in mixtures]).float(),
        mixtures[0].cluster_count,
    )
