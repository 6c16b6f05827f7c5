"""Plans of folds: random rotations and random orders for a model's shape."""

from __future__ import annotations

import torch
from torch import Tensor

from core.architectures.shape import ModelShape
from core.transport.fold_plans import FoldPlan, Variant
from core.transport.permutations import LayerPermutation
from core.transport.sites import Tie, groups

IDS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(1))
"""[2, 20]: two texts for any tiny model."""


def rotation(old: int, new: int, seed: int) -> Tensor:
    """Return [old, new >= old] float64, rows orthonormal."""
    random = torch.Generator().manual_seed(seed)
    square = torch.randn(new, new, dtype=torch.float64, generator=random)
    found: Tensor = torch.linalg.qr(square)[0][:old].contiguous()
    return found


def orders(shape: ModelShape, seed: int) -> dict[int, LayerPermutation]:
    """Return a random order of everything that may be reordered, for every layer."""
    random = torch.Generator().manual_seed(seed)

    def order(length: int) -> list[int]:
        return torch.randperm(length, generator=random).tolist()

    per_group = shape.heads // shape.kv_heads
    found = {}
    for layer in range(shape.layers):
        kv_heads = order(shape.kv_heads)
        heads = [group * per_group + head for group in kv_heads for head in order(per_group)]
        found[layer] = LayerPermutation(
            layer, tuple(kv_heads), tuple(heads), tuple(order(shape.neurons))
        )
    return found


def plan_of(
    shape: ModelShape,
    variant: Variant,
    *,
    width: int | None = None,
    tie: Tie | None = None,
    permuted: bool = False,
    dtype: str = "keep",
    stage_layers: int = 2,
) -> FoldPlan:
    """Plan a fold with random rotations; ``sliced`` and ``conjugate`` have one a layer."""
    tie = tie or ("layer" if variant in ("sliced", "conjugate") else "global")
    names = groups(shape, tie=tie, stage_layers=stage_layers)
    made = {
        name: rotation(shape.width, width or shape.width, seed) for seed, name in enumerate(names)
    }
    return FoldPlan(
        shape,
        variant,
        {} if variant == "none" else made,
        tie,
        stage_layers,
        orders(shape, 7) if permuted else {},
        dtype,
    )
