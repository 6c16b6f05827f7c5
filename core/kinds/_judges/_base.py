"""What judging over one format of model takes, and what all of them read of a job's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import DataInvalid
from core.kinds._base import Chunk, Input, Metric

if TYPE_CHECKING:
    from core.distill.evaluation import Map
    from core.distill.students._base import StudentModule
    from core.distill.teachers._base import TeacherModel
    from core.tensors.formats import Pairs
    from core.tensors.shards import Array


@dataclass(frozen=True)
class Asked:
    """A job that judges, as its chunks see it."""

    chunk: Chunk
    teacher: TeacherModel
    seed: int
    title: str
    facts: Mapping[str, Any]
    """What is told of the inputs."""
    trained: Mapping[str, Any]
    """What the student's file says of its training: ``history`` and ``words``."""

    def pairs(self) -> Pairs:
        """Read the pairs."""
        return load_asked_pairs(self.chunk)

    def given(self) -> Array:
        """Return what a student is given, of all rows: [n, d]."""
        if self.facts["pairs"] is not None:
            return self.pairs().queries
        from core.tensors.embeddings import load_embeddings

        return load_embeddings(self.chunk.fetch(self.chunk.input("model").sha256)).given

    def student(self) -> StudentModule | None:
        """Read the student, on the device; None where there is none."""
        from core.distill.export import load_student

        if not has_student(self.chunk):
            return None
        return load_student(student_file(self.chunk)).to(self.chunk.device).eval()


@dataclass(frozen=True)
class Reported:
    """What judging came to."""

    files: Mapping[str, Path]
    """By the names of ``core.distill.report``."""
    metrics: Sequence[Metric]


@dataclass(frozen=True)
class Judge:
    """Judging over one format."""

    needs_pairs: bool
    most: Callable[[Mapping[str, Input]], int]
    """Rows that are mapped, at most. Raises SpecInvalid where there are none."""
    choose: Callable[[Asked], tuple[Array, int]]
    """The rows judged, int64, and how many were dropped."""
    mapped: Callable[[Asked, Array], Array]
    """The rows mapped, int64, given those judged."""
    outputs: Callable[[Asked, Array], dict[str, Array]]
    """What each way of mapping says to some rows: name -> [rows, any]."""
    report: Callable[[Asked, dict[str, Array], Array, int], Reported]
    """(asked, outputs of all mapped rows, rows judged, dropped) -> the files."""
    answers: int
    """How many times the rows' answers are held in memory at most, beside the teacher."""
    timed: Callable[[Asked], dict[str, Map]]
    """Ways of mapping whose speed is of interest, without the student."""


def load_asked_pairs(chunk: Chunk) -> Pairs:
    """Read the pairs that a job judges on."""
    from core.tensors.formats import load_pairs

    return load_pairs(chunk.fetch(chunk.input("pairs").sha256))


def has_student(chunk: Chunk) -> bool:
    """Whether the job names a student."""
    try:
        chunk.input("student")
    except KeyError:
        return False
    return True


def student_file(chunk: Chunk) -> Path:
    """Give the stored student the suffix by which the reader knows it."""
    link = chunk.workdir / "student.safetensors"
    if not link.is_symlink():
        link.symlink_to(chunk.fetch(chunk.input("student").sha256))
    return link


def held_out_or_unseen(asked: Asked, model: Any) -> tuple[Array, int]:
    """Pick the rows of pairs that a model of pairs never saw; see ``evaluation.held_out``."""
    from core.distill.evaluation import held_out, unseen

    own = model.manifest.get("pairs") == asked.chunk.input("pairs").sha256
    rows, dropped = (held_out if own else unseen)(asked.pairs(), model)
    if not len(rows):
        raise DataInvalid("pairs: the model was trained on every one of these queries")
    return rows, dropped


def most_of_pairs(inputs: Mapping[str, Input]) -> int:
    """Return how many rows of the pairs may be judged."""
    from core.errors import SpecInvalid

    model, pairs = inputs["model"], inputs["pairs"]
    own = model.meta["pairs"] == pairs.sha256
    most = int(model.meta["held_out"] if own else pairs.meta["rows"])
    if most == 0:
        raise SpecInvalid("the model held no rows of these pairs out", pointer="/pairs")
    return most
