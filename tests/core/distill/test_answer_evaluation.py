"""How answers are judged: small cases by hand, null rows, warnings in words, the same files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

from core.distill.answer_evaluation import (
    MEAN,
    NULLS,
    RAW,
    RIDGE,
    TEACHER,
    AnswerEvaluation,
    answer_maps,
    answers_of,
    evaluate_answers,
    mean_answer,
)
from core.distill.answer_report import HEADER, markdown, write_answer_report
from core.distill.evaluation import Interval, mapped
from core.distill.retrieval import row_cosines
from core.distill.teachers.lda import LdaTeacher
from core.errors import DataInvalid
from core.tensors.lda import LDA
from core.tensors.shards import Array
from tests.core.distill._lda import drawn
from tests.core.distill._make import CLUSTERS, DIM, make_any_teacher, unit

STUDENT = "student"
HISTORY = [
    {"epoch": e, "loss": 1 / e, "learning_rate": 0.1, "validation_cosine": 0.9} for e in (1, 2, 3)
]


def make_teacher() -> LdaTeacher:
    teacher = make_any_teacher("lda")
    assert isinstance(teacher, LdaTeacher)
    return teacher


def wide_teacher(width: int) -> LdaTeacher:
    """Answers of another width than the questions."""
    model = make_teacher().model
    answers = drawn(CLUSTERS, width, seed=3).numpy()
    wide = LDA(**{**vars(model), "answers": answers, "targets": answers[model.cluster_of]})
    teacher = make_any_teacher("lda", wide)  # type: ignore[arg-type]
    assert isinstance(teacher, LdaTeacher)
    return teacher


def by_hand(**changes: list[list[float]]) -> AnswerEvaluation:
    """Four questions, two answers along the axes; the teacher is right about three."""
    outputs = {
        RAW: [[1, 0], [0, 1], [0, 1], [1, 0]],
        MEAN: [[1, 1]] * 4,
        RIDGE: [[2, 1], [2, 1], [1, 2], [1, 2]],
        TEACHER: [[3, 0.1], [2, 0.2], [0.1, 3], [0.4, 0.1]],
        STUDENT: [[6, 0.2], [4, 0.4], [0.2, 6], [0.1, 0.4]],
        **changes,
    }
    return evaluate_answers(
        {name: np.array(rows, dtype=np.float32) for name, rows in outputs.items()},
        np.array([[1, 0.1], [1, 0], [0, 1], [0.2, 1]], dtype=np.float32),
        np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32),
        mean=np.array([1.0, 1.0]),
        seed=0,
    )


def test_small_case_by_hand() -> None:
    found = by_hand()

    assert [row.name for row in found.rows] == [RAW, MEAN, RIDGE, TEACHER, STUDENT]
    assert (found.questions, found.answers, found.dropped) == (4, 2, 0), "equal answers are one"
    accuracy = {row.name: row.accuracy for row in found.rows}
    del accuracy[MEAN]  # as near to one answer as to the other
    assert accuracy == {RAW: 0.5, RIDGE: 1.0, TEACHER: 0.75, STUDENT: 1.0}
    assert found.row(STUDENT).versus_teacher.difference == 0.25
    assert found.row(RAW).versus_teacher.difference == -0.25
    student = found.row(STUDENT)
    last = (0.4 * 0.1 + 0.1 * 0.4) / (0.4**2 + 0.1**2)  # the same numbers, exchanged
    assert student.cosine_mean == pytest.approx((3 + last) / 4, abs=1e-6)
    assert student.cosine_min == pytest.approx(last, abs=1e-6)
    assert student.cosine_max == pytest.approx(1, abs=1e-6)
    assert student.cosine_std == pytest.approx(np.std([1, 1, 1, last]), abs=1e-6)


def test_the_teacher_is_its_own_measure() -> None:
    row = by_hand().row(TEACHER)
    assert row.versus_teacher == Interval(0, 0, 0)
    assert [row.cosine_mean, row.cosine_min, row.centred] == pytest.approx([1, 1, 1])
    assert row.cosine_std == pytest.approx(0, abs=1e-7)


def test_what_is_centred_is_not_flattered_by_a_shared_mean() -> None:
    """Answers that share nearly all: the opposite of the teacher's has a cosine near one."""
    mean, small = np.full(6, 10.0), drawn(40, 6, seed=0).numpy().astype(np.float64)
    small -= small.mean(axis=0)
    outputs = {MEAN: np.tile(mean, (40, 1)), RIDGE: mean - small, TEACHER: mean + small}

    found = evaluate_answers(outputs, mean + small, mean + small, mean=mean, seed=0)

    assert found.row(RIDGE).cosine_mean > 0.99
    assert found.row(RIDGE).centred == pytest.approx(-1, abs=1e-6)
    assert found.row(MEAN).centred == 0, "it points nowhere, so it agrees with nothing"
    assert found.row(TEACHER).centred == pytest.approx(1)


