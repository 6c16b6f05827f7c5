"""What a student is trained on: real training queries, and made ones between neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

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
MADE_ROWS = 1024
"""Made queries the teacher answers at a time."""
ANSWERED_ROWS = 1024
"""Training queries the teacher answers at a time: as where targets are cached."""


@dataclass(frozen=True)
class Examples:
    """Queries with all a teacher says about them."""

    queries: Tensor
    """[R, d] float32."""
    teacher: Tensor
    """[R, m] float32 targets."""
    mixture: Mixture | None
    """The teacher's weights; None where nobody asked for them, or it has none."""
    candidates: Tensor | None
    """[R, m] float32: true targets to retrieve among; None where nobody asked for them, and of
    made queries."""
    exclude: Tensor
    """[R, e] int64: rows of the training queries that the teacher excluded; -1 for none."""
    anchored: Tensor | None
    """[R, d] float32, the queries by the teacher's anchor; None where nobody asked for them, and
    of ``TrainingData.real``, which has them beside it."""

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class TrainingData:
    """Training and validation rows of one model, and the teacher that answers made queries."""

    teacher: TeacherModel
    real: Examples
    """[n]: all training queries, none routed through itself or its duplicates; without weights."""
    train: Tensor
    """[t] int64 rows of ``real``."""
    validation: Tensor
    """[v] int64 rows of ``real``, never trained on nor mixed from; nor are their duplicates."""
    shown: Tensor
    """[s] int64: the first row of every distinct query among ``train``."""
    same: Tensor
    """[n] int64: the first row of ``real`` with the same query; what a row must exclude."""
    noise: float
    """Length of the tangent noise on a made query, of its own length."""

    # What costs as much as routing every query is computed where it is asked for first: a student
    # without a router needs no weights, a training without made queries no neighbours.

    @cached_property
    def mixture(self) -> Mixture:
        """The teacher's weights of ``real``, float32."""
        found = self.teacher.mixture(self.real.queries, exclude_rows=self.same)
        return Mixture(found.offsets, found.clusters, found.weights.float(), found.cluster_count)

    @cached_property
    def anchored(self) -> Tensor:
        """[n, d] float32, q G of ``real``: one product for all epochs, not one in every step."""
        return anchored(self.teacher, self.real.queries)

    @cached_property
    def by_ease(self) -> Tensor:
        """[t] int64: ``train``, those first whose answers have near neighbours, by mean cosine.

        A row far from all others is hard: nothing beside it says where it belongs.
        """
        rows = self.train
        units = functional.normalize(self.real.teacher[rows], dim=1)
        count = min(NEIGHBOURS, len(rows) - 1)
        own = torch.arange(len(rows), device=rows.device)
        _, near = nearest(units, units, top_k=count, exclude_rows=own)
        return rows[near.mean(dim=1).argsort(descending=True, stable=True)]

    @cached_property
    def neighbours(self) -> Tensor:
        """[n, k] int64: rows among ``train`` of the nearest other queries, one row for each."""
        position = torch.full((len(self.same),), -1, device=self.same.device)
        position[self.shown] = torch.arange(len(self.shown), device=self.same.device)
        at, _ = nearest(
            self.real.queries,
            self.real.queries[self.shown],
            top_k=min(NEIGHBOURS, len(self.shown) - 1),
            exclude_rows=position[self.same],
        )
        return self.shown[at]

    @cached_property
    def centroids(self) -> Examples:
        """The clusters' centroids and what the teacher answers to each, float32.

        A centroid is no training query, so it excludes none, unless it equals one. Left out are
        the clusters of which every query is held out, and centroids at the origin, which have no
        direction. There are no true targets to retrieve: its answers stand for them.

        Raises:
            DataInvalid: none is left.
        """
        device = self.real.queries.device
        if self.teacher.centroids is None:
            raise DataInvalid("centroids: this teacher has no clusters to show the centroids of")
        found = torch.from_numpy(self.teacher.centroids).to(device)
        cluster_of = torch.from_numpy(self.teacher.cluster_of).to(device)
        left = cluster_of[self.train].bincount(minlength=len(found)) > 0
        queries = found[left & (found.norm(dim=1) > 0)]
        if not len(queries):
            raise DataInvalid("centroids: all are zero; at least one is needed to train on them")
        own = torch.from_numpy(self.teacher.own_rows(queries.cpu().numpy())).to(device)
        mixture = self.teacher.mixture(queries, exclude_rows=own)
        vectors = self.teacher.targets(queries, exclude_rows=own).float()
        return Examples(
            queries,
            teacher=vectors,
            mixture=concatenate([mixture]),
            candidates=vectors,
            exclude=own[:, None],
            anchored=None if self.teacher.anchor is None else anchored(self.teacher, queries),
        )

    def made(
        self,
        count: int,
        generator: torch.Generator,
        on_block: Callable[[], None],
        *,
        with_anchor: bool,
        with_weights: bool = True,
    ) -> Examples:
        """Make queries by SLERP between neighbours plus tangent noise, and ask the teacher.

        A made query may not route through its two parents or their duplicates, as a real one not
        through itself: otherwise the student would learn a teacher that has always seen it.

        Args:
            count: how many.
            generator: on the CPU; advances by a fixed amount per query.
            on_block: called before each block is answered.
            with_anchor: whether they are wanted by the teacher's anchor too.
            with_weights: whether the teacher's weights are wanted, if it has any.
        """
        parents = self._parents(count, generator)
        device = self.real.queries.device
        queries = self._between(parents, generator).to(device)
        exclude = self.same[parents.to(device)]
        vectors, mixtures = [], []
        for start in range(0, count, MADE_ROWS):
            on_block()
            block = slice(start, start + MADE_ROWS)
            if not with_weights:
                found = self.teacher.targets(queries[block], exclude_rows=exclude[block])
                vectors.append(found.float())
                continue
            said = self.teacher.answers(queries[block], exclude_rows=exclude[block])
            vectors.append(said.vectors.float())
            if said.mixture is not None:
                mixtures.append(said.mixture)
        return Examples(
            queries=queries,
            teacher=torch.cat(vectors),
            mixture=concatenate(mixtures) if mixtures else None,
            candidates=None,
            exclude=exclude,
            anchored=anchored(self.teacher, queries) if with_anchor else None,
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
        return jitter(slerp(a, b, share), noise, size=self.noise)


def training_data(
    teacher: TeacherModel, targets: Tensor | Array, training: Training, *, seed: int
) -> TrainingData:
    """Split off validation rows; a function of its arguments alone.

    Args:
        teacher: who answers made queries.
        targets: [n, m], the teacher's answers to its model's training queries, none routed through
            itself or its duplicates.
        training: for ``validation_fraction``, of the distinct queries, and for what it asks of
            the teacher.
        seed: of the split; equal queries stay on one side.

    Raises:
        DataInvalid: the targets are not one per training query, or too few queries differ.
        SpecInvalid: the training asks for new queries, which this teacher cannot answer.
    """
    training.check_teacher(answers_new=teacher.answers_new)
    device = teacher.device
    answers = targets if isinstance(targets, Tensor) else torch.from_numpy(targets)
    if tuple(answers.shape) != teacher.truths.shape:
        raise DataInvalid(
            f"targets: shape {list(answers.shape)}; needed {list(teacher.truths.shape)}, one per "
            "training query of the model"
        )
    same = torch.from_numpy(teacher.own_rows(teacher.queries))
    firsts, which = same.unique(return_inverse=True)  # a row per distinct query; its number
    if len(firsts) < 4:
        raise DataInvalid(
            f"the model has {len(firsts)} distinct training queries; at least 4 are needed to train"
        )
    order = torch.randperm(len(firsts), generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(training.validation_fraction * len(firsts))), len(firsts) - 2)
    hidden = torch.zeros(len(firsts), dtype=torch.bool)
    hidden[order[:held]] = True
    same = same.to(device)
    real = Examples(
        queries=torch.from_numpy(teacher.queries).to(device),
        teacher=answers.to(device).float(),
        mixture=None,
        candidates=torch.from_numpy(teacher.truths).to(device),
        exclude=same[:, None],
        anchored=None,
    )
    return TrainingData(
        teacher=teacher,
        real=real,
        train=(~hidden[which]).nonzero().flatten().to(device),
        validation=hidden[which].nonzero().flatten().to(device),
        shown=firsts[~hidden].to(device),
        same=same,
        noise=training.made_noise(),
    )


def teacher_answers(teacher: TeacherModel, on_rows: Callable[[int, int], None]) -> Tensor:
    """Compute what ``cache_targets`` would keep: the teacher's answers to its training queries.

    Args:
        teacher: who answers.
        on_rows: called with (queries answered, queries) before each block of ANSWERED_ROWS.

    Returns:
        [n, m], none routed through itself or its duplicates.
    """
    queries = teacher.queries
    own = torch.from_numpy(teacher.own_rows(queries))
    vectors = []
    for start in range(0, len(queries), ANSWERED_ROWS):
        on_rows(start, len(queries))
        block = slice(start, start + ANSWERED_ROWS)
        vectors.append(teacher.targets(queries[block], exclude_rows=own[block]))
    return torch.cat(vectors)


def anchored(teacher: TeacherModel, queries: Tensor) -> Tensor:
    """Return [n, d] queries by the teacher's anchor, float32."""
    if teacher.anchor is None:
        raise DataInvalid("this teacher has no anchor for a student to start from")
    return queries @ teacher.anchor.float()


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
