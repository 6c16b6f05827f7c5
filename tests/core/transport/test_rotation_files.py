from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import DataInvalid
from core.specs.transport import Rotate
from core.tensors import shards
from core.transport.rotate import solve
from core.transport.rotation_files import load_rotations, save_rotations
from core.transport.rotations import RotationSet, join
from tests.core.transport.moments_of import moments_of, orthogonal, rows

STUDENT = "ab" * 32


def _set(d_s: int = 5, d_t: int = 7, *, seed: int = 0, **options: Any) -> RotationSet:
    """A student of two layers, tied by layer: layer.0, layer.1 and final."""
    x = rows(60, max(d_s, d_t), seed=seed)
    maps, told = {}, {}
    for number, group in enumerate(("layer.0", "layer.1", "final")):
        y = x @ orthogonal(max(d_s, d_t), seed=seed + number)
        moments = moments_of(x[:, :d_s], y[:, :d_t])
        sites = (f"attention.{number}", f"mlp.{number}") if number < 2 else ("final",)
        maps[group], told[group] = solve(
            dict.fromkeys(sites, moments), Rotate(tie="layer", k=3, **options), group
        )
    return RotationSet("layer", 8, 2, d_s, d_t, maps, {"student": STUDENT}, told)


def _same(one: RotationSet, other: RotationSet) -> None:
    assert replace(one, maps={}) == replace(other, maps={})
    assert list(one.maps) == list(other.maps)
    for group, mine in one.maps.items():
        for name, value in vars(mine).items():
            theirs = getattr(other.maps[group], name)
            same = (
                torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs
            )
            assert same, (group, name)


@pytest.mark.parametrize(("d_s", "d_t"), [(5, 5), (5, 7), (7, 5)])
@pytest.mark.parametrize("whiten", [False, True])
def test_what_is_read_is_what_was_written(
    tmp_path: Path, d_s: int, d_t: int, *, whiten: bool
) -> None:
    found = _set(d_s, d_t, whiten=whiten)
    save_rotations(tmp_path / "r.safetensors", found)

    _same(found, load_rotations(tmp_path / "r.safetensors"))


def test_the_same_solve_gives_the_same_file(tmp_path: Path) -> None:
    hashes = set()
    for name in ("one", "other"):
        save_rotations(tmp_path / name, _set())
        hashes.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    save_rotations(tmp_path / "changed", _set(seed=1))

    assert len(hashes) == 1
    assert hashlib.sha256((tmp_path / "changed").read_bytes()).hexdigest() not in hashes


def test_sets_solved_apart_are_joined_in_the_order_of_the_stream(tmp_path: Path) -> None:
    whole = _set()
    parts = [
        replace(
            whole, maps={group: whole.maps[group]}, diagnostics={group: whole.diagnostics[group]}
        )
        for group in ("final", "layer.1", "layer.0")
    ]
    save_rotations(tmp_path / "part", parts[0])

    _same(whole, join([load_rotations(tmp_path / "part"), *parts[1:]]))


def test_sets_that_do_not_belong_together_are_refused() -> None:
    whole = _set()
    with pytest.raises(DataInvalid, match="cannot be joined"):
        join([whole, replace(whole, maps={}, sources={})])
    with pytest.raises(DataInvalid, match="in two of the sets"):
        join([whole, whole])
    with pytest.raises(DataInvalid, match="at least one set"):
        join([])


def test_a_fold_gets_every_group_or_a_reason() -> None:
    whole = _set()
    assert list(whole.rotations()) == ["layer.0", "layer.1", "final"]

    with pytest.raises(DataInvalid, match=r"layer\.1 is missing"):
        replace(whole, maps={"layer.0": whole.maps["layer.0"]}).rotations()
    with pytest.raises(DataInvalid, match="cannot be folded"):
        _set(whiten=True).rotations()


def _rewritten(path: Path, change: Any) -> Path:
    """Save a good set, change its parts in place, and write them again."""
    save_rotations(path, _set())
    tensors, manifest = shards.load(path)
    change(tensors, manifest)
    shards.save(path, tensors, manifest)
    return path


def _scale(name: str, by: float) -> Any:
    return lambda tensors, manifest: tensors.update({name: tensors[name] * by})


def _say(name: str, value: Any) -> Any:
    return lambda tensors, manifest: manifest.update({name: value})


BROKEN: list[tuple[Any, str]] = [
    (_say("format", "codebook"), "needed 'rotations'"),
    (_say("version", 2), "version 2"),
    (_say("tie", "none"), "tie 'none'; allowed"),
    (_say("layers", 1), "'layer.1'"),
    (_say("layers", None), "layers None; needed 1 to 4096"),
    (_say("layers", 10**9), "needed 1 to 4096"),
    (_say("student_width", 6), "shape"),
    (_say("teacher_width", 0), "needed 1 to"),
    (_say("groups", []), "groups a list"),
    (_say("groups", {"layer.9": {"sites": [], "orthogonal": True}}), "'layer.9'"),
    (_say("groups", {"layer.0": {"sites": ["final"], "orthogonal": True}}), "needs"),
    (_say("groups", {"layer.0": {"sites": ["attention.0", "mlp.0"]}}), "sites and orthogonal"),
    (_say("sources", {"student": "me"}), "64 lower-case hex"),
    (_say("diagnostics", {"layer.9": {}}), "'layer.9', which is no group"),
    (_scale("layer.0.full", 1 + 1e-6), r"layer\.0\.full: max abs\(R R\^T - I\)"),
    (_scale("layer.0.core", -1), "differs from the lifted core"),
    (_scale("layer.0.core", 1.1), r"layer\.0\.core: its columns are off orthonormal"),
    (_scale("final.student_basis", 0), "off orthonormal by 1"),
    (_scale("layer.1.singular_values", -1), "falling"),
    (_scale("layer.1.teacher_basis", float("nan")), "a NaN"),
    (lambda tensors, manifest: tensors.pop("final.core"), r"final\.core is missing"),
    (lambda tensors, manifest: tensors.update(odd=np.zeros(1)), "odd is odd"),
    (
        lambda tensors, manifest: tensors.update({"final.core": tensors["final.core"][:2]}),
        "shape",
    ),
    (
        lambda tensors, manifest: tensors.update(
            {"final.core": tensors["final.core"].astype(np.float32)}
        ),
        "needed finite float64, got float32",
    ),
    (lambda tensors, manifest: tensors.update({"final.core": np.float64(1)}), "shape"),
]


@pytest.mark.parametrize(("change", "said"), BROKEN)
def test_broken_files_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(DataInvalid, match=said):
        load_rotations(_rewritten(tmp_path / "r.safetensors", change))


def test_what_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b"no")
    with pytest.raises(DataInvalid, match=r"not a readable \.safetensors"):
        load_rotations(tmp_path / "r")


def test_spreads_of_z_scores_are_positive(tmp_path: Path) -> None:
    path = tmp_path / "r"
    save_rotations(path, _set(whiten=True))
    tensors, manifest = shards.load(path)
    tensors["final.student_scale"][0] = 0
    shards.save(path, tensors, manifest)

    with pytest.raises(DataInvalid, match=r"final\.student_scale: needed > 0"):
        load_rotations(path)
