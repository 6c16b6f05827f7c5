"""Models in float64 throughout: transformers' norms compute in float32 whatever they are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Norm(nn.Module):
    """RMSNorm in the dtype of its input."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """Widen a model and its norms; changes it in place. Needs sdpa attention."""
    model.double()
    found: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RMSNorm")
    ]
    for parent, name, norm in found:
        setattr(parent, name, Norm(norm.weight, norm.variance_epsilon))
    return model


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return [B, T, V] of the model as it is."""
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found