def test_a_teacher_that_says_one_thing_has_no_centred_cosine() -> None:
    found = by_hand(**{TEACHER: [[1, 1]] * 4})
    assert [row.centred for row in found.rows] == [None] * 5
    assert " - |" in markdown(found, title="T")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_lengths_of_answers_say_nothing_about_accuracy_and_cosine(seed: int, scale: float) -> None:
    shape = (30, 5)
    rng = np.random.default_rng(seed)
    outputs = {name: rng.normal(size=shape) for name in (MEAN, RIDGE, TEACHER, STUDENT)}
    given_all = {"truths": rng.normal(size=shape), "answers": rng.normal(size=(7, 5))}
    mean = rng.normal(size=5)

    plain = evaluate_answers(outputs, **given_all, mean=mean, seed=0)
    longer = {**outputs, STUDENT: scale * outputs[STUDENT]}
    scaled = evaluate_answers(longer, **given_all, mean=mean, seed=0)

    for one, other in zip(plain.rows, scaled.rows, strict=True):
        assert other.accuracy == one.accuracy
        assert other.cosine_mean == pytest.approx(one.cosine_mean)
        assert -1 <= one.cosine_min <= one.cosine_mean <= one.cosine_max <= 1 + 1e-12


def test_an_answer_without_a_direction_is_an_error() -> None:
    with pytest.raises(DataInvalid, match="row 2 holds NaN, infinity or only zeros"):
        by_hand(**{STUDENT: [[1, 0], [1, 0], [0, 0], [0, 1]]})
    with pytest.raises(DataInvalid, match="row 0 holds NaN"):
        by_hand(**{STUDENT: [[float("nan"), 0], [1, 0], [0, 1], [0, 1]]})


def held_out(teacher: LdaTeacher) -> Array:
    rng = np.random.default_rng(1)
    near = teacher.queries[rng.integers(len(teacher.queries), size=60)]
    rows: Array = unit(near + 0.3 * rng.normal(size=near.shape)).astype(np.float32)
    return rows


def test_null_rows_are_what_they_are_called() -> None:
    teacher = make_teacher()
    said = teacher.targets(torch.from_numpy(teacher.queries)).numpy().astype(np.float64)
    asked = held_out(teacher)

    maps = answer_maps(teacher, seed=0)
    found = {name: mapped(function, asked) for name, function in maps.items()}

    assert list(found) == [RAW, MEAN, RIDGE, TEACHER]
    assert list(found)[:3] == list(NULLS)
    assert np.array_equal(found[RAW], asked)
    assert found[MEAN] == pytest.approx(np.tile(said.mean(axis=0), (60, 1)), abs=1e-6)
    assert mean_answer(teacher) == pytest.approx(said.mean(axis=0), abs=1e-12)
    assert found[TEACHER] == pytest.approx(teacher.targets(torch.from_numpy(asked)).numpy())
    # With 128 rows of 12 dimensions without noise the strength that is chosen is a small one.
    plain = LinearRegression().fit(teacher.queries.astype(np.float64), said).predict(asked)
    assert row_cosines(found[RIDGE], plain).min() > 0.999


def test_the_raw_query_is_no_row_where_answers_have_another_width() -> None:
    teacher = wide_teacher(20)
    asked = held_out(teacher)
    maps = answer_maps(teacher, seed=0)
    outputs = {name: mapped(function, asked) for name, function in maps.items()}
    truths = outputs[TEACHER]

    found = evaluate_answers(
        outputs, truths, answers_of(teacher, truths), mean=mean_answer(teacher), seed=0
    )

    assert [row.name for row in found.rows] == [MEAN, RIDGE, TEACHER]
    assert found.row(TEACHER).accuracy == 1
    assert not any("raw query" in sentence for sentence in found.words)


def test_what_is_chosen_among_are_the_heads_answers_or_the_true_targets() -> None:
    teacher, targets = make_teacher(), drawn(9, DIM, seed=5).numpy()
    assert answers_of(teacher, targets) is teacher.model.answers
    maps = np.stack([np.eye(DIM, dtype=np.float32)] * CLUSTERS)
    of_maps = LDA(**{**vars(teacher.model), "answers": None, "maps": maps})
    other = make_any_teacher("lda", of_maps)  # type: ignore[arg-type]
    assert isinstance(other, LdaTeacher)
    assert answers_of(other, targets) is targets


