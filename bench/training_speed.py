"""The training loop against a plain one: seconds to a held-out cosine, from cached targets.

The plain loop is the one document 000 describes, with its student: 64 canonical planes, softmax
weight times 1 rad, a softplus scale, 3 layers; shuffled batches from a DataLoader, MSE + cosine
loss, Adam, ``.item()`` at every step; 5 epochs. The document names no batch size: the loop runs
with 32, usual at its time, and with ours, and the fastest is what we are compared with. It also
runs on queries that the teacher's anchor has turned, since our students start there: the cosine
to be reached is the best that any of the plain loops has after 5 epochs. That student moves so
little that ours are there before the first step ("untrained"): the times to that cosine are times
to a first validation. What training then adds is in the column of cosines.

The data are made: clusters on the sphere, each turned by one common rotation and a small one of
its own, so that queries and targets have a cosine of about 0.5, as document 000's have. Eight
clusters, not its 142: more only make the teacher dearer, whose answers are cached before any
clock starts.

Both loops see the same training rows and are judged on the same held-out rows, float32 cosine to
the teacher's answers. Our seconds count all from the targets on: the split, the student's planes
out of the teacher's rotations, training, and the validation after every epoch; the plain loop's
count its epochs alone. A student of canonical planes is near where it starts whatever it learns,
so the same student in our loop can save no more than the loop's own overhead: that row is shown.
The row that counts is a small geodesic_attention, 64 slots and 64 hidden units where the default
has 1024 of each. Both of its times have the bar: all 5 epochs, and the first validation at which
it has the plain loops' best cosine. Its loss is the plain loop's in kind, the distance to the
targets alone. Beside it stand the default student, rotor_product, so trained and with the default
losses and made queries, and what each student has before its first step.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from bench._report import Figure, options, print_table, verdict
from core.distill.curriculum import TrainingData, teacher_answers, training_data
from core.distill.curriculum import anchored as by_anchor
from core.distill.students._base import build_student
from core.distill.teachers.rotational import RotationalTeacher
from core.distill.training import TrainState, run_epochs
from core.specs.canonical import Canonical
from core.specs.losses import Losses
from core.specs.students import GeodesicAttention, NlerpGeodesic, RotorProduct, Student
from core.specs.teachers import Rotational
from core.specs.training import Training
from core.tensors.formats import Federated

ROWS, WIDTH, CLUSTERS, EPOCHS, ROUNDS, THREADS = 10_000, 768, 8, 5, 3, 2
PLANES, LAYERS, HEADS = 64, 3, 4
COMMON, OWN, SPREAD = 2.2, 0.6, 0.8
"""Largest angles (rad) of the common and of each cluster's own rotation; noise on a centre."""
PLAIN_RATE = 1e-3
PLAIN = {
    "document 000's loop, batches of 32": (32, False),
    "document 000's loop, batches of 256": (256, False),
    "the same, from the anchor's answers": (256, True),
}
"""Batch size, and whether the queries are turned by the anchor first."""
SPEEDUP_BAR = 3.0
ALONE = Training(
    epochs=EPOCHS, augment=0.0, losses=Losses(cvar=0.0, retrieval_kl=0.0, router_kl=0.0)
)
"""The distance to cached targets and nothing else of the teacher's: what the plain loop has too."""
SAME, COUNTS, NLERP, ROTOR, DEFAULT = (
    "ours, canonical student, cached targets alone",
    "ours, geodesic_attention, cached targets alone  <- counts",
    "ours, nlerp_geodesic, cached targets alone",
    "ours, rotor_product, cached targets alone",
    "ours, rotor_product, default settings",
)
OURS: Mapping[str, tuple[Student, Training]] = {
    SAME: (Canonical(n_components=PLANES, layers=LAYERS, heads=HEADS), ALONE),
    COUNTS: (GeodesicAttention(slots=8 * CLUSTERS, hidden=8 * CLUSTERS), ALONE),
    NLERP: (NlerpGeodesic(router="learnt"), ALONE),
    ROTOR: (RotorProduct(), ALONE),
    DEFAULT: (RotorProduct(), Training(epochs=EPOCHS)),
}


