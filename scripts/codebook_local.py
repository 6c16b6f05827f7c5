"""train_orthogonal_codebook.py on this machine: the service's own algorithms, no service."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from client.packing import packed
from core.artifacts.sandbox import import_file
from core.distill import evaluation as judged
from core.distill.backends import compare_backends
from core.distill.batches import left_out_answers
from core.distill.bivector_cache import cached_bivectors
from core.distill.combining import combine
from core.distill.curriculum import TrainingData, training_data
from core.distill.export import export_student
from core.distill.fitting import global_rotation
from core.distill.report import write_report
from core.distill.state import TrainState
from core.distill.students._base import StudentModule, build_student
from core.distill.target_cache import CHECKPOINT_INTERVAL, cached_targets
from core.distill.teachers._base import Bivectors, RotationTeacher, teachers
from core.distill.teachers._federated import fingerprint
from core.distill.teachers.rotational import RotationalTeacher
from core.distill.teachers.rotational_jax import JaxRotationalTeacher
from core.distill.training import remarks, run_epochs
from core.errors import DataInvalid, SpecInvalid
from core.rotations import codebook as codebooks
from core.specs.sizes import Sizes
from core.specs.students import check_router
from core.tensors.caches import read_claims
from core.tensors.codebooks import save_codebook_npz
from core.tensors.formats import Federated, load_federated, load_pairs
from core.tensors.shards import Array
from scripts.codebook_plan import Plan

Report = Callable[[int, int], None]
FITTED = (
    "Warning: these pairs are among those that the model's rotations were fitted to, and they "
    "chose the student's best epoch, so every row flatters. Judge on pairs of your own: --pairs."
)
MEASURED_ROWS = 1024
"""Targets that each backend computes when the faster one is looked for."""


def run(plan: Plan) -> None:
    """Do all that the plan asks for, saying what happens; nothing half-written stays."""
    _check_device(plan.local_device())
    model = load_model(plan)
    if plan.files.save_codebook is not None:
        save_codebook(plan, model)
    if plan.train:
        train(plan, model)


def interrupted(plan: Plan) -> str:
    """Say what is left of a run that was interrupted, and how it goes on."""
    kept, cache = plan.checkpoint(), plan.files.target_cache
    if plan.train and kept is not None and kept.exists():
        return f"interrupted; the same command with --resume goes on from {kept}"
    if plan.train and cache is not None:
        return f"interrupted; run again, it goes on with what is computed of {cache}"
    return "interrupted"


def load_model(plan: Plan) -> Federated:
    """Read the model or models, each through the sandbox that uploads pass."""
    found: list[Federated] = []
    for path in plan.files.models:
        with imported(path, "federated_model") as file:
            model = load_federated(file)
        click.echo(
            f"{path}: {len(model.rotations)} clusters, {len(model.queries)} training queries, "
            f"{model.queries.shape[1]} dimensions",
            err=True,
        )
        found.append(model)
    if len(found) == 1:
        return found[0]
    return combine({f"{index:064x}": model for index, model in enumerate(found)})


@contextmanager
def imported(path: Path, needed: str) -> Iterator[Path]:
    """Check a file as an upload is checked; yield its canonical form as long as it lasts."""
    with packed(path) as file, tempfile.TemporaryDirectory(prefix="still-import-") as folder:
        try:
            made = import_file(file, file_name=path.name, workdir=Path(folder))
        except DataInvalid as error:
            raise DataInvalid(f"{path}: {error.message}") from error
        if made.format != needed:
            raise DataInvalid(f"{path}: is of format {made.format!r}; needed {needed!r}")
        for note in made.notes:
            click.echo(f"{path}: {note}", err=True)
        yield made.path


def save_codebook(plan: Plan, model: Federated) -> None:
    """Build the planes and write them."""
    assert plan.files.save_codebook is not None
    plan.codebook.check_width(model.queries.shape[1])
    logs = find_logs(plan, model)
    if logs is None:  # canonical planes are made from nothing
        made = codebooks.canonical(model.queries.shape[1], plan.codebook.n_components)
    else:
        sizes = np.bincount(model.cluster_of, minlength=len(model.rotations))
        weights = torch.from_numpy(sizes)
        made = codebooks.build(plan.codebook, logs.values, weights=weights, seed=plan.seed)
    plan.files.save_codebook.parent.mkdir(parents=True, exist_ok=True)
    save_codebook_npz(plan.files.save_codebook, made)
    click.echo(f"{plan.files.save_codebook}: {len(made.planes)} planes, {made.method}")


def find_logs(plan: Plan, model: Federated) -> Bivectors | None:
    """Return the logarithms where they are needed, from the file beside the model or into it."""
    if not plan.needs_logs():
        return None
    with bar("logarithms") as report:
        return cached_bivectors(model, plan.teacher, path=plan.bivector_path(), report=report)


def train(plan: Plan, model: Federated) -> None:
    """Targets, training, judgement, files."""
    sizes = Sizes.of(model.meta())
    plan.student.check_sizes(sizes)
    plan.teacher.check_width(sizes.dim)
    check_router(plan.student, plan.teacher)
    plan.training.check_teacher(answers_new=plan.teacher.answers_new)
    logs = find_logs(plan, model)
    plan = measured(plan, model, logs)
    build = teachers()[plan.teacher.name].build
    teacher = cast("RotationTeacher", build(model, plan.teacher, plan.local_device(), logs))
    targets = find_targets(plan, teacher)
    data = training_data(teacher, targets, plan.training, seed=plan.seed)
    state = start_or_resume(plan, teacher, targets)
    train_epochs(plan, state, data)
    student = state.result()
    words = remarks(student)
    found = judge(plan, teacher, data, student, targets)
    save(plan, student, state, [*words, *found.words])
    show(plan, found, state)


def train_epochs(plan: Plan, state: TrainState, data: TrainingData) -> None:
    """Train to the end, keeping the state after every epoch where there is a place for it."""
    path, epochs = plan.checkpoint(), plan.training.epochs
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    with bar("training") as report:
        while not state.stopped and state.epoch < epochs:
            done = state.epoch
            tell = partial(_tell, report, done, epochs)
            run_epochs(state, data, done, done + 1, tell)
            if path is not None:
                replace_file(path, state)


def _tell(report: Report, epoch: int, epochs: int, steps: int, total: int) -> None:
    report(epoch * total + steps, epochs * total)


def replace_file(path: Path, state: TrainState) -> None:
    """Write the state beside its place, then put it there: a kill leaves the one before."""
    beside = path.with_name(f".{path.name}.part")
    state.save(beside)
    os.replace(beside, path)


def measured(plan: Plan, model: Federated, bivectors: Bivectors | None) -> Plan:
    """Choose torch or JAX by the clock where the plan leaves it open."""
    if not plan.measure:
        return plan
    known = _taught_before(plan, model)
    if known is not None:
        return plan.taught_by(known)
    table = compare_backends(
        model, plan.teacher, plan.local_device(), queries=MEASURED_ROWS, bivectors=bivectors
    )
    for timing in table.timings:
        click.echo(f"{timing.name}: {timing.queries_per_second:,.0f} targets a second", err=True)
    return plan.taught_by(table.fastest)


def _taught_before(plan: Plan, model: Federated) -> str | None:
    """Return whose targets the cache holds: no measurement is worth computing them again."""
    path = plan.files.target_cache
    if path is None or not path.exists():
        return None
    told = read_claims(path).fingerprint
    candidates = {"rotational": RotationalTeacher, "rotational_jax": JaxRotationalTeacher}
    for name, teacher in candidates.items():
        if told == fingerprint(teacher, model, plan.taught_by(name).teacher):
            return name
    return None


def find_targets(plan: Plan, teacher: RotationTeacher) -> torch.Tensor:
    """Return the teacher's answers to its model's training queries, none routed through itself."""
    queries = teacher.model.queries
    with bar("targets") as report:
        if plan.files.target_cache is None:
            with tempfile.TemporaryDirectory(prefix="still-targets-") as folder:
                return torch.from_numpy(
                    cached_targets(
                        teacher, queries, path=Path(folder) / "targets.npz", report=report
                    )
                )
        found = cached_targets(
            teacher,
            queries,
            path=plan.files.target_cache,
            checkpoint_path=plan.files.checkpoint_path,
            checkpoint_interval=plan.files.checkpoint_interval or CHECKPOINT_INTERVAL,
            report=report,
        )
    click.echo(f"{plan.files.target_cache}: targets of {len(found)} queries", err=True)
    return torch.from_numpy(found)


def start_or_resume(plan: Plan, teacher: RotationTeacher, targets: torch.Tensor) -> TrainState:
    """Begin training, or go on from the checkpoint.

    Raises:
        SpecInvalid: the checkpoint is of another student or of other settings.
        DataInvalid: there is none, or it is damaged.
    """
    path = plan.checkpoint()
    fresh = TrainState.start(
        build_student(plan.student, teacher, plan.seed),
        plan.training,
        seed=plan.seed,
        device=plan.local_device(),
    )
    fresh.origin = {
        "seed": plan.seed,
        "student": plan.student.model_dump(mode="json"),
        "teacher": teacher.fingerprint(),
        "targets": hashlib.sha256(np.ascontiguousarray(targets.numpy()).data).hexdigest(),
    }
    if not plan.files.resume:
        return fresh
    assert path is not None
    if not path.exists():
        raise DataInvalid(f"--resume: there is no {path}")
    state = TrainState.load(path, device=plan.local_device())
    if state.student.config != fresh.student.config:
        raise SpecInvalid(f"--resume: {path} is of another student: {state.student.config}")
    if state.origin != fresh.origin:
        odd = [name for name in fresh.origin if state.origin.get(name) != fresh.origin[name]]
        raise SpecInvalid(f"--resume: {path} was trained with another {' and '.join(odd)}")
    if state.training != plan.training:
        raise SpecInvalid(f"--resume: {path} was trained with {state.training!r}")
    click.echo(f"{path}: goes on after epoch {state.epoch}", err=True)
    return state


def judge(
    plan: Plan,
    teacher: RotationTeacher,
    data: TrainingData,
    student: StudentModule,
    targets: torch.Tensor,
) -> judged.Evaluation:
    """Judge on pairs of the caller's own, or else on the queries held back from the student.

    Those are pairs that the model's rotations were fitted to; all that can be left out of an
    answer is the query itself, for the teacher and for a student that copies its routing.
    """
    if plan.files.pairs is not None:
        return judge_on(plan.files.pairs, plan, teacher, student)
    model = teacher.model
    rows = data.validation.cpu().numpy()
    rows = rows[np.sort(np.unique(model.queries[rows], axis=0, return_index=True)[1])]
    queries = model.queries[rows]
    seen = data.train.cpu().numpy()
    one = global_rotation(model.queries[seen], model.targets[seen])
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    outputs = {
        judged.RAW: queries,
        judged.MEAN: lengths * judged.mean_direction(model.targets[seen]),
        judged.GLOBAL: (queries.astype(np.float64) @ one).astype(np.float32),
        judged.TEACHER: targets.numpy()[rows].astype(np.float32),
        plan.student.name: _left_out(student, data, torch.from_numpy(rows)),
    }
    found = judged.evaluate(outputs, model.targets, rows, seed=plan.seed)
    own = [sentence for sentence in found.words if sentence.startswith(plan.student.name)]
    return replace(found, words=[FITTED, *own])


def _left_out(student: StudentModule, data: TrainingData, rows: torch.Tensor) -> Array:
    """Map training queries, none routed through itself: [Q, d] float32."""
    student = student.to(data.train.device).eval()
    parts = [
        left_out_answers(student, data, part).cpu()
        for part in rows.to(data.train.device).split(judged.BLOCK_ROWS)
    ]
    vectors: Array = torch.cat(parts).numpy()
    return vectors


def judge_on(
    path: Path, plan: Plan, teacher: RotationTeacher, student: StudentModule
) -> judged.Evaluation:
    """Judge on the queries of other pairs that the model was not trained on."""
    model = teacher.model
    with imported(path, "pairs") as file:
        pairs = load_pairs(file)
    if pairs.queries.shape[1] != model.queries.shape[1]:
        raise DataInvalid(
            f"{path}: {pairs.queries.shape[1]} dimensions, the model {model.queries.shape[1]}"
        )
    rows, dropped = judged.unseen(pairs, model)
    if not len(rows):
        raise DataInvalid(f"{path}: the model was trained on every one of these queries")
    queries = pairs.queries[rows].astype(np.float32)
    one = global_rotation(model.queries, model.targets)
    outputs = judged.baselines(teacher.knowing(pairs), queries, anchor=one)
    outputs[plan.student.name] = judged.student_vectors(
        student, queries, device=plan.local_device()
    )
    targets = pairs.targets.astype(np.float32)
    return judged.evaluate(outputs, targets, rows, seed=plan.seed, dropped=dropped)


def save(plan: Plan, student: StudentModule, state: TrainState, words: list[str]) -> None:
    """Write the student's three files under the name asked for, whole or not at all."""
    path = plan.files.save_transformer
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {**plan.facts(), "history": state.history, "words": words}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        files = export_student(student.cpu(), Path(folder), facts=facts)
        ends = {files.torch: path, files.safetensors: path.with_suffix(".safetensors"),
                files.onnx: path.with_suffix(".onnx")}  # fmt: skip
        for source, target in ends.items():
            os.replace(source, target)
    click.echo("saved " + ", ".join(str(target) for target in ends.values()))


