"""The planes of a skew matrix, whatever repeats: what logarithm and plane factors share."""

from __future__ import annotations

import torch
from scipy.linalg import schur
from torch import Tensor


def split_planes(skew: Tensor) -> tuple[Tensor, Tensor]:
    """Find orthonormal planes with a @ A = s b and b @ A = -s a, by a real Schur form.

    Backward stable for repeated and for vanishing s: null directions are paired among
    themselves (for odd k one of them is left alone, as the last column).

    Args:
        skew: [k, k] float64, skew up to rounding, any device.

    Returns:
        bases: [k, k] orthogonal; columns 2i, 2i + 1 are a and b of plane i.
        sizes: [k // 2], s >= 0.
    """
    k = len(skew)
    form, basis = (torch.from_numpy(part) for part in schur(skew.cpu().numpy(), output="real"))
    paired: list[int] = []
    single: list[int] = []
    at = 0
    while at < k:
        coupled = at + 1 < k and bool(form[at + 1, at] != 0)
        (paired if coupled else single).extend(range(at, at + 1 + coupled))
        at += 1 + coupled
    basis = basis[:, paired + single]
    sizes = skew.new_zeros(k // 2, device="cpu")
    first, second = paired[0::2], paired[1::2]
    sizes[: len(first)] = (form[first, second] - form[second, first]) / 2
    backwards = (sizes < 0).nonzero().flatten() * 2 + 1
    basis[:, backwards] *= -1
    return basis.to(skew.device), sizes.abs().to(skew.device)


def from_planes(bases: Tensor, sizes: Tensor) -> Tensor:
    """Return sum_i s_i (a_i b_i^T - b_i a_i^T): [.., d, d] from [.., d, 2m] and [.., m]."""
    half = (bases[..., 0::2] * sizes[..., None, :]) @ bases[..., 1::2].mT
    return half - half.mT
