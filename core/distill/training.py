"""The one training loop. What it needs to go on is in the state, the state in one file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.distill.curriculum import Examples, TrainingData
from core.distill.losses._base import Batch, total_loss
from core.distill.students._base import StudentModule, restore_student
from core.errors import DataInvalid, SpecInvalid
from core.specs.training import Training
from core.tensors import shards

GENTLE = 0.05
"""Bases and angles learn at this share of the learning rate: a base's entries are near d^-1/2."""
STEP_AT = (0.5, 0.75)
"""Shares of the run after which scheduler ``step`` divides the learning rate by ten."""
Progress = Callable[[int, int], None]


@dataclass
class TrainState:
    """A student in training; ``save`` and ``load`` keep every bit of it."""

    student: StudentModule
    training: Training
    optimizer: torch.optim.AdamW | None
    """None where nothing is trainable."""
    generator: torch.Generator
    ema: dict[str, Tensor]
    """Averaged parameters, by name."""
    best: dict[str, Tensor]
    """The averaged parameters of the best epoch so far."""
    best_cosine: float = -math.inf
    waited: int = 0
    """Epochs since the validation cosine last gained ``min_delta``."""
    waited_from: float = -math.inf
    """The cosine that the next gain is measured from."""
    epoch: int = 0
    """Epochs done."""
    step: int = 0
    stopped: bool = False
    """No further epoch would change the result."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One row per epoch: epoch, loss, every term, learning_rate, validation_cosine."""

    @classmethod
    def start(
        cls, student: StudentModule, training: Training, *, seed: int, device: str = "cpu"
    ) -> TrainState:
        """Begin with a built student."""
        student = student.to(device)
        student.retract()
        now = trainable(student)
        return cls(
            student=student,
            training=training,
            optimizer=_optimizer(student, training),
            generator=torch.Generator().manual_seed(seed),
            ema={name: value.detach().clone() for name, value in now.items()},
            best={name: value.detach().clone() for name, value in now.items()},
        )

    def save(self, path: Path) -> None:
        """Write the whole state as one .safetensors; equal states give equal bytes."""
        tensors = {f"model.{name}": value for name, value in self.student.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        if self.optimizer is not None:
            for index, values in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        tensors["generator"] = self.generator.get_state()
        arrays = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
        shards.save(path, arrays, {"format": "train_state", "version": 1, **self._facts()})

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu") -> TrainState:
        """Read what save wrote, onto a device.

        Raises:
            DataInvalid: the file is something else.
        """
        arrays, manifest = shards.load(path)
        if manifest.get("format") != "train_state":
            raise DataInvalid(f"not a training checkpoint: format {manifest.get('format')!r}")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        training = Training.model_validate(manifest["training"])
        student = restore_student(manifest["config"], _under(tensors, "model.")).to(device)
        optimizer = _optimizer(student, training)
        if optimizer is not None:
            _restore(optimizer, _under(tensors, "optimizer."))
        generator = torch.Generator()
        generator.set_state(tensors["generator"])
        facts = {name: manifest[name] for name in _FACTS}
        for name in ("best_cosine", "waited_from"):
            facts[name] = -math.inf if facts[name] is None else facts[name]
        return cls(
            student=student,
            training=training,
            optimizer=optimizer,
            generator=generator,
            ema={name: value.to(device) for name, value in _under(tensors, "ema.").items()},
            best={name: value.to(device) for name, value in _under(tensors, "best.").items()},
            **facts,
        )

    def result(self) -> StudentModule:
        """Return the student with the best averaged parameters, ready to be used.

        A copy on the CPU: the state can go on training.
        """
        state = {name: value.cpu() for name, value in self.student.state_dict().items()}
        student = restore_student(self.student.config, state)
        _assign(student, self.best)
        student.retract()
        return student.eval()

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {name: getattr(self, name) for name in _FACTS}
        for name in ("best_cosine", "waited_from"):
            facts[name] = facts[name] if math.isfinite(facts[name]) else None
        return {
            **facts,
            "training": self.training.model_dump(mode="json"),
            "config": self.student.config,
        }


_FACTS = ("best_cosine", "waited", "waited_from", "epoch", "step", "stopped", "history")


def run_epochs(
    state: TrainState, data: TrainingData, first: int, last: int, on_step: Progress
) -> None:
    """Train epochs first..last-1; fewer where ``state.stopped`` turns true.

    Args:
        state: changed in place; its ``epoch`` must be ``first``.
        data: from ``training_data``, with the same arguments at every call.
        first: epochs done before.
        last: epochs done after, at most ``state.training.epochs``.
        on_step: called with (steps done, steps of this call) at every step; may raise.

    Raises:
        DataInvalid: the state is at another epoch: the checkpoint belongs to another chunk.
    """
    if state.epoch != first:
        raise DataInvalid(f"the checkpoint is at epoch {state.epoch}, not {first}")
    last = min(last, state.training.epochs)
    steps = steps_per_epoch(data, state.training)
    for epoch in range(first, last):
        if state.stopped:
            return
        _epoch(
            state, data, partial(_tell, on_step, (epoch - first) * steps, (last - first) * steps)
        )


def steps_per_epoch(data: TrainingData, training: Training) -> int:
    """How many batches show every real training query once."""
    return math.ceil(len(data.train) / _real_rows(training))


def learning_rate(training: Training, step: int, total_steps: int) -> float:
    """Learning rate of a step: linear warm-up, then the schedule over the steps that remain."""
    warm = min(training.warmup_steps, total_steps // 2)
    if step < warm:
        return training.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, total_steps - warm)
    factors = {
        "none": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "step": 0.1 ** sum(share >= at for at in STEP_AT),
    }
    return training.learning_rate * factors[training.scheduler]


def validation_cosine(student: StudentModule, data: TrainingData) -> float:
    """Mean cosine to the teacher on the validation rows."""
    total = 0.0
    with torch.no_grad():
        for rows in data.validation.split(1024):
            weights = data.real.mixture.rows(rows).dense()
            vectors = student.routed(data.real.queries[rows], weights).vectors
            wanted = data.real.teacher[rows].double()
            total += float(torch.cosine_similarity(vectors.double(), wanted).sum())
    return total / len(data.validation)


def remarks(student: StudentModule) -> list[str]:
    """Return what whoever asked for this student must be told about its training."""
    if trainable(student):
        return []
    return [
        "Nothing of this student is trained: it is the teacher's own routing and planes. Epochs, "
        "losses and learning rate had no effect; the one row of the history judges it."
    ]


def trainable(student: StudentModule) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that learn, by name."""
    return {name: value for name, value in student.named_parameters() if value.requires_grad}


def _epoch(state: TrainState, data: TrainingData, on_step: Callable[[int], None]) -> None:
    """Train one epoch, validate the average, keep the best, and see whether to stop."""
    steps = steps_per_epoch(data, state.training)
    total_steps = steps * state.training.epochs
    sums: dict[str, float] = {}
    if state.optimizer is None:
        _judge_untrainable(state, data)
        return
    state.student.train()
    rate = 0.0
    for number, batch in enumerate(_batches(state, data, steps, on_step)):
        on_step(number)
        rate = learning_rate(state.training, state.step, total_steps)
        for name, value in _step(state, batch, rate).items():
            sums[name] = sums.get(name, 0.0) + value / steps
    state.epoch += 1
    cosine = _validate(state, data)
    state.history.append(
        {"epoch": state.epoch, **sums, "learning_rate": rate, "validation_cosine": cosine}
    )
    _judge(state, cosine)
    on_step(steps)


def _tell(on_step: Progress, before: int, total: int, done: int) -> None:
    on_step(before + done, total)


def _real_rows(training: Training) -> int:
    return max(1, training.batch_size - round(training.batch_size * training.augment))


def _batches(
    state: TrainState, data: TrainingData, steps: int, on_step: Callable[[int], None]
) -> Iterator[list[Examples]]:
    """Yield each batch as real and made examples; every real training row once."""
    real_rows = _real_rows(state.training)
    made_rows = state.training.batch_size - real_rows
    order = data.train[
        torch.randperm(len(data.train), generator=state.generator).to(data.train.device)
    ]
    made = data.made(steps * made_rows, state.generator, lambda: on_step(0)) if made_rows else None
    for step in range(steps):
        batch = [_take(data.real, order[step * real_rows : (step + 1) * real_rows])]
        if made is not None:
            rows = torch.arange(step * made_rows, (step + 1) * made_rows)
            batch.append(_take(made, rows.to(order.device)))
        yield batch


def _take(examples: Examples, rows: Tensor) -> Examples:
    return Examples(
        queries=examples.queries[rows],
        teacher=examples.teacher[rows],
        mixture=examples.mixture.rows(rows),
        candidates=examples.candidates[rows],
    )


def _step(state: TrainState, batch: list[Examples], rate: float) -> dict[str, float]:
    """Take one optimizer step; return the loss and its terms."""
    assert state.optimizer is not None
    loss, terms = _loss(state, batch)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["share"]
    state.optimizer.step()
    state.student.retract()
    state.step += 1
    _average(state)
    return {"loss": float(loss.detach()), **terms}


def _loss(state: TrainState, batch: list[Examples]) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a batch, and its terms before their weights.

    Raises:
        SpecInvalid: every term that weighs something needs a router the student does not have.
    """
    weights = torch.cat([part.mixture.dense() for part in batch])
    routed = state.student.routed(torch.cat([part.queries for part in batch]), weights)
    seen = Batch(
        student=routed.vectors,
        teacher=torch.cat([part.teacher for part in batch]),
        candidates=batch[0].candidates,
        log_weights=routed.log_weights,
        weights=weights,
    )
    loss, terms = total_loss(seen, state.training.losses.model_dump())
    if not terms:
        raise SpecInvalid(
            "training.losses: no term of weight above 0 applies to this student; allowed: any of "
            "geodesic, cvar, retrieval_kl above 0",
            pointer="/training/losses",
        )
    return loss, terms


def _average(state: TrainState) -> None:
    """Move the average towards the parameters; early steps are forgotten faster."""
    decay = min(state.training.ema_decay, (1 + state.step) / (10 + state.step))
    decay = decay if state.training.ema_decay else 0.0
    with torch.no_grad():
        for name, value in trainable(state.student).items():
            state.ema[name].lerp_(value, 1 - decay)


def _validate(state: TrainState, data: TrainingData) -> float:
    """Validation cosine of the averaged parameters; the trained ones come back afterwards."""
    own = {name: value.detach().clone() for name, value in trainable(state.student).items()}
    _assign(state.student, state.ema)
    state.student.retract()
    state.student.eval()
    cosine = validation_cosine(state.student, data)
    _assign(state.student, own)
    return cosine


def _judge_untrainable(state: TrainState, data: TrainingData) -> None:
    """Record what a student without trainable parameters is worth, and stop."""
    means: dict[str, float] = {}
    with torch.no_grad():
        for rows in data.validation.split(state.training.batch_size):
            loss, terms = _loss(state, [_take(data.real, rows)])
            for name, value in {"loss": float(loss), **terms}.items():
                means[name] = means.get(name, 0.0) + value * len(rows) / len(data.validation)
    cosine = _validate(state, data)
    state.epoch += 1
    state.history.append(
        {"epoch": state.epoch, **means, "learning_rate": 0.0, "validation_cosine": cosine}
    )
    state.best_cosine, state.stopped = cosine, True


def _judge(state: TrainState, cosine: float) -> None:
    if cosine > state.best_cosine:
        state.best_cosine = cosine
        state.best = {name: value.clone() for name, value in state.ema.items()}
    if cosine > state.waited_from + state.training.min_delta:
        state.waited_from, state.waited = cosine, 0
    else:
        state.waited += 1
    patience = state.training.patience
    state.stopped = state.epoch >= state.training.epochs or (
        patience is not None and state.waited >= patience
    )


def _assign(student: StudentModule, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trainable(student).items():
            parameter.copy_(values[name])


def _optimizer(student: StudentModule, training: Training) -> torch.optim.AdamW | None:
    gentle = {id(parameter) for parameter in student.gentle()}
    learning = list(trainable(student).values())
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter for parameter in learning if id(parameter) not in gentle],
            "weight_decay": training.weight_decay,
            "share": 1.0,
        },
        {
            "params": [parameter for parameter in learning if id(parameter) in gentle],
            "weight_decay": 0.0,
            "share": GENTLE,
        },
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=training.learning_rate) if groups else None


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    inside = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in inside.items()}


def _restore(optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, part = name.split(".", 1)
        found.setdefault(int(index), {})[part] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": found, "param_groups": groups})
