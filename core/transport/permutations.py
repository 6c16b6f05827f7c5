"""Orders of heads and neurons, layer by layer: ``new[i] = old[order[i]]``."""

from __future__ import annotations

from dataclasses import dataclass


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
