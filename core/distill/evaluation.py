"""Judges vectors against the truth and against the teacher, on held-out queries alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.distill.retrieval import Index, row_cosines
from core.distill.routing import own_rows
from core.distill.students._base import StudentModule
from core.distill.teachers._base import RotationTeacher
from core.distill.teachers._linear import linear_blend
from core.errors import DataInvalid
from core.rotations.mixture import Mixture
from core.tensors.formats import Federated, Pairs
from core.tensors.shards import Array

RAW, MEAN, GLOBAL = "raw", "mean target", "global rotation"
TOP1, NLERP, TEACHER = "top-1 W", "nlerp", "exact teacher"
SIMPLE = (RAW, MEAN, GLOBAL, TOP1, NLERP)
"""Rows that need no student; the first two are null rows: what is had for nothing."""
HITS = (1, 5, 10)
OVERLAP = 10
DRAWS = 1000
"""Bootstrap resamples."""
BLOCK_ROWS = 1024
Map = Callable[[Tensor], Tensor]
"""[B, d] float32 queries to [B, d] float32 vectors, on one device."""


@dataclass(frozen=True)
class Interval:
    """A paired difference of hit rates, with its 95 % bootstrap interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """What one way of mapping queries is worth."""

    name: str
    hits: dict[int, float]
    """Share of queries whose own target is among the nearest k."""
    versus_raw: dict[int, Interval]
    versus_global: dict[int, Interval]
    versus_teacher: dict[int, Interval]
    cosine_mean: float
    """To the exact teacher, as all three."""
    cosine_p5: float
    cosine_min: float
    norm_drift: float
    """Largest | |y| / |q| - 1 |."""
    overlap: float
    """Mean share of the teacher's nearest 10 that are among its own nearest 10."""
    gap_closed: float | None
    """(cosine - cosine of the global rotation) / (1 - the same); none where that is 1."""
    gap_closed_raw: float | None
    """The same against the raw queries, which is what a student that does nothing leaves."""


@dataclass(frozen=True)
class Evaluation:
    """The whole judgement; a function of vectors and seed."""

    rows: list[Row]
    queries: int
    """Distinct held-out queries judged."""
    targets: int
    """Distinct targets searched."""
    dropped: int
    """Held-out rows left out because another one has the same query."""
    words: list[str]
    """Warnings and findings, in plain words."""

    def row(self, name: str) -> Row:
        """Return one row by name."""
        return next(row for row in self.rows if row.name == name)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        whole = asdict(self)
        for row in whole["rows"]:
            for key in ("hits", "versus_raw", "versus_global", "versus_teacher"):
                row[key] = {str(k): value for k, value in row[key].items()}
        return whole


def held_out(pairs: Pairs, model: Federated) -> tuple[Array, int]:
    """Pick the rows to judge on: held out when the model was fitted, each query once.

    Returns:
        Rows of ``pairs`` (int64, ascending) and how many repeats were dropped.

    Raises:
        DataInvalid: nothing was held out (an imported model), or the rows are not of these pairs.
    """
    rows = model.held_out_rows
    if not len(rows):
        raise DataInvalid(
            "held_out_rows: empty, the model has seen all its pairs; judge it on pairs of your "
            "own, or fit one with a test_fraction"
        )
    if rows.max() >= len(pairs.queries):
        raise DataInvalid(
            f"held_out_rows: names row {rows.max()}; the pairs have {len(pairs.queries)} rows. "
            "Give the pairs the model was fitted on"
        )
    _, first = np.unique(_plain(pairs.queries[rows]), axis=0, return_index=True)
    kept = rows[np.sort(first)]
    return kept, len(rows) - len(kept)


def unseen(pairs: Pairs, model: Federated) -> tuple[Array, int]:
    """Pick the rows of other pairs to judge on: each query once, none the model was trained on.

    Returns:
        Rows of ``pairs`` (int64, ascending) and how many were dropped.
    """
    queries = _plain(pairs.queries)
    _, first = np.unique(queries, axis=0, return_index=True)
    known = own_rows(model.queries, queries)[:, 0] >= 0
    rows = np.sort(first)
    rows = rows[~known[rows]]
    return rows, len(queries) - len(rows)


def _plain(queries: Array) -> Array:
    """Narrow to float32, -0.0 as 0.0: what tells queries apart."""
    plain: Array = queries.astype(np.float32) + np.float32(0)
    return plain


def how_split(manifest: Mapping[str, Any]) -> list[str]:
    """Say in words what the held-out rows of a model are, where they are no random queries."""
    if manifest.get("split") != "cluster":
        return []
    return [
        "Held out are whole clusters: no query of their sort was fitted or trained on, which is "
        "harder than the random queries of most reports."
    ]


