"""What the transformer's command line does on this machine: train, judge, save, time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from core.distill.export import export_student
from core.distill.latency import BATCHES, benchmark_latency, measure_crossover
from core.distill.latency_report import advise
from core.distill.lda import MultiHeadLDA
from core.distill.projection import evaluate_distillation, train_distillation
from core.distill.students.projection_transformer import ProjectionTransformer
from core.errors import DataInvalid, SpecInvalid
from core.specs.architectures import covering_architecture, optimal_architecture
from core.tensors.lda import LDA
from core.tensors.lda_db import load_lda_db
from scripts.codebook_local import bar

LEGACY_DROPOUT = 0.1


@dataclass(frozen=True)
class Plan:
    """What was asked for, as the options say it."""

    db: Path
    projection: str | None
    epochs: int
    cosine_weight: float
    num_heads: int
    num_layers: int
    embed_dim: int
    ff_dim: int
    learning_rate: float
    batch_size: int
    full_batch: bool
    augment: float
    compat: str | None
    test_fraction: float
    seed: int
    output: Path | None
    latency: bool
    seconds: float

    @property
    def legacy(self) -> bool:
        """Whether to train as document 001 prints it."""
        return self.compat == "legacy"

    def facts(self) -> dict[str, object]:
        """Return what decides the student, as JSON values."""
        places = ("db", "output", "latency", "seconds")
        return {name: value for name, value in vars(self).items() if name not in places}


@dataclass(frozen=True)
class Questions:
    """The database's questions in two parts, equal ones on one side."""

    train: Tensor
    test: Tensor
    test_of: Tensor
    """[n] int64, the head each test question belongs to."""


def run(plan: Plan) -> None:
    """Do everything that was asked for, and print it.

    Raises:
        SpecInvalid, DataInvalid: in words, before any training where that is possible.
    """
    model = load_lda_db(plan.db, plan.projection)
    lda = MultiHeadLDA.of(model)
    questions = split(plan, model)
    student = make_student(plan, model)
    if plan.output is not None:  # a place that cannot be is said before the training
        plan.output.parent.mkdir(parents=True, exist_ok=True)
    click.echo(f"{plan.db}: {_sizes(model)}, {len(questions.test)} questions kept to judge on")
    _say_architectures(lda.num_heads, plan)
    history = train(plan, student, lda, questions)
    last = {name: values[-1] for name, values in history.items()}
    click.echo(f"after {plan.epochs} epochs: " + ", ".join(f"{k} {v:.4f}" for k, v in last.items()))
    found = evaluate_distillation(
        student,
        lda,
        questions.test,
        train_data=questions.train,
        answers=lda.answers,
        answer_of=None if lda.answers is None else questions.test_of,
    )
    show(found)
    if plan.output is not None:
        save(plan.output, student, {**plan.facts(), "metrics": found})
    if plan.latency:
        time_both(plan, lda, student, questions.test)


def split(plan: Plan, model: LDA) -> Questions:
    """Keep a share of the distinct questions from training.

    Raises:
        SpecInvalid: ``--embed-dim`` is not the questions' width.
        DataInvalid: fewer than two distinct questions.
    """
    queries = torch.from_numpy(model.queries)
    width = queries.shape[1]
    if width != plan.embed_dim:
        raise SpecInvalid(
            f"{plan.embed_dim}, but the questions of {plan.db} are {width} wide; say {width}",
            pointer="/embed_dim",
        )
    if model.manifest.get("questions") == "centroids":
        click.echo(f"{plan.db}: holds no questions; the heads' centroids stand for them", err=True)
    _, which = queries.unique(dim=0, return_inverse=True)
    distinct = int(which.max()) + 1
    if distinct < 2:
        raise DataInvalid(f"{plan.db}: {distinct} distinct question; at least 2 are needed")
    held = min(max(1, round(plan.test_fraction * distinct)), distinct - 1)
    hidden = torch.zeros(distinct, dtype=torch.bool)
    hidden[torch.randperm(distinct, generator=torch.Generator().manual_seed(plan.seed))[:held]] = (
        True
    )
    test = hidden[which]
    return Questions(queries[~test], queries[test], torch.from_numpy(model.cluster_of)[test])