def many(right: dict[str, float], rows: int = 400, **cosines: float) -> AnswerEvaluation:
    """Rows that are right so often, and answers that are so near to the teacher's."""
    angle = {name: np.arccos(cosines.get(name.replace(" ", "_"), 0.9)) for name in right}
    outputs = {}
    teacher = np.zeros((rows, 4))
    teacher[np.arange(rows), (np.arange(rows) >= right[TEACHER] * rows).astype(int)] = 1
    for name, share in right.items():
        vectors = np.zeros((rows, 4))
        vectors[np.arange(rows), (np.arange(rows) >= share * rows).astype(int)] = 1
        vectors *= np.cos(angle[name])
        vectors[:, 2] = np.sin(angle[name])
        outputs[name] = vectors
    outputs[TEACHER] = teacher
    truths = np.tile([1.0, 0, 0, 0], (rows, 1))
    answers = np.eye(4)[:2]
    return evaluate_answers(outputs, truths, answers, mean=np.full(4, 0.25), seed=0)


SAME = {RAW: 0.8, MEAN: 0.8, RIDGE: 0.8, TEACHER: 0.8, STUDENT: 0.8}


def test_a_teacher_that_is_no_better_than_the_raw_query_is_told_in_words() -> None:
    for raw in (0.8, 0.9):
        words = many({**SAME, RAW: raw}).words[0]
        assert words.startswith("Warning: the teacher (80.0% right) is not beyond chance better")
        assert f"({raw:.1%})" in words
    better = many({**SAME, RAW: 0.5}).words[0]
    assert better.startswith("The teacher finds the right answer more often than the raw query")
    assert "80.0% against 50.0%" in better


def test_a_student_behind_a_null_row_is_told_in_words() -> None:
    ahead = many(SAME, student=0.95)
    equal = many(SAME)
    behind = many(SAME, student=0.85)

    assert "Warning" not in ahead.words[-1]
    for found in (equal, behind):
        assert found.words[-1].endswith("Warning: a null row is nearer.")
    assert ahead.words[-1].startswith("student has cosine 0.95000 to the teacher (min 0.9500, std")
    assert "differs by +0.00 points (95 % +0.00 to +0.00)" in ahead.words[-1]


def test_the_null_rows_are_told_in_words_with_and_without_a_student() -> None:
    alone = {name: share for name, share in SAME.items() if name != STUDENT}
    for right in (SAME, alone):
        words = many(right, mean_answer=0.7, ridge=0.8).words
        assert words[1].startswith(
            "One answer for all has cosine 0.7000 to the teacher, a ridge regression 0.8000"
        )
        assert len(words) == 1 + len(right) - 3


def test_remarks_join_the_findings() -> None:
    outputs = {name: np.eye(3) for name in (MEAN, RIDGE, TEACHER)}
    found = evaluate_answers(
        outputs, np.eye(3), np.eye(3), mean=np.ones(3), seed=0, dropped=2, remarks=["Stopped."]
    )
    assert found.words[-1] == "Stopped."
    assert "(2 left out: repeats" in markdown(found, title="T")


def test_files_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths = write_answer_report(
            tmp_path / name, by_hand(), title="T", history=HISTORY, facts={"b": 1, "a": 2}
        )
        written.append({key: path.read_bytes() for key, path in paths.items()})

    assert written[0] == written[1]
    pictures = {"hits_png", "cosines_png", "loss_curve_png"}
    assert set(written[0]) == {"report_json", "report_md", *pictures}
    assert all(written[0][name].startswith(b"\x89PNG") for name in pictures)


def test_the_report_holds_rows_words_and_settings(tmp_path: Path) -> None:
    found = by_hand()
    paths = write_answer_report(tmp_path, found, title="Answers", facts={"model": "abc"})

    told = json.loads(paths["report_json"].read_text())
    text = paths["report_md"].read_text()

    assert "loss_curve_png" not in paths
    assert "loss_curve" not in text
    assert (told["title"], told["facts"], told["history"]) == ("Answers", {"model": "abc"}, [])
    assert [row["name"] for row in told["evaluation"]["rows"]] == [row.name for row in found.rows]
    assert told["evaluation"]["rows"][4]["accuracy"] == 1
    assert text.startswith("# Answers\n")
    assert "4 held-out questions, answered among 2 distinct answers" in text
    for row in found.rows:
        [line] = [line for line in text.splitlines() if line.startswith(f"| {row.name} |")]
        assert line.count("|") == HEADER.count("|")
        assert f"{row.accuracy:.4f}" in line
    for sentence in found.words:
        assert f"- {sentence}\n" in text
    assert '"model": "abc"' in text


def test_what_has_no_centred_cosine_is_json_all_the_same(tmp_path: Path) -> None:
    paths = write_answer_report(tmp_path, by_hand(**{TEACHER: [[1, 1]] * 4}), title="T")
    text = paths["report_json"].read_text()
    assert "NaN" not in text
    assert json.loads(text)["evaluation"]["rows"][0]["centred"] is None
