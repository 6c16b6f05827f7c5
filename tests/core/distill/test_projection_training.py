from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.projection import evaluate_distillation, train_distillation
from core.errors import DataInvalid, SpecInvalid
from tests.core.distill._lda import DIM, HEADS, WIDTH, drawn, make_lda, make_transformer, questions


def equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_a_student_learns_to_answer_as_its_teacher() -> None:
    lda, student = make_lda(), make_transformer(ff_dim=64)

    history = train_distillation(
        student, lda, questions(240), 60, learning_rate=3e-3, batch_size=64
    )
    found = evaluate_distillation(student, lda, questions(60, seed=9), train_data=questions(240))

    assert list(history) == ["loss", "mse", "cosine"]
    assert {len(values) for values in history.values()} == {60}
    assert history["loss"][-1] < 0.05 * history["loss"][0]
    assert found["mean_cosine"] is not None
    assert found["mean_cosine"] > 0.99
    assert found["centred_cosine"] is not None
    assert found["centred_cosine"] > 0.98
    assert found["ridge_cosine"] is not None
    assert found["ridge_cosine"] < found["mean_cosine"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    students = [make_transformer(dropout=0.1) for _ in range(3)]
    torch.manual_seed(1)
    rows = [train_distillation(students[0], make_lda(), questions(), 3, batch_size=16)]
    torch.manual_seed(2)
    rows.append(train_distillation(students[1], make_lda(), questions(), 3, batch_size=16))
    train_distillation(students[2], make_lda(), questions(), 3, batch_size=16, seed=1)

    assert rows[0] == rows[1]
    assert equal(students[0], students[1])
    assert not equal(students[0], students[2])


def test_the_callers_randomness_is_left_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    student = make_transformer(seed=5)
    torch.manual_seed(5)
    train_distillation(student, make_lda(), questions(), 1)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_a_full_batch_is_document_001s_loss(weight: float) -> None:
    lda, student = make_lda(), make_transformer()
    before = copy.deepcopy(student)
    history = train_distillation(
        student, lda, questions(), 1, weight, batch_size=None, mse_reduction="mean", augment=0
    )

    found, wanted = before(questions()).detach(), lda(questions())
    mse = functional.mse_loss(found, wanted).item()
    cosine = 1 - functional.cosine_similarity(found, wanted).mean().item()
    assert history["mse"] == pytest.approx([mse], rel=1e-6)
    assert history["cosine"] == pytest.approx([cosine], rel=1e-6)
    assert history["loss"] == pytest.approx([(1 - weight) * mse + weight * cosine], rel=1e-6)


class Silent(nn.Module):
    """Answers zeros until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(DIM))

    def forward(self, asked: Tensor) -> Tensor:
        return self.bias.expand(len(asked), -1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_answering_zero_has_an_error_of_one_however_long_the_answers_are(scale: float) -> None:
    lda = make_lda()
    lda.answers.mul_(scale)  # type: ignore[union-attr]
    history = train_distillation(Silent(), lda, questions(), 1, batch_size=None, augment=0)
    assert history["mse"] == pytest.approx([1.0], rel=1e-5)


def test_validation_rows_are_not_trained_on() -> None:
    seen: list[Tensor] = []

    class Watched(Silent):
        def forward(self, asked: Tensor) -> Tensor:
            if self.training:
                seen.append(asked.detach().clone())
            return super().forward(asked)

    rows = torch.cat([questions(30), questions(30)])  # each twice: both copies on one side
    history = train_distillation(
        Watched(), make_lda(), rows, 2, batch_size=7, augment=0, validation_fraction=0.2
    )
    shown = {tuple(row.tolist()) for row in torch.cat(seen)}
    assert len(shown) == 24
    assert sum(map(len, seen)) == 2 * 48
    assert len(history["validation_cosine"]) == 2


def test_made_questions_fill_their_share_and_are_answered_by_the_teacher() -> None:
    sizes: list[int] = []

    class Counting(nn.Module):
        def forward(self, asked: Tensor) -> Tensor:
            sizes.append(len(asked))
            return asked

    train_distillation(make_transformer(), Counting(), questions(40), 1, batch_size=20, augment=0.8)
    assert sizes == [40, *[16] * 10]


def test_lengths_of_made_questions_stay_between_their_parents() -> None:
    lengths: list[Tensor] = []

    class Watched(Silent):
        def forward(self, asked: Tensor) -> Tensor:
            lengths.append(asked.norm(dim=1))
            return super().forward(asked)

    rows = questions(30) * torch.linspace(2, 3, 30)[:, None]
    train_distillation(Watched(), make_lda(), rows, 3, augment=0.9)
    every = torch.cat(lengths)
    assert float(every.min()) > 1.99
    assert float(every.max()) < 3.01


@pytest.mark.parametrize("rows", [1, 2])
def test_few_equal_or_zero_questions_are_no_trouble(rows: int) -> None:
    for given_rows in (questions(rows), questions(1).expand(rows, -1), torch.zeros(rows, DIM)):
        history = train_distillation(make_transformer(), make_lda(), given_rows, 2, augment=0.5)
        assert np.isfinite(history["loss"]).all()


def test_modes_and_teacher_are_left_as_found() -> None:
    lda, student = make_lda(), make_transformer()
    lda.train()
    student.eval()
    student.output_proj.train()
    kept = copy.deepcopy(lda)
    train_distillation(student, lda, questions(), 1)
    evaluate_distillation(student, lda, questions())
    assert lda.training
    assert not student.training
    assert student.output_proj.training
    assert equal(lda, kept)


def test_any_callable_teaches_and_any_width_fits() -> None:
    maps = drawn(DIM, WIDTH, seed=4)
    student = make_transformer(out_dim=WIDTH)
    train_distillation(student, lambda asked: asked @ maps, questions(), 1)
    found = evaluate_distillation(student, lambda asked: asked @ maps, questions())
    assert found["ridge_cosine"] is None


def test_whoever_watches_hears_each_epoch_and_may_stop() -> None:
    heard: list[tuple[int, Mapping[str, float]]] = []

    def watch(epoch: int, row: Mapping[str, float]) -> None:
        heard.append((epoch, row))
        if epoch == 2:
            raise KeyboardInterrupt

    student = make_transformer().eval()
    with pytest.raises(KeyboardInterrupt):
        train_distillation(student, make_lda(), questions(), 9, on_epoch=watch)
    assert [epoch for epoch, _ in heard] == [1, 2]
    assert not student.training


def test_a_student_in_float64_is_trained_in_float64() -> None:
    student = make_transformer().double()
    train_distillation(student, make_lda(), questions(), 1)
    assert evaluate_distillation(student, make_lda(), questions())["mean_cosine"] is not None


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_epochs": 0}, "num_epochs"),
        ({"num_epochs": 2.5}, "num_epochs"),
        ({"cosine_weight": 1.1}, "cosine_weight"),
        ({"cosine_weight": float("nan")}, "cosine_weight"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"augment": -0.1}, "augment"),
        ({"augment": True}, "augment"),
        ({"mse_reduction": "max"}, "mse_reduction"),
        ({"learning_rate": 1e30}, "learning_rate"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(SpecInvalid, match=name) as caught:
        train_distillation(
            make_transformer(), make_lda(), questions(), **{"num_epochs": 5} | changes
        )
    assert caught.value.pointer == f"/{name}"


def holed(value: float) -> Tensor:
    rows = questions()
    rows[7, 3] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (holed(float("nan")), "query_embeddings: row 7 is not finite"),
        (holed(float("inf")), "query_embeddings: row 7"),
        (questions()[0], r"query_embeddings: \[16\]"),
        (questions()[:0], "query_embeddings: shape"),
        (questions().long(), "query_embeddings: .*int64"),
        (questions().numpy(), "query_embeddings: .*ndarray"),
        (drawn(5, 7, seed=0), "width 7"),
    ],
)
def test_questions_that_cannot_be_are_named(rows: Any, words: str) -> None:
    with pytest.raises(DataInvalid, match=words):
        train_distillation(make_transformer(), make_lda(), rows, 1)


def test_widths_of_both_sides_must_agree() -> None:
    with pytest.raises(SpecInvalid, match="16 wide, the teacher's 10"):
        train_distillation(make_transformer(), make_lda(width=WIDTH), questions(), 1)
    with pytest.raises(SpecInvalid, match="16 wide, the teacher's 10"):
        evaluate_distillation(make_transformer(), make_lda(width=WIDTH), questions())


def test_odd_teachers_and_students_are_named() -> None:
    with pytest.raises(DataInvalid, match=r"lda_projection.*not finite"):
        train_distillation(make_transformer(), lambda x: x * float("nan"), questions(), 1)
    with pytest.raises(DataInvalid, match="answers every query with zero"):
        train_distillation(make_transformer(), torch.zeros_like, questions(), 1)
    with pytest.raises(DataInvalid, match=r"must be \[B, m\]"):
        train_distillation(make_transformer(), lambda x: x.sum(1), questions(), 1)
    with pytest.raises(DataInvalid, match="answers to 60 queries"):
        train_distillation(make_transformer(), lambda x: x[:2], questions(), 1)
    with pytest.raises(SpecInvalid, match="no parameter to train"):
        train_distillation(nn.Identity(), make_lda(), questions(), 1)
    with pytest.raises(DataInvalid, match="leaves none to train on"):
        train_distillation(make_transformer(), make_lda(), questions(1), 1, validation_fraction=0.5)


def test_a_perfect_student_is_perfect() -> None:
    lda = make_lda()
    right = torch.arange(60) % HEADS
    found = evaluate_distillation(
        lda, lda, questions(), train_data=questions(90, seed=5), answers=lda.answers,
        answer_of=right,
    )  # fmt: skip
    assert found["mean_cosine"] == found["centred_cosine"] == pytest.approx(1)
    assert found["std_cosine"] == pytest.approx(0, abs=1e-12)
    assert found["student_accuracy"] == found["teacher_accuracy"]
    assert found["raw_accuracy"] is not None


def test_a_student_that_says_the_mean_is_seen_through() -> None:
    lda = make_lda(temperature=3.0)  # nearly uniform weights: answers share a large mean
    mean = lda(questions(90, seed=5)).mean(0)

    def flat(asked: Tensor) -> Tensor:
        return mean + 1e-4 * drawn(len(asked), DIM, seed=8)

    found = evaluate_distillation(flat, lda, questions(), train_data=questions(90, seed=5))
    assert found["mean_cosine"] is not None
    assert found["mean_cosine"] > 0.95
    assert found["mean_vector_cosine"] == pytest.approx(found["mean_cosine"], abs=1e-3)
    assert found["centred_cosine"] is not None
    assert abs(found["centred_cosine"]) < 0.3


def test_one_row_has_no_deviation_and_one_head_no_centre() -> None:
    found = evaluate_distillation(make_transformer(), make_lda(), questions(1))
    assert found["std_cosine"] == 0
    assert found["centred_cosine"] is None
    alone = evaluate_distillation(make_transformer(), make_lda(heads=1), questions())
    assert alone["centred_cosine"] is None
    assert alone["mean_vector_cosine"] == pytest.approx(1)


def test_deviation_is_over_all_rows() -> None:
    student, lda = make_transformer(), make_lda()
    cosines = functional.cosine_similarity(student(questions()), lda(questions())).detach()
    found = evaluate_distillation(student, lda, questions())
    assert found["std_cosine"] == pytest.approx(np.std(cosines.double().numpy()), rel=1e-5)
    assert found["min_cosine"] == pytest.approx(float(cosines.min()), rel=1e-5)
    assert found["max_cosine"] == pytest.approx(float(cosines.max()), rel=1e-5)


def test_raw_questions_of_another_width_choose_nothing() -> None:
    lda = make_lda(width=WIDTH)
    found = evaluate_distillation(
        lda, lda, questions(6), answers=lda.answers, answer_of=torch.arange(6)
    )
    assert found["raw_accuracy"] is None
    assert found["student_accuracy"] == found["teacher_accuracy"] != None  # noqa: E711


@pytest.mark.parametrize(
    "changes",
    [
        {"answer_of": torch.full((60,), HEADS)},
        {"answer_of": torch.full((60,), -1)},
        {"answer_of": torch.zeros(59, dtype=torch.int64)},
        {"answer_of": torch.zeros(60)},
        {"answers": drawn(HEADS, 3, seed=0)},
        {"test_data": torch.full((60, DIM), float("nan"))},
        {"train_data": torch.zeros(0, DIM)},
    ],
)
def test_answers_that_cannot_be_are_refused(changes: dict[str, Tensor]) -> None:
    given_data: dict[str, Any] = {
        "test_data": questions(),
        "answers": drawn(HEADS, DIM, seed=2),
        "answer_of": torch.zeros(60, dtype=torch.int64),
        **changes,
    }
    with pytest.raises(DataInvalid, match=r"answer_of|answers|test_data|train_data"):
        evaluate_distillation(make_transformer(), make_lda(), **given_data)


def test_answers_need_to_know_which_is_right() -> None:
    with pytest.raises(SpecInvalid, match="answer_of"):
        evaluate_distillation(
            make_transformer(), make_lda(), questions(), answers=drawn(HEADS, DIM, seed=2)
        )
