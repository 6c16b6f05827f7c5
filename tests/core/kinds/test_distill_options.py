"""How the work of a training is done and cut changes nothing of what it makes."""

from typing import Any

import pytest

from core.errors import SpecInvalid
from tests.core.kinds.world import TRAINING, World, tiny_pairs

STUDENT = {"name": "rotor_product", "router_hidden": 16}


def distill(world: World, model: str, **training: Any) -> str:
    return world.submit(
        kind="distill", model=model, student=STUDENT, training={**TRAINING, **training}
    )


def test_the_artifacts_do_not_depend_on_chunks_nor_on_where_targets_come_from(
    other_world: World,
) -> None:
    world = other_world
    fit = world.chain(world.upload(tiny_pairs()))["fit_federated"]
    model = f"{fit}/model"
    plain = distill(world, model)
    others = [
        distill(world, model, targets="on_the_fly"),
        distill(world, model, checkpoint_interval=1),
        distill(world, model, checkpoint_interval=7, targets="on_the_fly"),
    ]
    world.run()

    wanted = world.status(plain).artifacts
    for job_id in others:
        assert world.job(job_id).state == "succeeded", world.job(job_id).error
        assert world.status(job_id).artifacts == wanted
        assert world.status(job_id).progress.fraction == 1


def test_cached_targets_on_the_fly_are_refused(other_world: World) -> None:
    world = other_world
    jobs = world.chain(world.upload(tiny_pairs()))
    world.run()
    made = {
        "model": world.status(jobs["fit_federated"]).artifacts["model"],
        "targets": world.status(jobs["cache_targets"]).artifacts["targets"],
    }
    with pytest.raises(SpecInvalid, match="names cached ones") as caught:
        world.submit(kind="distill", **made, training={"targets": "on_the_fly"})
    assert caught.value.pointer == "/training/targets"
