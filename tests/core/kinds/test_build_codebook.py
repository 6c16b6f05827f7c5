"""A codebook job: what it makes, that it finds bivectors again, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from core.distill.export import student_facts
from core.distill.teachers.rotational import RotationalTeacher
from core.errors import SpecInvalid
from core.kinds.build_codebook import Spec
from core.rotations.codebook import Codebook, build, combine
from core.specs.codebooks import CombinedPlanes, PrincipalPlanes
from core.specs.teachers import Rotational
from core.tensors.codebooks import load_codebook, save_codebook
from core.tensors.formats import Federated, load_federated
from tests.core.kinds.world import CLUSTERING, World, tiny_pairs


def fitted(world: World) -> str:
    pairs = world.upload(tiny_pairs())
    job = world.submit(kind="fit_federated", pairs=pairs, clustering=CLUSTERING, strength=1.0)
    world.run()
    return world.status(job).artifacts["model"]


def made(world: World, **spec: Any) -> tuple[str, Codebook]:
    job = world.submit(kind="build_codebook", **_named(spec))
    world.run()
    assert world.job(job).state == "succeeded", world.job(job).error
    return job, load_codebook(world.path(job, "codebook"))


def wanted(model: Federated, spec: Any, compat: Any = None) -> Codebook:
    teacher = RotationalTeacher(model, Rotational(compat=compat))
    sizes = torch.from_numpy(np.bincount(model.cluster_of))
    return build(spec, teacher.bivectors, weights=sizes)


def test_a_job_makes_what_the_functions_make_and_says_of_what(other_world: World) -> None:
    world = other_world
    sha256 = fitted(world)
    model = load_federated(world.store.path(sha256))
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"method": "pca", "n_components": 5}, None),
        ({"method": "pca", "n_components": 5, "solver": "incremental"}, "legacy"),
        ({"method": "pca", "n_components": 5, "solver": "randomized", "disjoint": False}, None),
        ({"method": "combined", "n_components": 5, "planes_per_cluster": 3}, None),
    ]
    for spec, compat in cases:
        _, found = made(world, model=sha256, codebook=spec, compat=compat)
        sort = CombinedPlanes if spec["method"] == "combined" else PrincipalPlanes
        expected = wanted(model, sort.model_validate(spec), compat)
        np.testing.assert_allclose(found.explained, expected.explained, atol=1e-5)
        assert found.method == spec["method"]
        assert found.disjoint is spec.get("disjoint", True)
        assert (found.facts["model"], found.facts["compat"]) == (sha256, compat)
        assert found.facts["clusters"] == len(model.rotations)


def test_the_npz_holds_the_same_planes(other_world: World) -> None:
    job, found = made(other_world, model=fitted(other_world), codebook={"n_components": 4})
    with np.load(other_world.path(job, "codebook_npz"), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["planes"], found.planes)
    assert other_world.path(job, "explained").read_bytes().startswith(b"\x89PNG")


def test_canonical_planes_need_no_logarithm(other_world: World) -> None:
    spec = {"method": "canonical", "n_components": 8}
    job, found = made(other_world, model=fitted(other_world), codebook=spec)
    np.testing.assert_array_equal(found.planes.reshape(16, 16), np.eye(16))
    assert other_world.status(job).progress.total == 1
    assert other_world.path(job, "explained").read_bytes().startswith(b"\x89PNG")


def test_bivectors_another_job_computed_are_found_again(other_world: World) -> None:
    world, model = other_world, fitted(other_world)
    world.submit(kind="cache_targets", model=model)
    world.run()
    job, _ = made(world, model=model, codebook={"method": "pca", "n_components": 4})
    assert world.job(job).cache_hits == 1


def test_another_models_codebook_joins_with_the_weight_of_a_model(other_world: World) -> None:
    world = other_world
    sha256 = fitted(world)
    pairs = world.upload(tiny_pairs(seed=3))
    fit = world.submit(kind="fit_federated", pairs=pairs, clustering=CLUSTERING, strength=1.0)
    first = world.submit(
        kind="build_codebook", model=f"{fit}/model", codebook={"method": "pca", "n_components": 4}
    )
    spec = {"method": "combined", "n_components": 6}

    job, found = made(world, model=sha256, codebook=spec, with_codebooks=[f"{first}/codebook"])

    other = load_codebook(world.path(first, "codebook"))
    _, alone = made(world, model=sha256, codebook=spec)
    assert found.facts["codebooks"] == [world.status(first).artifacts["codebook"]]
    assert found.facts["sources"] == alone.facts["sources"] + 1
    assert "codebooks" not in alone.facts
    rows = other.planes[0].astype(np.float64)
    kept, lost = (np.linalg.norm(rows @ c.planes.reshape(12, 16).T) for c in (found, alone))
    assert kept > lost
    assert combine([other], 4).explained[0] > 0
    assert world.job(job).state == "succeeded"


def test_what_cannot_be_is_refused_at_the_door(other_world: World) -> None:
    world, model = other_world, fitted(other_world)
    wide = world.upload(tiny_pairs(dim=20))
    fit = world.submit(kind="fit_federated", pairs=wide, clustering=CLUSTERING, strength=1.0)
    world.run()
    job, _ = made(world, model=f"{fit}/model", codebook={"method": "canonical", "n_components": 2})
    other = world.status(job).artifacts["codebook"]
    table: list[tuple[str, str, dict[str, Any]]] = [
        ("/codebook/n_components", "width 16 has 8 planes", {"codebook": {"n_components": 9}}),
        (
            "/with_codebooks/0",
            "with_codebooks: number 1 has 20 dimensions, the model 16",
            {"codebook": {"method": "combined", "n_components": 4}, "with_codebooks": [other]},
        ),
        (
            "/with_codebooks/0",
            "format 'federated_model'",
            {"codebook": {"method": "combined", "n_components": 4}, "with_codebooks": [model]},
        ),
    ]
    for pointer, match, spec in table:
        with pytest.raises(SpecInvalid, match=match) as caught:
            world.submit(kind="build_codebook", model=model, **_named(spec))
        assert caught.value.pointer == pointer
    job, _ = made(world, model=model, codebook={"method": "canonical", "n_components": 2})
    axes = world.status(job).artifacts["codebook"]
    job, _ = made(
        world, model=model, codebook={"method": "pca", "n_components": 2}, compat="legacy"
    )
    legacy = world.status(job).artifacts["codebook"]
    joined = {"method": "combined", "n_components": 4}
    for given, match in (
        ([axes], "number 1 says of no plane that it explains anything"),
        ([legacy], "number 1 is made of log W, this one would not be"),
    ):
        with pytest.raises(SpecInvalid, match=match) as caught:
            world.submit(kind="build_codebook", model=model, codebook=joined, with_codebooks=given)
        assert caught.value.pointer == "/with_codebooks/0"
    with pytest.raises(SpecInvalid, match="number 2 has the content of one before it"):
        world.submit(
            kind="build_codebook",
            model=model,
            codebook=joined,
            with_codebooks=[legacy, f"{job}/codebook"],
            compat="legacy",
        )
    with pytest.raises(ValidationError, match=r"with_codebooks beside codebook\.method 'pca'"):
        Spec(model=model, with_codebooks=(other,))
    with pytest.raises(ValidationError, match="the same one twice"):
        Spec(model=model, codebook=CombinedPlanes(), with_codebooks=(other, other))


def _named(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "codebook": {"method": "pca", **spec["codebook"]}}


def test_a_student_turns_in_the_planes_of_an_artifact(other_world: World) -> None:
    world, model = other_world, fitted(other_world)
    job, found = made(world, model=model, codebook={"method": "pca", "n_components": 4})
    asked = {
        "kind": "distill",
        "model": model,
        "codebook": f"{job}/codebook",
        "student": {"name": "canonical", "heads": 2},
        "training": {"epochs": 1},
    }

    trained = world.submit(**asked)
    world.run()

    student = world.student(trained)
    planes = student.get_buffer("planes").numpy()
    np.testing.assert_array_equal(planes, found.planes)
    assert student.config["n_components"] == 4
    facts = student_facts(world.path(trained, "student"))["facts"]
    assert facts["codebook"] == world.status(job).artifacts["codebook"]
    for change, match in (
        ({"student": {"name": "rotor_product"}}, "codebook beside student 'rotor_product'"),
        ({"student": {**asked["student"], "n_components": 4}}, r"beside student\.n_components"),
    ):
        with pytest.raises(ValidationError, match=match):
            world.submit(**{**asked, **change})


def test_uploaded_axes_are_kept_as_they_are(other_world: World) -> None:
    world, model = other_world, fitted(other_world)
    axes = np.eye(16, dtype=np.float32)[::-1].reshape(8, 2, 16)  # not in the order of canonical's
    path = world.folder / "axes.safetensors"
    given = Codebook(axes, np.zeros(8, np.float32), "canonical")
    save_codebook(path, given)
    codebook = world.put(path, "codebook", given.meta())

    trained = world.submit(
        kind="distill",
        model=model,
        codebook=codebook,
        student={"name": "canonical", "heads": 2},
        training={"epochs": 1},
    )
    world.run()

    again = world.student(trained)
    np.testing.assert_array_equal(again.get_buffer("planes").numpy(), axes)


@pytest.mark.parametrize(("count", "allowed"), [(130, True), (5000, False)])
def test_more_planes_than_the_width_has_may_overlap(
    other_world: World, *, count: int, allowed: bool
) -> None:
    world, model = other_world, fitted(other_world)
    rng = np.random.default_rng(0)
    columns = np.linalg.qr(rng.normal(size=(count, 16, 2)))[0].transpose(0, 2, 1)
    given = Codebook(columns.astype(np.float32), np.zeros(count, np.float32), "pca")
    path = world.folder / "many.safetensors"
    save_codebook(path, given)
    asked = {
        "kind": "distill",
        "model": model,
        "codebook": world.put(path, "codebook", given.meta()),
        "student": {"name": "canonical", "heads": 2},
        "training": {"epochs": 1},
    }
    if not allowed:
        with pytest.raises(SpecInvalid, match="5000 planes; allowed: 1 to 4096") as caught:
            world.submit(**asked)
        assert caught.value.pointer == "/codebook"
        return
    trained = world.submit(**asked)
    world.run()
    assert world.student(trained).get_buffer("planes").shape == (130, 2, 16)


def test_planes_the_clusters_do_not_have_fail_the_job_with_how_many_there_are(
    other_world: World,
) -> None:
    job = other_world.submit(
        kind="build_codebook",
        model=fitted(other_world),
        codebook={"method": "pca", "n_components": 120, "disjoint": False},
    )
    other_world.run()
    error = other_world.job(job).error
    assert error is not None
    assert error["code"] == "data_invalid"
    assert "ask for at most" in error["message"]
