"""Document 004's functions: their formulas, defaults, printed figures, and what they refuse."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.distill import relational
from core.distill.distillation import (
    combined_distill_loss,
    create_curriculum_schedule,
    curriculum_distill_step,
    distill_loss,
    kl_distill_loss,
)
from core.errors import DataInvalid, SpecInvalid
from core.specs.distillation import CURRICULUM_CONFIG
from tests.core.distill.test_relational import normal

EXTREME = [1e200, 10**400, 1e-310, 9e-7, 1001, math.inf, True]


def test_a_number_of_more_digits_than_python_writes_is_refused() -> None:
    with pytest.raises(SpecInvalid, match="tau a whole number of over 30 digits; allowed"):
        distill_loss(normal(4, 5), normal(4, 5), 10**5000)
    with pytest.raises(DataInvalid, match="a int a whole number of over 30 digits; needed"):
        combined_distill_loss(normal(4, 5), normal(4, 5), 10**5000)


@pytest.mark.parametrize("tau", [1e-6, 1e3])
def test_the_extreme_temperatures_give_finite_losses(tau: float) -> None:
    student, teacher = normal(8, 5).requires_grad_(), normal(8, 5, seed=1)
    for loss in (
        distill_loss(student, teacher, tau, method="relational_kl"),
        relational.neighbour_kl(student, teacher, tau=tau),
        kl_distill_loss(student, teacher, tau),
    ):
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_equal_widths_are_compared_by_their_cosines() -> None:
    student, teacher = normal(7, 5), normal(7, 5, seed=1)
    wanted = (1 - torch.cosine_similarity(student.double(), teacher.double())).mean()

    assert distill_loss(student, teacher).item() == pytest.approx(wanted.item(), rel=1e-6)
    for scale in (1, 3, 0.1):
        assert 0 <= distill_loss(student, scale * student).item() < 1e-13
    assert distill_loss(student, -student).item() == pytest.approx(2)
    assert distill_loss(student, teacher, tau=4.0) == distill_loss(student, teacher, tau=0.5)
    assert distill_loss(student[:1], teacher[:1]).isfinite(), "one row has an angle too"


def test_different_widths_are_compared_by_their_relations() -> None:
    student, teacher = normal(32, 5), normal(32, 1536, seed=1)
    for tau in (0.5, 4.0):
        wanted = relational.relational_kl(student, teacher, tau=tau)
        assert distill_loss(student, teacher, tau).item() == wanted.item()
    assert distill_loss(student, teacher, 0.5) != distill_loss(student, teacher, 4.0)


@pytest.mark.parametrize("method", ["rkd_distance", "rkd_angle", "gram"])
def test_a_method_may_be_asked_for(method: Any) -> None:
    student, teacher = normal(8, 5), normal(8, 5, seed=1)

    wanted = getattr(relational, method)(student, teacher)

    assert distill_loss(student, teacher, method=method).item() == wanted.item()
    asked = distill_loss(student, teacher, method="relational_kl")
    assert asked.item() == relational.relational_kl(student, teacher, tau=1.0).item()


def test_a_loss_of_ones_own_may_be_asked_for() -> None:
    def mine(student_vec: Tensor, teacher_vec: Tensor, **kwargs: float) -> Tensor:
        return kwargs["tau"] * student_vec.sum() + teacher_vec.sum()

    found = distill_loss(torch.ones(2, 3), torch.ones(2, 4), 0.5, method=mine)
    assert found.item() == 11
    loss, tau = curriculum_distill_step(
        torch.ones(2, 3), torch.ones(2, 4), 0, lambda stage: 2.0, 0.5, method=mine
    )
    assert (loss.item(), tau) == (10, 2.0)


@pytest.mark.parametrize("method", ["cosine", "relational_kl", "rkd_distance", "rkd_angle", "gram"])
def test_the_teacher_is_constant(method: Any) -> None:
    student = normal(6, 4).requires_grad_()
    teacher = normal(6, 4, seed=1).requires_grad_()

    distill_loss(student, teacher, method=method).backward()

    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"method": "cosine", "teacher_vec": normal(4, 9)}, DataInvalid, "5 wide beside .* 9"),
        ({"method": "euclid"}, SpecInvalid, "method 'euclid'; allowed: cosine, relational_kl"),
        ({"tau": 0.0}, SpecInvalid, "tau 0.0; allowed: a number, 1e-06 to 1000"),
        *(({"tau": tau}, SpecInvalid, "allowed: a number, 1e-06 to 1000") for tau in EXTREME),
        ({"tau": math.nan}, SpecInvalid, "tau nan"),
        ({"teacher_vec": normal(0, 5), "student_vec": normal(0, 5)}, DataInvalid, "0 rows"),
        ({"teacher_vec": normal(1, 9), "student_vec": normal(1, 5)}, DataInvalid, "at least 2"),
        ({"student_vec": [[1.0]]}, DataInvalid, "student_vec: a list; needed a tensor"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, error: Any, told: str) -> None:
    sound = {"student_vec": normal(4, 5), "teacher_vec": normal(4, 5, seed=1)}
    with pytest.raises(error, match=told):
        distill_loss(**{**sound, **arguments})


def plain_kl(p: Any, q: Any) -> Any:
    return np.where(
        p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0
    ).sum(-1)


def softmax(logits: Tensor, tau: float) -> Any:
    return (logits.double() / tau).softmax(-1).numpy()


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(32, 4), (3, 5, 7), (6,)])
def test_kl_of_logits_is_the_textbook_sum(tau: float, shape: tuple[int, ...]) -> None:
    student, teacher = normal(*shape), normal(*shape, seed=1)
    s, t = softmax(student, tau), softmax(teacher, tau)
    middle = (s + t) / 2
    rows = {
        "forward": plain_kl(t, s),
        "reverse": plain_kl(s, t),
        "jsd": (plain_kl(t, middle) + plain_kl(s, middle)) / 2,
    }
    reductions = {"mean": np.mean, "sum": np.sum, "none": lambda x: x}
    for direction, wanted in rows.items():
        for reduction, reduce in reductions.items():
            found = kl_distill_loss(student, teacher, tau, reduction, direction=direction)  # type: ignore[arg-type]
            np.testing.assert_allclose(found.numpy(), tau**2 * reduce(wanted), rtol=2e-4, atol=1e-6)


def test_the_mean_is_over_rows_and_not_over_classes() -> None:
    student, teacher = normal(32, 100), normal(32, 100, seed=1)
    batchmean = torch.nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean"
    )

    assert kl_distill_loss(student, teacher, tau=2.0).item() == pytest.approx(
        4 * batchmean.item(), rel=1e-5
    )


@given(shift=st.floats(-50, 50), tau=st.floats(0.1, 10))
def test_kl_of_logits_is_zero_where_the_distributions_agree(shift: float, tau: float) -> None:
    logits = normal(4, 6, dtype=torch.float64)
    for direction in ("forward", "reverse", "jsd"):
        found = kl_distill_loss(logits, logits + shift, tau, direction=direction)  # type: ignore[arg-type]
        assert abs(found.item()) < 1e-10


def test_a_class_that_cannot_be_adds_nothing() -> None:
    student, teacher = normal(3, 4), normal(3, 4, seed=1)
    masked = [torch.cat([x, torch.full((3, 1), -torch.inf)], 1) for x in (student, teacher)]
    masked[0].requires_grad_()
    for direction in ("forward", "reverse", "jsd"):
        found = kl_distill_loss(*masked, tau=2.0, direction=direction)  # type: ignore[arg-type]
        wanted = kl_distill_loss(student, teacher, tau=2.0, direction=direction)  # type: ignore[arg-type]
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(found, masked[0])
        assert gradient.isfinite().all()


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_gradients_of_logits_are_right_and_the_teacher_is_constant(direction: Any) -> None:
    student = normal(3, 5, dtype=torch.float64).requires_grad_()
    teacher = normal(3, 5, seed=1, dtype=torch.float64).requires_grad_()

    def loss(given: Tensor) -> Tensor:
        return kl_distill_loss(given, teacher, 1.7, direction=direction)

    assert torch.autograd.gradcheck(loss, (student,))
    loss(student).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"tau": -1}, SpecInvalid, "tau -1; allowed"),
        *(({"tau": tau}, SpecInvalid, "allowed: a number, 1e-06 to 1000") for tau in EXTREME),
        (
            {"reduction": "batchmean"},
            SpecInvalid,
            "reduction 'batchmean'; allowed: mean, sum, none",
        ),
        ({"direction": "back"}, SpecInvalid, "direction 'back'; allowed: forward, reverse, jsd"),
        ({"teacher_logits": normal(4, 6)}, DataInvalid, r"teacher_logits: \[4, 6\] on cpu beside"),
        ({"student_logits": normal(4, 1)}, DataInvalid, r"student_logits: .* \[4, 1\]; needed"),
        ({"student_logits": torch.ones(4, 5, dtype=torch.int32)}, DataInvalid, "torch.int32"),
        ({"student_logits": torch.tensor(1.0)}, DataInvalid, r"shape \[\]"),
        ({"student_logits": None}, DataInvalid, "student_logits: a NoneType"),
    ],
)
def test_bad_logits_are_named(arguments: Any, error: Any, told: str) -> None:
    sound = {"student_logits": normal(4, 5), "teacher_logits": normal(4, 5, seed=1)}
    with pytest.raises(error, match=told):
        kl_distill_loss(**{**sound, **arguments})


def test_the_combination_is_a_weighted_sum_with_both_gradients() -> None:
    student, teacher = normal(16, 5).requires_grad_(), normal(16, 1536, seed=1)
    other = torch.tensor(0.3, requires_grad=True)

    loss = combined_distill_loss(student, teacher, other, alpha=0.7, tau=2.0)
    loss.backward()

    wanted = 0.7 * distill_loss(student, teacher, 2.0).item() + 0.3 * 0.3
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    assert other.grad is not None
    assert other.grad.item() == pytest.approx(0.3)
    assert combined_distill_loss(student, teacher, 0.5, alpha=0).item() == pytest.approx(0.5)
    alone = combined_distill_loss(student, teacher, 0.5, alpha=1)
    assert alone.item() == pytest.approx(distill_loss(student, teacher).item())


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, "0.5", None, True])
def test_what_is_no_weight_is_refused(alpha: Any) -> None:
    with pytest.raises(SpecInvalid, match=r"alpha .*; allowed: a number, 0 to 1"):
        combined_distill_loss(normal(4, 5), normal(4, 9), 0.3, alpha)


OTHERS: list[Any] = [torch.ones(2), torch.tensor(1), None, "0.3", math.nan, True, 10**400]
OTHERS += [torch.tensor(torch.nan), torch.tensor(-torch.inf)]


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_reconstruction_loss_is_refused(other: Any) -> None:
    with pytest.raises(
        DataInvalid, match=r"reconstruction_loss: .*; needed a finite floating scalar"
    ):
        combined_distill_loss(normal(4, 5), normal(4, 9), other, 0.5)
    if other is not None:
        with pytest.raises(DataInvalid, match=r"reconstruction_loss: .*; needed a finite"):
            curriculum_distill_step(
                normal(4, 5), normal(4, 9), 0, lambda stage: 1.0, reconstruction_loss=other
            )


def test_a_curriculum_step_is_the_loss_at_its_stages_temperature() -> None:
    student, teacher = normal(32, 5), normal(32, 1536, seed=1)
    schedule = create_curriculum_schedule(4.0, 0.5, 5)
    for stage, wanted in enumerate([4.0, 3.125, 2.25, 1.375, 0.5]):
        loss, tau = curriculum_distill_step(student, teacher, stage, schedule, alpha=0.7)
        assert tau == wanted
        assert loss.item() == pytest.approx(0.7 * distill_loss(student, teacher, tau).item())
    beside, _ = curriculum_distill_step(student, teacher, 1, schedule, 0.7, torch.tensor(0.3))
    combined = combined_distill_loss(student, teacher, torch.tensor(0.3), 0.7, 3.125)
    assert beside.item() == combined.item()
    _, tau = curriculum_distill_step(student, teacher, 4, CURRICULUM_CONFIG.get_tau_for_stage)
    assert tau == 0.5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stage": 1.0}, "stage 1.0; allowed: a whole number"),
        ({"stage": True}, "stage True; allowed"),
        ({"tau_schedule": (4.0, 0.5)}, "tau_schedule .*; allowed: a function"),
        ({"tau_schedule": lambda stage: -1.0}, "tau -1.0; allowed"),
        ({"alpha": 2}, "alpha 2; allowed"),
    ],
)
def test_a_bad_step_is_named(changes: Any, told: str) -> None:
    sound = {
        "student_vec": normal(4, 5),
        "teacher_vec": normal(4, 9),
        "stage": 0,
        "tau_schedule": create_curriculum_schedule(4.0, 0.5, 5),
    }
    with pytest.raises(SpecInvalid, match=told):
        curriculum_distill_step(**{**sound, **changes})


@pytest.mark.parametrize("kind", ["linear", "exponential", "cosine"])
@given(
    start=st.floats(0.01, 100),
    end=st.floats(0.01, 100),
    stages=st.integers(1, 40),
    stage=st.integers(-100, 100),
)
def test_a_schedule_goes_from_start_to_end_and_never_beyond(
    kind: Any, start: float, end: float, stages: int, stage: int
) -> None:
    schedule = create_curriculum_schedule(start, end, stages, kind)
    taus = [schedule(number) for number in range(stages)]

    assert schedule(stages - 1) == schedule(stages + 7) == end
    if stages > 1:
        assert schedule(0) == schedule(-3) == start
    sign = 1 if end >= start else -1
    steps = [sign * (b - a) for a, b in itertools.pairwise(taus)]
    assert all(step >= -1e-9 for step in steps)
    low, high = sorted((start, end))
    assert low * (1 - 1e-12) <= schedule(stage) <= high * (1 + 1e-12)


def test_printed_temperatures() -> None:
    linear = create_curriculum_schedule(4.0, 0.5, 5, "linear")
    assert [f"{linear(stage):.2f}" for stage in range(5)] == [
        "4.00",
        "3.12",
        "2.25",
        "1.38",
        "0.50",
    ]
    exponential = create_curriculum_schedule(4.0, 0.5, 4, "exponential")
    np.testing.assert_allclose([exponential(stage) for stage in range(4)], [4, 2, 1, 0.5])
    cosine = create_curriculum_schedule(4.0, 0.5, 5, "cosine")
    wanted = [0.5 + 3.5 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)]
    np.testing.assert_allclose([cosine(stage) for stage in range(5)], wanted)
    assert create_curriculum_schedule(4.0, 0.5, 1)(0) == 0.5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0, 0.5, 5), "start_tau 0; allowed: a number, 1e-06 to 1000"),
        ((1e-300, 1e300, 5, "exponential"), "start_tau 1e-300; allowed"),
        ((4.0, 10**400, 5), "end_tau a whole number of over 30 digits; allowed"),
        ((4.0, math.nan, 5), "end_tau nan"),
        ((4.0, "x", 5), "end_tau 'x'"),
        ((4.0, 0.5, 0), "num_stages 0; allowed: a whole number from 1"),
        ((4.0, 0.5, 2.0), "num_stages 2.0"),
        ((4.0, 0.5, 5, "step"), "schedule_type 'step'; allowed: linear, exponential, cosine"),
    ],
)
def test_a_bad_schedule_is_named(arguments: Any, told: str) -> None:
    with pytest.raises(SpecInvalid, match=told):
        create_curriculum_schedule(*arguments)


def test_schedule_and_configuration_need_no_torch() -> None:
    imports = "core.specs.schedules, core.specs.distillation"
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
