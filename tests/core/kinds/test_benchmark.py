"""The benchmark kind: what it measures and writes, and which architectures it cannot build."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from core.errors import SpecInvalid
from core.kinds import benchmark
from core.kinds._base import Input
from tests.core.kinds.world import World, tiny_pairs

SMALL = {"clusters": [9, 3, 9], "batches": [16, 1, 16], "seconds": 0.005}
SIDES = ("lda", "transformer")
ROUTER = {"name": "hierarchical_router", "candidates": 2}


def planned(student: dict[str, Any] | None = None, **spec: Any) -> int:
    meta = {"dim": 16, "rows": 96, "clusters": 4, "mode": "answers", "target_dim": 16}
    asked: dict[str, Any] = {"model": "0" * 64, **spec}
    inputs = {"model": Input("0" * 64, "lda_model", meta)}
    if student is not None:
        asked["student"] = "1" * 64
        inputs["student"] = Input("1" * 64, "student", student)
    [stage] = benchmark.stages(benchmark.Spec.model_validate(asked), inputs)
    assert stage.chunks == 1
    return stage.memory_bytes


def test_teachers_and_students_are_timed_and_told(other_world: World) -> None:
    world = other_world
    fit = world.submit(kind="fit_lda", pairs=world.upload(tiny_pairs()), temperature=0.1)
    distill = world.submit(
        kind="distill",
        model=f"{fit}/model",
        student={"name": "linear"},
        training={"epochs": 1, "warmup_steps": 0},
    )
    made = {"kind": "benchmark", "model": f"{fit}/model", **SMALL}
    own = world.submit(**made, student=f"{distill}/student", name="Mine")
    router = world.submit(**made, architecture=ROUTER)
    world.run()

    for job in (own, router):
        assert world.job(job).state == "succeeded", world.job(job).error
        assert set(world.status(job).artifacts) == {"latency", "latency_md", "crossover"}
        assert world.path(job, "crossover").read_bytes().startswith(b"\x89PNG")
        found = json.loads(world.path(job, "latency").read_text())
        measured = [(row["batch"], row["heads"]) for row in found["measurements"]]
        assert measured == [(16, 3), (16, 9), (1, 3), (1, 9)]
        assert all(row["lda_flops"] == 4 * row["heads"] * 16 for row in found["measurements"])
        assert all(row[side]["p50_ms"] > 0 for row in found["measurements"] for side in SIDES)
        assert [each["batch"] for each in found["crossover"]] == [16, 1]
        assert (found["device"], found["threads"]) == ("cpu", 1)
        curves = {f"ms/{side}/batch {batch}" for side in SIDES for batch in (1, 16)}
        assert set(world.metrics(job)) == curves
        assert [heads for heads, _ in world.metrics(job)["ms/lda/batch 1"]] == [3, 9]

    mine, text = json.loads(world.path(own, "latency").read_text()), _text(world, own)
    assert [(row["batch"], row["heads"]) for row in mine["own"]] == [(16, 4), (1, 4)]
    assert mine["architecture"]["name"] == "projection_transformer"
    assert text.startswith("# Mine\n")
    assert "The trained student beside its own teacher" in text
    assert "batches of 16: teacher (4 heads)" in text
    other = json.loads(world.path(router, "latency").read_text())
    assert other["own"] == []
    assert other["architecture"]["candidates"] == 2
    assert "trained student" not in _text(world, router)
    for job in (own, router):
        assert "For batches of 16: the " in _text(world, job), "advice for this machine"
        assert "For single queries: the " in _text(world, job)
        assert "Memory: the student holds" in _text(world, job)
        assert "Measured on cpu with 1 threads" in _text(world, job)


def _text(world: World, job: str) -> str:
    return world.path(job, "latency_md").read_text()


@pytest.mark.parametrize(
    ("architecture", "clusters", "pointer", "match"),
    [
        (
            {"name": "hierarchical_router", "heads": 3, "levels": 2},
            [4, 9, 10],
            "/architecture/heads",
            r"clusters 10: architecture\.heads 3, levels 2: 9 slots; the model has 10 heads",
        ),
        (
            {"name": "projection_transformer", "num_heads": 3},
            [4],
            "/architecture/num_heads",
            r"clusters 4: architecture\.num_heads 3 does not divide the width 16",
        ),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(
    architecture: dict[str, Any], clusters: list[int], pointer: str, match: str
) -> None:
    with pytest.raises(SpecInvalid, match=match) as caught:
        planned(architecture=architecture, clusters=clusters)
    assert caught.value.pointer == pointer


def test_a_student_of_another_model_is_refused() -> None:
    own = {"model": "0" * 64, "dim": 16, "student": {"name": "mlp"}}
    assert planned(own) > planned()
    with pytest.raises(SpecInvalid, match="of another model") as caught:
        planned({"model": "2" * 64, "dim": 16})
    assert caught.value.pointer == "/student"


def test_memory_grows_with_heads_and_batches() -> None:
    assert planned(clusters=[64]) < planned(clusters=[64, 4096])
    assert planned(batches=[1]) < planned(batches=[1, 4096])


def test_memory_grows_with_the_architecture() -> None:
    wide = {"name": "projection_transformer", "num_heads": 4, "ff_dim": 65_536}
    more = planned(architecture=wide, clusters=[4]) - planned(clusters=[4])
    assert more > 4 * 2 * 2 * 16 * 60_000, "two layers of two matrices each"
    slots = {"name": "hierarchical_router", "heads": 4096, "levels": 1}
    assert planned(architecture=slots, clusters=[4]) > 4 * 4096 * (16 + 16)


def test_a_model_that_is_no_lda_is_refused(other_world: World) -> None:
    pairs = other_world.upload(tiny_pairs())
    held = other_world.submit(kind="hold_out", pairs=pairs)
    for model, told in ((pairs, "'pairs'"), (f"{held}/model", "'embeddings'")):
        assert other_world.refused(f"format {told}", kind="benchmark", model=model) == "/model"


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"clusters": []}, "at least 1 item"),
        ({"clusters": [0]}, "greater than or equal to 1"),
        ({"clusters": [65_537]}, "less than or equal to 65536"),
        ({"batches": [0]}, "greater than or equal to 1"),
        ({"batches": []}, "at least 1 item"),
        ({"seconds": 0}, "greater than 0"),
        ({"architecture": {"name": "rotor_product"}}, "projection_transformer"),
        ({"architecture": {"name": "hierarchical_router", "heads": 1}}, "greater than or equal"),
    ],
)
def test_what_cannot_be_is_refused_at_the_door(spec: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        benchmark.Spec.model_validate({"model": "0" * 64, **spec})
