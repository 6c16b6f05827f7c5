"""Where the residual stream is read: after each pre-norm, with gamma taken out. Torch-free.

A site's name is ``attention.3``, ``mlp.3`` or ``final``; the number is the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from core.architectures.shape import ModelShape

Tie = Literal["layer", "stage", "global"]
FINAL = "final"
POINTS = ("attention", "mlp")


def sites(shape: ModelShape) -> list[str]:
    """List a model's sites in the order in which the stream passes them."""
    return [f"{point}.{layer}" for layer in range(shape.layers) for point in POINTS] + [FINAL]


def layer_of(site: str) -> int | None:
    """Return a site's layer; None of the final norm."""
    return None if site == FINAL else int(site.partition(".")[2])


def teacher_site(site: str, layer_map: Sequence[int]) -> str:
    """Return the teacher's site beside a student's; ``layer_map[l]`` is the teacher's layer."""
    layer = layer_of(site)
    return FINAL if layer is None else f"{site.partition('.')[0]}.{layer_map[layer]}"


def group_of(layer: int | None, *, tie: Tie, stage_layers: int, layers: int) -> str:
    """Name the rotation that a layer shares: ``global``, ``stage.1``, ``layer.3`` or ``final``.

    Args:
        layer: of the student; None: the final norm, which goes with the last stage.
        tie: what shares one rotation.
        stage_layers: layers a stage has, the last one fewer.
        layers: of the student.
    """
    if tie == "global":
        return "global"
    if tie == "stage":
        return f"stage.{(layers - 1 if layer is None else layer) // stage_layers}"
    return FINAL if layer is None else f"layer.{layer}"


def groups(shape: ModelShape, *, tie: Tie, stage_layers: int) -> Mapping[str, tuple[str, ...]]:
    """Map each rotation's name to its sites, in the order of the stream."""
    found: dict[str, list[str]] = {}
    for site in sites(shape):
        name = group_of(layer_of(site), tie=tie, stage_layers=stage_layers, layers=shape.layers)
        found.setdefault(name, []).append(site)
    return {name: tuple(of) for name, of in found.items()}
