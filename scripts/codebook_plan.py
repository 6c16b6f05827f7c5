"""What the options of train_orthogonal_codebook.py mean, as the service's own specs. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter

from core.errors import SpecInvalid
from core.specs.codebooks import PLANES, Codebook
from core.specs.students import Student
from core.specs.teachers import parse_teacher
from core.specs.training import Training

TEACHERS = (
    "rotational",
    "jax",
    "rotational_jax",
    "direct",
    "weighted_baseline",
    "paired",
    "orthogonal",
    "multi_source",
)
ALIASES = {"jax": "rotational_jax"}
MEASURED = "auto"
_STUDENT: TypeAdapter[Any] = TypeAdapter(Student)
_CODEBOOK: TypeAdapter[Any] = TypeAdapter(Codebook)
STUDENTS = {one.model_fields["name"].default: one for one in get_args(get_args(Student)[0])}
"""Spec by name."""
STUDENT_FIELDS = ("layers", "heads", "transformer_type", "bias")
NAMES = {
    "learning_rate": "lr",
    "centroid_warmup_epochs": "centroid_warmup",
    "validation_fraction": "test_split",
    "student_options": "student_option",
}
"""Options that are called otherwise than what they set."""
TRAINING_FIELDS = frozenset(Training.model_fields) - {"losses", "epochs_per_chunk"}


@dataclass(frozen=True)
class Files:
    """Where things are read from and written to; none of it changes a result."""

    models: tuple[Path, ...]
    target_cache: Path | None
    checkpoint_path: Path | None
    checkpoint_interval: int | None
    bivector_cache: Path | None
    save_codebook: Path | None
    save_transformer: Path | None
    train_checkpoint: Path | None
    pairs: Path | None
    report: Path | None
    resume: bool


@dataclass(frozen=True)
class Plan:
    """A whole run: specs as a job would have them, and files."""

    train: bool
    teacher: Any
    """Spec; of ``auto`` the one for torch, to be replaced by the faster."""
    measure: bool
    """Whether torch or JAX is decided by measurement."""
    codebook: Any
    student: Any
    """Spec, or None where nothing is trained."""
    training: Training
    seed: int
    device: str | None
    """As the command line says it; None: the CPU here, any device of a service."""
    files: Files

    def local_device(self) -> str:
        """Return the device of a run on this machine."""
        return self.device or "cpu"

    def job_device(self) -> str:
        """Return what a job is told of devices: a service chooses among its own."""
        if self.device is None:
            return "any"
        return "gpu" if self.device.startswith("cuda") else "cpu"

    def needs_logs(self) -> bool:
        """Whether the rotations' logarithms are needed at all."""
        taught = self.train and (self.teacher.needs_logs or self.student.name != "canonical")
        return bool(taught or self.codebook.method != "canonical")

    def bivector_path(self) -> Path | None:
        """Return the file of logarithms: the one named, or beside the one model."""
        if self.files.bivector_cache is not None or len(self.files.models) > 1:
            return self.files.bivector_cache
        model = self.files.models[0]
        stem = model.name if model.is_dir() else model.name.partition(".")[0]
        return model.with_name(f"{stem}.bivectors.npz")

    def checkpoint(self) -> Path | None:
        """Return where training is kept after every epoch, if anywhere."""
        saved = self.files.save_transformer
        if self.files.train_checkpoint is not None or saved is None:
            return self.files.train_checkpoint
        return saved.with_name(f"{saved.stem}.checkpoint.safetensors")

    def taught_by(self, name: str) -> Plan:
        """Return the plan with the teacher of another name, told the same."""
        told = {**self.teacher.model_dump(mode="json"), "name": name}
        return replace(self, teacher=parse_teacher(told), measure=False)

    def facts(self) -> dict[str, Any]:
        """Return what decides the result, as JSON values."""
        return {
            "teacher": self.teacher.model_dump(mode="json"),
            "student": self.student and self.student.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
            "seed": self.seed,
        }


