"""Each gate fails on what it is for and on nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from core.specs.transport import Gates
from core.transport.gates import Facts, FoldFacts, as_json, check, failed

GOOD_TURN: dict[str, Any] = {
    "k": 4,
    "orthogonal": True,
    "errors": {"core": 1e-15, "bases": 1e-15, "lift": 1e-15, "rows": 1e-14, "columns": 1e-14},
    "round_trip": 1e-14,
    "round_trip_back": 1e-14,
}
GOOD_FOLD = FoldFacts(
    fold="global",
    exact=True,
    unfold_error=1e-12,
    logits_relative=1e-5,
    rope_changes=(),
    norms_off=0.0,
)


def scores(**overall: float | None) -> dict[str, Any]:
    told = {"cosine": 0.1, "shuffled": 0.05, "mean_only": 0.2, "channel_rms_factor": 1.3, **overall}
    return {
        "overall": {"seen": told["cosine"], **told},
        "sites": {"final": {"stream_rms_ratio": 0.5}},
    }


def good() -> Facts:
    return Facts(
        turns={"global": GOOD_TURN},
        folds={"permuted": replace(GOOD_FOLD, fold="none", norms_off=None), "rotated": GOOD_FOLD},
        scores={"base": scores(), "rotated": scores(cosine=0.6)},
        permutations=[
            {
                "layer": 0,
                "heads": {"before": 0.2, "after": 0.9, "skipped": None},
                "neurons": {"skipped": "no order makes them equal"},
            }
        ],
        checksums=3,
    )


def named(facts: Facts, gates: Gates | None = None) -> dict[str, Any]:
    return {gate.name: gate for gate in check(gates or Gates(), facts)}


def test_good_facts_pass_every_gate_and_say_why() -> None:
    found = check(Gates(), good())

    assert failed(found) == []
    assert all(gate.why for gate in found)
    assert len({gate.name for gate in found}) == len(found)
    assert json.loads(json.dumps(as_json(found), allow_nan=False))[0]["name"] == "orthogonality"
    assert "1e-14" in str(found[0])


@pytest.mark.parametrize("error", GOOD_TURN["errors"])
def test_any_part_of_a_rotation_may_break_orthogonality(error: str) -> None:
    bad = {**GOOD_TURN, "errors": {**GOOD_TURN["errors"], error: 2e-5}}

    gate = named(replace(good(), turns={"layer.0": GOOD_TURN, "layer.1": bad}))["orthogonality"]

    assert gate.passed is False
    assert gate.value == 2e-5
    assert "layer.1" in gate.why


def test_an_unwhitened_map_is_judged_by_core_and_bases() -> None:
    map_ = {
        "k": 4,
        "orthogonal": False,
        "errors": {"core": 1e-15, "bases": 1e-15, "rows": 3.0},
        "round_trip": None,
        "round_trip_back": None,
    }
    found = named(replace(good(), turns={"global": map_}))

    assert found["orthogonality"].passed
    assert "z-scores" in found["orthogonality"].why
    assert found["round_trip"].passed is None


def test_a_nan_fails_and_is_no_json_number() -> None:
    bad = {**GOOD_TURN, "round_trip": math.nan}
    gate = named(replace(good(), turns={"global": bad}))["round_trip"]

    assert gate.passed is False
    assert gate.value is None
    assert "nan" in gate.why


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"unfold_error": 2e-6}, "unfold.rotated"),
        ({"logits_relative": 2e-3}, "logits.rotated"),
        ({"rope_changes": ("rope_theta",)}, "rope.rotated"),
        ({"norms_off": 1e-3}, "norms.rotated"),
    ],
)
def test_a_fold_fails_its_own_gate(change: dict[str, Any], gate: str) -> None:
    facts = replace(good(), folds={"rotated": replace(GOOD_FOLD, **change)})

    assert [one.name for one in failed(check(Gates(), facts))] == [gate]


def test_sixteen_bits_are_allowed_more() -> None:
    fold = replace(GOOD_FOLD, logits_relative=1e-2, sixteen_bit=True)
    gate = named(replace(good(), folds={"rotated": fold}))["logits.rotated"]

    assert gate.passed
    assert gate.bound == pytest.approx(64e-3)


def test_logits_of_a_fold_that_is_not_exact_are_reported() -> None:
    fold = replace(GOOD_FOLD, fold="conjugate", exact=False, logits_relative=0.7)
    found = named(replace(good(), folds={"rotated": fold}))

    assert found["logits.rotated"].passed is None
    assert found["logits.rotated"].value == 0.7


@pytest.mark.parametrize(
    ("after", "passes"),
    [
        ({"cosine": 0.6}, True),
        ({"cosine": 0.1}, False),
        ({"cosine": 0.6, "shuffled": 0.7}, False),
        ({"cosine": 0.6, "mean_only": 0.7}, False),
        ({"cosine": 0.6, "mean_only": None}, True),
        ({"cosine": 0.15, "seen": 0.3}, True),
    ],
)
def test_improving_means_above_before_and_above_both_nulls(
    after: dict[str, float | None], passes: object
) -> None:
    facts = replace(good(), scores={"base": scores(), "rotated": scores(**after)})

    assert named(facts)["improves"].passed is passes
    assert named(facts, Gates(improves=False))["improves"].passed is None


def test_cosine_and_channels_are_gates_only_where_asked_for() -> None:
    found = named(good())
    asked = named(good(), Gates(hidden_cosine=0.75, rms_ratio=1.2))

    for name, value in (("hidden_cosine", 0.6), ("rms_ratio", 1.3)):
        assert found[name].passed is None
        assert found[name].value == value
        assert asked[name].passed is False


def test_a_fold_that_changes_the_streams_rms_fails() -> None:
    turned = scores(cosine=0.6)
    turned["sites"]["final"]["stream_rms_ratio"] = 0.51
    facts = replace(good(), scores={"base": scores(), "rotated": turned})

    gate = named(facts)["rms_kept"]
    assert gate.passed is False
    assert gate.value == pytest.approx(0.02)


def test_what_was_not_measured_fails_nothing_and_says_so() -> None:
    found = check(Gates(), Facts())

    assert failed(found) == []
    assert {gate.value for gate in found} == {None}
    assert all(gate.why for gate in found)


def test_matched_heads_are_reported_on_held_out_texts_where_there_are_some() -> None:
    heads = {
        "before": 0.2,
        "after": 0.9,
        "held_out_before": 0.2,
        "held_out_after": 0.8,
        "skipped": None,
    }
    facts = Facts(permutations=[{"layer": 0, "heads": heads, "neurons": {"skipped": "none"}}])
    found = named(facts)

    assert found["attention_maps"].value == 0.8
    assert "held-out" in found["attention_maps"].why
    assert found["neurons"].value is None
