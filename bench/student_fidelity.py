"""How near small students come to the exact teacher, on held-out filing pairs from WordNet.

Two teachers: the one whose anchor strength and temperature the fit chooses, which stays near one
global rotation, and a freer one (strength 1, temperature 0.05), which is harder to follow and finds
less than one global rotation does.

What the teacher itself is worth is judged on splits that nothing was tuned on (FRESH_SEEDS), all
their held-out queries together: one split alone is within chance of a tie.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from bench._report import Figure, options, print_table, verdict
from bench._report import seconds as timed
from core.distill import evaluation as judged
from core.distill import fitting
from core.distill.curriculum import training_data
from core.distill.retrieval import Index
from core.distill.students._base import StudentModule, build_student
from core.distill.students.rotor_product import RotorProductStudent
from core.distill.teachers.rotational import RotationalTeacher
from core.distill.training import TrainState, run_epochs
from core.specs.canonical import Canonical
from core.specs.clusterings import KMeans
from core.specs.students import RotorProduct, Student
from core.specs.teachers import Rotational
from core.specs.training import Training
from core.tensors.formats import Federated, Pairs
from core.tensors.shards import Array

FREE_STRENGTH, FREE_TEMPERATURE = 1.0, 0.05
FRESH_SEEDS = range(5, 10)
"""Splits on which the teacher is judged; the ways of choosing were compared on 0 to 4."""
PRODUCT_DRIFT = 1e-6
"""Allowed to the product of all 128 float32 factors, before lengths are put right."""
EXACT, LEARNT, DOCUMENT = "rotor, exact router", "rotor, learnt router", "document 000"
STUDENTS: Mapping[str, Student] = {
    EXACT: RotorProduct(router="exact"),
    LEARNT: RotorProduct(),
    DOCUMENT: Canonical(),
}


@dataclass(frozen=True)
class Run:
    """One teacher, its students, and how they did."""

    model: Federated
    evaluation: judged.Evaluation
    seconds: Mapping[str, float]
    """To build and train each student."""
    speeds: Mapping[str, float]
    """Queries per second of teacher and students, all held-out queries in one batch."""
    product_drift: float
    """Largest | |y| / |q| - 1 | of the rotor products before lengths are put right."""


@dataclass(frozen=True)
class Split:
    """How the chosen teacher does on one split's held-out rows."""

    seed: int
    strength: float
    temperature: float
    rows: Array
    """[Q] int64, of the pairs."""
    hits: Mapping[str, Array]
    """[Q] bool: hit@1 of raw, global rotation and teacher."""

    def wins(self, against: str) -> Array:
        """[Q] int64: 1 where only the teacher finds, -1 where only the other does."""
        wins: Array = self.hits[judged.TEACHER].astype(np.int64) - self.hits[against]
        return wins


def main() -> int:
    """Fit, train, judge, print; return the exit code."""
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, default=Path("examples/wordnet"))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    pairs = load_pairs(asked.data)
    chosen = run(pairs, seed=asked.seed, strength=None, temperature=None)
    show("chosen by the fit", chosen)
    free = run(pairs, seed=asked.seed, strength=FREE_STRENGTH, temperature=FREE_TEMPERATURE)
    show("freer teacher", free)
    splits = [split(pairs, seed=seed) for seed in FRESH_SEEDS]
    show_splits(splits)
    return judge(chosen, free, splits, asked)


def load_pairs(path: Path) -> Pairs:
    """Read the .npz of vectors, given itself or its folder."""
    file = path / "embeddings.npz" if path.is_dir() else path
    with np.load(file) as found:
        return Pairs(
            ids=[str(name) for name in found["ids"]],
            queries=found["query_embeddings"],
            targets=found["target_embeddings"],
            groups=[str(name) for name in found["groups"]],
        )


