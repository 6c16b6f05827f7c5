"""A student in training: all that the loop needs to go on, in one file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.distill.students._base import StudentModule, restore_student
from core.errors import DataInvalid
from core.specs.training import Training
from core.tensors import shards

GENTLE = 0.05
"""Bases and angles learn at this share of the learning rate: a base's entries are near d^-1/2."""
VERSION = 3
"""Of the checkpoint's layout."""


@dataclass
class TrainState:
    """A student in training; ``save`` and ``load`` keep every bit of it."""

    student: StudentModule
    training: Training
    optimizer: torch.optim.AdamW | None
    """None where nothing is trainable."""
    generator: torch.Generator
    """As it stood when the present epoch began: its order and made queries derive from it, so a
    run that goes on inside the epoch finds the same ones."""
    ema: dict[str, Tensor]
    """Averaged parameters, by name."""
    best: dict[str, Tensor]
    """The averaged parameters of the best epoch so far."""
    best_score: float = -math.inf
    """What validation said of it; the higher the better."""
    waited: int = 0
    """Epochs since the validation score last gained ``min_delta``."""
    waited_from: float = -math.inf
    """The score that the next gain is measured from."""
    flat: int = 0
    """Epochs without such a gain since the last one or the last cut."""
    cuts: int = 0
    """How often scheduler ``plateau`` has reduced the learning rate."""
    epoch: int = 0
    """Epochs done."""
    within: int = 0
    """Steps done of the epoch that has begun; 0 between epochs."""
    step: int = 0
    """Steps done in all."""
    stopped: bool = False
    """No further epoch would change the result."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Of the epoch that has begun: float64 scalars, the sums of the loss and of its terms."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One row per epoch: epoch, loss, every term, learning_rate, the validation score; stage and
    tau where there is a curriculum."""
    origin: dict[str, Any] = field(default_factory=dict)
    """JSON values: what it is trained on, for whoever goes on from a file alone."""

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
        for part in ("ema", "best", "sums"):
            held: dict[str, Tensor] = getattr(self, part)
            tensors |= {f"{part}.{name}": value for name, value in held.items()}
        if self.optimizer is not None:
            for index, values in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        tensors["generator"] = self.generator.get_state()
        arrays = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
        shards.save(path, arrays, {"format": "train_state", "version": VERSION, **self._facts()})

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu") -> TrainState:
        """Read what save wrote, onto a device.

        Raises:
            DataInvalid: the file is something else, or of another version.
        """
        arrays, manifest = shards.load(path)
        if manifest.get("format") != "train_state":
            raise DataInvalid(f"not a training checkpoint: format {manifest.get('format')!r}")
        if manifest.get("version") != VERSION:
            raise DataInvalid(
                f"a training checkpoint of version {manifest.get('version')!r}; needed {VERSION}"
            )
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        training = Training.model_validate(manifest["training"])
        student = restore_student(manifest["config"], _under(tensors, "model.")).to(device)
        optimizer = _optimizer(student, training)
        if optimizer is not None:
            _restore(optimizer, _under(tensors, "optimizer."))
        generator = torch.Generator()
        generator.set_state(tensors["generator"])
        facts = {name: manifest[name] for name in _FACTS}
        for name in ("best_score", "waited_from"):
            facts[name] = -math.inf if facts[name] is None else facts[name]
        ema, best, sums = (
            {name: value.to(device) for name, value in _under(tensors, f"{part}.").items()}
            for part in ("ema", "best", "sums")
        )
        return cls(
            student=student,
            training=training,
            optimizer=optimizer,
            generator=generator,
            ema=ema,
            best=best,
            sums=sums,
            **facts,
        )

    def result(self) -> StudentModule:
        """Return the student with the best averaged parameters, ready to be used.

        A copy on the CPU: the state can go on training.
        """
        state = {name: value.cpu() for name, value in self.student.state_dict().items()}
        student = restore_student(self.student.config, state)
        assign(student, self.best)
        student.retract()
        return student.eval()

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {name: getattr(self, name) for name in _FACTS}
        for name in ("best_score", "waited_from"):
            facts[name] = facts[name] if math.isfinite(facts[name]) else None
        return {
            **facts,
            "training": self.training.model_dump(mode="json"),
            "config": self.student.config,
        }


_FACTS = (
    "best_score",
    "waited",
    "waited_from",
    "flat",
    "cuts",
    "epoch",
    "within",
    "step",
    "stopped",
    "history",
    "origin",
)


def trainable(student: StudentModule) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that learn, by name."""
    return {name: value for name, value in student.named_parameters() if value.requires_grad}


def assign(student: StudentModule, values: dict[str, Tensor]) -> None:
    """Write values into the parameters that learn, by name."""
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
    # Fused: one pass over the parameters, where the others make eleven.
    return torch.optim.AdamW(groups, lr=training.learning_rate, fused=True) if groups else None


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
