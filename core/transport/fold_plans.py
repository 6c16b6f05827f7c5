"""What a fold is to do: whose rotations and orders go into which weights, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from core.architectures.shape import ModelShape
from core.errors import DataInvalid, SpecInvalid
from core.transport.permutations import LayerPermutation
from core.transport.sites import Tie, group_of

Variant = Literal["none", "global", "sliced", "conjugate"]
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
PROBES, ORTHOGONAL = 4, 1e-8
"""Random rows that a map is tried on, and how far one may come back from where it was."""
SLICED = "sliced_"
"""Before a family's name: a folder whose model is one of ``core.transport.sliced``."""


@dataclass(frozen=True)
class FoldPlan:
    """One variant of one model. ``none`` permutes alone: norms, width and tied heads stay.

    Raises:
        SpecInvalid: the variant cannot take these rotations.
        DataInvalid: a rotation is missing or no rotation; an order is none (when first used).
    """

    shape: ModelShape
    """Of the model that is folded."""
    variant: Variant
    rotations: Mapping[str, Tensor] = field(default_factory=dict)
    """By group: [d_s, d_r] float64, rows orthonormal. Read when needed, so it may be lazy, and may
    lack what a shard does not need."""
    tie: Tie = "global"
    stage_layers: int = 8
    permutations: Mapping[int, LayerPermutation] = field(default_factory=dict)
    """By layer; applied before the rotations, which do not see them."""
    dtype: str = "keep"
    """Of the weights written."""

    def __post_init__(self) -> None:
        if self.dtype != "keep" and self.dtype not in DTYPES:
            raise SpecInvalid(f"dtype {self.dtype!r}; allowed: keep, {', '.join(DTYPES)}")
        if self.variant == "none" and self.rotations:
            raise SpecInvalid("variant 'none' takes no rotations")
        if self.variant == "global" and self.tie != "global":
            raise SpecInvalid(
                f"variant 'global': the rotations are tied by {self.tie}, so layers have different "
                "ones; rotate with tie 'global', or fold 'sliced'",
                pointer="/fold/variant",
            )

    @cached_property
    def width(self) -> int:
        """Of the folded model's residual stream: ``d_r``."""
        if self.variant == "none":
            return self.shape.width
        if not self.rotations:
            raise DataInvalid(f"rotations: none given; variant {self.variant!r} needs them")
        width = int(self._map(next(iter(self.rotations))).shape[1])
        if self.variant == "conjugate" and width != self.shape.width:
            raise SpecInvalid(
                f"variant 'conjugate': the rotations lead from width {self.shape.width} to {width};"
                " block by block the stream between the blocks keeps its width, so they must be "
                "square: fold 'global' or 'sliced'",
                pointer="/fold/variant",
            )
        return width

    @cached_property
    def scale(self) -> float:
        """``sqrt(d_r / d_s)``: how much longer the folded residual stream is.

        A root mean square is over more entries where the stream is wider. The longer stream keeps
        it, and with it the norm's epsilon, which Qwen3's norms of queries and keys share.
        """
        return float((self.width / self.shape.width) ** 0.5)

    @property
    def absorbs(self) -> bool:
        """Whether the norms' gammas go into what reads after them, and a tied head parts."""
        return self.variant in ("global", "sliced")

    def group(self, layer: int | None) -> str:
        """Name the rotation of a layer (None: of the final norm)."""
        return group_of(
            layer, tie=self.tie, stage_layers=self.stage_layers, layers=self.shape.layers
        )

    def rotation(self, layer: int | None) -> Tensor | None:
        """Return the layer's map [d_s, d_r] float64; None where nothing is rotated."""
        if self.variant == "none":
            return None
        found = self._map(self.group(layer))
        if found.shape[1] != self.width:
            raise DataInvalid(
                f"rotations: {self.group(layer)} leads to width {found.shape[1]}, another to "
                f"{self.width}"
            )
        return found

    def _map(self, group: str) -> Tensor:
        if group not in self.rotations:
            raise DataInvalid(f"rotations: {group} is missing; there are {list(self.rotations)}")
        found = self.rotations[group]
        if found.ndim != 2 or found.shape[0] != self.shape.width or found.dtype != torch.float64:
            raise DataInvalid(
                f"rotations: {group} is {list(found.shape)} {found.dtype}; needed "
                f"[{self.shape.width}, d >= {self.shape.width}] float64"
            )
        _check_orthogonal(group, found)
        return found

    @property
    def turns(self) -> tuple[int, ...]:
        """Layers after which the stream turns into another basis: each takes a skip adapter."""
        if self.variant != "sliced":
            return ()
        after = [*range(1, self.shape.layers), None]
        return tuple(
            layer
            for layer in range(self.shape.layers)
            if self.group(layer) != self.group(after[layer])
        )

    @property
    def own_module(self) -> bool:
        """Whether the folder takes a module of ours to load.

        For its skip adapters; or because transformers' Llama refuses a width that is no multiple
        of the heads, though with ``head_dim`` told nothing depends on it.
        """
        return bool(self.turns) or (
            self.shape.family == "llama" and self.width % self.shape.heads != 0
        )

    @property
    def exact(self) -> bool:
        """Whether the folded model computes what the model computes, up to rounding."""
        return self.variant != "conjugate"

    def folded_shape(self) -> ModelShape:
        """Return the shape of what comes out."""
        return replace(
            self.shape,
            width=self.width,
            tied=self.shape.tied and not self.absorbs,
            dtype=self.shape.dtype if self.dtype == "keep" else self.dtype,
        )


def _check_orthogonal(group: str, found: Tensor) -> None:
    """Raise DataInvalid unless ``x R R^T = x`` for some random rows, which any fault shows in."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(PROBES, found.shape[0], dtype=torch.float64, generator=random)
    gap = float(((rows @ found) @ found.mT - rows).abs().max())
    if not gap <= ORTHOGONAL:
        raise DataInvalid(
            f"rotations: {group} [{found.shape[0]}, {found.shape[1]}] moves rows by {gap:.3g} there"
            f" and back; needed R R^T = I to {ORTHOGONAL:g}"
        )


def folded_config(config: Mapping[str, Any], plan: FoldPlan) -> dict[str, Any]:
    """Return the config.json of the folded model.

    Args:
        config: the model's own; what is not about the fold stays as it is (RoPE is not touched).
        plan: of the fold.
    """
    shape = plan.folded_shape()
    made = {
        name: value for name, value in config.items() if name not in ("torch_dtype", "auto_map")
    }
    made.update(
        model_type=shape.family,
        architectures=[shape.table.architecture],
        hidden_size=shape.width,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        dtype=shape.dtype,
    )
    if plan.own_module:
        kind = shape.table.architecture.removesuffix("ForCausalLM")
        made.update(
            model_type=SLICED + shape.family,
            architectures=[f"Sliced{shape.table.architecture}"],
            auto_map={
                "AutoConfig": f"modeling_sliced.Sliced{kind}Config",
                "AutoModelForCausalLM": f"modeling_sliced.Sliced{shape.table.architecture}",
            },
            skip_adapters=list(plan.turns),
        )
    return made
