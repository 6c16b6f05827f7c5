from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.distill.losses._base import Batch, Loss, losses, total_loss
from core.distill.losses.cvar import cvar
from core.distill.losses.retrieval_kl import retrieval_kl

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
