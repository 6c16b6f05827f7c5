"""Rotations as files: one .safetensors of float64 with its manifest; checked as it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.manifests import shown
from core.transport.polar import deviation
from core.transport.rotations import Rotation, RotationSet, Unwhitened
from core.transport.sites import FINAL, POINTS, group_of

ORTHOGONAL = ("student_basis", "core", "teacher_basis", "full", "singular_values")
WHITENED = (
    *("student_basis", "core", "teacher_basis", "singular_values"),
    *("student_mean", "student_scale", "teacher_mean", "teacher_scale"),
)
TOLERANCE = 1e-8
"""Of a stored rotation's orthogonality, max abs; a float64 solve leaves some 1e-13."""
MOST_LAYERS = 4096
MEANS = "teacher_mean."
"""Before a site's name."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FORMAT = {"format": "rotations", "version": 1}
_WHOLE = ("stage_layers", "layers", "student_width", "teacher_width")


def save_rotations(path: Path, found: RotationSet) -> None:
    """Write a set; the same set gives the same bytes, wherever its tensors are."""
    tensors: dict[str, Any] = {}
    for group, one in found.maps.items():
        for name in _parts(orthogonal=one.orthogonal):
            tensors[f"{group}.{name}"] = getattr(one, name).double().cpu().numpy()
    for site, mean in found.means.items():
        tensors[f"{MEANS}{site}"] = mean.double().cpu().numpy()
    shards.save(path, tensors, _manifest(found))


def _parts(*, orthogonal: bool) -> tuple[str, ...]:
    return ORTHOGONAL if orthogonal else WHITENED


def _manifest(found: RotationSet) -> dict[str, Any]:
    return {
        **_FORMAT,
        "tie": found.tie,
        **{name: getattr(found, name) for name in _WHOLE},
        "sources": dict(found.sources),
        "groups": {
            group: {"sites": list(one.sites), "orthogonal": one.orthogonal}
            for group, one in found.maps.items()
        },
        "diagnostics": dict(found.diagnostics),
    }


def load_rotations(path: Path) -> RotationSet:
    """Read a set and check it: shapes, numbers, orthogonality (max abs 1e-8), names of groups.

    Raises:
        DataInvalid: the file is none, or what it holds is not what it says.
    """
    tensors, manifest = shards.load(path)
    _check_manifest(manifest)
    expected = {
        f"{group}.{name}"
        for group, told in manifest["groups"].items()
        for name in _parts(orthogonal=told["orthogonal"])
    }
    means = {name for name in tensors if name.removeprefix(MEANS) in _all_sites(manifest)}
    expected |= means
    if odd := sorted(expected ^ tensors.keys()):
        raise DataInvalid(f"rotations: {odd[0]} is {'missing' if odd[0] in expected else 'odd'}")
    for name, array in tensors.items():
        if array.dtype != np.float64 or not np.isfinite(array).all():
            raise DataInvalid(f"{name}: needed finite float64, got {array.dtype} or a NaN")
    order = sorted(manifest["groups"], key=lambda group: _place(manifest, group))
    maps = {group: _one(group, manifest, tensors) for group in order}
    facts = {name: manifest[name] for name in (*_WHOLE, "tie", "sources", "diagnostics")}
    return RotationSet(maps=maps, means=_means(manifest, tensors, means), **facts)


def _all_sites(manifest: Mapping[str, Any]) -> set[str]:
    return {site for told in manifest["groups"].values() for site in told["sites"]}


def _means(
    manifest: Mapping[str, Any], tensors: Mapping[str, Any], names: set[str]
) -> dict[str, Tensor]:
    width = manifest["teacher_width"]
    for name in names:
        if tensors[name].shape != (width,):
            raise DataInvalid(f"{name}: shape {list(tensors[name].shape)}; needed [{width}]")
    return {name.removeprefix(MEANS): torch.from_numpy(tensors[name]) for name in sorted(names)}


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    for name, value in _FORMAT.items():
        if manifest.get(name) != value:
            raise DataInvalid(f"manifest: {name} {shown(manifest.get(name))}; needed {value!r}")
    if manifest.get("tie") not in ("layer", "stage", "global"):
        raise DataInvalid(
            f"manifest: tie {shown(manifest.get('tie'))}; allowed: layer, stage, global"
        )
    for name in _WHOLE:
        value = manifest.get(name)
        most = MOST_LAYERS if "layers" in name else 1 << 24
        if type(value) is not int or not 1 <= value <= most:
            raise DataInvalid(f"manifest: {name} {shown(value)}; needed 1 to {most}")
    for name in ("groups", "sources", "diagnostics"):
        if not isinstance(manifest.get(name), dict):
            raise DataInvalid(f"manifest: {name} {shown(manifest.get(name))}; needed an object")
    for group, told in manifest["groups"].items():
        _check_group(manifest, group, told)
    _check_notes(manifest)


def _check_notes(manifest: Mapping[str, Any]) -> None:
    for name, value in manifest["sources"].items():
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise DataInvalid(f"manifest: sources {shown(name)}: needed 64 lower-case hex digits")
    if odd := sorted(manifest["diagnostics"].keys() - manifest["groups"].keys()):
        raise DataInvalid(f"manifest: diagnostics of {shown(odd[0])}, which is no group here")


def _check_group(manifest: Mapping[str, Any], group: str, told: Any) -> None:
    if not isinstance(told, dict) or type(told.get("orthogonal")) is not bool:
        raise DataInvalid(f"manifest: group {shown(group)}: needed sites and orthogonal")
    needed = _sites(manifest, group)
    if not needed or told.get("sites") != needed:
        raise DataInvalid(
            f"manifest: group {shown(group)} holds {shown(str(told.get('sites')))}; a student of "
            f"{manifest['layers']} layers tied by {manifest['tie']} needs {needed[:6] or 'none'}"
        )


def _sites(manifest: Mapping[str, Any], group: str) -> list[str]:
    """Return the sites that a group has to have; none where the name is not one of the tie's."""
    tied = {name: manifest[name] for name in ("tie", "stage_layers", "layers")}
    layers = [at for at in range(manifest["layers"]) if group_of(at, **tied) == group]
    sites = [f"{point}.{at}" for at in layers for point in POINTS]
    return sites + [FINAL] * (group_of(None, **tied) == group)


