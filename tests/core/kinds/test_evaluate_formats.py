"""Students of LDA teachers and of stored embeddings are judged; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from core.distill.code_evaluation import GIVEN_OTHER
from core.tensors.embeddings import whole
from core.tensors.formats import Pairs
from core.tensors.lda import load_lda, save_lda, without_questions
from tests.core.kinds.test_hold_out import store
from tests.core.kinds.world import CLUSTERING, TRAINING, World, tiny_pairs

ONCE = {"epochs": 1, "batch_size": 64, "warmup_steps": 0}


def names_of(report: Mapping[str, Any]) -> list[str]:
    return [row["name"] for row in report["evaluation"]["rows"]]


def row_of(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    [found] = [row for row in report["evaluation"]["rows"] if row["name"] == name]
    return dict(found)


def lda_of(world: World, pairs: str, **spec: Any) -> str:
    return world.submit(kind="fit_lda", pairs=pairs, temperature=0.1, **spec) + "/model"


def test_a_student_of_an_lda_is_judged_by_the_answers_it_finds(other_world: World) -> None:
    world = other_world
    pairs = world.upload(tiny_pairs())
    model = lda_of(world, pairs)
    distill = world.submit(kind="distill", model=model, training=TRAINING)
    student = f"{distill}/student"
    judged = world.submit(kind="evaluate", pairs=pairs, model=model, student=student, name="J")
    alone = world.submit(kind="evaluate", pairs=pairs, model=model)
    world.run()

    report, without = world.report(judged), world.report(alone)
    assert world.student(distill).config["name"] == "hierarchical_router", "the default"
    assert names_of(report) == ["raw", "mean answer", "ridge", "teacher", "student"]
    assert names_of(without) == ["raw", "mean answer", "ridge", "teacher"]
    assert report["title"] == "J"
    assert (report["evaluation"]["questions"], report["evaluation"]["answers"]) == (24, 4)
    student_row, ridge = row_of(report, "student"), row_of(report, "ridge")
    assert student_row["cosine_mean"] > max(0.99, ridge["cosine_mean"])
    assert row_of(report, "teacher")["cosine_mean"] == pytest.approx(1)
    assert row_of(report, "mean answer")["centred"] == pytest.approx(0)
    assert len(report["history"]) == TRAINING["epochs"]
    assert without["history"] == []

    points = world.metrics(judged)
    for row in report["evaluation"]["rows"]:
        assert points[f"accuracy/{row['name']}"] == [(0, row["accuracy"])]
        assert points[f"cosine/{row['name']}"] == [(0, row["cosine_mean"])]
    timed = {name for name in points if name.startswith("queries_per_second/")}
    assert timed == {f"queries_per_second/{name}" for name in ("ridge", "teacher", "student")}
    artifacts = {"report", "report_md", "hits", "cosines"}
    assert set(world.status(judged).artifacts) == {*artifacts, "loss_curve"}
    assert set(world.status(alone).artifacts) == artifacts
    text = world.path(judged, "report_md").read_text()
    assert "| student |" in text
    assert all(f"- {sentence}" in text for sentence in report["evaluation"]["words"])


def test_an_lda_of_maps_is_judged_among_all_true_targets(other_world: World) -> None:
    world = other_world
    pairs = world.upload(tiny_pairs(rows=60))
    model = lda_of(world, pairs, mode="maps", strength=0.1)
    distill = world.submit(kind="distill", model=model, student={"name": "linear"}, training=ONCE)
    judged = world.submit(kind="evaluate", pairs=pairs, model=model, student=f"{distill}/student")
    world.run()

    report = world.report(judged)
    assert report["evaluation"]["answers"] == 60
    assert row_of(report, "teacher")["accuracy"] == 1
    assert row_of(report, "raw")["accuracy"] == row_of(report, "mean answer")["accuracy"] == 0
    assert names_of(report)[-1] == "student"


def codes_of(world: World) -> str:
    """Embeddings with texts and groups, the inputs their noisy first half; rows held out."""
    pairs, rng = tiny_pairs(), np.random.default_rng(0)
    inputs = pairs.targets[:, :8] + 0.05 * rng.normal(size=(120, 8)).astype(np.float32)
    stored = whole(
        pairs.targets,
        ids=pairs.ids,
        inputs=inputs,
        groups=pairs.groups,
        texts=[f"words about {group} things" for group in pairs.groups or ()],
    )
    return world.submit(kind="hold_out", embeddings=store(world, stored)) + "/model"


def test_codes_of_stored_embeddings_are_judged_beside_pca(other_world: World) -> None:
    world = other_world
    model = codes_of(world)
    nested = {"name": "hierarchical", "levels": [2, 4], "hidden": 16, "decoder": 8}
    curriculum = {"stages": 2, "order": "easy_first"}
    distill = world.submit(
        kind="distill",
        model=model,
        student=nested,
        training={**TRAINING, "curriculum": curriculum},
    )
    judged = world.submit(kind="evaluate", model=model, student=f"{distill}/student")
    alone = world.submit(kind="evaluate", model=model)
    wide = world.submit(kind="distill", model=model, training=ONCE)
    wider = world.submit(kind="evaluate", model=model, student=f"{wide}/student")
    world.run()

    report = world.report(judged)
    rows = ("PCA", "ridge to PCA", "student")
    assert names_of(report) == [f"{name} {dim}-D" for dim in (2, 4) for name in rows]
    found = report["evaluation"]
    assert (found["held_out"], found["among"]) == (24, 120)
    assert 0 < found["teacher_purity"] <= 1
    for row in found["rows"]:
        assert all(0 <= row[name] <= 1 for name in ("recall", "trustworthiness", "purity"))
        assert world.metrics(judged)[f"recall@10/{row['name']}"] == [(0, row["recall"])]
    assert [axis["number"] for axis in found["axes"]] == [0, 1], "of the shortest code"
    said = {word for axis in found["axes"] for word in [*axis["low"], *axis["high"]]}
    assert said <= {"g0", "g1", "g2", "g3"}
    assert GIVEN_OTHER in found["words"]
    assert [row["stage"] for row in report["history"]] == [0, 0, 1]
    assert "queries_per_second/student" in world.metrics(judged)
    pictures = {"recall", "map", "loss_curve"}
    assert set(world.status(judged).artifacts) == {"report", "report_md", *pictures}

    both = ["PCA 5-D", "ridge to PCA 5-D"]
    assert names_of(world.report(alone)) == both, "25 are more than the embeddings have"
    assert world.report(alone)["evaluation"]["axes"] == []
    assert world.student(wide).config["name"] == "hierarchical", "the default"
    wider_rows = ["PCA 5-D", "ridge to PCA 5-D", "student 5-D", "student 25-D"]
    assert names_of(world.report(wider)) == wider_rows


def test_a_student_given_the_embeddings_is_not_told_that_pca_has_more(other_world: World) -> None:
    world = other_world
    model = world.submit(kind="hold_out", pairs=world.upload(tiny_pairs(rows=60)), inputs="targets")
    distill = world.submit(
        kind="distill",
        model=f"{model}/model",
        student={"name": "linear", "dim": 3},
        training={**ONCE, "learning_rate": 1e-6},
    )
    judged = world.submit(kind="evaluate", model=f"{model}/model", student=f"{distill}/student")
    world.run()

    report = world.report(judged)
    pca, student = row_of(report, "PCA 3-D"), row_of(report, "student 3-D")
    assert student["recall"] == pytest.approx(pca["recall"], abs=0.02), "it starts as PCA"
    assert GIVEN_OTHER not in report["evaluation"]["words"]


def made_models(world: World) -> dict[str, str]:
    """One model of each format, pairs, embeddings without held-out rows, a student of each."""
    pairs = world.upload(tiny_pairs())
    rotations = world.submit(kind="fit_federated", pairs=pairs, clustering=CLUSTERING)
    lda, other = lda_of(world, pairs), lda_of(world, pairs, seed=1)
    held = codes_of(world)
    students = {
        name: world.submit(kind="distill", model=model, student=student, training=ONCE)
        for name, model, student in (
            ("of_lda", lda, {"name": "linear"}),
            ("of_held", held, {"name": "linear", "dim": 2}),
            ("narrow", lda, {"name": "mlp", "dim": 3, "hidden": 8}),
        )
    }
    world.run()
    jobs = {"rotations": rotations, "lda": lda, "other": other, "held": held}
    made = {
        name: world.status(job.partition("/")[0]).artifacts["model"] for name, job in jobs.items()
    }
    made |= {name: world.status(job).artifacts["student"] for name, job in students.items()}
    assert made["lda"] != made["other"]
    return {
        **made,
        "pairs": pairs,
        "wide": world.upload(tiny_pairs(dim=20)),
        "wordy": store_lda(world, width=9),
        "stored": store(world, whole(tiny_pairs().targets)),
    }


def store_lda(world: World, *, width: int) -> str:
    """An LDA as one is uploaded: heads alone, answers of another width than the questions."""
    rng = np.random.default_rng(0)
    model = without_questions(
        rng.normal(size=(3, 16)).astype(np.float32),
        answers=rng.normal(size=(3, width)).astype(np.float32),
        cluster_ids=["a", "b", "c"],
        manifest={"temperature": 0.1},
    )
    path = world.folder / "lda.safetensors"
    save_lda(path, model)
    return world.put(path, "lda_model", model.meta())


def evaluations(made: Mapping[str, str]) -> list[tuple[str, str, dict[str, Any]]]:
    """What evaluate refuses: (pointer, what is told, spec)."""
    lda, held, pairs = made["lda"], made["held"], made["pairs"]
    linear = {"model": lda, "pairs": pairs, "student": made["of_lda"]}
    table: list[tuple[str, str, dict[str, Any]]] = [
        ("/pairs", "needed over a model of format 'lda_model'", {"model": lda}),
        ("/pairs", "needed over a model of format 'federated", {"model": made["rotations"]}),
        ("/pairs", "null over a model of format 'embeddings'", {"model": held, "pairs": pairs}),
        ("/model", "no held-out rows.*run hold_out", {"model": made["stored"]}),
        ("/pairs", "20 dimensions, the model 16", {"model": lda, "pairs": made["wide"]}),
        ("/student", "distilled from model", {**linear, "model": made["other"]}),
        ("/student", "8 dimensions, the model 16", {**linear, "student": made["of_held"]}),
        (
            "/student",
            "'mlp' makes codes that have no cosine",
            {**linear, "student": made["narrow"]},
        ),
        ("/pairs", "the model answers with 9 dim", {"model": made["wordy"], "pairs": pairs}),
        ("/teacher/name", "answers over a 'fed", {**linear, "teacher": {"name": "rotational"}}),
        (
            "/teacher/name",
            "allowed for it: checkpoint",
            {"model": held, "teacher": {"name": "lda"}},
        ),
        ("/model", "format 'pairs'", {"model": pairs, "pairs": pairs}),
        ("/student", "format 'lda_model'", {**linear, "student": lda}),
    ]
    return [(pointer, told, {"kind": "evaluate", **spec}) for pointer, told, spec in table]


def trainings(made: Mapping[str, str]) -> list[tuple[str, str, dict[str, Any]]]:
    """What distill refuses of a student and of its loss."""
    lda, held = made["lda"], made["held"]

    def losses(**weights: Any) -> dict[str, Any]:
        return {"training": {**ONCE, "losses": weights}}

    linear = {"model": lda, "student": {"name": "linear"}}
    narrow = {"model": held, "student": {"name": "linear", "dim": 2}}
    plain = {"model": held, "student": {"name": "hierarchical", "decoder": 0}}
    staged = {"training": {"curriculum": {"stages": 2}}}
    no_default = dict.fromkeys(("mse", "cosine", "router_kl"), 0)
    table: list[tuple[str, str, dict[str, Any]]] = [
        ("/teacher/name", "allowed for it: lda", {"model": lda, "teacher": {"name": "rotational"}}),
        (
            "/student/name",
            "allowed: projection_transformer, hier",
            {**linear, "student": {"name": "rotor_product"}},
        ),
        (
            "/student/name",
            "does not learn from models of format 'emb",
            {"model": held, "student": {"name": "hierarchical_router"}},
        ),
        (
            "/student/name",
            "does not learn from models of format 'fed",
            {"model": made["rotations"], "student": {"name": "hierarchical_router"}},
        ),
        (
            "/student/heads",
            "2 slots; the model has 4 heads",
            {"model": lda, "student": {"name": "hierarchical_router", "heads": 2, "levels": 1}},
        ),
        (
            "/student/num_heads",
            "3 does not divide the width 16",
            {"model": lda, "student": {"name": "projection_transformer", "num_heads": 3}},
        ),
        (
            "/student/num_heads",
            "no clusters to tell them by",
            {"model": held, "student": {"name": "projection_transformer", "num_heads": None}},
        ),
        (
            "/student/dim",
            "allowed: 1 to 16, or start 'random'",
            {"model": held, "student": {"name": "linear", "dim": 17}},
        ),
        ("/training/losses/router_kl", "a learnt router", {**linear, **losses(router_kl=0.5)}),
        ("/training/losses/reconstruction", "a decoder", {**plain, **losses(reconstruction=0.5)}),
        ("/training/losses/mse", "the teacher's width", {**narrow, **losses(mse=0.5)}),
        ("/training/losses", "no term weighs anything", {**linear, **losses(**no_default)}),
        (
            "/training/losses/custom/nothing",
            "no such term; allowed: cosine",
            {**linear, **losses(custom={"nothing": 1})},
        ),
        (
            "/training/tau",
            "no term of the loss has a temperature",
            {**linear, "training": {"tau": 2}},
        ),
        ("/training/curriculum", "no term of the loss has a temp", {**linear, **staged}),
        (
            "/training/tau",
            "allowed beside a weight of neighbour_kl, relational_kl",
            {**narrow, "training": {"tau": 2, "losses": {"neighbour_kl": 0, "gram": 1}}},
        ),
        ("/training/augment", "stored answers alone", {**narrow, "training": {"augment": 0.5}}),
        (
            "/training/centroid_replay",
            "stored answers alone",
            {**narrow, "training": {"centroid_replay": 0.5}},
        ),
    ]
    return [(pointer, told, {"kind": "distill", **spec}) for pointer, told, spec in table]


def _sweep(made: Mapping[str, str], student: dict[str, Any], **grid: list[int]) -> dict[str, Any]:
    return {"kind": "sweep", "model": made["rotations"], "students": [student], "grid": grid}


def test_what_does_not_fit_a_format_is_refused_before_it_runs(other_world: World) -> None:
    made = made_models(other_world)
    others: list[tuple[str, str, dict[str, Any]]] = [
        ("/model", "format 'lda_model'", {"kind": "sweep", "model": made["lda"]}),
        ("/model", "format 'embeddings'", {"kind": "sweep", "model": made["held"]}),
        ("/students", "its codes have no cosine", _sweep(made, {"name": "hierarchical"})),
        ("/grid/dim", "answer with 16 dim", _sweep(made, {"name": "linear"}, dim=[16, 4])),
        ("/model", "format 'lda_model'", {"kind": "build_codebook", "model": made["lda"]}),
        ("/model", "format 'embeddings'", {"kind": "export_cache", "model": made["held"]}),
        (
            "/pairs",
            "its own stored inputs alone|8",
            {"kind": "cache_targets", "model": made["held"], "pairs": made["pairs"]},
        ),
        (
            "/pairs",
            "its own stored inputs alone",
            {"kind": "cache_targets", "model": made["stored"], "pairs": made["pairs"]},
        ),
        (
            "/teacher/name",
            "allowed for it: lda",
            {"kind": "cache_targets", "model": made["lda"], "teacher": {"name": "direct"}},
        ),
    ]
    for pointer, told, spec in [*evaluations(made), *trainings(made), *others]:
        assert other_world.refused(told, **spec) == pointer, spec


def test_pairs_of_which_every_query_was_trained_on_are_an_error_in_words(
    other_world: World,
) -> None:
    world, pairs = other_world, tiny_pairs(rows=60)
    model = lda_of(world, world.upload(pairs))
    world.run()
    known = load_lda(world.path(model.partition("/")[0], "model")).train_rows
    part = Pairs([pairs.ids[row] for row in known], pairs.queries[known], pairs.targets[known])

    judged = world.submit(kind="evaluate", pairs=world.upload(part), model=model)
    world.run()

    job = world.job(judged)
    assert job.state == "failed"
    assert job.error is not None
    assert job.error["code"] == "data_invalid"
    assert "trained on every one of these queries" in job.error["message"]
    assert world.status(judged).artifacts == {}
