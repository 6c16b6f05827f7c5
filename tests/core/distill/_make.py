"""Small federated models: pairs whose clusters turn in their own ways, fitted in no time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from core.distill import fitting
from core.distill.curriculum import TrainingData, training_data
from core.distill.students._base import Shown, StudentModule, build_student
from core.distill.teachers._base import TeacherModel, teachers
from core.distill.teachers.rotational import RotationalTeacher
from core.specs.canonical import Canonical
from core.specs.clusterings import KMeans
from core.specs.codebooks import PrincipalPlanes
from core.specs.plain_students import (
    Hierarchical,
    HierarchicalRouter,
    Linear,
    Mlp,
    ProjectionTransformer,
)
from core.specs.students import (
    GeodesicAttention,
    NlerpGeodesic,
    RotorProduct,
    SharedSubspace,
    Student,
)
from core.specs.teachers import Orthogonal, Rotational
from core.specs.training import Training
from core.tensors.embeddings import Embeddings
from core.tensors.formats import Federated, Pairs
from core.tensors.lda import LDA
from core.tensors.shards import Array

DIM, ROWS, CLUSTERS = 12, 160, 4

SMALL_STUDENTS: dict[str, Student] = {
    "canonical": Canonical(n_components=4, layers=2, heads=3),
    "geodesic_attention": GeodesicAttention(slots=32, hidden=48),
    "nlerp_geodesic": NlerpGeodesic(
        router="learnt", router_hidden=16, planes=3, correction_hidden=8
    ),
    "rotor_product": RotorProduct(planes=3, router_hidden=16),
    "shared_subspace": SharedSubspace(router="learnt", router_hidden=16, subspace=6),
    "projection_transformer": ProjectionTransformer(num_heads=3, num_layers=2, ff_dim=16),
    "hierarchical_router": HierarchicalRouter(heads=3, levels=2),
    "linear": Linear(start="random"),
    "mlp": Mlp(hidden=24, layers=1, dropout=0.1),
    "hierarchical": Hierarchical(
        levels=(2, 5), level_weights=(0.7, 0.3), hidden=24, layers=1, noise=0.1, decoder=16
    ),
}
"""One spec per student file; the suites run over the registry and find theirs here."""
SMALL_TEACHERS = {"orthogonal": Orthogonal(codebook=PrincipalPlanes(n_components=4))}
"""Specs of the teachers whose defaults ask for more than the small model has."""


OF_ROTATIONS = sorted(
    name for name, plugin in teachers().items() if plugin.spec.reads == "federated_model"
)
"""Teachers that blend rotations."""
OF_LENGTHS = sorted(
    name for name, spec in SMALL_STUDENTS.items() if spec.learns_from == ("federated_model",)
)
"""Students that keep the lengths of queries."""


def make_any_teacher(name: str, model: Federated | None = None) -> TeacherModel:
    plugin = teachers()[name]
    spec = SMALL_TEACHERS.get(name) or plugin.spec()
    made = {"lda_model": make_lda, "embeddings": make_embeddings}.get(plugin.spec.reads, make_model)
    return plugin.build(model or made(), spec, "cpu", None)


def teacher_for(student: str) -> TeacherModel:
    """A teacher that a student can follow."""
    if "federated_model" in SMALL_STUDENTS[student].learns_from:
        return make_teacher()
    return make_any_teacher("lda")


def unit(array: Array) -> Array:
    rows: Array = array / np.linalg.norm(array, axis=-1, keepdims=True)
    return rows


def rotation(rng: np.random.Generator, size: float) -> Array:
    a = rng.normal(size=(DIM, DIM)) * size
    turned: Array = torch.linalg.matrix_exp(torch.from_numpy(a - a.T)).numpy()
    return turned


@cache
def make_pairs(rows: int = ROWS) -> Pairs:
    rng = np.random.default_rng(0)
    common = rotation(rng, 0.2)
    centres = unit(rng.normal(size=(CLUSTERS, DIM)))
    which = rng.integers(CLUSTERS, size=rows)
    queries = unit(centres[which] + 0.25 * rng.normal(size=(rows, DIM)))
    own = np.stack([common @ rotation(rng, 0.1) for _ in range(CLUSTERS)])
    targets = unit(
        np.einsum("nd,nde->ne", queries, own[which]) + 0.05 * rng.normal(size=(rows, DIM))
    )
    return Pairs(
        ids=[f"row {row}" for row in range(rows)],
        queries=queries.astype(np.float32),
        targets=targets.astype(np.float32),
        groups=[f"group {number}" for number in which],
    )


@cache
def make_model() -> Federated:
    clustering = KMeans(max_clusters=CLUSTERS)
    return fitting.fit(make_pairs(), clustering, seed=0, strength=3.0, temperature=0.1)


@cache
def make_lda() -> LDA:
    """A head per cluster of the small model: means of its queries and of its targets."""
    model = make_model()
    sums = np.zeros((CLUSTERS, DIM))
    np.add.at(sums, model.cluster_of, model.targets)
    counts = np.bincount(model.cluster_of, minlength=CLUSTERS)
    return LDA(
        centroids=model.centroids,
        answers=(sums / counts[:, None]).astype(np.float32),
        maps=None,
        queries=model.queries,
        targets=model.targets,
        cluster_of=model.cluster_of,
        cluster_ids=[f"head {number}" for number in range(CLUSTERS)],
        train_rows=model.train_rows,
        held_out_rows=model.held_out_rows,
        manifest={"temperature": 0.2},
    )


@cache
def make_embeddings(*, inputs: bool = True) -> Embeddings:
    """The small pairs, stored: every fifth row is held out."""
    pairs = make_pairs()
    rows = np.arange(len(pairs.queries))
    return Embeddings(
        ids=pairs.ids,
        embeddings=pairs.targets,
        inputs=pairs.queries if inputs else None,
        groups=pairs.groups,
        texts=[f"{group} text" for group in pairs.groups or ()],
        train_rows=rows[rows % 5 != 0],
        held_out_rows=rows[rows % 5 == 0],
    )


@cache
def make_teacher(compat: str | None = None) -> RotationalTeacher:
    spec = Rotational.model_validate({"compat": compat})
    return RotationalTeacher(make_model(), spec)


def doubled(model: Federated) -> Federated:
    """Every training query twice, the second time with other zeros' signs; the targets differ."""
    queries = model.queries.copy()
    queries[:, 0] = 0.0
    again = queries.copy()
    again[:, 0] = -0.0
    return replace(
        model,
        queries=np.concatenate([queries, again]),
        targets=np.concatenate([model.targets, model.targets[::-1]]),
        cluster_of=np.concatenate([model.cluster_of, model.cluster_of]),
        train_rows=np.arange(2 * len(queries)),
        held_out_rows=np.zeros(0, np.int64),
    )


