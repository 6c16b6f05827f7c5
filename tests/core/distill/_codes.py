"""Small codes in training: document 004's student over the small stored embeddings."""

from __future__ import annotations

from core.distill.curriculum import TrainingData, training_data
from core.distill.state import TrainState
from core.distill.students._base import build_student
from core.distill.students.hierarchical import HierarchicalStudent
from core.distill.teachers.checkpoint import CheckpointTeacher
from core.specs.plain_students import Hierarchical
from core.specs.teachers import Checkpoint
from core.specs.training import Training
from tests.core.distill._make import answers, make_embeddings

SMALL = {
    "levels": (2, 5),
    "level_weights": (0.7, 0.3),
    "hidden": 16,
    "layers": 1,
    "dropout": 0.1,
    "noise": 0.2,
    "decoder": 8,
}


def code_teacher(*, inputs: bool = True) -> CheckpointTeacher:
    return CheckpointTeacher(make_embeddings(inputs=inputs), Checkpoint())


def code_data(training: Training) -> TrainingData:
    teacher = code_teacher()
    return training_data(teacher, answers(teacher), training, seed=1)


def code_student(**changes: object) -> HierarchicalStudent:
    spec = Hierarchical.model_validate({**SMALL, **changes})
    student = build_student(spec, code_teacher(), 0)
    assert isinstance(student, HierarchicalStudent)
    return student


def code_state(training: Training, *, seed: int = 2, **changes: object) -> TrainState:
    return TrainState.start(code_student(**changes), training, seed=seed)
