"""A curriculum as a job: every stage ends with a checkpoint that stays, and says of what."""

from __future__ import annotations

from typing import Any

from core.db.models import Artifact, Chunk, Output
from core.db.session import reading, transaction
from core.distill.state import TrainState
from core.jobs import checkpoints, control
from core.specs.distillation import CURRICULUM_CONFIG
from tests.core.kinds.world import World, tiny_pairs
from tests.life import PROJECT

CODES = {"name": "hierarchical", "hidden": 16, "layers": 1, "decoder": 8}
TRAINING = {"epochs": 5, "batch_size": 32, "warmup_steps": 2}


def stored(world: World) -> str:
    held = world.submit(kind="hold_out", pairs=world.upload(tiny_pairs()))
    return f"{held}/model"


def left(world: World, job_id: str) -> list[tuple[Output, Artifact, Chunk]]:
    assert world.job(job_id).state == "succeeded", world.job(job_id).error
    with reading(world.engine) as session:
        return list(checkpoints.kept(session, job_id, stage="train"))


def pinned(world: World, job_id: str) -> list[dict[str, Any]]:
    return [found.meta for output, found, _ in left(world, job_id) if output.pinned]


def test_the_end_of_every_stage_stays_readable(other_world: World) -> None:
    world = other_world
    told = {"stages": 3, "order": "easy_first"}
    job_id = world.submit(
        kind="distill",
        model=stored(world),
        student=CODES,
        training={**TRAINING, "curriculum": told, "accumulate": 2},
    )
    world.run()

    steps = 3  # of an epoch: 86 rows
    assert pinned(world, job_id) == [
        {"epoch": 2, "step": 2 * steps, "stage": 0, "tau": 4.0},
        {"epoch": 4, "step": 4 * steps, "stage": 1, "tau": 2.25},
        {"epoch": 5, "step": 5 * steps, "stage": 2, "tau": 0.5},
    ]
    assert world.job(job_id).spec["keep_checkpoints"] == "best_and_latest"
    rows = left(world, job_id)
    assert len(rows) <= 4  # the best one too, where it ends no stage
    for _, found, chunk in rows:
        state = TrainState.load(world.store.path(found.sha256))
        assert state.epoch == chunk.index + 1 == found.meta["epoch"]
        assert state.history[-1]["stage"] == found.meta["stage"]
        assert state.history[-1]["tau"] == found.meta["tau"]
    with transaction(world.engine) as session:
        control.pin(session, job_id, stage="train", index=1, pinned=False, project=PROJECT)
    assert [meta["stage"] for meta in pinned(world, job_id)] == [1, 2]


def test_where_patience_ends_the_last_stage_its_checkpoint_stays_too(other_world: World) -> None:
    world = other_world
    early = {"epochs": 8, "patience": 1, "min_delta": 1.0, "curriculum": {"stages": 2}}
    job_id = world.submit(
        kind="distill", model=stored(world), student=CODES, training={**TRAINING, **early}
    )
    world.run()
    assert [meta["epoch"] for meta in pinned(world, job_id)] == [4, 6]


def test_without_a_curriculum_nothing_comes_pinned(other_world: World) -> None:
    world = other_world
    job_id = world.submit(kind="distill", model=stored(world), student=CODES, training=TRAINING)
    world.run()
    assert pinned(world, job_id) == []
    assert all(set(found.meta) == {"epoch", "step"} for _, found, _ in left(world, job_id))


def test_document_004s_curriculum_runs_as_a_job(other_world: World) -> None:
    world = other_world
    config = CURRICULUM_CONFIG.model_copy(update={"epochs": 1, "curriculum_stages": 4})
    job_id = world.submit(**config.job(stored(world), term="relational_kl"))
    world.run()
    taus = [config.get_tau_for_stage(stage) for stage in range(4)]
    assert [meta["tau"] for meta in pinned(world, job_id)] == taus
    assert world.student(job_id).output_dim() == 5