def baseline_maps(teacher: RotationTeacher, *, anchor: Array | None = None) -> dict[str, Map]:
    """Return every way of mapping queries that a student is compared to, by name.

    Args:
        teacher: exact.
        anchor: [d, d], the one global rotation; the model's own anchor where absent. Give
            ``fitting.global_rotation`` of the training rows where that is the identity.
    """
    model, device = teacher.model, teacher.device
    one = torch.from_numpy(model.anchor if anchor is None else anchor).float().to(device)
    matrices = torch.from_numpy(model.scales[:, None, None] * model.rotations).float().to(device)

    mean = torch.from_numpy(mean_direction(model.targets)).to(device)

    def blend(queries: Tensor, mixture: Mixture, *, keep_length: bool) -> Tensor:
        return linear_blend(queries, matrices, mixture, log_scales=None, keep_length=keep_length)

    def heaviest(queries: Tensor) -> Mixture:
        best = teacher.mixture(queries).dense().argmax(dim=1, keepdim=True)
        return Mixture.from_topk(best, torch.ones_like(best, dtype=queries.dtype), len(matrices))

    return {
        RAW: lambda queries: queries,
        MEAN: lambda queries: _constant(mean, queries),
        GLOBAL: lambda queries: queries @ one,
        TOP1: lambda queries: blend(queries, heaviest(queries), keep_length=False),
        NLERP: lambda queries: blend(queries, teacher.mixture(queries), keep_length=True),
        TEACHER: lambda queries: teacher.targets(queries).float(),
    }


def mapped(function: Map, queries: Array, *, device: str | torch.device = "cpu") -> Array:
    """Map queries in blocks: [Q, d] float32."""
    with torch.no_grad():
        parts = [
            function(torch.from_numpy(queries[start : start + BLOCK_ROWS]).float().to(device)).cpu()
            for start in range(0, len(queries), BLOCK_ROWS)
        ]
    vectors: Array = torch.cat(parts).numpy()
    return vectors


def baselines(
    teacher: RotationTeacher, queries: Array, *, anchor: Array | None = None
) -> dict[str, Array]:
    """Map [Q, d] queries by each of ``baseline_maps``."""
    device = teacher.device
    maps = baseline_maps(teacher, anchor=anchor)
    return {name: mapped(function, queries, device=device) for name, function in maps.items()}


def student_vectors(student: StudentModule, queries: Array, *, device: str = "cpu") -> Array:
    """Map queries by a student, in blocks: [Q, d] float32."""
    return mapped(student.eval().to(device), queries, device=device)


def evaluate(
    outputs: Mapping[str, Array],
    targets: Array,
    rows: Array,
    *,
    seed: int,
    dropped: int = 0,
    remarks: Sequence[str] = (),
) -> Evaluation:
    """Judge every set of vectors against the truth and the exact teacher.

    Args:
        outputs: name -> [Q, d]; with the names of ``baselines``, students after them.
        targets: [N, d], all of them: what is searched.
        rows: [Q] int64, each query's own target.
        seed: of the bootstrap.
        dropped: repeats left out before, told in the result.
        remarks: sentences that join the findings (how model and student were made).
    """
    index = Index(targets)
    ranks = {name: index.ranks(vectors, rows) for name, vectors in outputs.items()}
    judge = _Judge(outputs, index, ranks, seed)
    found = [judge.row(name) for name in outputs]
    return Evaluation(
        rows=found,
        queries=len(rows),
        targets=len(index.targets),
        dropped=dropped,
        words=[*_words({row.name: row for row in found}, list(outputs)), *remarks],
    )


def paired_interval(wins: Array, *, seed: int) -> Interval:
    """Bootstrap the mean of paired differences: [Q] int64, each -1, 0 or 1.

    A resample of Q queries matters only by how many of each it holds, and those counts are
    multinomial: drawn as such, Q costs nothing.
    """
    total = len(wins)
    shares = np.bincount(wins + 1, minlength=3) / total
    counts = np.random.default_rng(seed).multinomial(total, shares, size=DRAWS)  # [DRAWS, 3]
    low, high = np.percentile((counts[:, 2] - counts[:, 0]) / total, [2.5, 97.5])
    return Interval(float(wins.mean()), float(low), float(high))