def make_student(plan: Plan, model: LDA) -> ProjectionTransformer:
    """Build the student, by the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return ProjectionTransformer(
            plan.embed_dim,
            plan.num_heads,
            plan.num_layers,
            plan.ff_dim,
            out_dim=model.targets.shape[1],
            dropout=LEGACY_DROPOUT if plan.legacy else 0.0,
        )


def train(
    plan: Plan, student: ProjectionTransformer, lda: MultiHeadLDA, questions: Questions
) -> dict[str, list[float]]:
    """Train, with a bar on a terminal."""
    with bar("training") as report:

        def tell(epoch: int, _row: Mapping[str, float]) -> None:
            report(epoch, plan.epochs)

        return train_distillation(
            student,
            lda,
            questions.train,
            plan.epochs,
            plan.cosine_weight,
            plan.learning_rate,
            batch_size=None if plan.full_batch or plan.legacy else plan.batch_size,
            seed=plan.seed,
            mse_reduction="mean" if plan.legacy else "sum",
            augment=0.0 if plan.legacy else plan.augment,
            on_epoch=tell,
        )


def show(found: Mapping[str, float | None]) -> None:
    """Print the student's row between those that learnt nothing and its teacher."""
    click.echo(f"\n{'':<14}{'mean cosine':>13}{'answers right':>15}")
    for name, cosine, right in (
        ("raw question", None, found["raw_accuracy"]),
        ("mean vector", found["mean_vector_cosine"], None),
        ("ridge", found["ridge_cosine"], None),
        ("student", found["mean_cosine"], found["student_accuracy"]),
        ("teacher", 1.0, found["teacher_accuracy"]),
    ):
        click.echo(f"{name:<14}{_number(cosine):>13}{_number(right):>15}")
    rest = ("min_cosine", "max_cosine", "std_cosine", "centred_cosine")
    click.echo("student: " + ", ".join(f"{name} {_number(found[name])}" for name in rest))
    ridge, own = found["ridge_cosine"], found["mean_cosine"]
    if ridge is not None and own is not None and own <= ridge:
        click.echo("The student is no nearer to its teacher than a linear map: train it longer.")


def save(path: Path, student: ProjectionTransformer, facts: Mapping[str, object]) -> None:
    """Write the student's three files, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        files = export_student(student, Path(folder), facts=facts)
        ends = {files.torch: path, files.safetensors: path.with_suffix(".safetensors"),
                files.onnx: path.with_suffix(".onnx")}  # fmt: skip
        for source, target in ends.items():
            os.replace(source, target)
    click.echo("saved " + ", ".join(str(target) for target in ends.values()))


def time_both(
    plan: Plan, lda: MultiHeadLDA, student: ProjectionTransformer, queries: Tensor
) -> None:
    """Print what both take here, and from how many heads on the student would be faster."""
    taken = benchmark_latency(lda, student, queries, seconds=plan.seconds)
    click.echo(f"\n{lda.num_heads} heads, {taken['threads']:.0f} threads, microseconds per query:")
    click.echo(f"{'batch':>7}{'LDA':>10}{'p95':>10}{'student':>10}{'p95':>10}")
    for size in BATCHES:
        cells = [
            f"{1000 * taken[f'{side}_{part}_ms_per_query_{size}']:>10.2f}"
            for side in ("lda", "transformer")
            for part in ("p50", "p95")
        ]
        click.echo(f"{size:>7}{''.join(cells)}")
    click.echo("timing teachers of other numbers of heads ...", err=True)
    measured = measure_crossover(
        dim=plan.embed_dim,
        student_for=lambda _: student,
        seconds=plan.seconds,
        out_dim=student.config["target_dim"],
        teacher_for=lambda c, a: MultiHeadLDA(c, a, temperature=lda.temperature),
        seed=plan.seed,
    )
    click.echo("\nteachers of other numbers of heads, milliseconds per batch:")
    click.echo(advise(measured))


def _say_architectures(heads: int, plan: Plan) -> None:
    near, covering = optimal_architecture(heads), covering_architecture(heads, dim=plan.embed_dim)
    click.echo(
        f"student: {plan.num_heads} heads, {plan.num_layers} layers; H^L nearest to {heads} is "
        f"{near[0]}^{near[1]}, the smallest that covers it {covering[0]}^{covering[1]}"
    )


def _sizes(model: LDA) -> str:
    return f"{len(model.centroids)} heads, {len(model.queries)} questions"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
