"""Several models put side by side: lists of inputs, what does not fit, and retries that rewire."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from core.db.models import Job
from core.db.session import reading, transaction
from core.errors import SpecInvalid
from core.jobs import control
from tests.core.kinds.world import CLUSTERING, World, tiny_pairs
from tests.life import PROJECT


def fit(world: World, **changes: int) -> str:
    pairs = world.upload(tiny_pairs(**changes))
    return world.submit(
        kind="fit_federated", pairs=pairs, clustering=CLUSTERING, strength=1.0, temperature=0.1
    )


def test_every_entry_of_a_list_is_checked_by_itself(other_world: World) -> None:
    world = other_world
    first, wide = fit(world), fit(world, dim=20)
    world.run()
    model = f"{first}/model"
    table = [
        (["f" * 64, model], "/models/0", "no artifact"),
        ([model, f"{first}/student"], "/models/1", "makes no 'student'"),
        ([model, f"{wide}/model"], "/models/1", "the first has 16 dimensions, number 2 has 20"),
    ]
    for models, pointer, told in table:
        with pytest.raises(SpecInvalid, match=told) as caught:
            world.submit(kind="combine_models", models=models)
        assert caught.value.pointer == pointer


def test_a_combination_of_combinations_and_two_names_of_one_model_fail_in_words(
    other_world: World,
) -> None:
    world = other_world
    first, second = fit(world), fit(world, seed=2)
    models = [f"{first}/model", f"{second}/model"]
    whole = world.submit(kind="combine_models", models=models)
    world.run()
    again = world.submit(kind="combine_models", models=[f"{whole}/model", models[0]])
    sha256 = world.status(first).artifacts["model"]
    twice = world.submit(kind="combine_models", models=[sha256, models[0]])
    world.run()

    for job_id, told in ((again, "is itself a combination"), (twice, "have the same content")):
        job = world.job(job_id)
        assert job.state == "failed"
        assert job.error is not None
        assert told in job.error["message"]


def test_a_retry_points_the_list_at_the_new_jobs(other_world: World) -> None:
    world = other_world
    first, second = fit(world), fit(world, seed=2)
    combined = world.submit(kind="combine_models", models=[f"{first}/model", f"{second}/model"])
    with transaction(world.engine) as session:
        control.cancel(session, first, project=PROJECT, now=world.clock())
    assert world.job(combined).state == "failed"

    with transaction(world.engine) as session:
        control.retry(session, first, project=PROJECT, by="tests", now=world.clock())
    world.run()

    with reading(world.engine) as session:
        anew = session.scalars(select(Job).where(Job.retry_of.in_([first, combined]))).all()
    made = {job.kind: job for job in anew}
    assert made["combine_models"].spec["models"] == [
        f"{made['fit_federated'].id}/model",
        f"{second}/model",
    ]
    assert made["combine_models"].state == "succeeded", made["combine_models"].error
