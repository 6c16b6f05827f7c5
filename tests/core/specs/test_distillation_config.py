"""Document 004's configuration: its fields, its presets, and the temperatures it answers with."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from core.errors import SpecInvalid
from core.kinds.distill import Spec
from core.specs.distillation import (
    CURRICULUM_CONFIG,
    DEFAULT_OPENAI_CONFIG,
    FAST_CONFIG,
    DistillationConfig,
    get_tau_for_stage,
)
from core.specs.loss_checks import check_losses
from core.specs.plain_students import Hierarchical
from core.specs.schedules import SCHEDULE_TYPES
from core.specs.sizes import Sizes


def test_every_field_that_the_document_sets_is_kept() -> None:
    asked = {
        "teacher_checkpoint": "models/teacher_1536d.pt",
        "teacher_dim": 1536,
        "student_dim": 5,
        "tau": 2.0,
        "alpha": 0.7,
        "device": "cpu",
        "curriculum": True,
        "curriculum_stages": 5,
        "curriculum_tau_schedule": (4.0, 0.5),
        "batch_size": 32,
        "learning_rate": 1e-4,
    }

    config = DistillationConfig(**asked)

    assert {name: getattr(config, name) for name in asked} == asked


def test_the_presets_say_what_the_document_says_of_them() -> None:
    assert (DEFAULT_OPENAI_CONFIG.teacher_dim, DEFAULT_OPENAI_CONFIG.student_dim) == (1536, 5)
    assert (DEFAULT_OPENAI_CONFIG.tau, DEFAULT_OPENAI_CONFIG.alpha) == (1.0, 0.7)
    assert not DEFAULT_OPENAI_CONFIG.curriculum
    assert DistillationConfig() == DEFAULT_OPENAI_CONFIG
    assert CURRICULUM_CONFIG.curriculum
    assert CURRICULUM_CONFIG.curriculum_stages == 5
    assert str(CURRICULUM_CONFIG.curriculum_tau_schedule) == "(4.0, 0.5)"
    assert FAST_CONFIG.batch_size < DEFAULT_OPENAI_CONFIG.batch_size
    assert FAST_CONFIG.epochs < DEFAULT_OPENAI_CONFIG.epochs
    for preset in (DEFAULT_OPENAI_CONFIG, CURRICULUM_CONFIG, FAST_CONFIG):
        assert DistillationConfig.model_validate_json(preset.model_dump_json()) == preset


def test_stages_have_the_temperatures_that_the_document_prints() -> None:
    taus = [f"{CURRICULUM_CONFIG.get_tau_for_stage(stage):.2f}" for stage in range(5)]
    assert taus == ["4.00", "3.12", "2.25", "1.38", "0.50"]
    assert get_tau_for_stage(CURRICULUM_CONFIG, -1) == 4.0
    assert get_tau_for_stage(CURRICULUM_CONFIG, 99) == 0.5
    cosine = CURRICULUM_CONFIG.model_copy(update={"curriculum_schedule_type": "cosine"})
    assert cosine.get_tau_for_stage(1) > CURRICULUM_CONFIG.get_tau_for_stage(1)
    with pytest.raises(SpecInvalid, match=r"stage 0\.5; allowed: a whole number"):
        CURRICULUM_CONFIG.get_tau_for_stage(0.5)  # type: ignore[arg-type]


@given(stage=st.integers(-3, 9), tau=st.floats(0.01, 10))
def test_without_a_curriculum_every_stage_has_the_one_temperature(stage: int, tau: float) -> None:
    assert DistillationConfig(tau=tau).get_tau_for_stage(stage) == pytest.approx(tau, rel=1e-15)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("teacher_checkpoint", ["", None, 3]),
        ("teacher_dim", [1, 0, -5, 2.5, None]),
        ("student_dim", [1, 0, 10**6]),
        ("tau", [0, -1.0, math.nan, math.inf, 1e9, "warm"]),
        ("alpha", [-0.1, 1.1, math.nan]),
        ("device", ["gpu", "cuda:", "cuda:x", "tpu", "cpu ", ""]),
        ("curriculum", ["maybe", 3]),
        ("curriculum_stages", [0, -1, 2.5]),
        ("curriculum_tau_schedule", [(4.0,), (4.0, 0.5, 0.1), (4.0, 0.0), (math.nan, 1.0), 4.0]),
        ("curriculum_schedule_type", ["step", ""]),
        ("epochs", [0, -1]),
        ("batch_size", [0, 1, -4]),
        ("learning_rate", [0, -1e-4, math.inf]),
        ("temperature", [1.0]),
    ],
)
def test_bad_values_are_refused_and_named(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValidationError) as caught:
            DistillationConfig(**{field: value})
        assert {str(error["loc"][0]) for error in caught.value.errors()} == {field}


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError):
        DEFAULT_OPENAI_CONFIG.tau = 2.0  # type: ignore[misc]


PRESETS = {"default": DEFAULT_OPENAI_CONFIG, "curriculum": CURRICULUM_CONFIG, "fast": FAST_CONFIG}
SHA256 = "0" * 64


def planned(config: DistillationConfig, **told: Any) -> Spec:
    """Return the job's spec, through JSON, checked against embeddings of the config's width."""
    spec = Spec.model_validate_json(json.dumps(config.job(SHA256, **told)))
    assert isinstance(spec.student, Hierarchical)
    check_losses(spec.training, spec.student, Sizes(config.teacher_dim, config.teacher_dim, 100))
    return spec


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_a_preset_is_a_job(config: DistillationConfig) -> None:
    spec = planned(config)

    assert isinstance(spec.student, Hierarchical)
    assert (spec.student.levels, spec.student.decodes()) == ((5,), True)
    assert spec.device == "cpu"
    assert (spec.model, spec.training.batch_size) == (SHA256, config.batch_size)
    assert spec.training.learning_rate == config.learning_rate
    stages = config.curriculum_stages if config.curriculum else 1
    assert spec.training.epochs == config.epochs * stages
    weights = spec.training.losses.weights("relations", routes=False, decodes=True)
    assert weights == {"neighbour_kl": 0.7, "reconstruction": pytest.approx(0.3)}
    for epoch in range(spec.training.epochs):
        stage = epoch // config.epochs
        assert spec.training.stage_of(epoch) == (stage if config.curriculum else 0)
        assert spec.training.tau_of(epoch) == config.get_tau_for_stage(stage)


@given(
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    curriculum=st.booleans(),
    stages=st.integers(1, 256),
    schedule=st.sampled_from(SCHEDULE_TYPES),
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
    term=st.sampled_from(["neighbour_kl", "relational_kl"]),
)
def test_every_config_is_a_job(
    *, alpha: float, curriculum: bool, stages: int, schedule: str, device: str, term: str
) -> None:
    config = DistillationConfig.model_validate(
        {
            "alpha": alpha,
            "curriculum": curriculum,
            "curriculum_stages": stages,
            "curriculum_schedule_type": schedule,
            "device": device,
        }
    )

    spec = planned(config, term=term)

    assert isinstance(spec.student, Hierarchical)
    assert spec.device == {"auto": "any", "cpu": "cpu"}.get(device, "gpu")
    assert spec.student.decodes() is (alpha < 1)
    weights = spec.training.losses.weights("relations", routes=False, decodes=alpha < 1)
    both = {term: alpha, "reconstruction": 1 - alpha}
    assert weights == pytest.approx({name: weight for name, weight in both.items() if weight})
    assert (spec.training.curriculum is not None) is (curriculum and alpha > 0)
