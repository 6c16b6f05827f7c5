"""Where heads stand among H^L slots: codes of L digits, and the keys that add up to a slot's own.

Product keys (Lample et al. 2019, section 3) with a correction per slot: a slot's key is the sum of
one key per level and of what that sum leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """N heads on S = H^L slots; slot s has digit ``(s // H^(L-1-l)) % H`` at level l."""

    head_of: Tensor
    """[S] int64: every head has a slot, some several."""
    keys: Tensor
    """[L, H, d] float64."""
    own: Tensor
    """[S, d] float64: the slot's head less the keys of its digits."""


def digits(heads: int, levels: int) -> Tensor:
    """Return the digits of every slot: [H^L, L] int64."""
    slots = torch.arange(heads**levels)
    places = [slots // heads ** (levels - 1 - level) % heads for level in range(levels)]
    return torch.stack(places, dim=1)


def place(centroids: Tensor, *, heads: int, levels: int) -> Slots:
    """Give heads codes by which sums of few keys come near them.

    At level l the slots that share their digits so far are sorted along the l-th principal
    direction and cut into H equal parts, so that a digit means the same under every prefix. The
    keys are the least-squares solution for these codes.

    Args:
        centroids: [N, d] floating, N <= H^L.
        heads: H.
        levels: L.
    """
    count, total = len(centroids), heads**levels
    points = centroids.double()
    head_of = torch.arange(total) % count  # some heads once more than others
    spread = points - points.mean(0)
    _, axes = torch.linalg.eigh(spread.T @ spread)
    axes = axes.flip(1)
    order = torch.arange(total)[None]  # [prefixes, slots of each]
    for level in range(levels):
        along = spread @ axes[:, level % axes.shape[1]]
        by = along[head_of[order]].argsort(dim=1, stable=True)
        order = order.gather(1, by).reshape(len(order) * heads, -1)
    head_of = head_of[order.flatten()]
    chosen = torch.nn.functional.one_hot(digits(heads, levels), heads).double().flatten(1)
    wanted = points[head_of]
    keys = torch.linalg.lstsq(chosen, wanted, driver="gelsd").solution  # [L H, d], least norm
    return Slots(head_of, keys.unflatten(0, (levels, heads)), wanted - chosen @ keys)
