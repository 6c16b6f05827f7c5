"""Orders of heads and neurons, layer by layer: ``new[i] = old[order[i]]``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.architectures.shape import ModelShape
from core.errors import DataInvalid
from core.tensors.manifests import shown

_ORDERS = ("kv_heads", "heads", "neurons")


@dataclass(frozen=True)
class LayerPermutation:
    """How one layer of the student is reordered; None: left as it is.

    Query heads move with their KV group: ``heads[i] // per_group == kv_heads[i // per_group]`` in
    units of old heads, where ``per_group = heads / kv_heads``.
    """

    layer: int
    kv_heads: tuple[int, ...] | None = None
    """[kv_heads]"""
    heads: tuple[int, ...] | None = None
    """[heads]"""
    neurons: tuple[int, ...] | None = None
    """[neurons]"""

    def inverse(self) -> LayerPermutation:
        """Return the one that undoes this one."""
        return LayerPermutation(self.layer, *(_undone(getattr(self, name)) for name in _ORDERS))


def _undone(order: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if order is None else tuple(sorted(range(len(order)), key=order.__getitem__))


def identity(layer: int, shape: ModelShape) -> LayerPermutation:
    """Return the permutation of a layer that moves nothing, every order written out."""
    return LayerPermutation(layer, *(tuple(range(getattr(shape, name))) for name in _ORDERS))


def check(permutation: LayerPermutation, shape: ModelShape) -> None:
    """Refuse a permutation that does not fit a model.

    Raises:
        DataInvalid: no such layer, an order that is no permutation of as many as there are, or
            heads that leave their KV group.
    """
    layer = permutation.layer
    if type(layer) is not int or not 0 <= layer < shape.layers:
        raise DataInvalid(
            f"permutations: layer {shown(layer)}; the model has 0 to {shape.layers - 1}"
        )
    for name in _ORDERS:
        order, count = getattr(permutation, name), getattr(shape, name)
        if order is not None and not _permutes(order, count):
            raise DataInvalid(
                f"permutations: {name} of layer {layer} must hold each of 0 to {count - 1} once"
            )
    kv_heads, heads = permutation.kv_heads, permutation.heads
    if (kv_heads is None) != (heads is None):
        raise DataInvalid(f"permutations: layer {layer} needed both heads and kv_heads, or neither")
    if kv_heads is None or heads is None:
        return
    per_group = shape.heads // shape.kv_heads
    for at, head in enumerate(heads):
        if head // per_group != kv_heads[at // per_group]:
            raise DataInvalid(
                f"permutations: layer {layer}: head {head} at place {at} is of group "
                f"{head // per_group}; group {kv_heads[at // per_group]} stands there"
            )


def _permutes(order: Sequence[Any], count: int) -> bool:
    return all(type(at) is int for at in order) and sorted(order) == list(range(count))


def dump(
    permutations: Mapping[int, LayerPermutation],
    shape: ModelShape,
    reports: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return what the artifact's JSON holds.

    Args:
        permutations: by layer.
        shape: of the student that they reorder.
        reports: of ``permute.match_layer``, kept beside.
    """
    for at, one in permutations.items():
        if at != one.layer:
            raise ValueError(f"the permutation of layer {one.layer} stands under {at}")
        check(one, shape)
    ordered = [permutations[at] for at in sorted(permutations)]
    return {
        "format": "permutations",
        "version": 1,
        **{name: getattr(shape, name) for name in ("layers", *_ORDERS)},
        "permutations": [
            {
                "layer": one.layer,
                **{name: _listed(getattr(one, name)) for name in _ORDERS},
            }
            for one in ordered
        ],
        "reports": [dict(each) for each in reports],
    }


def _listed(order: tuple[int, ...] | None) -> list[int] | None:
    return None if order is None else list(order)


def load_permutations(path: Path, shape: ModelShape) -> dict[int, LayerPermutation]:
    """Read the artifact's JSON and check it against the model that it is to reorder.

    Raises:
        DataInvalid: the file is none, is of a model of other counts, or an order is broken.
    """
    told = _read(path)
    for name in ("layers", *_ORDERS):
        count = getattr(shape, name)
        if told.get(name) != count:
            raise DataInvalid(
                f"permutations: {name} {shown(told.get(name))}; the model has {count}"
            )
    entries = told.get("permutations")
    if not isinstance(entries, list):
        raise DataInvalid(f"permutations: {shown(entries)}; needed a list")
    found: dict[int, LayerPermutation] = {}
    for entry in entries:
        one = _one(entry)
        check(one, shape)
        if one.layer in found:
            raise DataInvalid(f"permutations: layer {one.layer} stands twice")
        found[one.layer] = one
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataInvalid(f"not a readable permutations file: {error}") from error
    if not isinstance(told, dict) or (told.get("format"), told.get("version")) != (
        "permutations",
        1,
    ):
        raise DataInvalid("manifest: needed format 'permutations', version 1")
    return told


def _one(entry: Any) -> LayerPermutation:
    if not isinstance(entry, dict) or entry.keys() != {"layer", *_ORDERS}:
        raise DataInvalid(f"permutations: needed entries of layer, {', '.join(_ORDERS)}")
    orders = [entry[name] for name in _ORDERS]
    for name, order in zip(_ORDERS, orders, strict=True):
        if order is not None and not isinstance(order, list):
            raise DataInvalid(f"permutations: {name} {shown(order)}; needed a list or null")
    return LayerPermutation(
        entry["layer"], *(None if order is None else tuple(order) for order in orders)
    )
