"""What a training may be told beside its defaults, and that none of it depends on the chunks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from core.distill.batches import Wanted, batch_plan, centroid_batches, epoch_batches
from core.distill.curriculum import Examples, TrainingData, teacher_answers, training_data
from core.distill.schedules import BatchPlan
from core.distill.state import TrainState, trainable
from core.distill.teachers.rotational import RotationalTeacher
from core.distill.training import run_epochs, run_steps
from core.errors import DataInvalid, SpecInvalid
from core.specs.teachers import Rotational
from core.specs.training import Training
from core.tensors import shards
from tests.core.distill._make import (
    make_data,
    make_model,
    make_student,
    make_targets,
    make_teacher,
    make_training,
)
from tests.core.distill.test_training import digest, every_student, quiet, start

EVERYTHING = {
    "epochs": 3,
    "centroid_warmup_epochs": 1,
    "centroid_replay": 0.2,
    "scheduler": "plateau",
    "min_delta": 1.0,
    "warmup_steps": 0,
}


def in_pieces(state: TrainState, data: TrainingData, sizes: list[int], path: Path) -> TrainState:
    """Train to the end, saved and loaded after each piece; the last size is used again."""
    taken = 0
    while not state.stopped:
        size = sizes[min(taken, len(sizes) - 1)]
        run_steps(state, data, size, quiet)
        state.save(path)
        state, taken = TrainState.load(path), taken + 1
    return state


@pytest.mark.parametrize("sizes", [[1], [5, 2], [1000]], ids=str)
@every_student
def test_a_run_cut_anywhere_is_the_uninterrupted_one_bit_for_bit(
    name: str, sizes: list[int], tmp_path: Path
) -> None:
    training, path = make_training(**EVERYTHING), tmp_path / "state.safetensors"
    whole = start(name, training)
    run_epochs(whole, make_data(training), 0, 3, quiet)

    state = in_pieces(start(name, training), make_data(training), sizes, path)

    assert digest(state, tmp_path) == digest(whole, tmp_path)
    assert state.history == whole.history
    assert state.cuts == 1


def test_epochs_do_not_start_inside_one() -> None:
    training = make_training()
    state, data = start("canonical", training), make_data(training)
    run_steps(state, data, 2, quiet)
    with pytest.raises(DataInvalid, match="at epoch 0 and 2 steps, not 0"):
        run_epochs(state, data, 0, 1, quiet)


def test_progress_inside_an_epoch_counts_the_steps_of_the_call() -> None:
    training = make_training()
    state, data, seen = start("canonical", training), make_data(training), []
    steps = batch_plan(data, training).steps
    for _ in range(2):
        run_steps(state, data, steps - 1, lambda *at: seen.append(at))
    assert {total for _, total in seen} == {steps - 1}
    assert [done for done, _ in seen].count(0) >= 2
    assert max(seen) == (steps - 1, steps - 1)
    assert (state.epoch, state.within) == (1, steps - 2)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    shards.save(tmp_path / "old.safetensors", {}, {"format": "train_state", "version": 1})
    with pytest.raises(DataInvalid, match="of version 1; needed 3"):
        TrainState.load(tmp_path / "old.safetensors")


def test_a_plateau_cuts_the_rate_and_a_gain_does_not() -> None:
    flat = make_training(
        epochs=6,
        warmup_steps=0,
        scheduler="plateau",
        plateau_factor=0.1,
        plateau_patience=2,
        min_delta=1.0,
    )
    state, data = start("rotor_product", flat), make_data(flat)
    run_epochs(state, data, 0, 6, quiet)
    rates = [row["learning_rate"] / flat.learning_rate for row in state.history]
    # The first epoch gains on nothing; every two that follow are a plateau.
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01])

    # A longer stretch shows gains, as all that rises here: the rate stays.
    rising = make_training(epochs=3, warmup_steps=0, scheduler="plateau", min_delta=0.0)
    state = start("rotor_product", rising)
    run_epochs(state, data, 0, 3, quiet)
    cosines = [row["validation_cosine"] for row in state.history]
    assert cosines == sorted(cosines)
    assert state.cuts == 0


def rows_of(batch: list[Examples]) -> list[int]:
    return [len(part) for part in batch]


def same(one: list[Examples], other: list[Examples]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.queries, b.queries)
        and torch.equal(a.teacher, b.teacher)
        and a.mixture is not None
        and b.mixture is not None
        and torch.equal(a.mixture.dense(), b.mixture.dense())
        and a.anchored is not None
        and b.anchored is not None
        and torch.equal(a.anchored, b.anchored)
        for a, b in zip(one, other, strict=True)
    )


def epoch_from(data: TrainingData, plan: BatchPlan, first: int) -> list[list[Examples]]:
    generator = torch.Generator().manual_seed(5)
    wanted = Wanted(weights=True, anchored=True, candidates=True)
    found = epoch_batches(
        data,
        plan,
        generator,
        wanted=wanted,
        pool=data.train,
        first=first,
        on_block=lambda: None,
    )
    return list(found)


@settings(max_examples=10, deadline=None)
@given(first=st.integers(0, 5))
def test_an_epoch_begun_late_shows_the_batches_that_were_left(first: int) -> None:
    training = make_training(centroid_replay=0.25)
    data = make_data(training)
    plan = batch_plan(data, training)
    whole, rest = epoch_from(data, plan, 0), epoch_from(data, plan, first)
    assert len(whole) == plan.steps
    assert all(same(a, b) for a, b in zip(whole[first:], rest, strict=True))
    assert not any(same(a, b) for a, b in pairwise(whole))


def test_made_queries_of_several_blocks_do_not_depend_on_where_an_epoch_is_entered() -> None:
    training = make_training(batch_size=1600, augment=0.9875, centroid_replay=0.005)
    data = make_data(training)
    plan = batch_plan(data, training)
    assert (plan.real, plan.made, plan.replayed) == (12, 1580, 8)
    whole, late = epoch_from(data, plan, 0), epoch_from(data, plan, plan.steps - 1)
    assert same(whole[-1], late[0])


def test_a_batch_has_its_shares_and_an_epoch_every_training_query_once() -> None:
    training = make_training(augment=0.25, centroid_replay=0.125)
    data = make_data(training)
    plan = batch_plan(data, training)
    batches = epoch_from(data, plan, 0)
    assert rows_of(batches[0]) == [20, 8, 4]
    shown = torch.cat([batch[0].queries for batch in batches])
    own = data.real.queries[data.train]
    assert torch.equal(shown.sort(dim=0).values, own.sort(dim=0).values)


def test_centroids_are_answered_by_the_teacher_and_shown_once_an_epoch() -> None:
    training = make_training(epochs=2, centroid_warmup_epochs=1, batch_size=3)
    data = make_data(training)
    centroids = torch.from_numpy(make_model().centroids)
    torch.testing.assert_close(data.centroids.queries, centroids)
    torch.testing.assert_close(data.centroids.teacher, make_teacher().targets(centroids))

    plan, generator = batch_plan(data, training), torch.Generator().manual_seed(0)
    batches = list(centroid_batches(data, plan, generator, first=0))

    assert [rows_of(batch) for batch in batches] == [[3], [1]]
    assert plan.steps_before(1) == 2
    shown = torch.cat([batch[0].queries for batch in batches])
    assert torch.equal(shown.sort(dim=0).values, centroids.sort(dim=0).values)


def test_a_cluster_that_is_held_out_has_no_centroid_to_train_on() -> None:
    data = make_data(make_training())
    lone = make_model().cluster_of.copy()
    lone[data.validation.numpy()] = 0
    lone[data.train.numpy()] = 1
    model = replace(make_model(), cluster_of=lone)
    hidden = replace(data, teacher=RotationalTeacher(model, Rotational()))
    assert torch.equal(hidden.centroids.queries, torch.from_numpy(model.centroids[1:2]))


def test_warm_up_epochs_count_neither_for_patience_nor_for_a_plateau() -> None:
    told = {"epochs": 9, "patience": 2, "min_delta": 1.0, "scheduler": "plateau"}
    training = make_training(**told, centroid_warmup_epochs=4, plateau_patience=2)
    state = start("rotor_product", training)
    run_epochs(state, make_data(training), 0, 9, quiet)
    assert state.epoch == 7  # four of centroids, one that gains, two that do not
    assert state.cuts == 1


def stored_alone() -> RotationalTeacher:
    """A teacher as one of stored pairs is: it says that it answers no new query."""
    teacher = RotationalTeacher(make_model(), Rotational())
    teacher.answers_new = False
    return teacher


def test_a_teacher_of_stored_answers_is_asked_nothing_new() -> None:
    training = make_training()
    data = training_data(stored_alone(), make_targets(), training, seed=1)
    plan = batch_plan(data, training)
    assert (plan.real, plan.made, plan.replayed) == (32, 0, 0)
    assert batch_plan(make_data(training), training).made == 8
    state = start("canonical", training)
    run_epochs(state, data, 0, 1, quiet)
    assert state.epoch == 1


@pytest.mark.parametrize(
    "changes", [{"augment": 0.25}, {"centroid_warmup_epochs": 1}, {"centroid_replay": 0.1}]
)
def test_what_needs_new_answers_is_refused_without_them(changes: dict[str, float]) -> None:
    (name,) = changes
    with pytest.raises(SpecInvalid, match=f"training.{name} .*can answer no new query") as caught:
        training_data(stored_alone(), make_targets(), make_training(**changes), seed=1)
    assert caught.value.pointer == f"/training/{name}"


def test_targets_on_the_fly_are_the_cached_ones() -> None:
    told: list[tuple[int, int]] = []
    found = teacher_answers(make_teacher(), lambda *at: told.append(at))
    assert torch.equal(found, make_targets())
    assert told == [(0, len(make_model().queries))]


@every_student
def test_bfloat16_narrows_the_products_alone(name: str, tmp_path: Path) -> None:
    narrow, plain = (make_training(epochs=2, precision=p) for p in ("bfloat16", "float32"))
    state, other = start(name, narrow), start(name, plain)
    run_epochs(state, make_data(narrow), 0, 2, quiet)
    run_epochs(other, make_data(plain), 0, 2, quiet)

    held = [*trainable(state.student).values(), *state.ema.values()]
    assert state.optimizer is not None
    held += [value for kept in state.optimizer.state.values() for value in kept.values()]
    assert {value.dtype for value in held} == {torch.float32}
    assert state.history != other.history
    assert state.best_score == pytest.approx(other.best_score, abs=0.02)
    again = in_pieces(start(name, narrow), make_data(narrow), [3], tmp_path / "s.safetensors")
    assert digest(again, tmp_path) == digest(state, tmp_path)


@pytest.mark.parametrize("name", ["nlerp_geodesic", "rotor_product", "shared_subspace"])
@pytest.mark.parametrize("router", ["exact", "projected"])
def test_bfloat16_judges_what_is_not_trained_too(name: str, router: str) -> None:
    narrow = make_training(epochs=1, precision="bfloat16")
    state = TrainState.start(make_student(name, router=router), narrow, seed=0)
    run_epochs(state, make_data(narrow), 0, 1, quiet)
    assert state.history[0]["validation_cosine"] > 0.9


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"scheduler": "cosine", "plateau_factor": 0.5}, "plateau_factor 0.5 is scheduler"),
        ({"scheduler": "step", "plateau_patience": 3}, "plateau_patience 3 is scheduler"),
        ({"scheduler": "plateau", "plateau_factor": 1.0}, "less than 1"),
        ({"epochs": 3, "centroid_warmup_epochs": 3}, "leave none .*allowed: 0 to 2"),
        ({"augment": 0.5, "centroid_replay": 0.5}, "leave no room"),
        ({"centroid_replay": 0.75}, "augment 0.25 and centroid_replay 0.75"),
        ({"checkpoint_interval": 5, "epochs_per_chunk": 2}, "both say when a chunk ends"),
        ({"checkpoint_interval": 0}, "greater than or equal to 1"),
        ({"precision": "float16"}, "'float32' or 'bfloat16'"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(told: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Training.model_validate(told)
