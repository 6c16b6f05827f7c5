"""How near small students come to the exact teacher, on held-out filing pairs from WordNet.

Two teachers: the one whose anchor strength and temperature the fit chooses, which stays near one
global rotation, and a freer one (strength 1, temperature 0.05), which is harder to follow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
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
from core.distill.students._base import StudentModule, build_student
from core.distill.teachers.rotational import RotationalTeacher
from core.distill.training import TrainState, run_epochs
from core.specs.clusterings import KMeans
from core.specs.students import Canonical, RotorProduct, Student
from core.specs.teachers import Rotational
from core.specs.training import Training
from core.tensors.formats import Federated, Pairs

FREE_STRENGTH, FREE_TEMPERATURE = 1.0, 0.05
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
    return judge(chosen, free, asked)


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
    own = torch.arange(len(model.queries))
    targets = teacher.targets(model.queries, exclude_rows=own)
    batch = torch.from_numpy(queries)
    speeds = {judged.TEACHER: len(batch) / timed(lambda: teacher.targets(batch))}
    seconds = {}
    for name, spec in STUDENTS.items():
        began = perf_counter()
        student = train(spec, teacher, targets, seed=seed)
        seconds[name] = perf_counter() - began
        speeds[name] = judged.throughput(student, batch)
        outputs[name] = judged.student_vectors(student, queries)
    found = judged.evaluate(outputs, pairs.targets, rows, seed=seed, dropped=dropped)
    return Run(model, found, seconds, speeds)


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


def judge(chosen: Run, free: Run, asked: argparse.Namespace) -> int:
    """Print the line that counts."""
    figures = []
    for prefix, found in (("", chosen), ("free ", free)):
        exact, learnt = found.evaluation.row(EXACT), found.evaluation.row(LEARNT)
        figures += [
            Figure(f"{prefix}exact-router cosine", exact.cosine_mean, 0.995),
            Figure(f"{prefix}gap closed", exact.gap_closed or 0.0, 0.9),
            Figure(f"{prefix}norm drift", exact.norm_drift, 1e-6, at_most=True),
            Figure(
                f"{prefix}hit@1 off the teacher (points)",
                100 * abs(exact.versus_teacher[1].difference),
                0.5,
                at_most=True,
            ),
            Figure(f"{prefix}learnt-router cosine", learnt.cosine_mean, 0.98),
        ]
    teacher = chosen.evaluation.row(judged.TEACHER)
    one = chosen.evaluation.row(judged.GLOBAL)
    figures += [
        Figure("teacher over raw (points)", 100 * teacher.versus_raw[1].difference, 3.0),
        Figure("teacher over one rotation (points)", 100 * (teacher.hits[1] - one.hits[1]), 0.0),
    ]
    return verdict("student fidelity", *figures, check=asked.check)


if __name__ == "__main__":
    sys.exit(main())
