"""A teacher of stored embeddings: what is split from what, and which wishes cannot be met."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from core.errors import SpecInvalid
from core.kinds.hold_out import Spec
from core.tensors.embeddings import Embeddings, load_embeddings, save_embeddings, whole
from tests.core.kinds.world import World, tiny_pairs


def store(world: World, made: Embeddings) -> str:
    path = world.folder / "embeddings.safetensors"
    save_embeddings(path, made)
    return world.put(path, "embeddings", made.meta())


def held(world: World, **spec: Any) -> Embeddings:
    job = world.submit(kind="hold_out", **spec)
    world.run()
    assert world.job(job).state == "succeeded", world.job(job).error
    return load_embeddings(world.path(job, "model"))


def test_pairs_become_embeddings_with_rows_held_out(other_world: World) -> None:
    pairs = tiny_pairs()
    sha256 = other_world.upload(pairs)

    found = held(other_world, pairs=sha256, test_fraction=0.25, seed=3)

    np.testing.assert_array_equal(found.embeddings, pairs.targets)
    assert found.inputs is not None
    np.testing.assert_array_equal(found.inputs, pairs.queries)
    assert found.texts == found.ids == pairs.ids
    assert found.groups == pairs.groups
    assert found.manifest == {
        "pairs": sha256,
        "given": "queries",
        "split": "query",
        "seed": 3,
        "test_fraction": 0.25,
    }
    assert (len(found.train_rows), len(found.held_out_rows)) == (90, 30)
    assert found.meta()["pairs"] == sha256
    again = held(other_world, pairs=sha256, test_fraction=0.25, seed=4)
    assert again.held_out_rows.tolist() != found.held_out_rows.tolist()


def test_a_student_may_be_given_the_targets_themselves(other_world: World) -> None:
    found = held(other_world, pairs=other_world.upload(tiny_pairs()), inputs="targets")

    assert found.inputs is None
    assert found.manifest["given"] == "targets"
    assert found.meta()["dim"] == found.meta()["target_dim"] == 16


def test_equal_inputs_stay_on_one_side(other_world: World) -> None:
    pairs = tiny_pairs()
    queries = pairs.queries.copy()
    queries[60:] = queries[:60]
    sha256 = other_world.upload(replace(pairs, queries=queries))

    found = held(other_world, pairs=sha256, test_fraction=0.5)

    assert {row % 60 for row in found.train_rows}.isdisjoint(
        row % 60 for row in found.held_out_rows
    )


def test_whole_groups_are_held_out_by_cluster(other_world: World) -> None:
    pairs = tiny_pairs()

    found = held(other_world, pairs=other_world.upload(pairs), split="cluster", test_fraction=0.3)

    assert pairs.groups is not None
    sides = [
        {pairs.groups[row] for row in rows} for rows in (found.train_rows, found.held_out_rows)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[1]) == 1


def test_stored_embeddings_keep_what_they_hold_and_are_split_anew(other_world: World) -> None:
    random = np.random.default_rng(0)
    made = whole(
        random.normal(size=(20, 8)).astype(np.float32),
        inputs=random.normal(size=(20, 3)).astype(np.float16),
        texts=[f"text {row}" for row in range(20)],
        manifest={"source": "imported"},
    )
    sha256 = store(other_world, made)

    found = held(other_world, embeddings=sha256)

    assert found.inputs is not None
    assert made.inputs is not None
    np.testing.assert_array_equal(found.inputs, made.inputs)
    assert (found.texts, found.groups, found.ids) == (made.texts, None, made.ids)
    assert len(found.held_out_rows) == 4
    assert (found.manifest["stored"], found.manifest["given"]) == (sha256, "stored")
    twice = held(other_world, embeddings=store(other_world, found), seed=1)
    assert len(twice.train_rows) + len(twice.held_out_rows) == 20


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({}, "needed pairs or embeddings, one of the two"),
        ({"pairs": "0" * 64, "embeddings": "1" * 64}, "one of the two"),
        ({"embeddings": "1" * 64, "inputs": "queries"}, "is a choice of pairs"),
        ({"pairs": "0" * 64, "test_fraction": 0}, "test_fraction"),
        ({"pairs": "0" * 64, "split": "row"}, "split"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(spec: Any, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Spec(**spec)


def test_what_the_input_cannot_give_is_refused_when_posted(other_world: World) -> None:
    bare = other_world.upload(replace(tiny_pairs(), groups=None))
    with pytest.raises(SpecInvalid, match="needs at least 2 groups, and these pairs have 0") as one:
        other_world.submit(kind="hold_out", pairs=bare, split="cluster")
    assert one.value.pointer == "/split"
    single = store(other_world, whole(np.ones((1, 4), np.float32)))
    with pytest.raises(SpecInvalid, match="embeddings: 1 row; a split needs at least 2"):
        other_world.submit(kind="hold_out", embeddings=single)
    with pytest.raises(SpecInvalid):
        other_world.submit(kind="hold_out", pairs=single)


def test_inputs_that_are_all_equal_fail_in_words(other_world: World) -> None:
    sha256 = store(other_world, whole(np.ones((5, 4), np.float32)))
    job = other_world.submit(kind="hold_out", embeddings=sha256)
    other_world.run()
    error = other_world.job(job).error
    assert error is not None
    assert "inputs: too few different ones for a split by query" in error["message"]
