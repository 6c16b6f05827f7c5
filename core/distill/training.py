"""The one training loop. What it needs to go on is in the state, the state in one file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from core.distill.batches import (
    batch_plan,
    centroid_batches,
    epoch_batches,
    epoch_pool,
    left_out_answers,
    validation_batches,
)
from core.distill.curriculum import Examples, TrainingData
from core.distill.neighbours import NEAREST, recall
from core.distill.schedules import BatchPlan, learning_rate
from core.distill.state import TrainState, assign, trainable
from core.distill.stepping import Stepper
from core.distill.students._base import StudentModule
from core.errors import DataInvalid, SpecInvalid
from core.specs.training import PLATEAU_PATIENCE, Training

__all__ = [
    "TrainState",
    "learning_rate",
    "remarks",
    "run_epochs",
    "run_steps",
    "score_name",
    "steps_per_epoch",
    "trainable",
    "validation_cosine",
    "validation_recall",
    "validation_score",
]

VALIDATED_ROWS = 1024
"""Validation rows the student maps at a time."""
Progress = Callable[[int, int], None]


def run_epochs(
    state: TrainState, data: TrainingData, first: int, last: int, on_step: Progress
) -> None:
    """Train epochs first..last-1; fewer where ``state.stopped`` turns true.

    Args:
        state: changed in place; its ``epoch`` must be ``first``, with no step of it done.
        data: from ``training_data``, with the same arguments at every call.
        first: epochs done before.
        last: epochs done after, at most ``state.training.epochs``.
        on_step: called with (steps done, steps of this call) at every step; may raise.

    Raises:
        DataInvalid: the state is at another epoch: the checkpoint belongs to another chunk.
    """
    if state.epoch != first or state.within:
        inside = f" and {state.within} steps" if state.within else ""
        raise DataInvalid(f"the checkpoint is at epoch {state.epoch}{inside}, not {first}")
    plan = batch_plan(data, state.training)
    last = min(last, state.training.epochs)
    _run(state, data, plan, plan.steps_before(last) - plan.steps_before(first), on_step)


def run_steps(
    state: TrainState,
    data: TrainingData,
    count: int,
    on_step: Progress,
) -> None:
    """Take up to ``count`` more steps, from wherever the state stands, also inside an epoch.

    An epoch that they complete is validated, as by ``run_epochs``. However a run is cut, the
    state ends up the same, bit for bit.

    Args:
        state: changed in place.
        data: from ``training_data``, with the same arguments at every call.
        count: at least 1; fewer are taken where ``state.stopped`` turns true.
        on_step: called with (steps done, steps of this call) at every step; may raise.
    """
    plan = batch_plan(data, state.training)
    done = plan.steps_before(state.epoch) + state.within
    _run(state, data, plan, min(count, plan.total_steps - done), on_step)


def steps_per_epoch(data: TrainingData, training: Training) -> int:
    """How many batches show every real training query once."""
    return batch_plan(data, training).steps


def score_name(student: StudentModule) -> str:
    """Return what a student is validated by: ``validation_cosine`` or ``validation_recall``."""
    return "validation_recall" if student.compares == "relations" else "validation_cosine"


def validation_score(student: StudentModule, data: TrainingData) -> float:
    """Judge a student on the validation rows; the higher the better, at most 1."""
    if student.compares == "relations":
        return validation_recall(student, data)
    return validation_cosine(student, data)


def validation_recall(student: StudentModule, data: TrainingData) -> float:
    """Share of the validation rows' nearest by the teacher that are nearest by the codes too.

    Both among the validation rows; of several nested codes the mean by their weight. NaN
    where a code is not finite.
    """
    rows = data.validation
    codes = torch.cat(
        [left_out_answers(student, data, part) for part in rows.split(VALIDATED_ROWS)]
    )
    if not bool(codes.isfinite().all()):
        return math.nan
    levels = student.levels or ((codes.shape[1], 1.0),)
    teacher = data.real.teacher[rows]
    count = max(1, min(NEAREST, len(rows) // 4))  # of few rows most are among the nearest 10
    found = [recall(codes[:, :k], teacher, count=count) * weight for k, weight in levels]
    return sum(found) / sum(weight for _, weight in levels)


def validation_cosine(student: StudentModule, data: TrainingData) -> float:
    """Mean cosine to the teacher on the validation rows."""
    total = torch.zeros((), dtype=torch.float64, device=data.validation.device)
    for rows in data.validation.split(VALIDATED_ROWS):
        vectors = left_out_answers(student, data, rows).double()
        total += torch.cosine_similarity(vectors, data.real.teacher[rows].double()).sum()
    return float(total) / len(data.validation)


def remarks(
    student: StudentModule, history: Sequence[Mapping[str, float]] = (), *, best: float = -math.inf
) -> list[str]:
    """Return what whoever asked for this student must be told about its training.

    Args:
        student: as it was trained.
        history: of its training.
        best: validation score of the state that was taken.
    """
    name = score_name(student)
    if trainable(student) and history and best > max(row[name] for row in history):
        return [
            "No epoch was better than the start: the student is the untrained one, which has "
            f"{name.replace('_', ' ')} {best:.6f}."
        ]
    if trainable(student):
        return []
    return [
        "Nothing of this student is trained: it is the teacher's own routing and planes. Epochs, "
        "losses and learning rate had no effect; the one row of the history judges it."
    ]


def _run(
    state: TrainState,
    data: TrainingData,
    plan: BatchPlan,
    count: int,
    on_step: Progress,
) -> None:
    """Take ``count`` steps, epoch by epoch."""
    if state.stopped:
        return
    stepper = Stepper(state)
    if state.optimizer is None:
        _judge_untrainable(stepper, data)
        return
    if state.step == 0:  # a student that starts as its teacher is never made worse
        state.best_score = _validate(state, data)
    done = 0
    while done < count and not state.stopped:
        some = min(count - done, plan.steps_of(state.epoch) - state.within)
        _part(stepper, data, plan, some, partial(_tell, on_step, done, count))
        done += some


def _tell(on_step: Progress, before: int, total: int, taken: int) -> None:
    on_step(before + taken, total)


def _part(
    stepper: Stepper,
    data: TrainingData,
    plan: BatchPlan,
    count: int,
    on_step: Callable[[int], None],
) -> None:
    """Take ``count`` steps of the present epoch; where they end it, judge it."""
    state = stepper.state
    ahead = torch.Generator()
    ahead.set_state(state.generator.get_state())
    state.student.train()
    taken = 0
    batches = _batches(stepper, data, plan, ahead, lambda: on_step(taken))
    for taken in range(count):
        on_step(taken)
        batch = next(batches)
        rate = learning_rate(state.training, state.step, plan.total_steps, cuts=state.cuts)
        stepper.step(batch, rate)
    if state.within == plan.steps_of(state.epoch):
        state.generator = ahead
        _end_epoch(state, data, plan, rate)
    on_step(count)


def _batches(
    stepper: Stepper,
    data: TrainingData,
    plan: BatchPlan,
    generator: torch.Generator,
    on_block: Callable[[], None],
) -> Iterator[list[Examples]]:
    """Yield the batches of the present epoch that are still to come."""
    state = stepper.state
    if state.epoch < plan.warmup_epochs:
        return centroid_batches(data, plan, generator, first=state.within)
    return epoch_batches(
        data,
        plan,
        generator,
        wanted=stepper.wanted,
        pool=epoch_pool(data, state.training, state.epoch),
        first=state.within,
        on_block=on_block,
    )


def _end_epoch(state: TrainState, data: TrainingData, plan: BatchPlan, rate: float) -> None:
    """Validate the average, keep the best, see whether to slow down or to stop."""
    means = {name: float(value) / state.within for name, value in state.sums.items()}
    score = _validate(state, data)
    _check_finite(state, {**means, score_name(state.student): score})
    told, stage = state.training.curriculum, state.training.stage_of(state.epoch)
    _record(state, means, rate, score)
    state.within, state.sums = 0, {}
    if score > state.best_score:
        state.best_score = score
        state.best = {name: value.clone() for name, value in state.ema.items()}
    if state.epoch > plan.warmup_epochs and (told is None or stage == told.stages - 1):
        _judge_gain(state, score)
    state.stopped = state.stopped or state.epoch >= state.training.epochs


def _record(state: TrainState, means: dict[str, float], rate: float, score: float) -> None:
    """Add the row of the epoch that has ended, and count it."""
    training, stage = state.training, {}
    if training.curriculum is not None:
        stage = {
            "stage": float(training.stage_of(state.epoch)),
            "tau": training.tau_of(state.epoch),
        }
    state.epoch += 1
    facts = {"learning_rate": rate, score_name(state.student): score, **stage}
    state.history.append({"epoch": state.epoch, **means, **facts})


def _check_finite(state: TrainState, found: Mapping[str, float]) -> None:
    """Refuse an epoch whose loss, a term of it or whose validation is NaN or infinite."""
    for name, value in found.items():
        if not math.isfinite(value):
            raise SpecInvalid(
                f"training.learning_rate {state.training.learning_rate:g}: {name} is {value} after "
                f"epoch {state.epoch + 1}, the training diverged; lower it",
                pointer="/training/learning_rate",
            )


def _judge_gain(state: TrainState, score: float) -> None:
    """Count the epochs without a gain of ``min_delta``; cut the learning rate or stop."""
    training = state.training
    if score > state.waited_from + training.min_delta:
        state.waited_from, state.waited, state.flat = score, 0, 0
        return
    state.waited += 1
    state.flat += 1
    if training.scheduler == "plateau" and state.flat >= (
        training.plateau_patience or PLATEAU_PATIENCE
    ):
        state.cuts, state.flat = state.cuts + 1, 0
    state.stopped = training.patience is not None and state.waited >= training.patience


def _validate(state: TrainState, data: TrainingData) -> float:
    """Validation score of the averaged parameters; the trained ones come back afterwards."""
    own = {name: value.detach().clone() for name, value in trainable(state.student).items()}
    assign(state.student, state.ema)
    state.student.retract()
    state.student.eval()
    score = validation_score(state.student, data)
    assign(state.student, own)
    return score


def _judge_untrainable(stepper: Stepper, data: TrainingData) -> None:
    """Record what a student without trainable parameters is worth, and stop."""
    state = stepper.state
    means: dict[str, float] = {}
    size = state.training.batch_size
    with torch.no_grad():
        for part in validation_batches(data, size, stepper.wanted):
            loss, terms = stepper.loss([part])
            for name, value in {"loss": loss, **terms}.items():
                share = float(value) * len(part) / len(data.validation)
                means[name] = means.get(name, 0.0) + share
    score = _validate(state, data)
    _record(state, means, 0.0, score)
    state.best_score, state.stopped = score, True
