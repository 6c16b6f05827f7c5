from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.distill import evaluation as judged
from core.distill.evaluation import (
    GLOBAL,
    MEAN,
    RAW,
    TEACHER,
    Evaluation,
    baselines,
    evaluate,
    held_out,
    how_split,
    mean_direction,
    student_vectors,
)
from core.distill.report import write_report
from core.distill.retrieval import Index, row_cosines
from core.errors import DataInvalid, SpecInvalid
from core.kinds import evaluate as judging
from core.kinds._base import Input
from core.tensors.formats import Pairs
from core.tensors.shards import Array
from tests.core.distill._make import make_model, make_pairs, make_student, make_teacher, unit


def make_outputs() -> tuple[dict[str, Array], Array]:
    rows, _ = held_out(make_pairs(), make_model())
    queries = make_pairs().queries[rows]
    outputs = baselines(make_teacher(), queries)
    outputs["student"] = student_vectors(make_student("rotor_product"), queries)
    return outputs, rows


def make_evaluation() -> Evaluation:
    outputs, rows = make_outputs()
    return evaluate(outputs, make_pairs().targets, rows, seed=0)


def test_the_rows_stand_in_order_and_the_teacher_is_its_own_measure() -> None:
    found = make_evaluation()
    assert [row.name for row in found.rows] == [
        "raw",
        "mean target",
        "global rotation",
        "top-1 W",
        "nlerp",
        "exact teacher",
        "student",
    ]
    teacher = found.row("exact teacher")
    assert teacher.cosine_min == pytest.approx(1.0)
    assert teacher.overlap == teacher.gap_closed == 1.0
    assert teacher.versus_teacher[1] == judged.Interval(0, 0, 0)
    assert found.row("global rotation").gap_closed == 0.0
    assert all(row.norm_drift < 1e-6 for row in found.rows)


def test_hits_are_a_plain_search() -> None:
    outputs, rows = make_outputs()
    targets = make_pairs().targets
    order = np.argsort(-outputs["exact teacher"] @ targets.T, axis=1)
    place = (order == rows[:, None]).argmax(axis=1)

    found = make_evaluation().row("exact teacher")

    for k, share in found.hits.items():
        assert share == pytest.approx((place < k).mean())


def test_the_same_evaluation_twice_is_the_same() -> None:
    assert make_evaluation() == make_evaluation()


def test_an_interval_holds_its_difference_and_a_sure_win_excludes_zero() -> None:
    for row in make_evaluation().rows:
        for interval in (*row.versus_raw.values(), *row.versus_teacher.values()):
            assert interval.low <= interval.difference <= interval.high
    gain = make_evaluation().row("exact teacher").versus_raw[1]
    assert gain.low > 0


def test_the_interval_is_the_bootstrap_of_whole_queries() -> None:
    wins = np.random.default_rng(1).choice([-1, 0, 1], size=400, p=[0.1, 0.7, 0.2])
    picks = np.random.default_rng(2).integers(400, size=(4000, 400))
    low, high = np.percentile(wins[picks].mean(axis=1), [2.5, 97.5])

    found = judged.paired_interval(wins, seed=0)

    assert found.difference == wins.mean()
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    assert found == judged.paired_interval(np.sort(wins), seed=0)


