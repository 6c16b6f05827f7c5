"""A curriculum in the one loop: what each stage shows, what its terms see, and where it is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.distill.batches import epoch_pool
from core.distill.state import TrainState
from core.distill.training import run_epochs, run_steps
from core.specs.training import Training
from tests.core.distill._codes import code_data, code_state
from tests.core.distill._make import (
    make_any_teacher,
    make_data,
    make_student,
    make_training,
    some_queries,
)
from tests.core.distill.test_training import digest, quiet

STAGES = {"epochs": 5, "curriculum": {"stages": 3, "order": "easy_first"}}


def trained(training: Training, *, seed: int = 2) -> TrainState:
    state = code_state(training, seed=seed)
    run_epochs(state, code_data(training), 0, training.epochs, quiet)
    return state


def test_the_history_has_the_stage_and_the_temperature_of_every_epoch() -> None:
    training = make_training(**STAGES)
    rows = trained(training).history
    assert [row["stage"] for row in rows] == [0, 0, 1, 1, 2]
    assert [row["tau"] for row in rows] == [4.0, 4.0, 2.25, 2.25, 0.5]
    assert all("stage" not in row for row in trained(make_training(epochs=1)).history)


def test_a_student_with_nothing_to_train_is_judged_in_the_first_stage() -> None:
    losses = {"relational_kl": 1.0, "geodesic": 0, "cvar": 0, "retrieval_kl": 0}
    training = make_training(epochs=3, curriculum={"stages": 3}, losses=losses)
    state = TrainState.start(make_student("rotor_product", router="exact"), training, seed=0)
    run_epochs(state, make_data(training), 0, 3, quiet)
    [row] = state.history
    assert (row["stage"], row["tau"]) == (0.0, 4.0)
    assert state.stopped


def test_rows_are_easy_by_the_mean_cosine_of_their_nearest() -> None:
    data = code_data(make_training())
    wide = data.real.teacher[data.train].double().numpy()
    units = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -np.inf)
    ease = np.sort(cosines, axis=1)[:, -8:].mean(1)

    place = {row: at for at, row in enumerate(data.train.tolist())}
    found = ease[[place[row] for row in data.by_ease.tolist()]]

    assert sorted(data.by_ease.tolist()) == sorted(data.train.tolist())
    assert (np.diff(found) <= 1e-6).all()
    assert found[0] - found[-1] > 0.05


def test_every_stage_shows_its_easy_share_and_as_many_rows() -> None:
    training = make_training(**STAGES)
    data = code_data(training)
    count = len(data.train)
    for epoch, share in enumerate((1 / 3, 1 / 3, 2 / 3, 2 / 3, 1)):
        pool = epoch_pool(data, training, epoch)
        easy = data.by_ease[: round(share * count)]
        times = pool.unique(return_counts=True)[1]
        assert len(pool) == count
        assert set(pool.tolist()) == set(easy.tolist())
        assert int(times.max() - times.min()) <= 1
    shuffled = make_training(epochs=5, curriculum={"stages": 3})
    assert torch.equal(epoch_pool(data, shuffled, 0), data.train)
    assert len(epoch_pool(data, make_training(epochs=256, curriculum={"stages": 256}), 0)) == count


def test_patience_counts_in_the_last_stage_alone() -> None:
    told = {"epochs": 12, "patience": 2, "min_delta": 1.0}
    staged = trained(make_training(**told, curriculum={"stages": 3}))
    plain = trained(make_training(**told))
    assert plain.epoch == 3  # one that gains on nothing, two that do not gain
    assert staged.epoch == 8 + 3
    assert staged.stopped


def test_a_run_cut_at_every_chunk_is_the_whole_bit_for_bit(tmp_path: Path) -> None:
    """With all that draws or counts: dropout, noise, parts, an average, stages."""
    training = make_training(**STAGES, accumulate=3, ema_decay=0.9, epochs_per_chunk=2)
    whole = trained(training)
    assert training.epoch_blocks() == [(0, 2), (2, 4), (4, 5)]

    state = code_state(training)
    for first, last in training.epoch_blocks():
        run_epochs(state, code_data(training), first, last, quiet)
        state.save(tmp_path / "state.safetensors")
        state = TrainState.load(tmp_path / "state.safetensors")

    assert digest(state, tmp_path) == digest(whole, tmp_path)
    assert state.history == whole.history


def test_the_seed_decides_what_is_drawn_and_the_global_generator_is_left_alone(
    tmp_path: Path,
) -> None:
    training = make_training(epochs=2)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = digest(trained(training), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)

    assert digest(trained(training), tmp_path) == one
    assert digest(trained(training, seed=3), tmp_path) != one


def test_two_steps_draw_differently() -> None:
    training = make_training(batch_size=256, learning_rate=1e-6, augment=0.0)
    state, data, seen = code_state(training, dropout=0.0), code_data(training), []
    student = state.student
    first = student.get_submodule("encoder.layers.0")
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    student.train()
    run_steps(state, data, 2, quiet)
    noisy = [given for given in seen if len(given) == len(data.train)]
    assert len(noisy) == 2
    assert not torch.equal(noisy[0].sort(0).values, noisy[1].sort(0).values)


def test_a_student_that_starts_as_its_teacher_is_never_made_worse() -> None:
    training = make_training(epochs=2, learning_rate=1.0, scheduler="none", ema_decay=0.0)
    state = TrainState.start(make_student("hierarchical_router"), training, seed=0)
    data = make_data(training, "hierarchical_router")
    run_epochs(state, data, 0, 2, quiet)

    assert max(row["validation_cosine"] for row in state.history) < 1 - 1e-3
    assert state.best_score == pytest.approx(1.0, abs=1e-6)
    wanted = make_any_teacher("lda").targets(some_queries())
    torch.testing.assert_close(state.result()(some_queries()), wanted, rtol=0, atol=1e-5)
