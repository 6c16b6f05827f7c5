"""What a student is trained on: real training queries, and made ones between neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from core.distill.routing import nearest
from core.distill.teachers._base import BlendingTeacher
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

    teacher: BlendingTeacher
    real: Examples
    """[n]: all training queries, each left out of its own routing."""
    train: Tensor
    """[t] int64 rows of ``real``."""
    validation: Tensor
    """[v] int64 rows of ``real``, never trained on nor mixed from."""
    neighbours: Tensor
    """[n, k] int64: nearest training rows among ``train``."""

    def made(
        self, count: int, generator: torch.Generator, on_block: Callable[[], None]
    ) -> Examples:
        """Make queries by SLERP between neighbours plus tangent noise, and ask the teacher.

        A made query may not route through its two parents, as a real one not through itself:
        otherwise the student would learn a teacher that has always seen the query.

        Args:
            count: how many.
            generator: on the CPU; advances by a fixed amount per query.
            on_block: called before each block is answered.
        """
        parents = self._parents(count, generator)
        device = self.real.queries.device
        queries = self._between(parents, generator).to(device)
        exclude = parents.to(device)
        vectors, mixtures = [], []
        for start in range(0, count, MADE_ROWS):
            on_block()
            block = slice(start, start + MADE_ROWS)
            mixture = self.teacher.mixture(queries[block], exclude_rows=exclude[block])
            mixtures.append(mixture)
            vectors.append(self.teacher.blend(queries[block], mixture).float())
        return Examples(
            queries=queries,
            teacher=torch.cat(vectors),
            mixture=concatenate(mixtures),
            candidates=self.real.candidates[exclude[:, 0]],
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
    teacher: BlendingTeacher, targets: Tensor | Array, training: Training, *, seed: int
) -> TrainingData:
    """Split off validation rows and find neighbours; a function of its arguments alone.

    Args:
        teacher: who answers made queries.
        targets: [n, d], the teacher's answers to its model's training queries, each left out of
            its own routing.
        training: for ``validation_fraction``.
        seed: of the split.

    Raises:
        DataInvalid: the targets are not one per training query, or there are too few rows.
    """
    model, device = teacher.model, teacher.bivectors.device
    answers = targets if isinstance(targets, Tensor) else torch.from_numpy(targets)
    if tuple(answers.shape) != model.queries.shape:
        raise DataInvalid(
            f"targets: shape {list(answers.shape)}; needed {list(model.queries.shape)}, one per "
            "training query of the model"
        )
    n = len(model.queries)
    if n < 4:
        raise DataInvalid(f"the model has {n} training queries; at least 4 are needed to train")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(training.validation_fraction * n)), n - 2)
    validation, train = order[:held].sort().values, order[held:].sort().values
    queries = torch.from_numpy(model.queries).to(device)
    own = torch.arange(n, device=device)
    mixture = teacher.mixture(queries, exclude_rows=own)
    position = torch.full((n,), -1)
    position[train] = torch.arange(len(train))
    at, _ = nearest(
        queries,
        queries[train],
        top_k=min(NEIGHBOURS, len(train) - 1),
        exclude_rows=position.to(device),
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
        train=train.to(device),
        validation=validation.to(device),
        neighbours=train.to(device)[at],
    )


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Interpolate along the great circle from a to b; lengths interpolate geometrically.

    Args:
        a: [n, d], no zero rows.
        b: [n, d], no zero rows.
        share: [n, 1] in [0, 1]; 0 gives a.
    """
    length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    x, y = a / length_a, b / length_b
    angle = 2 * torch.atan2((x - y).norm(dim=1, keepdim=True), (x + y).norm(dim=1, keepdim=True))
    sine = angle.sin()
    arc = (((1 - share) * angle).sin() * x + (share * angle).sin() * y) / sine.clamp(min=1e-4)
    direction = torch.where(sine < 1e-4, torch.lerp(x, y, share), arc)
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-12)
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
