"""Teachers without rotations: an LDA's heads, and stored embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from core.distill.curriculum import training_data
from core.distill.students._base import build_student
from core.distill.teachers._base import TeacherModel
from core.distill.teachers.checkpoint import CheckpointTeacher
from core.distill.teachers.lda import LdaTeacher
from core.distill.training import TrainState, run_epochs
from core.errors import DataInvalid, SpecInvalid
from core.specs.loss_checks import check_losses
from core.specs.plain_students import HierarchicalRouter, Mlp
from core.specs.sizes import Sizes
from core.specs.students import (
    Linear,
    RotorProduct,
    check_learns,
    default_student,
)
from core.specs.teachers import Checkpoint, Direct, Lda, check_reads, default_teacher
from core.specs.training import Training
from tests.core.distill._make import (
    CLUSTERS,
    DIM,
    answers,
    make_any_teacher,
    make_embeddings,
    make_lda,
    make_training,
    some_queries,
)


@pytest.mark.parametrize("name", ["lda", "checkpoint"])
def test_a_teacher_says_the_same_twice_and_knows_its_own_rows(name: str) -> None:
    teacher = make_any_teacher(name)
    said = teacher.answers(teacher.queries)
    assert said.vectors.shape == teacher.truths.shape
    assert torch.equal(said.vectors, teacher.targets(teacher.queries))
    assert teacher.fingerprint() == make_any_teacher(name).fingerprint()
    assert np.array_equal(teacher.own_rows(teacher.queries), np.arange(len(teacher.queries)))
    assert teacher.own_rows(-teacher.queries[:3]).tolist() == [-1] * 3


def test_an_lda_answers_by_its_formula_in_float64() -> None:
    model, queries = make_lda(), some_queries().double()
    assert model.answers is not None
    teacher = LdaTeacher(model, Lda(temperature=0.07, dtype="float64"))
    hats = torch.from_numpy(model.centroids).double()
    hats = hats / hats.norm(dim=1, keepdim=True)
    weights = (queries / queries.norm(dim=1, keepdim=True) @ hats.T / 0.07).softmax(1)
    wanted = weights @ torch.from_numpy(model.answers).double()
    torch.testing.assert_close(teacher.targets(queries), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(teacher.mixture(queries).dense(), weights, rtol=0, atol=1e-12)


def test_what_decides_an_ldas_answers_is_in_its_fingerprint() -> None:
    one = LdaTeacher(make_lda(), Lda()).fingerprint()
    assert one != LdaTeacher(make_lda(), Lda(temperature=0.3)).fingerprint()
    assert one != LdaTeacher(make_lda(), Lda(dtype="float64")).fingerprint()


def test_a_checkpoint_looks_up_held_out_rows_too_and_nothing_else() -> None:
    model = make_embeddings()
    teacher = CheckpointTeacher(model, Checkpoint())
    rows = model.held_out_rows
    found = teacher.targets(model.given[rows])
    torch.testing.assert_close(found, torch.from_numpy(model.embeddings[rows]))
    with pytest.raises(DataInvalid, match="row 0 is not stored"):
        teacher.targets(some_queries())
    with pytest.raises(DataInvalid, match="weighs no clusters"):
        teacher.mixture(some_queries())


def test_without_inputs_a_student_is_given_the_embeddings() -> None:
    teacher = CheckpointTeacher(make_embeddings(inputs=False), Checkpoint())
    assert np.array_equal(teacher.queries, teacher.truths)


def test_each_model_has_its_default_teacher_and_student() -> None:
    for model, teacher, student in (
        ("federated_model", "rotational", "rotor_product"),
        ("lda_model", "lda", "hierarchical_router"),
        ("embeddings", "checkpoint", "hierarchical"),
    ):
        assert default_teacher(model).name == teacher
        assert default_student(model).name == student
        check_reads(default_teacher(model), model)
        check_learns(default_student(model), model)


def test_a_teacher_or_a_student_of_another_model_is_refused_by_name() -> None:
    with pytest.raises(SpecInvalid, match="allowed for it: lda") as caught:
        check_reads(Direct(), "lda_model")
    assert caught.value.pointer == "/teacher/name"
    with pytest.raises(SpecInvalid, match=r"allowed: .*hierarchical_router") as caught:
        check_learns(RotorProduct(), "lda_model")
    assert caught.value.pointer == "/student/name"


@pytest.mark.parametrize(
    ("losses", "match", "pointer"),
    [
        ({"geodesic": 1.0}, "needs an answer of the teacher's width", "/training/losses/geodesic"),
        (
            {"router_kl": 1.0},
            "needs an answer of the teacher's width",
            "/training/losses/router_kl",
        ),
        ({"reconstruction": 0.1}, "needs a decoder", "/training/losses/reconstruction"),
        ({"neighbour_kl": 0.0}, "no term weighs anything", "/training/losses"),
    ],
)
def test_terms_without_anything_to_act_on_are_refused(
    losses: dict[str, float], match: str, pointer: str
) -> None:
    training = Training.model_validate({"losses": losses})
    with pytest.raises(SpecInvalid, match=match) as caught:
        check_losses(training, Linear(dim=3), Sizes(DIM, DIM, 100))
    assert caught.value.pointer == pointer


@pytest.mark.parametrize("told", [{"tau": 2.0}, {"curriculum": {"stages": 2}}])
def test_a_temperature_needs_a_term_that_has_one(told: dict[str, object]) -> None:
    training = Training.model_validate(told)
    with pytest.raises(SpecInvalid, match="no term of the loss has a temperature"):
        check_losses(training, Linear(), Sizes(DIM, DIM, 100))
    check_losses(training, Linear(dim=3), Sizes(DIM, DIM, 100))


def test_made_queries_of_an_lda_have_its_weights_and_no_anchor() -> None:
    teacher: TeacherModel = make_any_teacher("lda")
    data = training_data(teacher, answers(teacher), make_training(), seed=1)
    made = data.made(8, torch.Generator().manual_seed(0), lambda: None, with_anchor=False)
    assert made.anchored is None
    assert made.mixture is not None
    assert made.mixture.dense().shape == (8, CLUSTERS)
    torch.testing.assert_close(made.teacher, teacher.targets(made.queries))
    with pytest.raises(DataInvalid, match="no anchor"):
        _ = data.anchored


@pytest.mark.parametrize(
    ("told", "rows"), [({"batch_size": 2}, 2), ({"batch_size": 8, "accumulate": 3}, 2)]
)
def test_relations_need_three_rows_of_a_part(told: dict[str, int], rows: int) -> None:
    training = Training.model_validate(told)
    with pytest.raises(SpecInvalid, match=f"which are {rows}; allowed: 3 and more") as caught:
        check_losses(training, Linear(dim=3), Sizes(DIM, DIM, 100))
    assert caught.value.pointer == "/training/batch_size"
    check_losses(training, Linear(), Sizes(DIM, DIM, 100))  # compares row by row


def test_an_order_alone_has_no_temperatures() -> None:
    easy = {"order": "easy_first", "stages": 2}
    check_losses(Training.model_validate({"curriculum": easy}), Linear(), Sizes(DIM, DIM, 100))
    warm = Training.model_validate({"curriculum": {**easy, "start_tau": 9.0}})
    with pytest.raises(SpecInvalid, match="no term of the loss has a temperature"):
        check_losses(warm, Linear(), Sizes(DIM, DIM, 100))
    with pytest.raises(ValidationError, match="stages 1 shows all rows"):
        Training.model_validate({"curriculum": {"order": "easy_first", "stages": 1}})


def test_noise_on_queries_that_nobody_answers_is_refused() -> None:
    training = Training.model_validate({"augment_noise": 0.5})
    with pytest.raises(SpecInvalid, match=r"augment_noise 0\.5.*allowed: null or 0"):
        training.check_teacher(answers_new=False)


def test_more_heads_than_slots_are_refused_in_words() -> None:
    for told in ({"levels": 1}, {"heads": 2, "levels": 3}, {}):
        spec = HierarchicalRouter.model_validate(told)
        with pytest.raises(SpecInvalid, match="the model has 70000 heads"):
            spec.check_sizes(Sizes(DIM, DIM, 100, 70_000))


def test_a_training_that_diverges_says_so() -> None:
    teacher = make_any_teacher("checkpoint")
    training = make_training(learning_rate=10.0, warmup_steps=0, scheduler="none", epochs=50)
    data = training_data(teacher, answers(teacher), training, seed=1)
    state = TrainState.start(
        build_student(Mlp(hidden=64, layers=8, dim=4), teacher, 0), training, seed=0
    )
    with pytest.raises(SpecInvalid, match="the training diverged; lower it") as caught:
        run_epochs(state, data, 0, 50, lambda done, total: None)
    assert caught.value.pointer == "/training/learning_rate"