def test_the_interval_takes_no_memory_per_draw() -> None:
    tracemalloc.start()
    judged.paired_interval(np.ones(200_000, dtype=np.int64), seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_teacher_against_one_rotation_is_always_said() -> None:
    outputs, rows = make_outputs()
    targets = make_pairs().targets
    said = {}
    for name, teacher, one in (
        ("equal", outputs["raw"], outputs["raw"]),
        ("perfect", outputs["raw"], targets[rows]),
        ("useless", targets[rows], outputs["raw"]),
    ):
        changed = {**outputs, "exact teacher": teacher, "global rotation": one}
        found = evaluate(changed, targets, rows, seed=0)
        said[name] = next(words for words in found.words if "one global rotation" in words)
        gain = found.row("exact teacher").versus_global[1]
        assert {"equal": gain.low == 0, "perfect": gain.high < 0, "useless": gain.low > 0}[name]
    assert said["equal"].startswith("The teacher finds as much as one global rotation: +0.00")
    assert said["perfect"].startswith("Warning: one global rotation finds more")
    assert said["useless"].startswith("The teacher beats one global rotation by")


def test_a_student_of_another_model_is_refused() -> None:
    spec = judging.Spec.model_validate(judging.KIND.example)
    facts = {"dim": 12, "pairs": None, "held_out": 3, "rows": 5, "clusters": 2}
    inputs = {
        "pairs": Input(spec.pairs, "pairs", facts),
        "model": Input(spec.model, "federated_model", facts),
        "student": Input(str(spec.student), "student", {"dim": 12, "model": "9" * 64}),
    }
    with pytest.raises(SpecInvalid, match="distilled from model 999") as caught:
        judging.stages(spec, inputs)
    assert caught.value.pointer == "/student"
    told = {"dim": 12, "model": spec.model, "student": {"name": "rotor_product"}}
    own = Input(str(spec.student), "student", told)
    assert len(judging.stages(spec, {**inputs, "student": own})) == 3


def test_remarks_join_the_findings() -> None:
    outputs, rows = make_outputs()
    found = evaluate(outputs, make_pairs().targets, rows, seed=0, remarks=["An edge was chosen."])
    assert found.words[-1] == "An edge was chosen."


def test_held_out_twins_are_judged_once() -> None:
    pairs, model = make_pairs(), make_model()
    first, second = model.held_out_rows[:2]
    queries = pairs.queries.astype(np.float64)
    queries[first, 0] = 0.0
    queries[second] = queries[first] * (1 + 1e-12)
    queries[second, 0] = -0.0
    assert held_out(Pairs(pairs.ids, queries, pairs.targets), model)[1] == 1


def test_equal_targets_count_as_one() -> None:
    targets = np.array([[1.0, 0], [0, 1], [1, 0]])
    index = Index(targets)
    assert len(index.targets) == 2
    assert index.ranks(targets, np.arange(3)).tolist() == [0, 0, 0]


def test_the_log_score_prefers_the_nearer_answer() -> None:
    targets = unit(np.random.default_rng(0).normal(size=(20, 5)))
    index, rows = Index(targets), np.arange(20)
    noise = np.random.default_rng(1).normal(size=(20, 5))
    scores = [index.log_score(targets + size * noise, rows) for size in (0.0, 0.2, 1.0)]
    assert 0 > scores[0] > scores[1] > scores[2]
    assert index.cosine(targets, rows) == pytest.approx(1.0)


def test_repeated_held_out_queries_are_judged_once() -> None:
    pairs, model = make_pairs(), make_model()
    queries = pairs.queries.copy()
    queries[model.held_out_rows[3]] = queries[model.held_out_rows[0]]
    twice = Pairs(pairs.ids, queries, pairs.targets, pairs.groups)

    rows, dropped = held_out(twice, model)

    assert dropped == 1
    assert rows.tolist() == [r for i, r in enumerate(model.held_out_rows.tolist()) if i != 3]


def test_a_model_that_held_nothing_out_cannot_be_judged() -> None:
    pairs, model = make_pairs(), make_model()
    with pytest.raises(DataInvalid, match="held_out_rows: empty"):
        held_out(pairs, replace(model, held_out_rows=np.zeros(0, np.int64)))
    with pytest.raises(DataInvalid, match="names row 500"):
        held_out(pairs, replace(model, held_out_rows=np.array([500])))


def test_a_teacher_that_does_not_beat_raw_is_called_so_in_words() -> None:
    outputs, rows = make_outputs()
    outputs["raw"] = make_pairs().targets[rows]

    found = evaluate(outputs, make_pairs().targets, rows, seed=0)

    assert any("does not beat the raw queries" in sentence for sentence in found.words)
    assert "The teacher beats the raw queries" in make_evaluation().words[0]


def test_baselines_are_what_they_are_called() -> None:
    outputs, rows = make_outputs()
    queries, model = make_pairs().queries[rows], make_model()
    best = make_teacher().mixture(queries).dense().argmax(1).numpy()
    top1 = np.einsum("qi,qij->qj", queries, model.rotations[best])
    assert np.array_equal(outputs["raw"], queries)
    assert row_cosines(outputs["global rotation"], queries @ model.anchor).min() > 1 - 1e-6
    assert np.abs(outputs["top-1 W"] - top1).max() < 1e-6
    assert row_cosines(outputs["nlerp"], outputs["exact teacher"]).min() > 0.999
    identity = baselines(make_teacher(), queries, anchor=np.eye(queries.shape[1]))
    assert np.array_equal(identity["global rotation"], queries)


def test_reports_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    history = [
        {"epoch": e, "loss": 1 / e, "learning_rate": 0.1, "validation_cosine": 0.9}
        for e in (1, 2, 3)
    ]
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths = write_report(
            tmp_path / name, make_evaluation(), title="T", history=history, facts={"b": 1, "a": 2}
        )
        written.append({key: path.read_bytes() for key, path in paths.items()})

    assert written[0] == written[1]
    pictures = {"hits_png", "cosines_png", "loss_curve_png"}
    assert set(written[0]) == {"report_json", "report_md", *pictures}
    assert written[0]["hits_png"].startswith(b"\x89PNG")
    parsed = json.loads(written[0]["report_json"])
    assert parsed["evaluation"]["rows"][0]["hits"].keys() == {"1", "5", "10"}
    text = written[0]["report_md"].decode()
    assert "| exact teacher |" in text
    assert make_evaluation().words[0] in text


def test_throughput_is_measured() -> None:
    speed = judged.throughput(make_student("rotor_product"), torch.ones(8, 12), seconds=0.01)
    assert speed > 0


def test_a_constant_answer_has_a_cosine_and_finds_nothing() -> None:
    """The null row: what of a cosine is owed to the mean all targets share."""
    row = make_evaluation().row(MEAN)
    pairs = make_pairs()
    units = pairs.targets / np.linalg.norm(pairs.targets, axis=1, keepdims=True)
    assert row.hits[1] <= 2 / len(pairs.targets) * 10
    assert row.norm_drift < 1e-6
    direction = mean_direction(pairs.targets)
    assert (units @ direction).mean() == pytest.approx(np.linalg.norm(units.mean(axis=0)), abs=1e-5)
    opposite = np.concatenate([units, -units])
    assert np.array_equal(mean_direction(opposite), units[0].astype(np.float32))


def test_the_gap_to_the_raw_query_is_closed_from_zero_to_one() -> None:
    found = make_evaluation()
    assert found.row(RAW).gap_closed_raw == pytest.approx(0)
    assert found.row(TEACHER).gap_closed_raw == pytest.approx(1)
    shares = [found.row(name).gap_closed_raw for name in (GLOBAL, "student")]
    start = found.row(RAW).cosine_mean
    for name, share in zip((GLOBAL, "student"), shares, strict=True):
        assert share == pytest.approx((found.row(name).cosine_mean - start) / (1 - start))


def test_a_split_by_cluster_is_told() -> None:
    assert how_split({"split": "query"}) == how_split({}) == []
    assert "whole clusters" in how_split({"split": "cluster"})[0]
