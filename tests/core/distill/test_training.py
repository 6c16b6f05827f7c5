from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.distill import training as loop
from core.distill.batches import Wanted, left_out_answers, validation_batches
from core.distill.curriculum import jitter, slerp, training_data
from core.distill.students._base import students
from core.distill.teachers.rotational import RotationalTeacher
from core.distill.training import TrainState, learning_rate, run_epochs
from core.errors import Cancelled, DataInvalid, SpecInvalid
from core.rotations.sphere import squared_angles
from core.specs.teachers import Rotational
from core.specs.training import Training
from core.tensors import shards
from tests.core.distill._make import (
    OF_LENGTHS,
    answers,
    doubled,
    make_data,
    make_model,
    make_student,
    make_targets,
    make_teacher,
    make_training,
    some_queries,
)

every_student = pytest.mark.parametrize("name", students())


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total


def digest(state: TrainState, folder: Path) -> str:
    state.save(folder / "digest.safetensors")
    return hashlib.sha256((folder / "digest.safetensors").read_bytes()).hexdigest()


def start(name: str, training: Training) -> TrainState:
    return TrainState.start(make_student(name), training, seed=2)


@pytest.mark.parametrize(
    ("name", "restless"),
    [*((name, False) for name in students()), ("canonical", True), ("rotor_product", True)],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    name: str, tmp_path: Path, *, restless: bool
) -> None:
    wild = {"epochs": 5, "learning_rate": 0.5, "scheduler": "none", "ema_decay": 0.0}
    training = make_training(**(wild if restless else {}))
    whole = start(name, training)
    run_epochs(whole, make_data(training, name), 0, training.epochs, quiet)
    if name in OF_LENGTHS:
        assert (whole.best_score > whole.history[-1]["validation_cosine"]) == restless

    state = start(name, training)
    for epoch in range(training.epochs):
        run_epochs(state, make_data(training, name), epoch, epoch + 1, quiet)
        state.save(tmp_path / "state.safetensors")
        state = TrainState.load(tmp_path / "state.safetensors")

    assert digest(state, tmp_path) == digest(whole, tmp_path)
    assert state.history == whole.history
    assert [row["epoch"] for row in whole.history] == list(range(1, training.epochs + 1))


@every_student
def test_training_lowers_the_loss_and_does_not_lose_validation_cosine(name: str) -> None:
    training = make_training(epochs=6)
    state, data = start(name, training), make_data(training, name)
    state.student.eval()
    before = loop.validation_score(state.student, data)

    run_epochs(state, data, 0, 6, quiet)

    if name == "hierarchical_router":  # it starts as its teacher: there is nothing to gain
        assert before > 1 - 1e-9
        assert state.best_score >= before
    else:
        assert min(row["loss"] for row in state.history[1:]) < state.history[0]["loss"]
        assert state.best_score > before or name == "hierarchical"  # recall among 15 rows is coarse
    assert loop.validation_score(state.result(), data) == pytest.approx(state.best_score)
    assert state.stopped


def test_a_learnt_router_comes_near_the_teacher() -> None:
    training = make_training(epochs=30, learning_rate=1e-2)
    state = start("rotor_product", training)
    run_epochs(state, make_data(training), 0, 30, quiet)
    wanted = make_teacher().targets(make_model().queries)
    found = state.result()(torch.from_numpy(make_model().queries))
    assert torch.cosine_similarity(found, wanted).mean() > 0.995


def test_planes_stay_orthonormal_while_they_are_trained() -> None:
    training = make_training(learning_rate=0.1)
    state = TrainState.start(make_student("rotor_product", train_planes=True), training, seed=0)
    start_planes = state.student.state_dict()["bases"].clone()
    run_epochs(state, make_data(training), 0, 2, quiet)
    for student in (state.student, state.result()):
        bases = student.state_dict()["bases"]
        assert not torch.equal(bases, start_planes)
        assert (bases.mT @ bases - torch.eye(bases.shape[2])).abs().max() < 1e-5


