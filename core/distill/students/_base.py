"""What a student is, and how its plugin hands it over.

A file in this package is a student; its name is the one in the spec. It ends in
``STUDENT = Student(spec=..., build=..., restore=...)``; its spec is in core/specs/students.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.distill.graph import Graph
from core.distill.teachers._base import TeacherModel
from core.errors import DataInvalid, SpecInvalid
from core.registry import scan
from core.rotations.sphere import keep_length
from core.specs.losses import Compares
from core.specs.shaped import Shaped
from core.specs.sizes import Sizes
from core.tensors.codebooks import Codebook


@dataclass(frozen=True)
class Shown:
    """What a student is shown of a batch while it is trained."""

    queries: Tensor
    """[B, d]."""
    anchored: Tensor
    """[B, d] q G by the teacher's anchor, which no training changes; [B, 0] where the student does
    not read it."""
    weights: Tensor
    """[B, C], the teacher's; a student that routes over training queries takes them as its own,
    for here a query must not find itself. [B, 0] where neither the student nor a term of the loss
    reads them."""
    exclude: Tensor
    """[B, e] int64, rows of the model's training queries that a query may not find, nor their
    duplicates: what the teacher excluded; -1 for none."""


@dataclass(frozen=True)
class Routed:
    """What a student says about a batch while it is trained."""

    vectors: Tensor
    """[B, m]; of any length where it compares directions alone, see ``with_lengths``."""
    log_weights: Tensor | None = None
    """[B, C] log of its own weights over the clusters; None where it has no learnt router."""
    decoded: Tensor | None = None
    """[B, D] the vectors brought back to the teacher's width; None where it has no decoder."""


class StudentModule(nn.Module, ABC):
    """A map of queries: ``forward([B, d]) -> [B, m]`` float32."""

    config: dict[str, Any]
    """JSON values; with the state dict enough to build the module again. ``dim`` is d,
    ``target_dim`` m where that is another number."""
    compares: Compares = "directions"
    """What of its answers is held against the teacher's; it keeps the queries' lengths where that
    is their directions."""
    levels: tuple[tuple[int, float], ...] = ()
    """Nested codes: how many of the first columns, and what they weigh; () for all of them."""
    decodes: bool = False
    """Whether ``routed`` returns decoded vectors."""
    draws: bool = False
    """Whether ``routed`` draws from torch's generator while it trains (dropout, noise)."""
    takes_weights: bool = True
    """Whether ``routed`` reads the teacher's weights."""
    takes_anchored: bool = True
    """Whether ``routed`` starts from q G."""
    has_router: bool = True
    """Whether ``routed`` returns weights of its own, to be compared with the teacher's."""

    @abstractmethod
    def forward(self, queries: Tensor) -> Tensor:
        """Map [B, d] queries to [B, m]."""

    @abstractmethod
    def routed(self, shown: Shown) -> Routed:
        """Map training queries, differentiably."""

    def with_lengths(self, vectors: Tensor, queries: Tensor) -> Tensor:
        """Give what ``routed`` returns the lengths that ``forward`` gives: those of the queries."""
        return keep_length(vectors, queries)

    def output_dim(self) -> int:
        """Return m."""
        width: int = self.config.get("target_dim", self.config["dim"])
        return width

    @abstractmethod
    def emit(self, graph: Graph, queries: str) -> str:
        """Add ``forward`` to an ONNX graph; return the name of its result."""

    def retract(self) -> None:
        """Put parameters back onto their manifold, after each step."""

    def gentle(self) -> list[nn.Parameter]:
        """Parameters that move slowly and never decay (bases, angles)."""
        return []

    def free_parameters(self) -> int:
        """Count what was free to choose, whether trained or taken from the teacher.

        Every parameter; buffers (the anchor, an exact router's training queries) are the data's.
        A student whose parameters are bound (orthonormal columns) counts the dimension instead;
        one that keeps planes of the teacher's as buffers counts them too.
        """
        return sum(value.numel() for value in self.parameters())

    def stored_bytes(self) -> int:
        """Count the bytes of all its tensors: what a weight file holds beside a short header."""
        return sum(value.numel() * value.element_size() for value in self.state_dict().values())


class PlainModule(StudentModule):
    """A student that says its own lengths and reads nothing but the query."""

    compares: Compares = "vectors"
    takes_weights = takes_anchored = has_router = False

    def routed(self, shown: Shown) -> Routed:
        """Map training queries, differentiably."""
        return Routed(self(shown.queries))

    def with_lengths(self, vectors: Tensor, queries: Tensor) -> Tensor:
        """Leave lengths as they are."""
        del queries
        return vectors


@dataclass(frozen=True)
class Student:
    """A plugin: what may be said about it, how it is made and how it comes back."""

    spec: type[Shaped]
    build: Callable[[Any, Any, int], StudentModule]
    """(spec ``as_built``, teacher, seed) -> an untrained student on the CPU, initialised from
    the teacher."""
    restore: Callable[[Mapping[str, Any]], StudentModule]
    """config -> a student whose state is then loaded."""
    build_on: Callable[[Any, Any, Codebook], StudentModule] | None = None
    """The same as ``build`` on given planes; None where a student has none of its own."""


def students() -> Mapping[str, Student]:
    """Return every student by name."""
    return scan("core.distill.students", "STUDENT", Student)


def build_student(
    spec: Any, teacher: TeacherModel, seed: int, *, codebook: Codebook | None = None
) -> StudentModule:
    """Build the student a spec names; draws from ``seed`` alone.

    Args:
        spec: of a student.
        teacher: what it starts from.
        seed: of every draw.
        codebook: planes to turn in, where the student's ``build_on`` takes them.
    """
    plugin, built = students()[spec.name], spec.as_built(sizes_of(teacher))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if codebook is None:
            return plugin.build(built, teacher, seed)
        if plugin.build_on is None:
            raise SpecInvalid(f"student {spec.name!r} turns in no codebook's planes")
        return plugin.build_on(built, teacher, codebook)


def sizes_of(teacher: TeacherModel) -> Sizes:
    """Return what a student's spec must know of a teacher; ``maps`` an artifact's meta tells."""
    rows, dim = teacher.queries.shape
    clusters = 0 if teacher.centroids is None else len(teacher.centroids)
    return Sizes(dim, teacher.truths.shape[1], rows, clusters)


def restore_student(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> StudentModule:
    """Rebuild a student from its config and state dict.

    Raises:
        DataInvalid: no such student, or the state does not fit the config.
    """
    name = str(config.get("name"))
    if name not in students():
        raise DataInvalid(f"config.name {name!r}; allowed: {', '.join(students())}")
    try:
        module = students()[name].restore(config)
    except (KeyError, TypeError, ValueError, SpecInvalid) as error:
        raise DataInvalid(f"the student's config is incomplete or wrong: {error!r}") from error
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise DataInvalid(f"the student's state does not fit its config: {error}") from error
    return module.eval()


def plane_parameters(dim: int, planes: int) -> int:
    """Count what m planes at right angles with an angle each are free in: m (2 d - 2 m - 1).

    2 (d - 2) for where the first lies, 4 less for each next one, and m angles. For all planes it
    is d (d - 1) / 2, the dimension of so(d).
    """
    return planes * (2 * dim - 2 * planes - 1)
