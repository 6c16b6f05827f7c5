"""What document 002's section 16.3 has checked, measured: rotations, round trips, RoPE, norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from core.architectures.shape import ModelShape
from core.transport.folding import norm_names
from core.transport.rotation_figures import errors
from core.transport.rotations import Rotation, Unwhitened
from core.transport.weight_files import WeightFile

ROWS = 256
"""Random rows that a rotation is tried on."""
ROPE = (
    *("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"),
    *("max_position_embeddings", "num_attention_heads", "num_key_value_heads"),
)
"""What of a config.json decides how positions turn queries and keys."""


def turn_facts(found: Rotation | Unwhitened, *, seed: int) -> dict[str, Any]:
    """Measure one map anew, from its matrices alone.

    Args:
        found: of a group.
        seed: of the random rows.

    Returns:
        JSON values: ``k``, ``orthogonal``, ``errors`` (``rotation_figures.errors``),
        ``round_trip``: max abs(x R R^T - x) of random rows x of the student, N(0, 1), and
        ``round_trip_back``: max abs(y R^T R - y); the latter of square rotations alone, both None
        of a map that is none.
    """
    there = back = None
    if isinstance(found, Rotation):
        R = found.full.double()
        there = _round_trip(R, seed)
        back = _round_trip(R.mT, seed) if R.shape[0] == R.shape[1] else None
    return {
        "k": int(found.core.shape[0]),
        "orthogonal": found.orthogonal,
        "errors": errors(found),
        "round_trip": there,
        "round_trip_back": back,
    }


def _round_trip(R: torch.Tensor, seed: int) -> float:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, len(R), generator=random, dtype=torch.float64).to(R.device)
    return float((x @ R @ R.mT - x).abs().max())


def worst_error(facts: Mapping[str, Any]) -> float:
    """Return the largest of a map's errors of orthogonality; of what is no rotation, of its parts.

    An un-whitened map is not meant to be one, so only its core and bases count.
    """
    told: Mapping[str, float] = facts["errors"]
    names = told.keys() if facts["orthogonal"] else ("core", "bases")
    return max(told[name] for name in names)


def rope_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Name what two config.json say differently about positions; empty: RoPE is untouched.

    The size of a head, which a configuration may leave to its width, is compared by value.
    """
    changed = [name for name in ROPE if before.get(name) != after.get(name)]
    if _head_dim(before) != _head_dim(after):
        changed.append("head_dim")
    return tuple(changed)


def _head_dim(config: Mapping[str, Any]) -> int:
    told = config.get("head_dim")
    return int(told or config["hidden_size"] // config["num_attention_heads"])


def norms_off(shards: Sequence[Path], shape: ModelShape) -> float:
    """Return the largest deviation from 1 of any gamma: 0 where a fold took all of them in.

    Args:
        shards: of the folded model.
        shape: of the model, whose norms before blocks and head are meant.
    """
    worst = 0.0
    for path in shards:
        with WeightFile(path) as file:
            for name in set(norm_names(shape)) & set(file.layouts):
                gamma = file.rows(name, 0, 1).double()
                worst = max(worst, float((gamma - 1).abs().max()))
    return worst
