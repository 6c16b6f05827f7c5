"""One step of the training loop: forward, loss, backward, optimizer, retraction, average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from core.distill.batches import Wanted, joined, parts, shown
from core.distill.curriculum import Examples
from core.distill.losses._base import Batch, total_loss, weighed
from core.distill.state import TrainState, trainable
from core.errors import SpecInvalid
from core.specs.losses import DEFAULTS

PRIME = 1_000_003
"""Apart from each other: what two seeds draw at neighbouring steps."""


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
        student = state.student
        self._losses = state.training.losses.weights(
            student.compares, routes=student.has_router, decodes=student.decodes
        )
        terms = weighed(self._losses).values()
        self._lengths = any(term.needs_lengths for term in terms)
        compared = any(term.needs_router for term in terms)
        self.wanted = Wanted(
            weights=student.takes_weights or (student.has_router and compared),
            anchored=student.takes_anchored,
            candidates=any(term.needs_candidates for term in terms),
        )

    def step(self, batch: list[Examples], rate: float) -> None:
        """Take one optimizer step at a learning rate; add the loss and its terms to the sums."""
        state = self.state
        assert state.optimizer is not None
        state.optimizer.zero_grad(set_to_none=True)
        values: dict[str, Tensor] = {}
        with self._seeded():  # once for all parts: each draws its own
            for part, share in parts(batch, state.training.accumulate):
                loss, terms = self.loss(part)
                (loss * share).backward()
                for name, value in {"loss": loss.detach(), **terms}.items():
                    values[name] = values.get(name, 0.0) + value.double() * share
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        state.optimizer.step()
        state.student.retract()
        state.step += 1
        state.within += 1
        self._average()
        for name, value in values.items():
            # float64, on the device: reading a number at every step would wait for the device.
            state.sums[name] = state.sums.get(name, 0.0) + value

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Let a student draw the same at the same step, however the run was cut."""
        state, student = self.state, self.state.student
        if not student.draws:
            yield
            return
        device = next(student.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed((state.generator.initial_seed() * PRIME + state.step) % 2**63)
            yield

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
        log_weights, decoded = routed.log_weights, routed.decoded
        vectors = routed.vectors.float()
        if self._lengths:
            vectors = self.state.student.with_lengths(vectors, asked.queries)
        seen = Batch(
            student=vectors,
            teacher=joined([part.teacher for part in batch]),
            candidates=batch[0].candidates,
            log_weights=None if log_weights is None else log_weights.float(),
            weights=asked.weights if self.wanted.weights else None,
            decoded=None if decoded is None else decoded.float(),
            tau=self.state.training.tau_of(self.state.epoch),
            levels=self.state.student.levels,
        )
        loss, terms = total_loss(seen, self._losses)
        if not terms:
            raise SpecInvalid(
                "training.losses: no term of weight above 0 applies to this student; its default "
                f"terms: {', '.join(DEFAULTS[self.state.student.compares])}",
                pointer="/training/losses",
            )
        return loss, terms

    def _average(self) -> None:
        """Move the average towards the parameters; early steps are forgotten faster."""
        kept, step = self.state.training.ema_decay, self.state.step
        decay = min(kept, (1 + step) / (10 + step)) if kept else 0.0
        torch._foreach_lerp_(self._averages, self._learning, 1 - decay)
