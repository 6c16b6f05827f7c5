"""The arithmetic of a fold, weight by weight: orders, gammas and rotations, there and back.

Rows of the residual stream are ``x``; the folded model's are ``s x R`` with ``s = sqrt(d_r/d_s)``
(``FoldPlan.scale``). With torch's ``[out, in]``: what reads after a norm becomes
``W diag(gamma) R / s``, what writes ``s R^T W``, the embedding ``s E R`` (document 002, section 6,
with the norms' gammas taken in first, so that nothing the model computes changes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from core.architectures.shape import ModelShape
from core.architectures.tables import Family, Stream, Weight
from core.errors import DataInvalid
from core.transport.fold_plans import FoldPlan
from core.transport.permutations import LayerPermutation


@dataclass(frozen=True)
class Recipe:
    """``scale * left^T ((weight[rows][:, columns] * before) right) * after``, all float64.

    A weight of one axis counts as one row. What is None is left out.
    """

    rows: Tensor | None = None
    """[out] int64, a permutation."""
    columns: Tensor | None = None
    """[in] int64, a permutation."""
    before: Tensor | None = None
    """[in]"""
    left: Tensor | None = None
    """[out, new out]"""
    right: Tensor | None = None
    """[in, new in]"""
    after: Tensor | None = None
    """[new in]"""
    scale: float = 1.0
    value: Tensor | None = None
    """[new in]: what stands there instead, whatever the weight was."""

    def turned(self, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Make new rows [b, new in] of old ones [b, in]: all but ``rows``, ``columns``, ``left``.

        Args:
            rows: float64, written over.
            out: where the product goes, [b, new in] float64; None: to new memory.
        """
        if self.before is not None:
            rows.mul_(self.before)
        made = rows if self.right is None else torch.mm(rows, self.right, out=out)
        if self.after is not None:
            made.mul_(self.after)
        return made.mul_(self.scale) if self.scale != 1.0 else made


def recipe(plan: FoldPlan, name: str, norms: Mapping[str, Tensor]) -> Recipe:
    """Say how the folded model's weight is made from the model's.

    Args:
        plan: of the fold.
        name: whole name of a weight of ``plan.shape``; the head of tied embeddings too.
        norms: by whole name, [d_s] float64: of this weight's norm at least (``read_norms``).

    Raises:
        DataInvalid: no such weight, its norm is missing, an order is none.
    """
    layer, weight = place(plan.shape, name)
    permutation = None if layer is None else plan.permutations.get(layer)
    orders = [orders_of(plan.shape, permutation, axis) for axis in weight.axes]
    found = Recipe(columns=orders[-1], rows=orders[0] if len(orders) == 2 else None)
    if plan.variant == "none" or weight.side == "neither":
        return found
    if plan.variant == "conjugate":
        return _conjugate(plan, layer, weight, found)
    return _exact(plan, layer, weight, found, norms)


def _exact(
    plan: FoldPlan,
    layer: int | None,
    weight: Weight,
    found: Recipe,
    norms: Mapping[str, Tensor],
) -> Recipe:
    if weight.side == "norm":
        return Recipe(value=torch.ones(plan.width, dtype=torch.float64))
    first = 0 if weight.name == plan.shape.table.embedding else layer
    rotation = plan.rotation(first)
    if weight.side == "reads":
        gamma = _gamma(plan.shape.table, layer, weight, norms, plan.shape.width)
        return replace(found, before=gamma / plan.scale, right=rotation)
    if weight.axes[-1] == "residual":
        return replace(found, right=rotation, scale=plan.scale)
    return replace(found, left=rotation, scale=plan.scale)


def _conjugate(plan: FoldPlan, layer: int | None, weight: Weight, found: Recipe) -> Recipe:
    """The document's own fold: inside the blocks alone, gammas where they are.

    Not exact: the stream between the blocks keeps its basis, which what reads it now turns from.
    """
    if layer is None or weight.side == "norm":
        return found
    rotation = plan.rotation(layer)
    if weight.side == "writes" and len(weight.axes) == 2:
        return replace(found, left=rotation)
    return replace(found, right=rotation)


def unfold_recipe(plan: FoldPlan, name: str, norms: Mapping[str, Tensor]) -> Recipe:
    """Say how the model's weight is made from the folded model's: the inverse of ``recipe``.

    Args:
        plan: of the fold.
        name: whole name of a weight of ``plan.shape``.
        norms: by whole name, [d_s] float64; the norms' own weights are made of them.

    Raises:
        DataInvalid: as ``recipe``; or a gamma is 0, so that what was multiplied by it is lost.
    """
    _, weight = place(plan.shape, name)
    if plan.absorbs and weight.side == "norm":
        return Recipe(value=_norm(norms, name, plan.shape.width))
    return inverse(recipe(plan, name, norms), name)