def _place(manifest: Mapping[str, Any], group: str) -> int:
    name = _sites(manifest, group)[0]
    return manifest["layers"] if name == FINAL else int(name.partition(".")[2])


def _one(
    group: str, manifest: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Rotation | Unwhitened:
    told = manifest["groups"][group]
    parts = {name: tensors[f"{group}.{name}"] for name in _parts(orthogonal=told["orthogonal"])}
    found: dict[str, Tensor] = {name: torch.from_numpy(array) for name, array in parts.items()}
    _check_shapes(group, manifest["student_width"], manifest["teacher_width"], found)
    _check_values(group, found)
    sites = tuple(told["sites"])
    if not told["orthogonal"]:
        return Unwhitened(group=group, sites=sites, **found)
    rotation = Rotation(group=group, sites=sites, **found)
    check_rotation(rotation)
    return rotation


def _check_shapes(group: str, d_s: int, d_t: int, found: Mapping[str, Tensor]) -> None:
    k = found["core"].shape[0] if found["core"].ndim else 0
    if not 1 <= k <= min(d_s, d_t):
        raise DataInvalid(f"{group}.core: {k} rows; needed 1 to {min(d_s, d_t)}")
    shapes: dict[str, tuple[int, ...]] = {
        "student_basis": (d_s, k),
        "core": (k, k),
        "teacher_basis": (d_t, k),
        "full": (d_s, max(d_s, d_t)),
        "singular_values": (k,),
        "student_mean": (d_s,),
        "student_scale": (d_s,),
        "teacher_mean": (d_t,),
        "teacher_scale": (d_t,),
    }
    for name, tensor in found.items():
        if tuple(tensor.shape) != shapes[name]:
            raise DataInvalid(
                f"{group}.{name}: shape {list(tensor.shape)}; needed {list(shapes[name])}"
            )


def _check_values(group: str, found: Mapping[str, Tensor]) -> None:
    values = found["singular_values"]
    if bool((values < 0).any()) or bool((values[1:] > values[:-1]).any()):
        raise DataInvalid(f"{group}.singular_values: needed >= 0 and falling")
    for name in ("student_scale", "teacher_scale"):
        if name in found and not bool((found[name] > 0).all()):
            raise DataInvalid(f"{group}.{name}: needed > 0")
    for name in ("student_basis", "core", "teacher_basis"):
        off = deviation(found[name].mT @ found[name])
        if off > TOLERANCE:
            raise DataInvalid(
                f"{group}.{name}: its columns are off orthonormal by {off:.3g}; allowed {TOLERANCE}"
            )


def check_rotation(rotation: Rotation) -> None:
    """Refuse a rotation whose full map is not orthogonal or not the completion of its lift.

    Raises:
        DataInvalid: max abs of ``full full^T - I``, or of ``P_s^T full P_t - core``, > 1e-8.
    """
    off = deviation(rotation.full @ rotation.full.mT)
    if off > TOLERANCE:
        raise DataInvalid(
            f"{rotation.group}.full: max abs(R R^T - I) is {off:.3g}; allowed {TOLERANCE}"
        )
    seen = rotation.full[:, : rotation.teacher_basis.shape[0]]
    within = rotation.student_basis.mT @ seen @ rotation.teacher_basis
    off = float((within - rotation.core).abs().max())
    if off > TOLERANCE:
        raise DataInvalid(
            f"{rotation.group}.full: differs from the lifted core by {off:.3g}; allowed {TOLERANCE}"
        )