@dataclass(frozen=True)
class Course:
    """What a training had reached when."""

    seconds: list[float]
    """After each epoch, from the start."""
    cosines: list[float]
    """Held out, after each epoch; of the plain loop the last alone."""
    untrained: float
    """Held out, before the first step."""

    def until(self, cosine: float) -> float:
        """Seconds to the first validation with at least this cosine; inf where none has it."""
        pairs = zip(self.seconds[-len(self.cosines) :], self.cosines, strict=True)
        return min((at for at, found in pairs if found >= cosine), default=float("inf"))


def main() -> int:
    """Return the exit code."""
    args = options(__doc__).parse_args()
    torch.set_num_threads(THREADS)
    with threadpool_limits(THREADS):  # scipy's too, which finds the planes
        return race(check=args.check)


def race(*, check: bool) -> int:
    """Train every student in turns."""
    teacher = make_teacher()
    targets = teacher_answers(teacher, lambda done, total: None)
    raw = torch.cosine_similarity(torch.from_numpy(teacher.model.queries), targets).mean()
    print(f"{ROWS} targets at d={WIDTH}, {CLUSTERS} clusters, cosine of the query {raw:.3f}")
    runs: dict[str, list[Course]] = {}
    for seed in range(ROUNDS):
        split = training_data(teacher, targets, ALONE, seed=seed)
        for name, (size, anchored) in PLAIN.items():
            found = plain(split, size, anchored=anchored, seed=seed)
            runs.setdefault(name, []).append(found)
        for name, (student, training) in OURS.items():
            found = ours(student, training, teacher, targets, seed=seed)
            runs.setdefault(name, []).append(found)
    return judge(runs, check=check)


def judge(runs: Mapping[str, list[Course]], *, check: bool) -> int:
    """Print the table and the line that counts."""
    plains = {name: runs[name] for name in PLAIN}
    whole = {name: median(run.seconds[-1] for run in found) for name, found in runs.items()}
    fastest = min(plains, key=lambda name: whole[name])
    # Every round against its own: the best the plain loops reached on that split.
    bars = [max(run.cosines[-1] for run in same) for same in zip(*plains.values(), strict=True)]
    reached = {
        name: median(run.until(bar) for run, bar in zip(found, bars, strict=True))
        for name, found in runs.items()
    }
    header = ["", f"s, {EPOCHS} epochs", "untrained", "cosine", "s to the plain cosine", "faster"]
    rows: list[tuple[object, ...]] = []
    for name, found in runs.items():
        cosine = f"{median(run.cosines[-1] for run in found):.5f}"
        before = f"{median(run.untrained for run in found):.5f}"
        if name in plains:
            rows.append((name, whole[name], before, cosine, "-", "-"))
        else:
            faster = whole[fastest] / reached[name]
            rows.append((name, whole[name], before, cosine, reached[name], faster))
    print_table(header, rows)
    others = ", ".join(
        f"{name} {whole[fastest] / whole[name]:.2f}" for name in (NLERP, ROTOR, DEFAULT, SAME)
    )
    small = next(iter(PLAIN))
    return verdict(
        f"training speed [{fastest!r} {whole[fastest]:.3g} s; times faster for {EPOCHS} epochs: "
        f"{others}; {small!r} over what counts {whole[small] / whole[COUNTS]:.2f}]",
        Figure(
            "times faster to the plain loop's cosine", whole[fastest] / reached[COUNTS], SPEEDUP_BAR
        ),
        Figure(f"times faster for {EPOCHS} epochs", whole[fastest] / whole[COUNTS], SPEEDUP_BAR),
        check=check,
    )


def make_teacher() -> RotationalTeacher:
    """Build a federated model whose clusters turn in their own ways around a common rotation."""
    rng = np.random.default_rng(0)
    common = rotation(rng, COMMON)
    rotations = torch.stack([common @ rotation(rng, OWN) for _ in range(CLUSTERS)])
    centres = functional.normalize(torch.from_numpy(rng.normal(size=(CLUSTERS, WIDTH))))
    which = torch.from_numpy(rng.integers(CLUSTERS, size=ROWS))
    noise = functional.normalize(torch.from_numpy(rng.normal(size=(ROWS, WIDTH))))
    queries = functional.normalize(centres[which] + SPREAD * noise)
    targets = torch.empty_like(queries)
    for cluster in range(CLUSTERS):
        targets[which == cluster] = queries[which == cluster] @ rotations[cluster]
    model = Federated(
        rotations=rotations.float().numpy(),
        scales=np.ones(CLUSTERS, np.float32),
        anchor=common.float().numpy(),
        centroids=centres.float().numpy(),
        queries=queries.float().numpy(),
        targets=targets.float().numpy(),
        cluster_of=which.numpy(),
        train_rows=np.arange(ROWS),
        held_out_rows=np.zeros(0, np.int64),
        manifest={"temperature": 0.1},
    )
    return RotationalTeacher(model, Rotational())


