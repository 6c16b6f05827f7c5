"""Rotations, positions and norms are measured from what is stored, and faults show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench._tiny_models import VARIANTS, config_of, save_folder, tiny_model
from core.transport.checks import norms_off, rope_changes, turn_facts, worst_error
from core.transport.fold_folders import fold_folder, weight_files
from core.transport.fold_plans import FoldPlan
from core.transport.rotations import Rotation, Unwhitened
from core.transport.streams import shape_of
from tests.core.transport.held_out import random_rotation


def rotation(d_s: int = 6, d_t: int = 6, k: int = 6) -> Rotation:
    full = random_rotation(d_s, max(d_s, d_t))
    student = random_rotation(d_s, seed=1)[:, :k]
    teacher = (student.mT @ full[:, :d_t]).mT[:, :k]
    core = torch.eye(k, dtype=torch.float64)
    return Rotation("global", ("final",), student, core, teacher, full, torch.ones(k).double())


def test_a_square_rotation_is_measured_both_ways() -> None:
    found = turn_facts(rotation(), seed=0)

    assert found["orthogonal"]
    assert worst_error(found) < 1e-13
    assert found["round_trip"] < 1e-13
    assert found["round_trip_back"] < 1e-13


def test_a_widening_rotation_has_one_way_back() -> None:
    found = turn_facts(rotation(6, 9), seed=0)

    assert found["round_trip"] < 1e-13
    assert found["round_trip_back"] is None
    assert "columns" not in found["errors"]


def test_a_fault_shows_in_errors_and_round_trip() -> None:
    good = rotation()
    bad = replace(good, full=good.full + 1e-3)
    found = turn_facts(bad, seed=0)

    assert worst_error(found) == pytest.approx(
        float((bad.full @ bad.full.mT - torch.eye(6)).abs().max()), rel=0.5
    )
    assert found["round_trip"] > 1e-3


def test_an_unwhitened_map_has_no_round_trip() -> None:
    turn = rotation(k=4)
    ones, zeros = torch.ones(6).double(), torch.zeros(6).double()
    found = turn_facts(
        Unwhitened(
            "global",
            ("final",),
            random_rotation(6)[:, :4],
            turn.core,
            random_rotation(6, seed=2)[:, :4],
            zeros,
            2 * ones,
            zeros,
            ones,
            turn.singular_values,
        ),
        seed=0,
    )

    assert not found["orthogonal"]
    assert found["round_trip"] is None
    assert worst_error(found) < 1e-13
    assert found["errors"]["rows"] > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fold_leaves_positions_alone_and_norms_at_one(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant)
    shape = shape_of(model)
    source = save_folder(model, tmp_path / "model")
    plan = FoldPlan(shape, "global", {"global": random_rotation(32)})
    folded = fold_folder(source, tmp_path / "folded", plan)

    assert rope_changes(config_of(source), config_of(folded)) == ()
    assert norms_off([folded / name for name in weight_files(folded)], shape) == 0
    assert norms_off([source / name for name in weight_files(source)], shape) > 0.1


def test_a_changed_position_is_named() -> None:
    before = {"hidden_size": 32, "num_attention_heads": 4, "rope_theta": 1e4}

    assert rope_changes(before, {**before, "head_dim": 8}) == ()
    assert rope_changes(before, {**before, "hidden_size": 48}) == ("head_dim",)
    assert rope_changes(before, {**before, "rope_theta": 1e6}) == ("rope_theta",)
