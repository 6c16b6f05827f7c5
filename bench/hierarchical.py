"""Low-dimensional codes that keep neighbours: 384 dimensions to 5 and 25, held out, beside PCA.

WordNet's 6,000 query vectors, a fifth held out. Recall: of each held-out row's 10 nearest by cosine
among all rows, the share that is among its 10 nearest by distance between codes. Rows: PCA, which
is the best linear map; a linear student; an MLP of document 004's relational loss at a constant
temperature of 1; and the nested student (5 of 25 dimensions, with a decoder) at a constant
temperature and with a curriculum from 4 to 0.5 in five stages by each of the three schedules.

Temperature matters to what is learnt, not to how large a step is: the norm of the loss's gradient
at a fresh student is measured over tau from 0.5 to 4, with the factor tau^2 and, for comparison,
without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from bench._report import Figure, options, print_table, verdict
from core.distill import relational
from core.distill.code_evaluation import CodeRow, evaluate_codes, pca_codes
from core.distill.curriculum import teacher_answers, training_data
from core.distill.evaluation import student_vectors
from core.distill.splits import split_rows
from core.distill.students._base import build_student
from core.distill.teachers.checkpoint import CheckpointTeacher
from core.distill.training import TrainState, run_epochs
from core.specs.losses import Losses
from core.specs.plain_students import Hierarchical, Linear, Mlp
from core.specs.students import Student
from core.specs.teachers import Checkpoint
from core.specs.training import Curriculum, Training
from core.tensors.embeddings import Embeddings
from core.tensors.shards import Array

THREADS, LEVELS, TAUS = 2, (5, 25), (0.5, 1.0, 2.0, 4.0)
TRAINING = Training(
    epochs=100, batch_size=512, learning_rate=3e-3, warmup_steps=50, epochs_per_chunk=100
)
RELATIONAL = Losses(relational_kl=1.0, neighbour_kl=0.0)
NESTED = "nested, constant tau"
SCHEDULES = ("linear", "exponential", "cosine")


@dataclass(frozen=True)
class Trained:
    """What one student came to."""

    rows: Mapping[int, CodeRow]
    """By width."""
    seconds: float


def main() -> int:
    """Train and judge every student; print the table, the schedules and the gradients."""
    parser = options(__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("examples/wordnet"), help="folder of embeddings.npz"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="splits and starts of the nested student"
    )
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    models = [load_model(args.data, seed=seed) for seed in range(args.seeds)]
    pca = [_judged(model, {k: pca_codes(model, k) for k in LEVELS}) for model in models]
    table = {"PCA": Trained(pca[0], 0.0)}
    for name, (student, training) in _students().items():
        table[name] = _train(models[0], student, training, seed=0)
        print(f"trained {name} in {table[name].seconds:.0f} s", file=sys.stderr, flush=True)
    others = [
        _train(model, *_students()[NESTED], seed=seed)
        for seed, model in enumerate(models)
        if seed > 0
    ]
    nested = [table[NESTED], *others]
    _print(table)
    ratios = [one.rows[5].recall / base[5].recall for one, base in zip(nested, pca, strict=True)]
    print(f"nested over PCA at 5-D, seed by seed: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    return verdict("hierarchical", *_figures(models[0], table, ratios), check=args.check)


def _students() -> dict[str, tuple[Student, Training]]:
    plain = {"losses": RELATIONAL}
    found: dict[str, tuple[Student, Training]] = {
        "linear, 5-D": (Linear(dim=5), TRAINING),
        "MLP, relational_kl, 5-D": (Mlp(dim=5), TRAINING.model_copy(update=plain)),
        NESTED: (Hierarchical(), TRAINING),
    }
    for schedule in SCHEDULES:
        told = {"curriculum": Curriculum.model_validate({"schedule": schedule})}
        found[f"nested, {schedule} 4 to 0.5"] = (Hierarchical(), TRAINING.model_copy(update=told))
    easy = {"curriculum": Curriculum(schedule="exponential", order="easy_first")}
    found["nested, exponential, easy first"] = (
        Hierarchical(),
        TRAINING.model_copy(update=easy),
    )
    return found


def _figures(model: Embeddings, table: Mapping[str, Trained], ratios: list[float]) -> list[Figure]:
    base, best = table["PCA"].rows, table[NESTED].rows
    curricula = [row.rows[5].recall for name, row in table.items() if "4 to 0.5" in name]
    grown = {name: _spread(model, name, squared=True) for name in _LOSSES}
    print_table(
        ["gradient norm, largest over smallest for tau 0.5 to 4", "with tau^2", "without"],
        [
            [name, f"{grown[name]:.2f}", f"{_spread(model, name, squared=False):.1f}"]
            for name in _LOSSES
        ],
    )
    return [
        Figure("recall@10 at 5-D over PCA's, worst seed", min(ratios), 2.5),
        Figure("the same, mean", mean(ratios), 2.5),
        Figure("recall@10 at 25-D over PCA's", best[25].recall / base[25].recall, 1.0),
        Figure("worst schedule at 5-D over PCA's", min(curricula) / base[5].recall, 2.0),
        Figure("gradient norm over tau, times", max(grown.values()), 2.0, at_most=True),
    ]


def load_model(folder: Path, *, seed: int) -> Embeddings:
    """Read the query vectors as stored embeddings, a fifth held out."""
    with np.load(folder / "embeddings.npz") as found:
        vectors = found["query_embeddings"].astype(np.float32)
        train, held = split_rows(vectors, seed=seed, test_fraction=0.2)
        return Embeddings(
            ids=[str(name) for name in found["ids"]],
            embeddings=vectors,
            groups=[str(name) for name in found["groups"]],
            train_rows=np.sort(train),
            held_out_rows=np.sort(held),
        )


def _train(model: Embeddings, student: Student, training: Training, *, seed: int) -> Trained:
    teacher = CheckpointTeacher(model, Checkpoint())
    began = perf_counter()
    data = training_data(teacher, teacher_answers(teacher, _quiet), training, seed=seed)
    state = TrainState.start(build_student(student, teacher, seed), training, seed=seed)
    run_epochs(state, data, 0, training.epochs, _quiet)
    taken = perf_counter() - began
    trained = state.result()
    codes = student_vectors(trained, model.given)
    widths = [width for width, _ in trained.levels] or [codes.shape[1]]
    return Trained(_judged(model, {width: codes[:, :width] for width in widths}), taken)


def _quiet(done: int, total: int) -> None:
    pass


def _judged(model: Embeddings, codes: Mapping[int, Array]) -> dict[int, CodeRow]:
    named = {str(width): values for width, values in codes.items()}
    found = evaluate_codes(named, model, model.held_out_rows, student=None, seed=0)
    return {row.dim: row for row in found.rows}


def _print(table: Mapping[str, Trained]) -> None:
    rows = []
    for name, one in table.items():
        for width, row in one.rows.items():
            purity = "-" if row.purity is None else f"{row.purity:.4f}"
            trusted = "-" if row.trustworthiness is None else f"{row.trustworthiness:.4f}"
            base = table["PCA"].rows[width].recall
            rows.append(
                [
                    f"{name}: {width}-D",
                    f"{row.recall:.4f}",
                    f"{row.recall / base:.2f}",
                    trusted,
                    purity,
                    f"{one.seconds:.0f}" if one.seconds else "",
                ]
            )
    print_table(
        ["", "recall@10", "over PCA's", "trustworthiness", "group purity", "trained, s"], rows
    )


_LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "neighbour_kl": relational.neighbour_kl,
    "relational_kl": relational.relational_kl,
}


def _spread(model: Embeddings, name: str, *, squared: bool) -> float:
    """Largest gradient norm over the smallest, by the codes of a fresh student, over TAUS."""
    teacher = CheckpointTeacher(model, Checkpoint())
    student = build_student(Hierarchical(noise=0.0), teacher, 0)
    queries = torch.from_numpy(model.given[model.train_rows[: TRAINING.batch_size]])
    norms = []
    for tau in TAUS:
        codes = student(queries).detach().requires_grad_()
        loss = partial(_LOSSES[name], tau=tau)(codes[:, :5], queries)
        (loss if squared else loss / tau**2).backward()
        assert codes.grad is not None
        norms.append(float(codes.grad.norm()))
    return max(norms) / min(norms)


if __name__ == "__main__":
    sys.exit(main())