def run(pairs: Pairs, *, seed: int, strength: float | None, temperature: float | None) -> Run:
    """Fit a model, train every student on it, judge all on the held-out rows."""
    model = fitting.fit(pairs, KMeans(), seed=seed, strength=strength, temperature=temperature)
    teacher = RotationalTeacher(model, Rotational())
    rows, dropped = judged.held_out(pairs, model)
    queries = pairs.queries[rows].astype(np.float32)
    outputs = judged.baselines(teacher, queries)
    own = torch.from_numpy(teacher.own_rows(model.queries))
    targets = teacher.targets(model.queries, exclude_rows=own)
    batch = torch.from_numpy(queries)
    speeds = {judged.TEACHER: len(batch) / timed(lambda: teacher.targets(batch))}
    seconds, drifts = {}, []
    for name, spec in STUDENTS.items():
        began = perf_counter()
        student = train(spec, teacher, targets, seed=seed)
        seconds[name] = perf_counter() - began
        speeds[name] = judged.throughput(student, batch)
        outputs[name] = judged.student_vectors(student, queries)
        if isinstance(student, RotorProductStudent):
            drifts.append(drift(judged.mapped(student.product, queries), queries))
    found = judged.evaluate(outputs, pairs.targets, rows, seed=seed, dropped=dropped)
    return Run(model, found, seconds, speeds, max(drifts))


def drift(vectors: Array, queries: Array) -> float:
    """Return the largest | |y| / |q| - 1 |, lengths in float64."""
    lengths = (np.linalg.norm(rows.astype(np.float64), axis=1) for rows in (vectors, queries))
    return float(np.abs(next(lengths) / next(lengths) - 1).max())


def split(pairs: Pairs, *, seed: int) -> Split:
    """Fit on another split, choosing as ever; see what its held-out rows find."""
    model = fitting.fit(pairs, KMeans(), seed=seed)
    teacher = RotationalTeacher(model, Rotational())
    rows, _ = judged.held_out(pairs, model)
    queries = pairs.queries[rows].astype(np.float32)
    maps = judged.baseline_maps(teacher)
    index = Index(pairs.targets)
    hits = {
        name: index.ranks(judged.mapped(maps[name], queries), rows) < 1
        for name in (judged.RAW, judged.GLOBAL, judged.TEACHER)
    }
    facts = model.manifest
    return Split(seed, facts["strength"], facts["temperature"], rows, hits)


