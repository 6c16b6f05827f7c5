"""A batch in parts: the gradient of the whole where a term is a mean over rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.distill import relational
from core.distill.batches import Wanted, batch_plan, epoch_batches, parts
from core.distill.curriculum import Examples, TrainingData
from core.distill.state import TrainState, trainable
from core.distill.stepping import Stepper
from core.distill.training import run_steps
from core.specs.training import Training
from tests.core.distill._codes import code_data, code_state
from tests.core.distill._make import make_data, make_student, make_training
from tests.core.distill.test_training import digest, quiet

ALONE = {"geodesic": 0.0, "cvar": 0.0, "retrieval_kl": 0.0, "router_kl": 0.0, "mse": 0.0}


def first_batch(data: TrainingData, training: Training, wanted: Wanted) -> list[Examples]:
    generator = torch.Generator().manual_seed(0)
    plan = batch_plan(data, training)
    pool: dict[str, object] = {"pool": data.train, "first": 0, "on_block": lambda: None}
    return next(epoch_batches(data, plan, generator, wanted=wanted, **pool))  # type: ignore[arg-type]


def gradient(term: str, **told: object) -> tuple[Tensor, float]:
    """Of one step of a linear map; and what the step says of the loss."""
    losses = {**ALONE, "cosine": 0.0, term: 1.0}
    training = make_training(losses=losses, **told)
    data, student = make_data(training), make_student("linear")
    state = TrainState.start(student, training, seed=0)
    run_steps(state, data, 1, quiet)
    found = [
        value.grad.flatten() for value in trainable(student).values() if value.grad is not None
    ]
    return torch.cat(found), float(state.sums["loss"])


@pytest.mark.parametrize(("term", "replay"), [("mse", 0.0), ("cosine", 0.1), ("geodesic", 0.1)])
def test_parts_have_the_gradient_of_the_whole(term: str, replay: float) -> None:
    """Also in parts of unequal length, and in more parts than there are made queries (8 of 32).

    ``mse`` is over the part's mean squared length: exact where lengths are alike, as centroids'
    are not.
    """
    told = {"centroid_replay": replay}
    whole, loss = gradient(term, **told)
    for count in (3, 5, 20, 32):
        found, said = gradient(term, accumulate=count, **told)
        assert float((found - whole).norm() / whole.norm()) < 1e-6
        assert said == pytest.approx(loss, rel=1e-6)


def rows(count: int, start: int) -> Examples:
    at = torch.arange(start, start + count, dtype=torch.float32)[:, None]
    return Examples(at, at, None, at, at.long(), None)


@settings(max_examples=50, deadline=None)
@given(
    real=st.integers(1, 20),
    others=st.lists(st.integers(1, 9), max_size=2),
    count=st.integers(1, 30),
)
def test_every_row_is_in_one_part_and_real_rows_come_first(
    real: int, others: list[int], count: int
) -> None:
    batch = [rows(real, 0), *(rows(more, 100 * n) for n, more in enumerate(others, start=1))]

    cut = parts(batch, count)

    assert len(cut) == min(count, real)
    assert sum(share for _, share in cut) == pytest.approx(1)
    total = sum(len(part) for part in batch)
    for part, share in cut:
        assert share == sum(len(some) for some in part) / total
        assert len(part[0]) > 0
        assert float(part[0].queries.max()) < 100
        assert part[0].candidates is not None
        assert torch.equal(part[0].candidates, part[0].queries)
    shown = torch.cat([some.queries for part, _ in cut for some in part]).flatten().tolist()
    assert sorted(shown) == torch.cat([part.queries for part in batch]).flatten().tolist()


def test_relations_are_those_inside_a_part() -> None:
    """So fewer pairs are compared: what is saved in memory is paid for in what a batch tells."""
    losses = {"neighbour_kl": 0.0, "reconstruction": 0.0, "relational_kl": 1.0}
    training = make_training(losses=losses)
    data = code_data(training)
    state = code_state(training, noise=0.0, dropout=0.0, levels=(5,), level_weights=(1.0,))
    stepper = Stepper(state)
    batch = first_batch(data, training, stepper.wanted)

    found = [(stepper.loss(part)[0], share) for part, share in parts(batch, 4)]

    for (part, _), (loss, _) in zip(parts(batch, 4), found, strict=True):
        codes = state.student(part[0].queries)
        torch.testing.assert_close(loss, relational.relational_kl(codes, part[0].teacher, tau=1.0))
    in_parts = sum(float(loss.detach()) * share for loss, share in found)
    assert in_parts != pytest.approx(float(stepper.loss(batch)[0].detach()), rel=1e-3)


def test_each_part_draws_its_own_noise() -> None:
    training = make_training(batch_size=8, accumulate=2)
    state, seen = code_state(training, dropout=0.0, noise=0.5), []
    first = state.student.get_submodule("encoder.layers.0")
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    stepper, data = Stepper(state), code_data(training)
    state.student.train()
    batch = first_batch(data, training, stepper.wanted)
    same = batch[0].queries[:1].expand(8, -1)
    one = Examples(same, batch[0].teacher, None, None, batch[0].exclude, None)

    stepper.step([one], 1e-3)

    assert [len(given) for given in seen] == [4, 4]
    assert not torch.equal(*seen)


def test_parts_of_a_students_own_draws_come_back_after_a_cut(tmp_path: Path) -> None:
    training = make_training(accumulate=4, epochs=2)
    data, path = code_data(training), tmp_path / "state.safetensors"
    whole, state = code_state(training), code_state(training)
    run_steps(whole, data, 5, quiet)
    run_steps(state, data, 3, quiet)
    state.save(path)
    state = TrainState.load(path)
    run_steps(state, data, 2, quiet)
    assert digest(state, tmp_path) == digest(whole, tmp_path)
