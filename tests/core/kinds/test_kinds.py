"""What every kind owes: an honest example, the outputs it promises, and the same bytes twice."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from core.artifacts.store import Blob, LocalStore
from core.db.session import reading, transaction
from core.distill.export import load_student
from core.errors import SpecInvalid
from core.jobs import control, lineage
from core.kinds import _teacher, _training
from core.kinds._base import kinds
from core.tensors.formats import Pairs
from tests.conftest import make_runner
from tests.core.kinds.world import CLUSTERING, TRAINING, World, tiny_pairs
from tests.life import PROJECT, release


@pytest.mark.parametrize("name", sorted(kinds()))
def test_the_example_is_valid_and_the_spec_is_closed(name: str) -> None:
    kind = kinds()[name]

    spec = kind.spec.model_validate(kind.example)

    assert spec.kind == name
    assert kind.summary.endswith(".")
    with pytest.raises(ValidationError):
        kind.spec.model_validate({**kind.example, "unheard_of": 1})
    with pytest.raises(ValidationError):
        spec.seed = 3  # type: ignore[misc]


def test_every_kind_makes_what_it_promises(world: World) -> None:
    jobs = world.chain(world.upload(tiny_pairs())) | world.language_chain()
    assert set(jobs) == set(kinds()), "a new kind joins one of the chains"
    waiting = world.status(jobs["evaluate"])
    assert waiting.waits_for is not None
    assert jobs["distill"] in waiting.waits_for

    world.run()

    promised: dict[str, dict[str, str]] = {name: {} for name in jobs}
    for job_id in [*jobs.values(), *world.others]:
        assert world.job(job_id).state == "succeeded", world.job(job_id).error
        with reading(world.engine) as session:
            made = lineage.outputs_of(session, job_id, role="artifact")
        promised[world.job(job_id).kind] |= {each.name: found.format for each, found in made}
        assert world.status(job_id).progress.fraction == 1
    assert promised == {name: dict(kinds()[name].outputs) for name in jobs}
    assert not list(world.runner.scratch.iterdir())


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)  # the other has SQLite
def test_every_chunk_gives_the_same_bytes_elsewhere_and_again(
    world: World, other_world: World
) -> None:
    other_world.keep = "all"
    for one in (world, other_world):
        one.chain(one.upload(tiny_pairs()))
        one.language_chain()
    world.run()

    discarded = _run_every_chunk_twice(other_world)

    files = other_world.files()
    assert untimed(world.files()).items() <= untimed(files).items()
    kept = set(untimed(files).values())
    assert kept <= discarded
    timed = [kind for kind in kinds().values() if kind.timed]
    assert len(discarded - kept) == sum(len(kind.outputs) for kind in timed)


def untimed(files: dict[Any, str]) -> dict[Any, str]:
    """Leave out files that say how long things took."""
    return {place: sha for place, sha in files.items() if not kinds()[place[0]].timed}


class Stolen(LocalStore):
    """A store whose user loses the lease of a chunk as soon as the chunk has made something."""

    def __init__(self, world: World) -> None:
        super().__init__(world.store.root)
        self.made: set[str] = set()
        self.stolen = False
        self._world = world

    def put(self, path: Path) -> Blob:
        blob = super().put(path)
        self.made.add(blob.sha256)
        self.stolen = True
        self._world.clock.tick(seconds=31)
        release(self._world.engine, self._world.clock)
        return blob


def _run_every_chunk_twice(world: World) -> set[str]:
    """Run each chunk, lose its lease before the write, run it again; return what was discarded."""
    store = Stolen(world)
    first = make_runner(world.engine, store, world.clock, world.folder, "slow")
    while first.run_one():
        _forget()
        if store.stolen:  # a chunk that found all it makes in the cache stores nothing, and is done
            world.runner.run_one()
        _forget()
        store.stolen = False
    return store.made


def _forget() -> None:
    """Leave nothing in memory, as in a process of its own."""
    _teacher._kept.clear()
    _training._kept.clear()


def test_the_same_work_is_found_again_across_jobs(world: World) -> None:
    pairs = world.upload(tiny_pairs())
    first = world.chain(pairs)
    world.run()
    second = world.chain(pairs)
    world.run()

    assert world.job(first["cache_targets"]).cache_hits == 0
    again = world.job(second["cache_targets"])
    assert again.cache_hits == 3, "one bivector block and two target blocks"
    made = [world.status(jobs["cache_targets"]).artifacts for jobs in (first, second)]
    assert made[0] == made[1]


def test_a_lost_blob_is_computed_again(world: World) -> None:
    pairs = world.upload(tiny_pairs())
    first = world.chain(pairs)
    world.run()
    wanted = world.status(first["cache_targets"]).artifacts
    with reading(world.engine) as session:
        made = lineage.outputs_of(session, first["cache_targets"], role="checkpoint")
    for output, _ in made:
        world.store.delete(output.sha256)

    second = world.chain(pairs)
    world.run()

    assert world.status(second["cache_targets"]).artifacts == wanted
    assert world.status(second["distill"]).artifacts == world.status(first["distill"]).artifacts


def test_targets_may_be_left_out_and_change_nothing(other_world: World) -> None:
    world = other_world
    jobs = world.chain(world.upload(tiny_pairs()))
    alone = world.submit(
        kind="distill",
        model=f"{jobs['fit_federated']}/model",
        student={"name": "rotor_product", "router_hidden": 16},
        training=TRAINING,
    )
    world.run()

    assert world.job(alone).state == "succeeded"
    assert world.status(alone).artifacts == world.status(jobs["distill"]).artifacts


@pytest.mark.parametrize(
    "student",
    [
        {"name": "canonical", "n_components": 4, "layers": 1, "heads": 2},
        {
            "name": "canonical",
            "codebook": {"method": "pca", "n_components": 4, "disjoint": False},
            "transformer_type": "bivector_blend",
            "bias": "angle",
        },
        {"name": "rotor_product", "router": "exact", "planes": 3},
        {"name": "rotor_product", "router": "exact", "train_planes": False},
        {"name": "nlerp_geodesic", "router": "projected", "correction_hidden": 4},
        {"name": "shared_subspace", "router": "learnt", "router_hidden": 16, "subspace": 4},
        {"name": "geodesic_attention", "slots": 16, "hidden": 16},
    ],
)
def test_every_student_goes_the_whole_way(other_world: World, student: dict[str, Any]) -> None:
    jobs = other_world.chain(other_world.upload(tiny_pairs()), **student)
    other_world.run()

    assert other_world.job(jobs["evaluate"]).state == "succeeded", other_world.job(
        jobs["distill"]
    ).error
    link = other_world.folder / "student.pt"
    link.symlink_to(other_world.path(jobs["distill"], "student_pt"))
    assert load_student(link).config["name"] == student["name"]


@pytest.mark.parametrize(
    "clustering",
    [
        {"method": "mst", "max_clusters": 4, "min_cluster_size": 5},
        {"method": "groups"},
        {"method": "kmeans", "max_clusters": 50, "min_cluster_size": 10},
    ],
)
def test_every_clustering_fits(other_world: World, clustering: dict[str, Any]) -> None:
    pairs = other_world.upload(tiny_pairs())
    job_id = other_world.submit(
        kind="fit_federated", pairs=pairs, clustering=clustering, strength=1.0, temperature=0.1
    )
    other_world.run()

    assert other_world.job(job_id).state == "succeeded", other_world.job(job_id).error


def test_what_cannot_work_is_refused_before_it_runs(other_world: World) -> None:
    world = other_world
    pairs = world.upload(tiny_pairs())
    jobs = world.chain(pairs)
    world.run()
    model = world.status(jobs["fit_federated"]).artifacts["model"]
    targets = world.status(jobs["cache_targets"]).artifacts["targets"]
    student = world.status(jobs["distill"]).artifacts["student"]
    wide = world.upload(tiny_pairs(dim=20))
    nameless = world.upload(Pairs(**{**vars(tiny_pairs(rows=100)), "groups": None}))
    other_fit = world.submit(kind="fit_federated", pairs=pairs, clustering=CLUSTERING, seed=1)
    world.run()
    other = world.status(other_fit).artifacts["model"]

    table: list[tuple[str, str, Mapping[str, Any]]] = [
        ("/pairs", "no artifact", {"kind": "fit_federated", "pairs": "f" * 64}),
        ("/pairs", "format 'federated_model'", {"kind": "fit_federated", "pairs": model}),
        ("/pairs", "no job", {"kind": "fit_federated", "pairs": f"job_{'0' * 26}/model"}),
        (
            "/model",
            "makes no 'student'",
            {"kind": "cache_targets", "model": f"{jobs['echo']}/student"},
        ),
        ("/pairs", "20 dimensions", {"kind": "cache_targets", "model": model, "pairs": wide}),
        (
            "/clustering/method",
            "groups column",
            {"kind": "fit_federated", "pairs": nameless, "clustering": {"method": "groups"}},
        ),
        ("/targets", "made with model", {"kind": "distill", "model": other, "targets": targets}),
        (
            "/teacher",
            "differs",
            {
                "kind": "distill",
                "model": model,
                "targets": targets,
                "teacher": {"name": "rotational", "top_k": 3},
            },
        ),
        ("/pairs", "20 dimensions", {"kind": "evaluate", "model": model, "pairs": wide}),
        ("/student", "format 'targets'", _evaluate(model, pairs, targets)),
    ]
    for pointer, match, spec in table:
        assert world.refused(match, **spec) == pointer
    assert world.submit(**_evaluate(model, pairs, student))


def _evaluate(model: str, pairs: str, student: str) -> dict[str, Any]:
    return {"kind": "evaluate", "model": model, "pairs": pairs, "student": student}


def test_a_failed_upstream_fails_what_waits_for_it(other_world: World) -> None:
    pairs = other_world.upload(tiny_pairs())
    jobs = other_world.chain(pairs)
    with transaction(other_world.engine) as session:
        control.cancel(session, jobs["fit_federated"], project=PROJECT, now=other_world.clock())

    for name in ("cache_targets", "distill", "evaluate"):
        job = other_world.job(jobs[name])
        assert job.state == "failed"
        assert job.error is not None
        assert job.error["code"] == "upstream_failed"
    late = {"kind": "cache_targets", "model": f"{jobs['fit_federated']}/model"}
    with pytest.raises(SpecInvalid, match="is cancelled"):
        other_world.submit(**late)


def test_other_pairs_are_judged_on_queries_the_model_never_saw(other_world: World) -> None:
    world = other_world
    jobs = world.chain(world.upload(tiny_pairs()))
    fresh = world.upload(tiny_pairs(rows=40, seed=5))
    judged = world.submit(
        kind="evaluate",
        pairs=fresh,
        model=f"{jobs['fit_federated']}/model",
        student=f"{jobs['distill']}/student",
    )
    world.run()

    assert world.job(judged).state == "succeeded", world.job(judged).error
    assert '"queries": 40' in world.path(judged, "report").read_text()


def test_cancel_reaches_a_running_chunk(other_world: World) -> None:
    """The heartbeat carries the cancellation into a training chunk that would run on and on."""
    world = other_world
    fit = world.chain(world.upload(tiny_pairs()))["fit_federated"]
    world.run()
    endless = world.submit(
        kind="distill",
        model=f"{fit}/model",
        training={"epochs": 100_000, "epochs_per_chunk": 100_000},
    )
    while world.status(endless).progress.stage != "train":
        assert world.runner.run_one()
    thread = threading.Thread(target=world.runner.run_one)
    thread.start()
    while world.status(endless).progress.done <= 1:
        time.sleep(0.05)

    with transaction(world.engine) as session:
        assert (
            control.cancel(session, endless, project=PROJECT, now=world.clock()).state
            == "cancelling"
        )
    thread.join(10)

    assert not thread.is_alive()
    assert world.job(endless).state == "cancelled"
    assert not list(world.runner.scratch.iterdir())