def show(plan: Plan, found: judged.Evaluation, state: TrainState) -> None:
    """Print the table and the sentences; write the report where one is asked for."""
    click.echo(f"\n{found.queries} queries not trained on, among {found.targets} targets")
    head = ("", "hit@1", "hit@5", "hit@10", "cosine", "gap closed")
    lines: list[tuple[str, ...]] = [head]
    for row in found.rows:
        hits = [f"{row.hits[k]:.4f}" for k in judged.HITS]
        gap = "-" if row.gap_closed is None else f"{row.gap_closed:.4f}"
        lines.append((row.name, *hits, f"{row.cosine_mean:.5f}", gap))
    for line in lines:
        click.echo("".join(f"{cell:<17}" for cell in line).rstrip())
    click.echo("")
    for sentence in found.words:
        click.echo(sentence)
    if plan.files.report is not None:
        plan.files.report.mkdir(parents=True, exist_ok=True)
        title = f"{plan.student.name} taught by {plan.teacher.name}"
        write_report(
            plan.files.report, found, title=title, history=state.history, facts=plan.facts()
        )
        click.echo(f"report in {plan.files.report}")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpecInvalid(f"--device {name!r}; allowed: cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not _has_cuda(device)):
        raise SpecInvalid(f"--device {name!r}: there is no such device here; allowed: cpu")


def _has_cuda(device: Any) -> bool:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return (device.index or 0) < count


@contextmanager
def bar(title: str) -> Iterator[Report]:
    """Show how far a step is, on standard error, while it lasts."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<12}"), BarColumn(bar_width=32),
               TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=1)
        yield lambda done, total: progress.update(task, completed=done, total=max(1, total))