def test_patience_ends_a_run_that_no_longer_gains() -> None:
    training = make_training(epochs=50, patience=2, min_delta=1.0)
    state = start("rotor_product", training)
    run_epochs(state, make_data(training), 0, 50, quiet)
    assert state.stopped
    assert state.epoch == 3  # the first epoch gains, two do not

    run_epochs(state, make_data(training), 3, 50, quiet)
    assert state.epoch == 3


def test_a_progress_callback_may_stop_the_run_at_any_step() -> None:
    training = make_training()
    seen: list[tuple[int, int]] = []

    def cancel(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 4:
            raise Cancelled("by the user")

    with pytest.raises(Cancelled):
        run_epochs(start("rotor_product", training), make_data(training), 0, 3, cancel)
    steps = loop.steps_per_epoch(make_data(training), training)
    assert {total for _, total in seen} == {3 * steps}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_checkpoint_of_another_epoch_is_refused(tmp_path: Path) -> None:
    training = make_training()
    with pytest.raises(DataInvalid, match="at epoch 0, not 1"):
        run_epochs(start("canonical", training), make_data(training), 1, 2, quiet)
    shards.save(tmp_path / "other.safetensors", {}, {"format": "pairs"})
    with pytest.raises(DataInvalid, match="not a training checkpoint"):
        TrainState.load(tmp_path / "other.safetensors")


def test_a_student_with_nothing_to_train_is_judged_and_done(tmp_path: Path) -> None:
    training = make_training()
    student = make_student("rotor_product", router="exact", train_planes=False)
    state = TrainState.start(student, training, seed=0)

    run_epochs(state, make_data(training), 0, 3, quiet)

    assert state.stopped
    assert len(state.history) == 1
    assert state.history[0]["validation_cosine"] > 0.98
    state.save(tmp_path / "state.safetensors")
    again = TrainState.load(tmp_path / "state.safetensors").result()
    assert torch.equal(again(some_queries()), student(some_queries()))


def test_nothing_to_train_is_said_and_judged_in_batches() -> None:
    training = make_training(batch_size=5, losses={"cvar": 0})
    student = make_student("rotor_product", router="exact", train_planes=False)
    state, data = TrainState.start(student, training, seed=0), make_data(training)
    sizes = [len(part) for part in validation_batches(data, 5, Wanted())]
    assert max(sizes) == 5
    assert sum(sizes) == len(data.validation)

    run_epochs(state, data, 0, 1, quiet)

    rows = data.validation
    vectors = left_out_answers(student, data, rows)
    angles = squared_angles(vectors, data.real.teacher[rows])
    assert state.history[0]["geodesic"] == pytest.approx(float(angles.mean()))
    assert "Nothing of this student is trained" in loop.remarks(student)[0]
    assert loop.remarks(make_student("rotor_product")) == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("canonical", {}),
        ("rotor_product", {"router": "exact", "train_planes": True}),
        ("rotor_product", {"router": "exact", "train_planes": False}),
    ],
)
def test_terms_that_do_not_apply_to_a_student_are_refused(
    name: str, changes: dict[str, object]
) -> None:
    training = make_training(losses={"geodesic": 0, "cvar": 0, "retrieval_kl": 0, "router_kl": 1})
    state = TrainState.start(make_student(name, **changes), training, seed=0)
    with pytest.raises(SpecInvalid, match="no term of weight above 0"):
        run_epochs(state, make_data(training), 0, 1, quiet)


@pytest.mark.parametrize("scheduler", ["none", "cosine", "step"])
def test_the_learning_rate_warms_up_and_never_grows_after(scheduler: str) -> None:
    training = make_training(scheduler=scheduler, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(training, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[-1] < 0.02) is (scheduler != "none")


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.0},
        {"augment": 0.0},
        {"batch_size": 1},
        {"batch_size": 4, "augment": 0.5, "centroid_replay": 0.45},
        {"epochs": 2, "centroid_warmup_epochs": 1, "batch_size": 1},
    ],
)
def test_extremes_of_the_settings_work(changes: dict[str, float]) -> None:
    training = make_training(**{"epochs": 1, **changes})
    state = start("rotor_product", training)
    run_epochs(state, make_data(training), 0, training.epochs, quiet)
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in state.history)
    if training.ema_decay == 0:
        own = loop.trainable(state.student)
        assert all(torch.equal(state.ema[name], own[name]) for name in own)


