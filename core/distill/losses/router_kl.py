"""How far the learnt router's weights are from the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from core.distill.losses._base import Batch, Loss


def router_kl(batch: Batch) -> Tensor:
    """KL(teacher || router) over the clusters, in nats, averaged; zero if and only if equal."""
    if batch.log_weights is None or batch.weights is None:
        raise ValueError("router_kl needs the weights of router and teacher")
    entropy = torch.xlogy(batch.weights, batch.weights)
    cross = batch.weights * batch.log_weights
    return (entropy - cross).sum(-1).mean()


LOSS = Loss(compute=router_kl, needs_router=True)