def inverse(made: Recipe, name: str) -> Recipe:
    """Return the recipe that undoes one; ``name`` is for the error.

    Raises:
        DataInvalid: a gamma is 0.
    """
    if made.before is not None and (lost := int((made.before == 0).sum())):
        raise DataInvalid(
            f"{name}: {lost} entries of its norm's gamma are 0; what was multiplied by them cannot "
            "be had back from the folded weights"
        )
    return Recipe(
        rows=None if made.rows is None else made.rows.argsort(),
        # Orders of the columns and rotations of them never meet in one weight.
        columns=None if made.columns is None else made.columns.argsort(),
        left=None if made.left is None else made.left.mT,
        right=None if made.right is None else made.right.mT,
        after=None if made.before is None else made.before.reciprocal(),
        scale=1 / made.scale,
    )


def place(shape: ModelShape, name: str) -> tuple[int | None, Weight]:
    """Return a weight's layer (None: outside of them) and its entry in the family's table.

    Raises:
        DataInvalid: a model of this shape has no weight of this name.
    """
    known = _places(shape)
    if name not in known:
        raise DataInvalid(f"{name[:200]}: no weight of a {shape.family} of {shape.layers} layers")
    return known[name]


@lru_cache(maxsize=8)
def _places(shape: ModelShape) -> Mapping[str, tuple[int | None, Weight]]:
    kept = {*shape.tensors(), shape.table.head}
    weights = shape.table.weights(shape.layers)
    return {name: (layer, weight) for name, layer, weight in weights if name in kept}


def stored_shape(shape: ModelShape, name: str, width: int) -> tuple[int, ...]:
    """Return a weight's shape in a model whose residual stream is so wide."""
    _, weight = place(shape, name)
    return tuple(width if axis == "residual" else shape.size(axis) for axis in weight.axes)


def norm_names(shape: ModelShape) -> list[str]:
    """List the norms of the residual stream, by whole name."""
    weights = shape.table.weights(shape.layers)
    return [name for name, _, weight in weights if weight.side == "norm"]


def _gamma(
    table: Family, layer: int | None, weight: Weight, norms: Mapping[str, Tensor], width: int
) -> Tensor:
    prefix = "" if layer is None else table.layer_prefix.format(layer=layer)
    return _norm(norms, f"{prefix}{weight.after}", width)


def _norm(norms: Mapping[str, Tensor], name: str, width: int) -> Tensor:
    if name not in norms or norms[name].shape != (width,):
        raise DataInvalid(f"{name}: missing among the norms, or not of shape [{width}]")
    return norms[name].to(torch.float64)


def orders_of(
    shape: ModelShape, permutation: LayerPermutation | None, stream: Stream
) -> Tensor | None:
    """Return the order [entries] int64 along an axis of this stream; None: as it is.

    Raises:
        DataInvalid: the layer's permutation is none, or parts a query head from its KV group.
    """
    if permutation is None or stream not in ("queries", "keys", "neurons"):
        return None
    if stream == "neurons":
        return _order(permutation.layer, "neurons", permutation.neurons, shape.neurons)
    layer = permutation.layer
    kv_heads = _order(layer, "kv_heads", permutation.kv_heads, shape.kv_heads)
    heads = _order(layer, "heads", permutation.heads, shape.heads)
    _check_groups(shape, layer, kv_heads, heads)
    chosen = heads if stream == "queries" else kv_heads
    if chosen is None:
        return None
    return (chosen[:, None] * shape.head_dim + torch.arange(shape.head_dim)).flatten()


def _order(layer: int, name: str, order: Sequence[int] | None, length: int) -> Tensor | None:
    if order is None:
        return None
    made = torch.tensor(order, dtype=torch.int64)
    if made.shape != (length,) or not torch.equal(made.sort().values, torch.arange(length)):
        raise DataInvalid(
            f"permutations: layer {layer}: {name} must be an order of 0 to {length - 1}"
        )
    return made


def _check_groups(
    shape: ModelShape, layer: int, kv_heads: Tensor | None, heads: Tensor | None
) -> None:
    per_group = shape.heads // shape.kv_heads
    groups = torch.arange(shape.kv_heads) if kv_heads is None else kv_heads
    asked = torch.arange(shape.heads) if heads is None else heads
    if not torch.equal(asked // per_group, groups.repeat_interleave(per_group)):
        raise DataInvalid(
            f"permutations: layer {layer}: heads must move with their KV group of {per_group}: "
            "heads[i] // per_group == kv_heads[i // per_group]"
        )