def test_validation_rows_are_neither_trained_on_nor_mixed_from() -> None:
    data = make_data(make_training())
    held = set(data.validation.tolist())
    assert held
    assert held.isdisjoint(data.train.tolist())
    assert held.isdisjoint(data.neighbours[data.train].flatten().tolist())
    own = torch.arange(len(data.neighbours))[:, None]
    assert not (data.neighbours == own).any()


def test_made_queries_are_answered_by_the_teacher_without_their_parents() -> None:
    data = make_data(make_training())
    generator, parents = (torch.Generator().manual_seed(3) for _ in range(2))

    made = data.made(20, generator, lambda: None, with_anchor=False)

    rows = data._parents(20, parents)
    torch.testing.assert_close(
        made.teacher, make_teacher().targets(made.queries, exclude_rows=rows)
    )
    torch.testing.assert_close(made.queries.norm(dim=1), torch.ones(20), rtol=1e-5, atol=0)


def test_duplicates_are_one_query_everywhere() -> None:
    teacher = RotationalTeacher(doubled(make_model()), Rotational())
    half = len(make_model().queries)
    data = training_data(teacher, answers(teacher), make_training(), seed=1)
    number = torch.arange(2 * half) % half

    assert set(number[data.validation].tolist()).isdisjoint(number[data.train].tolist())
    assert len(data.validation) == 2 * round(0.1 * half)
    near = number[data.neighbours]
    assert not (near == number[:, None]).any()
    assert all(len(set(row)) == len(row) for row in near.tolist())
    once = teacher.mixture(data.real.queries, exclude_rows=torch.stack([number, number + half], 1))
    torch.testing.assert_close(data.mixture.dense(), once.dense())

    made = data.made(20, torch.Generator().manual_seed(3), lambda: None, with_anchor=True)
    parents = number[data._parents(20, torch.Generator().manual_seed(3))]
    every = torch.cat([parents, parents + half], dim=1)
    wanted = teacher.targets(made.queries, exclude_rows=every)
    torch.testing.assert_close(made.teacher, wanted)


def test_too_few_distinct_queries_are_refused() -> None:
    model = make_model()
    three = np.arange(len(model.queries)) % 3
    teacher = RotationalTeacher(replace(model, queries=model.queries[three]), Rotational())
    with pytest.raises(DataInvalid, match="3 distinct training queries; at least 4"):
        training_data(teacher, torch.from_numpy(model.targets), make_training(), seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slerp_goes_round_between_opposites_and_stands_still_between_equals(
    dtype: torch.dtype,
) -> None:
    a = some_queries().to(dtype)
    shares = torch.linspace(0, 1, len(a), dtype=dtype)[:, None]
    for b, turn in ((-3 * a, math.pi), (3 * a, 0.0)):
        between = slerp(a, b, shares)
        torch.testing.assert_close(between.norm(dim=1, keepdim=True), 3**shares)
        cosines = torch.cosine_similarity(a, between)
        torch.testing.assert_close(cosines, (turn * shares[:, 0]).cos(), rtol=0, atol=1e-6)


def test_targets_must_be_one_per_training_query() -> None:
    with pytest.raises(DataInvalid, match="one per training query"):
        training_data(make_teacher(), make_targets()[1:], make_training(), seed=0)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_slerp_stays_on_the_arc_and_jitter_on_the_sphere(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b, noise = torch.randn(3, 1, 5, generator=generator, dtype=torch.float64)
    a, b = a / a.norm(), 2 * b / b.norm()

    between = slerp(a, b, torch.tensor([[share]], dtype=torch.float64))
    moved = jitter(between, noise, size=0.1)

    angle = torch.arccos((a * b).sum() / 2)
    along = torch.arccos(((a * between).sum() / between.norm()).clamp(-1, 1))
    torch.testing.assert_close(along, share * angle, atol=1e-6, rtol=0)
    assert float(between.norm()) == pytest.approx(2**share)
    assert float(moved.norm()) == pytest.approx(2**share)
    cosine = float((moved * between).sum() / moved.norm() ** 2)
    assert cosine == pytest.approx(1 / (1 + 0.01) ** 0.5)