def rotation(rng: np.random.Generator, angle: float) -> Tensor:
    """[d, d] float64: exp of a Gaussian skew matrix whose largest angle is about ``angle``."""
    skew = torch.from_numpy(rng.normal(size=(WIDTH, WIDTH)))
    skew = skew - skew.T
    turned: Tensor = torch.linalg.matrix_exp(skew * (angle / (2 * (2 * WIDTH) ** 0.5)))
    return turned


def ours(
    student: Student,
    training: Training,
    teacher: RotationalTeacher,
    targets: Tensor,
    *,
    seed: int,
) -> Course:
    """Train as a job does, the clock running from the targets on."""
    began = perf_counter()
    data = training_data(teacher, targets, training, seed=seed)
    state = TrainState.start(build_student(student, teacher, seed), training, seed=seed)
    judged = perf_counter()
    untrained = held_out_cosine(state.student, data, data.real.queries)
    began += perf_counter() - judged  # No training needs it, nor leaves it anything: shown alone.
    seconds = []
    for epoch in range(EPOCHS):
        run_epochs(state, data, epoch, epoch + 1, lambda done, total: None)
        seconds.append(perf_counter() - began)
    return Course(seconds, [row["validation_cosine"] for row in state.history], untrained)


class PlainLayer(nn.Module):
    """Attend to a key per canonical plane, turn each plane by its weight, scale the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.keys = nn.Parameter(torch.randn(HEADS, PLANES, WIDTH // HEADS) * WIDTH**-0.5)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """[B, d] -> [B, d]."""
        asked = self.query(x).view(len(x), HEADS, WIDTH // HEADS)
        scores = torch.einsum("bhw,hpw->bhp", asked, self.keys) / (WIDTH // HEADS) ** 0.5
        angle = scores.softmax(-1).mean(1)  # [B, planes], times 1 rad
        cosine, sine = angle.cos(), angle.sin()
        pairs = x[:, : 2 * PLANES].view(len(x), PLANES, 2)
        along, across = pairs[..., 0], pairs[..., 1]
        turned = torch.stack([along * cosine - across * sine, along * sine + across * cosine], -1)
        mapped = torch.cat([turned.flatten(1), x[:, 2 * PLANES :]], dim=1)
        return mapped * functional.softplus(self.scale)


def plain(data: TrainingData, size: int, *, anchored: bool, seed: int) -> Course:
    """Train document 000's student as it describes; the clock covers the epochs alone."""
    every = by_anchor(data.teacher, data.real.queries) if anchored else data.real.queries
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = nn.Sequential(*(PlainLayer() for _ in range(LAYERS)))
    rows = data.train
    loader = DataLoader(
        TensorDataset(every[rows], data.real.teacher[rows]),
        batch_size=size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=PLAIN_RATE)
    untrained = held_out_cosine(student, data, every)
    began, seconds = perf_counter(), []
    for _ in range(EPOCHS):
        total = 0.0
        for queries, wanted in loader:
            found = student(queries)
            apart = 1 - functional.cosine_similarity(found, wanted).mean()
            loss = functional.mse_loss(found, wanted) + apart
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds.append(perf_counter() - began)
    return Course(seconds, [held_out_cosine(student, data, every)], untrained)


@torch.no_grad()
def held_out_cosine(student: nn.Module, data: TrainingData, every: Tensor) -> float:
    """Mean cosine to the teacher on the validation rows; ``every``: what stands for the queries."""
    found, wanted = student(every[data.validation]), data.real.teacher[data.validation]
    return float(torch.cosine_similarity(found, wanted).double().mean())


if __name__ == "__main__":
    sys.exit(main())
