"""A sweep: what may be asked, how it is cut, and that its student is distill's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import select

from client import fields
from core.db.models import Chunk, MetricPoint
from core.db.session import make_engine, reading, upgrade
from core.errors import SpecInvalid
from core.kinds._base import Input
from core.kinds.sweep import KIND, Spec
from core.specs.base import inputs_of
from tests.conftest import Clock
from tests.core.kinds.world import CLUSTERING, TRAINING, World, tiny_pairs

MODEL = "0" * 64
ROTOR = {"name": "rotor_product", "router_hidden": 16}
EXACT = {"name": "rotor_product", "router": "exact"}
FORMS = ["composed", "bivector_blend"]
COMBINED = {"method": "combined", "n_components": 4}
CANONICAL = {"name": "canonical", "n_components": 4, "heads": 2}


def spec(**fields: Any) -> Spec:
    return Spec.model_validate({"kind": "sweep", "model": MODEL, **fields})


def test_a_grid_changes_the_fields_that_a_student_has() -> None:
    asked = spec(students=[ROTOR, CANONICAL], grid={"layers": [1, 2], "planes": [2, 4, None]})

    assert [variant.name for variant in asked.variants()] == [
        "rotor_product planes=2",
        "rotor_product planes=4",
        "rotor_product planes=null",
        "canonical layers=1",
        "canonical layers=2",
    ]
    students = [variant.student.model_dump() for variant in asked.variants()]
    assert all(one["router_hidden"] == 16 for one in students[:3])
    assert [one["layers"] for one in students[3:]] == [1, 2]


def test_students_may_be_listed_without_a_grid() -> None:
    listed = spec(students=[{**ROTOR, "planes": 2}, EXACT, CANONICAL])

    assert [variant.name for variant in listed.variants()] == [
        "rotor_product router=learnt router_hidden=16 planes=2",
        "rotor_product router=exact router_hidden=null planes=16",
        "canonical",
    ]
    assert [variant.name for variant in spec().variants()] == ["rotor_product"]
    assert Spec.model_validate_json(listed.model_dump_json()) == listed


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"grid": {"layers": [1]}}, r"grid\.layers: no student given has this field; .*planes"),
        ({"grid": {"name": ["canonical"]}}, r"grid\.name: no student"),
        ({"grid": {"planes": [2, 2]}}, "make rotor_product more than once"),
        ({"grid": {"planes": [2, 4, 2]}}, "make rotor_product planes=2 more than once"),
        ({"students": [ROTOR, ROTOR]}, "more than once"),
        ({"grid": {"planes": [0]}}, r"planes=0: planes: Input should be greater"),
        ({"grid": {"planes": ["many"]}}, r'planes="many": planes: '),
        ({"students": [ROTOR], "grid": {"router": ["exact"]}}, "router_hidden 16 is the learnt"),
        ({"grid": {"planes": []}}, "at least 1 item"),
        ({"students": []}, "at least 1 item"),
        ({"grid": {"planes": [*range(1, 34)], "train_planes": [True, False]}}, "make 66 variants"),
        ({"training": {"epochs": 257}}, "257 rounds; allowed: 1 to 256"),
        ({"criterion": "hit@1"}, "'auto', 'aic', 'bic' or 'held_out'"),
    ],
)
def test_what_makes_no_sweep_is_refused_at_the_door(asked: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        spec(**asked)


def planned(**asked: Any) -> dict[str, int]:
    meta = {"clusters": 4, "dim": 16, "rows": 100, "held_out": 20, "temperature": 0.1}
    given = {"model": Input(MODEL, "federated_model", meta)}
    return {stage.name: stage.chunks for stage in KIND.stages(spec(**asked), given)}


def test_every_round_is_a_stage_with_a_chunk_for_each_variant() -> None:
    training = {"epochs": 5, "epochs_per_chunk": 2}

    stages = planned(grid={"planes": [1, 2, 4]}, training=training)

    rounds = {"train_1": 3, "train_2": 3, "train_3": 3}
    assert stages == {"targets": 1, **rounds, "judge": 3, "report": 1}


def test_what_the_width_forbids_or_makes_the_same_is_refused() -> None:
    with pytest.raises(SpecInvalid, match=r"n_components=9: .* width 16 has 8 planes") as caught:
        planned(students=[CANONICAL], grid={"n_components": [4, 9]})
    assert caught.value.pointer == "/grid/n_components"
    same = r"planes=12 is the same student as rotor_product planes=8 at width 16 and \d+ training"
    with pytest.raises(SpecInvalid, match=same) as caught:
        planned(grid={"planes": [4, 8, 12]})
    assert caught.value.pointer == "/grid/planes"
    for student, field, values in (
        ({"name": "shared_subspace"}, "subspace", [16, 32]),
        ({"name": "nlerp_geodesic"}, "router_rank", [16, 17]),
        ({"name": "rotor_product"}, "router_hidden", [None, 256]),
        ({"name": "geodesic_attention"}, "slots", [40_000, 50_000]),
        ({"name": "canonical", "n_components": 8}, "transformer_type", FORMS),
        ({"name": "canonical", "codebook": COMBINED}, "transformer_type", FORMS),
    ):
        with pytest.raises(
            (SpecInvalid, ValidationError), match=r"the same student|more than once"
        ):
            planned(students=[student], grid={field: values})
    overlapping = {"method": "pca", "n_components": 4, "disjoint": False}
    assert planned(
        students=[{"name": "canonical", "codebook": overlapping}], grid={"transformer_type": FORMS}
    )
    brought = [COMBINED | {"planes_per_cluster": count} for count in (8, 16)]
    with pytest.raises(SpecInvalid, match="the same student"):
        planned(students=[{"name": "canonical", "codebook": planes} for planes in brought])
    given, axes = {"name": "canonical"}, {"method": "canonical", "n_components": 8}
    with pytest.raises(SpecInvalid, match="the same student") as caught:
        planned(students=[given | {"n_components": 8}, given | {"codebook": axes}])
    assert caught.value.pointer == "/students"
    with pytest.raises(SpecInvalid, match="does not divide") as caught:
        planned(students=[{**CANONICAL, "heads": 3}])
    assert caught.value.pointer == "/students"


def test_rows_that_the_model_held_out_are_out_of_reach() -> None:
    assert set(inputs_of(Spec)) == {"model", "targets"}


def test_the_command_line_can_say_a_sweep() -> None:
    schema = Spec.model_json_schema()
    said: dict[str, Any] = {"kind": "sweep", "model": MODEL}
    for change in (
        'students=[{"name": "rotor_product"}, {"name": "canonical", "n_components": 8}]',
        "grid.planes=[2, 4, null]",
        "grid.layers=[1, 2]",
        "training.epochs=4",
        "criterion=bic",
    ):
        fields.apply(said, *fields.read_change(change, schema))
    fields.complete(said, schema)

    asked = Spec.model_validate(said)

    assert len(asked.variants()) == 5
    assert asked.training.epochs == 4
    shown = {path.split()[0] for path, _ in fields.settable(schema)}
    assert {"students", "grid"} <= shown


class Ran:
    """A sweep over three variants, one of them stopped at once, and distill of the one taken."""

    def __init__(self, world: World) -> None:
        self.world = world
        pairs = world.upload(tiny_pairs())
        fit = world.submit(kind="fit_federated", pairs=pairs, clustering=CLUSTERING)
        self.model = f"{fit}/model"
        self.sweep = world.submit(
            kind="sweep",
            model=self.model,
            students=[ROTOR, EXACT],
            grid={"planes": [1, 3]},
            training=TRAINING,
        )
        world.run()
        job = world.job(self.sweep)
        assert job.state == "succeeded", job.error
        self.report = json.loads(world.path(self.sweep, "sweep").read_text())


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("sweep")
    engine = make_engine(f"sqlite:///{folder / 'sweep.db'}")
    upgrade(engine)
    return Ran(World(engine, folder, Clock()))


def test_the_report_compares_all_and_takes_one(ran: Ran) -> None:
    found, variants = ran.report["selection"], ran.report["facts"]["variants"]

    names = [line["name"] for line in found["lines"]]
    assert names == list(dict.fromkeys(names))
    assert sorted(names) == sorted(variants)
    assert len(names) == 4
    assert found["chosen"] in names
    assert found["words"][0].startswith(f"Take {found['chosen']}: ")
    assert found["used"] == "held_out", "more parameters than 96 rows"
    exact = [name for name in names if "router=exact" in name]
    assert [variants[name]["epochs"] for name in exact] == [1, 1], "nothing to train"
    assert {variants[name]["epochs"] for name in set(names) - set(exact)} == {3}
    text = ran.world.path(ran.sweep, "sweep_md").read_text()
    assert f"**{found['words'][0]}**" in text
    assert ran.world.path(ran.sweep, "scores").read_bytes().startswith(b"\x89PNG")


def test_the_student_taken_is_the_one_that_distill_trains(ran: Ran) -> None:
    taken = ran.report["facts"]["variants"][ran.report["selection"]["chosen"]]["student"]
    distill = ran.world.submit(kind="distill", model=ran.model, student=taken, training=TRAINING)
    ran.world.run()

    own, other = (ran.world.status(job).artifacts for job in (ran.sweep, distill))

    for name in ("student", "student_pt", "student_onnx", "training"):
        assert own[name] == other[name]


def test_every_variant_has_its_own_curves(ran: Ran) -> None:
    with reading(ran.world.engine) as session:
        rows = session.execute(
            select(MetricPoint.name, MetricPoint.step).where(MetricPoint.job_id == ran.sweep)
        ).all()
    steps: dict[str, list[int]] = {}
    for name, step in rows:
        steps.setdefault(name, []).append(step)

    for line in ran.report["selection"]["lines"]:
        epochs = [1] if "router=exact" in line["name"] else [1, 2, 3]
        assert sorted(steps[f"validation_cosine/{line['name']}"]) == epochs
        assert steps[f"log_score/{line['name']}"] == [0]


def test_a_chunk_is_one_round_of_one_variant(ran: Ran) -> None:
    """So a crash costs no more than that."""
    with reading(ran.world.engine) as session:
        rows = session.execute(
            select(Chunk.stage, Chunk.chained).where(Chunk.job_id == ran.sweep)
        ).all()
    rounds = [stage for stage, _ in rows if stage.startswith("train_")]

    assert sorted(rounds) == ["train_1"] * 4 + ["train_2"] * 4 + ["train_3"] * 4
    assert not any(chained for _, chained in rows)
