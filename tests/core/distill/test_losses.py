"""The terms of the loss: zeros, float64 references, invariances, and what each may see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from core.distill.batches import real_rows, shown
from core.distill.losses._base import Batch, Loss, losses, total_loss
from core.distill.losses.cvar import cvar
from core.distill.losses.retrieval_kl import retrieval_kl
from core.distill.state import TrainState
from core.distill.stepping import Stepper
from core.distill.students._layers import Perceptron
from core.tensors.shards import Array
from tests.core.distill._make import make_data, make_student, make_training

every_loss = pytest.mark.parametrize("loss", losses().values(), ids=losses().keys())


def make_batch(*, equal: bool, scale: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(40, 6, generator=generator)
    weights = torch.rand(40, 3, generator=generator).softmax(1)
    weights[0] = torch.tensor([1.0, 0.0, 0.0])
    other = torch.randn(40, 6, generator=generator)
    logits = torch.randn(40, 3, generator=generator)
    log_weights = weights.clamp(min=1e-30).log() if equal else logits.log_softmax(1)
    return Batch(
        student=(scale * teacher if equal else other).requires_grad_(),
        teacher=teacher,
        candidates=torch.randn(9, 6, generator=generator),
        log_weights=log_weights.requires_grad_(),
        weights=weights,
        decoded=(scale * teacher if equal else other).detach().clone().requires_grad_(),
    )


@pytest.mark.parametrize("loss", [losses()[name] for name in losses() if name != "neighbour_kl"])
def test_a_term_is_zero_where_student_and_teacher_agree(loss: Loss) -> None:
    scale = 1.0 if loss.needs_lengths else 3.0
    assert abs(loss.compute(make_batch(equal=True, scale=scale)).item()) < 1e-6


@every_loss
def test_a_term_is_positive_elsewhere_and_gradients_are_finite(loss: Loss) -> None:
    for equal in (False, True):
        batch = make_batch(equal=equal)
        value = loss.compute(batch)
        assert value.shape == ()
        assert equal or value > 0
        value.backward()
        leaf: Tensor | None = batch.log_weights if loss.needs_router else batch.student
        leaf = batch.decoded if loss is losses()["reconstruction"] else leaf
        assert leaf is not None
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_cvar_looks_at_the_worst_twentieth() -> None:
    batch = make_batch(equal=False)
    angles = batch.angles.sort(descending=True).values
    torch.testing.assert_close(cvar(batch), angles[:2].mean())


def test_the_total_is_the_weighted_sum_of_what_applies() -> None:
    batch = make_batch(equal=False)
    weights = {"geodesic": 2.0, "cvar": 0.0, "retrieval_kl": 0.5, "router_kl": 3.0}

    total, terms = total_loss(batch, weights)
    without, fewer = total_loss(Batch(batch.student, batch.teacher, batch.candidates), weights)

    assert set(terms) == {"geodesic", "retrieval_kl", "router_kl"}
    assert total.item() == pytest.approx(sum(weights[name] * float(terms[name]) for name in terms))
    assert set(fewer) == {"geodesic", "retrieval_kl"}
    assert without.item() == pytest.approx(total.item() - 3 * float(terms["router_kl"]), rel=1e-5)


def test_a_term_says_what_it_lacks() -> None:
    batch = make_batch(equal=False)
    with pytest.raises(ValueError, match="needs candidates"):
        retrieval_kl(Batch(batch.student, batch.teacher))


def plain_neighbours(student: Array, teacher: Array, tau: float) -> float:
    """``neighbour_kl`` pair by pair, in float64."""
    rows, width = student.shape
    units = teacher / np.linalg.norm(teacher, axis=1, keepdims=True)
    total = 0.0
    for i in range(rows):
        others = [j for j in range(rows) if j != i]
        wanted = np.exp([units[i] @ units[j] / (0.05 * tau) for j in others])
        apart = [np.sum((student[i] - student[j]) ** 2) for j in others]
        kernel = [(1 + a / max(1, width - 1)) ** (-width / (2 * tau)) for a in apart]
        p, q = wanted / wanted.sum(), np.array(kernel) / np.sum(kernel)
        total += float((p * np.log(p / q)).sum())
    return tau**2 * total / rows


def plain_relations(student: Array, teacher: Array, tau: float) -> float:
    """``relational_kl`` pair by pair, in float64."""
    rows, total = len(student), 0.0
    ours, theirs = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher))
    for i in range(rows):
        others = [j for j in range(rows) if j != i]
        p, q = (np.exp([x[i] @ x[j] / tau for j in others]) for x in (theirs, ours))
        p, q = p / p.sum(), q / q.sum()
        total += float((p * np.log(p / q)).sum())
    return tau**2 * total / rows


REFERENCES: dict[str, Callable[[Array, Array, float], float]] = {
    "neighbour_kl": plain_neighbours,
    "relational_kl": plain_relations,
}
each_tempered = pytest.mark.parametrize("name", REFERENCES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(name: str, student: Tensor, teacher: Tensor, **facts: Any) -> float:
    return losses()[name].compute(Batch(student, teacher, **facts)).item()


@each_tempered
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(2, 8),
    width=st.integers(1, 4),
    tau=st.sampled_from([0.5, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_a_tempered_term_is_its_formula_pair_by_pair(
    name: str, rows: int, width: int, tau: float, seed: int
) -> None:
    student, teacher = normal(rows, width, seed=seed), normal(rows, 9, seed=seed + 1)
    wanted = REFERENCES[name](student.numpy(), teacher.numpy(), tau)
    assert value(name, student, teacher, tau=tau) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    single = value(name, student.float(), teacher.float(), tau=tau)
    assert single == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@each_tempered
def test_turned_codes_and_a_scaled_teacher_are_the_same_to_a_tempered_term(name: str) -> None:
    student, teacher = normal(12, 5), normal(12, 30, seed=1)
    turn = torch.linalg.qr(normal(5, 5, seed=2))[0]
    plain = value(name, student, teacher)
    assert value(name, student @ turn, teacher) == pytest.approx(plain, rel=1e-9)
    assert value(name, student, 7 * teacher) == pytest.approx(plain, rel=1e-9)
    away = {"neighbour_kl": student.float() + 1000, "relational_kl": 1000 * student.float()}
    assert value(name, away[name], teacher.float()) == pytest.approx(plain, rel=1e-3)


@each_tempered
def test_the_gradient_of_a_tempered_term_is_right(name: str) -> None:
    teacher = normal(5, 7, seed=1)

    def term(student: Tensor) -> Tensor:
        return losses()[name].compute(Batch(student, teacher, tau=0.7))

    assert torch.autograd.gradcheck(term, (normal(5, 3).requires_grad_(),))


@each_tempered
def test_tau_hardly_changes_the_gradient_of_a_fresh_student(name: str) -> None:
    queries = normal(64, 48).float() + 1.5 * normal(1, 48, seed=1).float()
    student = Perceptron(dim=48, hidden=32, layers=1, width=5)
    student.fit_input(queries.numpy())
    norms = []
    for tau in (0.5, 1.0, 2.0, 4.0):
        student.zero_grad()
        losses()[name].compute(Batch(student(queries), queries, tau=tau)).backward()
        whole = [each.grad.flatten() for each in student.parameters() if each.grad is not None]
        norms.append(float(torch.cat(whole).norm()))
    assert max(norms) < 2 * min(norms)


RELATIONS = ["gram", "neighbour_kl", "relational_kl", "rkd_angle", "rkd_distance"]


@pytest.mark.parametrize("name", RELATIONS)
def test_nested_codes_are_summed_by_their_weights(name: str) -> None:
    student, teacher = normal(9, 6), normal(9, 20, seed=1)
    found = value(name, student, teacher, levels=((2, 0.7), (6, 0.3)))
    parts = [value(name, student[:, :2], teacher), value(name, student, teacher)]
    assert found == pytest.approx(0.7 * parts[0] + 0.3 * parts[1], rel=1e-9)


@pytest.mark.parametrize("name", RELATIONS)
def test_a_batch_of_one_row_has_no_relations(name: str) -> None:
    student = normal(1, 4).requires_grad_()
    loss = losses()[name].compute(Batch(student, normal(1, 9)))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_means_are_what_torch_says_they_are() -> None:
    student, teacher = 2 * normal(20, 7), normal(20, 7, seed=1)
    cosines = functional.cosine_similarity(student, teacher)
    wanted = {
        "mse_mean": functional.mse_loss(student, teacher),
        "mse": functional.mse_loss(student, teacher) / teacher.square().mean(),
        "cosine": (1 - cosines).mean(),
        "geodesic": cosines.acos().square().mean(),
        "reconstruction": (1 - cosines).mean(),
    }
    for name, each in wanted.items():
        found = value(name, student, teacher, decoded=student)
        assert found == pytest.approx(each.item(), rel=1e-6), name


def test_cosine_keeps_its_digits_where_the_directions_nearly_agree() -> None:
    teacher = functional.normalize(normal(20, 7))
    student = teacher + 1e-5 * normal(20, 7, seed=1)
    wanted = (1 - functional.cosine_similarity(student, teacher)).mean().item()
    assert value("cosine", student.float(), teacher.float()) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(("name", "sees"), [("mse", True), ("mse_mean", True), ("geodesic", False)])
def test_who_sees_lengths_is_given_the_queries_own(name: str, *, sees: bool) -> None:
    """Of a student that keeps lengths, which says vectors of any length while it trains."""
    none = {"geodesic": 0, "cvar": 0, "retrieval_kl": 0, "router_kl": 0}
    training = make_training(losses={**none, name: 1.0})
    student, data = make_student("rotor_product", train_planes=True), make_data(training)
    stepper = Stepper(TrainState.start(student, training, seed=0))
    with torch.no_grad():  # as between a step and the retraction, only more so
        student.get_parameter("bases").mul_(2.0)
    batch = [real_rows(data, data.train, stepper.wanted)]
    raw = student.routed(shown(batch, stepper.wanted)).vectors
    kept = student.with_lengths(raw, batch[0].queries)

    _, terms = stepper.loss(batch)

    bare, right = (value(name, x.detach(), batch[0].teacher) for x in (raw, kept))
    assert terms[name].item() == pytest.approx(right, rel=1e-5)
    assert (abs(bare / right - 1) > 1e-2) is sees


def test_reconstruction_needs_a_decoder() -> None:
    with pytest.raises(ValueError, match="needs decoded vectors"):
        value("reconstruction", normal(4, 2), normal(4, 9))