def throughput(function: Map, queries: Tensor, *, seconds: float = 1.0) -> float:
    """Measure queries per second of a map at this batch size, after one warm-up.

    A timing, so it belongs into metrics and never into a report: reports are the same every time.
    """
    done = 0
    with torch.no_grad():
        function(queries)
        _finish(queries)
        began = perf_counter()
        while perf_counter() - began < seconds:
            function(queries)
            _finish(queries)
            done += len(queries)
    return done / (perf_counter() - began)


def _finish(queries: Tensor) -> None:
    if queries.is_cuda:
        torch.cuda.synchronize(queries.device)


@dataclass(frozen=True)
class _Judge:
    outputs: Mapping[str, Array]
    index: Index
    ranks: Mapping[str, Array]
    seed: int

    def row(self, name: str) -> Row:
        vectors, teacher = self.outputs[name], self.outputs[TEACHER]
        cosines = row_cosines(vectors, teacher)
        own = np.linalg.norm(self.outputs[RAW].astype(np.float64), axis=1)
        drift = np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) / own - 1)
        near, wanted = (self.index.nearest(found, OVERLAP) for found in (vectors, teacher))
        common = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(near, wanted, strict=True)]
        return Row(
            name=name,
            hits={k: float((self.ranks[name] < k).mean()) for k in HITS},
            versus_raw={k: self._interval(name, RAW, k) for k in HITS},
            versus_global={k: self._interval(name, GLOBAL, k) for k in HITS},
            versus_teacher={k: self._interval(name, TEACHER, k) for k in HITS},
            cosine_mean=float(cosines.mean()),
            cosine_p5=float(np.percentile(cosines, 5)),
            cosine_min=float(cosines.min()),
            norm_drift=float(drift.max()),
            overlap=float(np.mean(common)),
            gap_closed=self._gap(float(cosines.mean()), GLOBAL),
            gap_closed_raw=self._gap(float(cosines.mean()), RAW),
        )

    def _interval(self, name: str, against: str, k: int) -> Interval:
        wins = (self.ranks[name] < k).astype(np.int64) - (self.ranks[against] < k)
        return paired_interval(wins, seed=self.seed)

    def _gap(self, cosine: float, left_by: str) -> float | None:
        start = float(row_cosines(self.outputs[left_by], self.outputs[TEACHER]).mean())
        return (cosine - start) / (1 - start) if 1 - start > 1e-9 else None


def mean_direction(targets: Array) -> Array:
    """Return the direction of the mean of the targets' directions: [d] float32.

    The first target's where they cancel: then no constant answer is better than another.
    """
    units = targets.astype(np.float64) / np.linalg.norm(targets, axis=1, keepdims=True)
    mean = units.mean(axis=0)
    length = np.linalg.norm(mean)
    direction: Array = (mean / length if length > 1e-9 else units[0]).astype(np.float32)
    return direction


def _constant(direction: Tensor, queries: Tensor) -> Tensor:
    """Answer every query alike, at its own length: what cosines flatter and ranks do not."""
    answers: Tensor = queries.norm(dim=1, keepdim=True) * direction
    return answers


def _words(rows: Mapping[str, Row], names: Sequence[str]) -> list[str]:
    teacher = rows[TEACHER]
    gain = teacher.versus_raw[1]
    span = f"{_points(gain.difference)} points of hit@1 {_between(gain)}"
    if gain.low > 0:
        words = [f"The teacher beats the raw queries by {span}."]
    else:
        words = [
            f"Warning: the teacher does not beat the raw queries: {span}. A student of it is "
            "worth no more than no student."
        ]
    words.append(_global_words(teacher.versus_global[1]))
    for name in names:
        if name in (*SIMPLE, TEACHER):
            continue
        row = rows[name]
        lost = row.versus_teacher[1]
        words.append(
            f"{name} has cosine {row.cosine_mean:.5f} to the teacher{_gap_words(row)}; its hit@1 "
            f"differs by {_points(lost.difference)} points {_between(lost)}."
        )
    return words


def _global_words(gain: Interval) -> str:
    span = f"{_points(gain.difference)} points of hit@1 {_between(gain)}"
    if gain.low > 0:
        return f"The teacher beats one global rotation by {span}."
    if gain.high < 0:
        return f"Warning: one global rotation finds more than the teacher: {span}."
    if gain.difference == 0:
        return f"The teacher finds as much as one global rotation: {span}."
    return f"Teacher and one global rotation differ by {span}: within chance."


def _gap_words(row: Row) -> str:
    if row.gap_closed is None:
        return ""
    if row.gap_closed <= 0:
        return ", no nearer than one global rotation"
    return f" and closes {row.gap_closed:.1%} of the gap that one global rotation leaves"


def _between(interval: Interval) -> str:
    return f"(95 % {_points(interval.low)} to {_points(interval.high)})"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"
