"""Caches leave as document 000's files, and come in only as far as they are true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bench._jobs import Desk, Done, run_job
from core.artifacts.importers import sniff
from core.artifacts.limits import Limits
from core.distill import checking
from core.distill.teachers._logs import bivector_block
from core.distill.teachers.rotational import RotationalTeacher
from core.errors import DataInvalid, SpecInvalid
from core.kinds import cache_targets, export_cache, import_cache
from core.kinds._base import Input, Produced
from core.specs.teachers import Rotational
from core.tensors import caches, shards
from core.tensors.formats import save_federated
from tests.core.artifacts.federated_files import npz
from tests.core.distill._make import make_model, make_teacher

A, B, C = "0" * 64, "1" * 64, "2" * 64


class World:
    """A model, its targets and their export."""

    def __init__(self, folder: Path) -> None:
        self.desk = Desk(folder)
        path = folder / "model"
        save_federated(path, make_model())
        meta = make_model().meta()
        self.model = self.keep(Produced(path, "federated_model", "m", meta=meta))
        self.cached = self.run(cache_targets.Spec(model=A, rows_per_chunk=50), model=self.model)
        self.targets = self.desk.as_input(self.cached.outputs["targets"])
        exported = self.run(
            export_cache.Spec(model=A, targets=B), model=self.model, targets=self.targets
        )
        self.files = {name: made.path.read_bytes() for name, made in exported.outputs.items()}
        self.inputs = {name: self.desk.as_input(m) for name, m in exported.outputs.items()}

    def keep(self, made: Produced) -> Input:
        return self.desk.as_input(self.desk.keep(made))

    def run(self, spec: Any, **inputs: Input) -> Done:
        return run_job(self.desk, spec, inputs)

    def upload(self, data: bytes) -> Input:
        source, target = self.desk.folder / "source", self.desk.folder / "target"
        source.write_bytes(data)
        found = sniff.read(source, target, scratch=self.desk.folder, limits=Limits())
        return self.keep(Produced(target, found.format, "x", meta=found.meta))

    def take(self, data: bytes, **options: Any) -> Done:
        """Upload a file and import it."""
        given = self.upload(data)
        name = "bivectors" if given.format == "bivectors_cache" else "targets"
        inputs = {"model": self.model, name: given}
        return self.run(
            import_cache.Spec.model_validate({"model": A, name: B, **options}), **inputs
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("caches"))


def targets_of(world: World, done: Done) -> Any:
    listed = json.loads(done.outputs["targets"].path.read_text())["blocks"]
    paths = [world.desk.store.path(block["sha256"]) for block in listed]
    return np.concatenate([shards.load(path)[0]["targets"] for path in paths])


def arrays(data: bytes, folder: Path) -> dict[str, Any]:
    path = folder / "file.npz"
    path.write_bytes(data)
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def test_the_export_has_the_documents_layout(world: World, tmp_path: Path) -> None:
    bivectors = arrays(world.files["bivectors_npz"], tmp_path)
    targets = arrays(world.files["targets_npz"], tmp_path)

    expected = bivector_block(make_model(), Rotational(), 0, 4).values.numpy()
    np.testing.assert_array_equal(bivectors["bivectors"], expected)
    assert bivectors["bivectors"].dtype == np.float32
    assert bivectors["cluster_ids"].tolist() == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(targets["targets"], targets_of(world, world.cached))
    assert str(targets["fingerprint"]) == make_teacher().fingerprint()
    np.testing.assert_array_equal(
        targets["query_digests"], caches.digest_rows(make_model().queries)
    )
    assert json.loads(str(targets["settings"])) == Rotational().model_dump(mode="json")


def test_an_export_comes_back_as_targets_that_distill_takes(world: World) -> None:
    done = world.take(world.files["targets_npz"], rows_per_chunk=50, verify=7)

    np.testing.assert_array_equal(targets_of(world, done), targets_of(world, world.cached))
    made, cached = done.outputs["targets"], world.cached.outputs["targets"]
    assert made.meta == cached.meta
    assert json.loads(made.path.read_text())["imported"]["rows_recomputed"] == 7 * 3
    assert {metric.name for metric in done.metrics} == {"target_difference"}


def test_what_was_only_sampled_has_no_cache_key(world: World) -> None:
    done = world.take(world.files["targets_npz"], rows_per_chunk=50, verify=29)

    keys = [made["targets"].cache_key for made in done.checkpoints["targets"]]
    assert keys[:2] == [None, None], "21 of 50 rows were never looked at"
    assert keys[2] is not None, "28 rows, all of them recomputed"


def test_fully_recomputed_blocks_are_the_services_own(world: World, tmp_path: Path) -> None:
    file = arrays(world.files["targets_npz"], tmp_path)
    file["targets"] = file["targets"] + np.float32(1e-7)

    done = world.take(npz(file), rows_per_chunk=50, verify=1000)

    np.testing.assert_array_equal(targets_of(world, done), targets_of(world, world.cached))


def test_what_was_recomputed_because_it_could_not_be_compared_is_counted(
    world: World, tmp_path: Path
) -> None:
    file = arrays(world.files["targets_npz"], tmp_path)
    sharp = {"name": "rotational", "temperature": 1e-6}

    done = world.take(npz({"targets": sharp_targets(file["targets"])}), teacher=sharp, verify=4)

    told = json.loads(done.outputs["checked"].path.read_text())
    assert told["rows_recomputed"] == told["rows"] > 4


def sharp_targets(targets: Any) -> Any:
    """What the same teacher answers where the nearest neighbour alone decides."""
    model = make_model()
    teacher = RotationalTeacher(model, Rotational(temperature=1e-6))
    own = torch.from_numpy(teacher.own_rows(model.queries))
    found = teacher.targets(model.queries, exclude_rows=own).numpy()
    assert found.shape == targets.shape
    return found


def test_bivectors_are_checked_and_the_cache_keeps_its_own(world: World, tmp_path: Path) -> None:
    file = arrays(world.files["bivectors_npz"], tmp_path)
    nearly = file["bivectors"] * np.float32(1 + 1e-6)
    before = dict(world.desk.found)

    done = world.take(npz({"logs": nearly}))

    assert world.desk.found == before
    assert [metric.step for metric in done.metrics] == [0, 1, 2, 3]
    assert 1e-8 < max(metric.value for metric in done.metrics) < 1e-5
    assert set(done.outputs) == {"checked"}


def test_an_empty_cache_is_filled_with_the_services_own(world: World, tmp_path: Path) -> None:
    file = arrays(world.files["bivectors_npz"], tmp_path)
    nearly = file["bivectors"] * np.float32(1 + 1e-6)
    kept = dict(world.desk.found)
    world.desk.found.clear()
    try:
        world.take(npz({"logs": nearly}))
        assert set(world.desk.found) <= set(kept), "only what the service's own jobs would keep"
        (block,) = world.desk.found.values()
    finally:
        world.desk.found.update(kept)

    found = shards.load(block.path)[0]["bivectors"]
    np.testing.assert_array_equal(found, bivector_block(make_model(), Rotational(), 0, 4).values)
    assert np.abs(found - nearly).max() > 0


def test_an_export_of_targets_alone_plans_their_teachers_memory(world: World) -> None:
    alone = export_cache.stages(export_cache.Spec(targets=B), {"targets": world.targets})
    both = export_cache.stages(
        export_cache.Spec(model=A, targets=B), {"model": world.model, "targets": world.targets}
    )
    assert alone[-1].memory_bytes == both[-1].memory_bytes > 0


def test_another_branch_of_the_logarithm_passes_no_check() -> None:
    """exp(L) = W holds for it too: only its length tells."""
    model = make_model()
    L = bivector_block(model, Rotational(), 0, 1).values.double().numpy()
    angles, planes = np.linalg.eigh(1j * L[0])
    longer = planes * (angles + 2 * np.pi * np.sign(angles) * (abs(angles) == abs(angles).max()))
    other = np.real(-1j * longer @ planes.conj().T)[None]

    with pytest.raises(DataInvalid, match=r"cluster 0 turns by up to .* no principal logarithm"):
        checking.check_bivectors(model, Rotational(), other, first=0)


def test_an_error_outside_the_first_draws_rows_is_found() -> None:
    """The rows are drawn from the file itself, so its maker cannot steer clear of them."""
    model = make_model()
    L = bivector_block(model, Rotational(), 0, 1).values.numpy()
    wrong = L.copy()
    wrong[0, 0, 1] += 0.01
    wrong[0, 1, 0] -= 0.01

    with pytest.raises(DataInvalid, match=r"cluster 0 is 0\.00\d+ away from G\^T W"):
        checking.check_bivectors(model, Rotational(), wrong, first=0)
    draws = {checking._seed(L), checking._seed(wrong)}
    assert len(draws) == 2


def changed(file: dict[str, Any], name: str, at: Any, value: Any) -> dict[str, Any]:
    array = file[name].copy()
    array[at] = value
    return {**file, name: array}


def test_what_is_not_true_is_refused_with_its_place(world: World, tmp_path: Path) -> None:
    b = arrays(world.files["bivectors_npz"], tmp_path)
    t = arrays(world.files["targets_npz"], tmp_path)
    bare = {"targets": t["targets"]}
    digests = changed(t, "query_digests", 77, 0)
    table: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"B": b["bivectors"][::-1]}, {}, r"cluster \d is .* the file is of another model"),
        (changed(bare, "targets", 60, t["targets"][61]), {"verify": 50}, "targets: row 60 is"),
        ({"targets": t["targets"][::-1]}, {"verify": 1}, r"targets: row \d+ is .* other queries"),
        (digests, {}, r"query_digests: row 77 is of another query \(1 of the 50 rows from 50"),
        ({**t, "fingerprint": np.array("f" * 64)}, {}, "the file says it is of teacher ffffffff"),
        (t, {"teacher": {"name": "rotational", "top_k": 3}}, "fingerprint: the file says"),
        (
            bare,
            {"teacher": {"name": "rotational", "compat": "legacy", "top_k": 2}},
            "of another teacher",
        ),
    ]
    for file, options, reason in table:
        with pytest.raises(DataInvalid, match=reason):
            world.take(npz(file), **{"rows_per_chunk": 50, **options})


def test_clusters_are_found_by_their_names(world: World, tmp_path: Path) -> None:
    b = arrays(world.files["bivectors_npz"], tmp_path)
    names = ["a", "b", "c", "d"]
    named = replace(make_model(), manifest={**make_model().manifest, "cluster_ids": names})
    path = world.desk.folder / "source"
    path.write_bytes(npz({"B": b["bivectors"][::-1], "cluster_ids": np.array(names[::-1])}))
    target = tmp_path / "target"
    sniff.read(path, target, scratch=tmp_path, limits=Limits())

    assert import_cache._places(target, named) == [3, 2, 1, 0]
    odd = replace(named, manifest={**named.manifest, "cluster_ids": ["a", "b", "c", "e"]})
    with pytest.raises(DataInvalid, match="'d' stands in the file alone"):
        import_cache._places(target, odd)


def test_what_cannot_fit_is_refused_before_it_runs(world: World) -> None:
    short = Input(B, "targets_cache", {"rows": 3, "dim": 12, "dtype": "float32"})
    wide = Input(B, "bivectors_cache", {"clusters": 4, "dim": 13, "dtype": "float32"})
    ours = Input(B, "targets_cache", {"rows": 128, "dim": 12, "dtype": "float32"})
    exact = import_cache.Spec(model=A, targets=B, teacher=Rotational(dtype="float64"))
    table: list[tuple[Any, dict[str, Input], str, str]] = [
        (
            import_cache.Spec(model=A, targets=B),
            {"targets": short},
            "/targets",
            "3 rows; needed 12",
        ),
        (import_cache.Spec(model=A, bivectors=B), {"bivectors": wide}, "/bivectors", "13 dim"),
        (exact, {"targets": ours}, "/targets", "float32 for a teacher of float64"),
    ]
    for spec, inputs, pointer, reason in table:
        with pytest.raises(SpecInvalid, match=reason) as caught:
            import_cache.stages(spec, {"model": world.model, **inputs})
        assert caught.value.pointer == pointer
    other = {"model": replace(world.model, sha256=C), "targets": world.targets}
    with pytest.raises(SpecInvalid, match="export them one by one"):
        export_cache.stages(export_cache.Spec(model=A, targets=B), other)


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        (import_cache, {"model": A}, "nothing to import"),
        (import_cache, {"model": A, "bivectors": B, "pairs": C}, "there are no targets"),
        (import_cache, {"model": A, "targets": B, "verify": 0}, "greater than or equal to 1"),
        (export_cache, {}, "nothing to export"),
        (
            export_cache,
            {"targets": B, "teacher": {"name": "rotational"}},
            "without 'model' there are none",
        ),
    ],
)
def test_a_spec_that_asks_for_nothing_is_refused(
    kind: Any, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        kind.Spec.model_validate(fields)
