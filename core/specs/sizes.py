"""How large a model is, as far as a student's spec must know it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Of a model that a student learns from."""

    dim: int
    """Width of a query."""
    width: int
    """Width of an answer; the same for models of rotations."""
    rows: int
    """Training queries."""
    clusters: int = 0
    """That a teacher over it weighs; 0 where it weighs none."""
    maps: bool = False
    """Whether each of those answers by a matrix [d, m] of its own, not by a vector."""

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Sizes:
        """Read them from an artifact's meta."""
        dim = meta["dim"]
        width, maps = meta.get("target_dim", dim), meta.get("mode", "answers") == "maps"
        return cls(dim, width, meta["rows"], meta.get("clusters", 0), maps)