def pooled(splits: Sequence[Split], against: str, *, draws: int = 1000) -> judged.Interval:
    """Compare hit@1 over all splits' held-out queries together.

    A query may be held out in several splits, so whole queries are drawn, with all they did.
    """
    rows = np.concatenate([found.rows for found in splits])
    wins = np.concatenate([found.wins(against) for found in splits])
    _, which = np.unique(rows, return_inverse=True)
    won, asked = np.bincount(which, weights=wins), np.bincount(which)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(draws):
        drawn = rng.integers(len(won), size=len(won))
        means.append(won[drawn].sum() / asked[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return judged.Interval(float(wins.mean()), float(low), float(high))


def show_splits(splits: Sequence[Split]) -> None:
    """Print the chosen teacher's hit@1 on every fresh split, and all together."""
    names = (judged.RAW, judged.GLOBAL, judged.TEACHER)
    print("\nhit@1 of the teacher the fit chooses, on splits that nothing was tuned on")
    header = ["seed", "strength", "temperature", "queries", *names, "- raw", "- global"]
    lines = [
        [
            str(found.seed),
            f"{found.strength:g}",
            f"{found.temperature:.3g}",
            str(len(found.rows)),
            *(f"{found.hits[name].mean():.4f}" for name in names),
            *(f"{100 * found.wins(name).mean():+.2f}" for name in names[:2]),
        ]
        for found in splits
    ]
    print_table(header, lines)
    for name in names[:2]:
        print(f"  all splits, teacher - {name}: {in_points(pooled(splits, name))}")


def in_points(found: judged.Interval) -> str:
    """Write a difference and its interval in points."""
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.difference:+.2f} points (95 % {low:+.2f} to {high:+.2f})"


def train(
    spec: Student, teacher: RotationalTeacher, targets: torch.Tensor, *, seed: int
) -> StudentModule:
    """Train one student as a job with default settings does."""
    training = Training()
    data = training_data(teacher, targets, training, seed=seed)
    state = TrainState.start(build_student(spec, teacher, seed), training, seed=seed)
    run_epochs(state, data, 0, training.epochs, lambda done, total: None)
    return state.result()


def show(title: str, found: Run) -> None:
    """Print one teacher's table."""
    facts = found.model.manifest
    print(
        f"\n{title}: strength {facts['strength']:g}, temperature {facts['temperature']:.3g}, "
        f"{len(found.model.rotations)} clusters, {found.evaluation.queries} held-out queries, "
        f"{found.evaluation.targets} targets"
    )
    header = [
        "",
        "hit@1",
        "hit@5",
        "hit@10",
        "cosine",
        "p5",
        "min",
        "overlap",
        "gap",
        "drift",
        "train s",
        "q/s",
    ]
    print_table(
        header,
        [
            [
                row.name,
                *(f"{row.hits[k]:.4f}" for k in row.hits),
                f"{row.cosine_mean:.5f}",
                f"{row.cosine_p5:.5f}",
                f"{row.cosine_min:.5f}",
                f"{row.overlap:.4f}",
                "-" if row.gap_closed is None else f"{row.gap_closed:.4f}",
                f"{row.norm_drift:.1e}",
                f"{found.seconds[row.name]:.1f}" if row.name in found.seconds else "",
                f"{found.speeds[row.name]:.0f}" if row.name in found.speeds else "",
            ]
            for row in found.evaluation.rows
        ],
    )
    for sentence in found.evaluation.words:
        print(f"  {sentence}")


def judge(chosen: Run, free: Run, splits: Sequence[Split], asked: argparse.Namespace) -> int:
    """Print the line that counts."""
    figures = []
    learnt_gap = chosen.evaluation.row(LEARNT).gap_closed or 0.0
    for prefix, found in (("", chosen), ("free ", free)):
        exact, learnt = found.evaluation.row(EXACT), found.evaluation.row(LEARNT)
        figures += [
            Figure(f"{prefix}exact-router cosine", exact.cosine_mean, 0.995),
            Figure(f"{prefix}gap closed", exact.gap_closed or 0.0, 0.9),
            Figure(f"{prefix}norm drift", exact.norm_drift, 1e-6, at_most=True),
            Figure(
                f"{prefix}drift of the bare product",
                found.product_drift,
                PRODUCT_DRIFT,
                at_most=True,
            ),
            Figure(
                f"{prefix}hit@1 off the teacher (points)",
                100 * abs(exact.versus_teacher[1].difference),
                0.5,
                at_most=True,
            ),
            Figure(f"{prefix}learnt-router cosine", learnt.cosine_mean, 0.98),
        ]
    over_raw, over_one = (pooled(splits, name) for name in (judged.RAW, judged.GLOBAL))
    figures += [
        Figure("learnt-router gap closed", learnt_gap, 0.5),
        Figure("pooled teacher over raw (points)", 100 * over_raw.difference, 3.0),
        Figure("pooled teacher over one rotation (points)", 100 * over_one.difference, 0.0),
    ]
    one, other = (found.evaluation.row(judged.GLOBAL).cosine_mean for found in (chosen, free))
    behind = free.evaluation.row(judged.TEACHER).versus_global[1]
    title = (
        f"student fidelity [one global rotation has cosine {one:.5f} to the teacher, {other:.5f} "
        f"to the free one; the free teacher {'loses to' if behind.difference < 0 else 'reaches'} "
        f"it: {in_points(behind)}; pooled teacher - one rotation {in_points(over_one)}]"
    )
    return verdict(title, *figures, check=asked.check)


if __name__ == "__main__":
    sys.exit(main())