def make_plan(**given: Any) -> Plan:
    """Turn the command line's values into specs.

    Raises:
        SpecInvalid: options that exclude each other, or a field that the student does not have.
        ValidationError: a value that its spec refuses.
    """
    files = Files(**{name: given.pop(name) for name in Files.__dataclass_fields__})
    if not given["train"] and (files.save_codebook is None or given["codebook"] is None):
        raise SpecInvalid(
            "nothing to do: give --train, or --build-canonical, --build-pca or --build-combined "
            "with --save-codebook"
        )
    if files.resume and files.train_checkpoint is None and files.save_transformer is None:
        raise SpecInvalid("--resume: needs --train-checkpoint or --save-transformer to go on from")
    if (saved := files.save_transformer) is not None and saved.suffix in (".safetensors", ".onnx"):
        raise SpecInvalid(
            f"--save-transformer {saved}: names the .pt, beside which a .safetensors and an .onnx "
            "of the same name are written; give it another suffix"
        )
    _check_device(given["device"])
    _refuse_idle(given, files)
    codebook = _CODEBOOK.validate_python(_codebook(given))
    told = {name: given[name] for name in TRAINING_FIELDS & given.keys()}
    plan = Plan(
        train=given["train"],
        teacher=_teacher(given, codebook),
        measure=given["teacher"] == MEASURED,
        codebook=codebook,
        student=_student(given, codebook) if given["train"] else None,
        training=Training.model_validate(_said(told)),
        seed=given["seed"],
        device=given["device"],
        files=files,
    )
    if not plan.needs_logs():
        _refuse(
            _said({"bivector_cache": files.bivector_cache}),
            "needs a teacher or planes made of the rotations' logarithms",
        )
    return plan


def _check_device(device: str | None) -> None:
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise SpecInvalid(f"--device {device[:40]!r}; allowed: cpu, cuda, cuda:0 and so on")


def _refuse_idle(given: Mapping[str, Any], files: Files) -> None:
    """Refuse options that would have no effect.

    Raises:
        SpecInvalid: which, and beside what they are allowed.
    """
    if not given["train"]:
        idle = ["target_cache", "checkpoint_path", "save_transformer", "train_checkpoint", "pairs"]
        told = {name: getattr(files, name) for name in [*idle, "report", "checkpoint_interval"]}
        told |= {name: given[name] for name in TRAINING_FIELDS & given.keys()}
        told |= {name: given[name] for name in (*STUDENT_FIELDS, "student", "student_options")}
        _refuse(_said(told), "need --train")
    if files.target_cache is None:
        idle = ["checkpoint_path", "checkpoint_interval"]
        _refuse(_said({name: getattr(files, name) for name in idle}), "need --target-cache")
    if given["codebook"] != "pca":
        _refuse(_said({"pca_method": given["pca_method"]}), "needs --build-pca")
    planes = given["student"] in (None, "canonical") or given["teacher"] == "orthogonal"
    if not planes and files.save_codebook is None:
        _refuse(_said({"n_components": given["n_components"]}), "needs student 'canonical'")


def _refuse(told: Mapping[str, Any], why: str) -> None:
    given = [
        f"--{NAMES.get(name, name).replace('_', '-')}" for name, value in told.items() if value
    ]
    if given:
        raise SpecInvalid(f"{', '.join(given)}: {why}; without it nothing would come of it")


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what was not said: specs know their own defaults."""
    return {name: value for name, value in values.items() if value is not None}


def _codebook(given: Mapping[str, Any]) -> dict[str, Any]:
    method = given["codebook"] or "canonical"
    solver = {"solver": given["pca_method"]} if given["pca_method"] is not None else {}
    planes = PLANES if given["n_components"] is None else given["n_components"]
    return {"method": method, "n_components": planes, **solver}


def _teacher(given: Mapping[str, Any], codebook: Any) -> Any:
    name = "rotational" if given["teacher"] == MEASURED else given["teacher"]
    name = ALIASES.get(name, name)
    told = _said({key: given[key] for key in ("top_k", "temperature", "compat")})
    if name == "orthogonal":
        told["codebook"] = codebook.model_dump(mode="json")
    return parse_teacher({"name": name, **told})


def _student(given: Mapping[str, Any], codebook: Any) -> Any:
    name = given["student"] or "canonical"
    told = _said({key: given[key] for key in STUDENT_FIELDS})
    options = _pairs(given["student_options"])
    if "name" in options:
        raise SpecInvalid("--student-option name: say --student")
    said = "codebook" if given["codebook"] is not None and name == "canonical" else None
    if twice := sorted(options.keys() & {*told, said}):
        raise SpecInvalid(f"--student-option {twice[0]}: another option says it already")
    told |= options
    if name == "canonical":
        told.setdefault("codebook", codebook.model_dump(mode="json"))
    elif given["codebook"] is not None and given["teacher"] != "orthogonal":
        raise SpecInvalid(
            f"--student {name} has no codebook; --build-{given['codebook']} is for 'canonical'"
        )
    return _STUDENT.validate_python({"name": name, **told})


def _pairs(texts: Sequence[str]) -> dict[str, Any]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise SpecInvalid(f"--student-option {text!r}; needed NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found