@cache
def make_targets() -> Tensor:
    return answers(make_teacher())


def answers(teacher: TeacherModel) -> Tensor:
    """What cache_targets keeps: the training queries' targets, none routed through itself."""
    queries = teacher.queries
    own = torch.from_numpy(teacher.own_rows(queries))
    return teacher.targets(queries, exclude_rows=own)


def make_training(**changes: object) -> Training:
    values = {"epochs": 3, "batch_size": 32, "warmup_steps": 2, "learning_rate": 5e-3, **changes}
    return Training.model_validate(values)


def make_data(training: Training, student: str = "rotor_product") -> TrainingData:
    teacher = teacher_for(student)
    return training_data(teacher, answers(teacher), training, seed=1)


def make_student(name: str, *, seed: int = 0, **changes: object) -> StudentModule:
    if changes.get("router", "learnt") != "learnt":
        changes = {"router_hidden": None, **changes}
    spec = SMALL_STUDENTS[name].model_copy(update=dict(changes))
    return build_student(spec, teacher_for(name), seed)


NOTHING = torch.full((50, 1), -1)
"""What ``some_queries`` exclude: they are no training queries."""


def shown(queries: Tensor, weights: Tensor, exclude: Tensor | None = None) -> Shown:
    """Return what a student of ``make_teacher`` is shown of a batch."""
    anchored = queries @ make_teacher().anchor.float()
    return Shown(
        queries, anchored, weights, NOTHING[: len(queries)] if exclude is None else exclude
    )


def some_queries(count: int = 50) -> Tensor:
    rng = np.random.default_rng(7)
    return torch.from_numpy(unit(rng.normal(size=(count, DIM))).astype(np.float32))
