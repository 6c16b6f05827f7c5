"""One step of the training loop: forward, loss, backward, optimizer, retraction, average."""

from __future__ import annotations

import torch
from torch import Tensor

from core.distill.batches import Wanted, joined, shown
from core.distill.curriculum import Examples
from core.distill.losses._base import Batch, losses, total_loss
from core.distill.state import TrainState, trainable
from core.errors import SpecInvalid


class Stepper:
    """Steps of one state, with what does not change between them found once."""

    wanted: Wanted
    """What its batches must hold."""

    def __init__(self, state: TrainState) -> None:
        """Prepare; ``state`` is changed in place by ``step``."""
        self.state = state
        learning = trainable(state.student)
        self._learning = [value.detach() for value in learning.values()]
        self._averages = [state.ema[name] for name in learning]
        self._losses = state.training.losses.model_dump()
        weighed = [loss for name, loss in losses().items() if self._losses[name]]
        compared = any(loss.needs_router for loss in weighed)
        self.wanted = Wanted(
            weights=state.student.takes_weights or (state.student.has_router and compared),
            anchored=state.student.takes_anchored,
            candidates=any(loss.needs_candidates for loss in weighed),
        )

    def step(self, batch: list[Examples], rate: float) -> None:
        """Take one optimizer step at a learning rate; add the loss and its terms to the sums."""
        state = self.state
        assert state.optimizer is not None
        loss, terms = self.loss(batch)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        state.optimizer.step()
        state.student.retract()
        state.step += 1
        state.within += 1
        self._average()
        for name, value in {"loss": loss.detach(), **terms}.items():
            # float64, on the device: reading a number at every step would wait for the device.
            state.sums[name] = state.sums.get(name, 0.0) + value.double()

    def loss(self, batch: list[Examples]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, and its terms before their weights.

        With ``precision`` bfloat16 the student's products are rounded to 8 bits of mantissa;
        what comes out of it, and every term of the loss, is float32.

        Raises:
            SpecInvalid: every term that weighs something needs a router the student does not have.
        """
        asked = shown(batch, self.wanted)
        narrow = self.state.training.precision == "bfloat16"
        with torch.autocast(asked.queries.device.type, torch.bfloat16, enabled=narrow):
            routed = self.state.student.routed(asked)
        log_weights = routed.log_weights
        seen = Batch(
            student=routed.vectors.float(),
            teacher=joined([part.teacher for part in batch]),
            candidates=batch[0].candidates,
            log_weights=None if log_weights is None else log_weights.float(),
            weights=asked.weights if self.wanted.weights else None,
        )
        loss, terms = total_loss(seen, self._losses)
        if not terms:
            raise SpecInvalid(
                "training.losses: no term of weight above 0 applies to this student; allowed: any "
                "of geodesic, cvar, retrieval_kl above 0",
                pointer="/training/losses",
            )
        return loss, terms

    def _average(self) -> None:
        """Move the average towards the parameters; early steps are forgotten faster."""
        kept, step = self.state.training.ema_decay, self.state.step
        decay = min(kept, (1 + step) / (10 + step)) if kept else 0.0
        torch._foreach_lerp_(self._averages, self._learning, 1 - decay)
