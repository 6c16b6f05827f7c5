"""A transport from two folders to a third: what it offers is what was asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench._tiny_models import reload
from tests.core.kinds.transports import (
    SMALL,
    folder_of,
    model_of,
    put_pair,
    put_prompts,
    transport,
)
from tests.core.kinds.world import World


def same_logits(old: PreTrainedModel, new: PreTrainedModel) -> bool:
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        a, b = old(ids).logits, new(ids).logits
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max())


def test_a_wider_folded_student_says_what_the_student_says(other_world: World) -> None:
    world = other_world
    inputs = put_pair(world, hidden_size=48)
    job = transport(world, inputs)
    world.run()

    report = world.report(job)
    student = reload(folder_of(world, inputs["student"].partition("/")[0]))
    folded = AutoModelForCausalLM.from_pretrained(folder_of(world, job)).eval()
    assert folded.config.hidden_size == 48
    assert not folded.config.tie_word_embeddings
    assert same_logits(student, folded)
    assert {gate["name"] for gate in report["gates"] if gate["passed"]} >= {
        "orthogonality",
        "round_trip",
        "unfold.rotated",
        "unfold.permuted",
        "logits.rotated",
        "logits.permuted",
        "rope.rotated",
        "norms.rotated",
    }
    assert model_of(world, job).exact


def test_the_permuted_student_is_offered_too(other_world: World) -> None:
    world = other_world
    inputs = put_pair(world, student="qwen2", teacher="qwen2")
    job = transport(world, inputs)
    world.run()

    student = reload(folder_of(world, inputs["student"].partition("/")[0]))
    assert same_logits(student, reload(folder_of(world, job, "model_permuted")))
    told = json.loads(world.path(job, "permutations").read_text())
    assert any(one["neurons"] != sorted(one["neurons"]) for one in told["permutations"])


def test_every_stage_alone_makes_what_the_whole_makes(other_world: World) -> None:
    world = other_world
    inputs = put_pair(world, hidden_size=48)
    whole = transport(world, inputs, capture={**SMALL, "raw": True})
    captured = transport(world, inputs, until="capture")
    permuted = transport(world, inputs, until="permute", moments=f"{captured}/moments")
    rotated = transport(
        world,
        inputs,
        until="rotate",
        moments=f"{captured}/moments",
        capture=None,
    )
    folded = transport(
        world,
        inputs,
        until="fold",
        permutations=f"{permuted}/permutations",
        rotations=f"{rotated}/rotations",
    )
    judged = transport(
        world,
        inputs,
        rotations=f"{rotated}/rotations",
        permutations=f"{permuted}/permutations",
        folded=f"{folded}/model",
    )
    summed = transport(world, inputs, until="rotate", states=f"{whole}/states", capture=None)
    world.run()

    made = {job: world.status(job).artifacts for job in (whole, permuted, rotated, folded, judged)}
    assert {world.job(job).state for job in (*made, summed)} == {"succeeded"}
    assert made[permuted]["permutations"] == made[whole]["permutations"]
    assert made[rotated]["rotations"] == made[whole]["rotations"]
    assert made[folded]["model"] == made[whole]["model"]
    assert made[folded]["model_permuted"] == made[whole]["model_permuted"]
    assert world.status(summed).artifacts["rotations"] == made[whole]["rotations"]
    mine, theirs = world.report(judged)["scores"], world.report(whole)["scores"]
    assert mine["rotated"] == theirs["rotated"]
    assert mine["base"] == theirs["base"]


def test_the_same_capture_is_found_by_another_job(other_world: World) -> None:
    world = other_world
    inputs = put_pair(world)
    transport(world, inputs, until="rotate")
    world.run()
    again = transport(world, inputs, until="rotate", rotate={"tie": "stage", "stage_layers": 2})
    world.run()

    assert world.job(again).cache_hits == 3, "one for each block of texts"


def test_states_are_kept_where_their_moments_were_found_too(other_world: World) -> None:
    world = other_world
    inputs = put_pair(world)
    raw = {**SMALL, "raw": True}
    first = transport(world, inputs, until="capture", capture=raw)
    world.run()
    again = transport(world, inputs, until="permute", capture=raw)
    world.run()

    assert world.job(again).cache_hits
    assert world.status(again).artifacts["states"] == world.status(first).artifacts["states"]


def test_the_texts_that_choose_k_do_not_depend_on_the_chunks(other_world: World) -> None:
    world = other_world
    inputs = put_pair(world)
    jobs = [
        transport(
            world,
            inputs,
            until="rotate",
            permute={"heads": False, "neurons": False},
            rotate={"k": "held_out", "pca": "each"},
            capture={**SMALL, "prompts_per_chunk": size},
        )
        for size in (2, 16)
    ]
    world.run()

    told = [json.loads(world.path(job, "moments").read_text()) for job in jobs]
    assert [sum(block["texts"] for block in one["validation"]) for one in told] == [2, 2]
    assert [sum(block["texts"] for block in one["blocks"]) for one in told] == [11, 11]
    turns = [world.report(job)["turns"]["global"] for job in jobs]
    assert turns[0]["k"] == turns[1]["k"]


def test_too_few_texts_to_choose_k_are_refused_before_the_capture(other_world: World) -> None:
    world = other_world
    job = transport(
        world,
        put_pair(world),
        rotate={"k": "held_out", "pca": "each"},
        evaluate={"test_fraction": 0.8},
    )
    world.run()

    error = world.job(job).error
    assert error is not None
    assert error["chunk"]["stage"] == "ledger"
    assert "3 training texts have paired tokens" in error["message"]


def test_models_that_compute_in_sixteen_bits_pass_as_such_weights_do(other_world: World) -> None:
    world = other_world
    job = transport(world, put_pair(world), capture={**SMALL, "dtype": "bfloat16"})
    world.run()

    gates = {gate["name"]: gate for gate in world.report(job)["gates"]}
    assert gates["logits.rotated"]["bound"] == pytest.approx(64e-3)


def test_a_given_fold_of_the_document_is_judged_as_where_it_was_made(other_world: World) -> None:
    world = other_world
    inputs = put_pair(world)
    none = {"heads": False, "neurons": False}
    whole = transport(world, inputs, fold={"variant": "conjugate"}, permute=none)
    judged = transport(
        world, inputs, rotations=f"{whole}/rotations", folded=f"{whole}/model", permute=None
    )
    world.run()

    mine, theirs = world.report(judged)["scores"], world.report(whole)["scores"]
    assert mine["rotated"] == theirs["rotated"]


@pytest.mark.parametrize(
    "spec",
    [
        {"fold": {"variant": "sliced"}, "rotate": {"tie": "layer"}},
        {"fold": {"variant": "sliced"}, "rotate": {"tie": "stage", "stage_layers": 2}},
        {"rotate": {"k": "held_out", "pca": "each", "det": "positive"}},
        {"rotate": {"shrink": 0.5, "centre": True}, "refine": {"reflections": 0}},
        {"capture": {**SMALL, "layer_map": "cka", "token_weights": "text"}},
        {"capture": {**SMALL, "layer_map": [0, 0, 2], "alignment": "span_average"}},
        {"capture": {**SMALL, "system_prompt": "You are a guide.", "drop_bos": False}},
        {"permute": {"heads": False, "neurons": False}, "evaluate": {"layers": [1]}},
        {"permute": {"layers": "every_other"}, "fold": {"dtype": "bfloat16"}},
    ],
)
def test_every_choice_goes_the_whole_way(other_world: World, spec: dict[str, Any]) -> None:
    world = other_world
    inputs = put_pair(world, student="qwen3", teacher="llama", head_dim=16)
    job = transport(world, inputs, **spec)
    world.run()

    assert world.job(job).state == "succeeded", world.job(job).error
    report = world.report(job)
    passed = {gate["name"]: gate["passed"] for gate in report["gates"]}
    assert passed["orthogonality"]
    assert passed["logits.rotated"]
    assert model_of(world, job).exact
    assert report["settings"]["totals"]["test"]["prompts"] > 0


def test_the_documents_fold_says_that_it_is_not_exact(other_world: World) -> None:
    world = other_world
    job = transport(world, put_pair(world), fold={"variant": "conjugate"})
    world.run()

    gates = {gate["name"]: gate for gate in world.report(job)["gates"]}
    assert gates["logits.rotated"]["passed"] is None
    assert gates["logits.rotated"]["value"] > 1e-2
    assert not model_of(world, job).exact
    assert "does not compute" in world.path(job, "report_md").read_text()


def test_whitening_is_reported_and_offers_no_model(other_world: World) -> None:
    world = other_world
    job = transport(world, put_pair(world), until="rotate", rotate={"whiten": True})
    world.run()

    assert world.job(job).state == "succeeded", world.job(job).error
    assert "model" not in world.status(job).artifacts
    assert not world.report(job)["turns"]["global"]["orthogonal"]


@pytest.mark.parametrize("gates", [{"hidden_cosine": 0.999}, {"orthogonality": 1e-300}])
def test_a_missed_gate_fails_the_job_and_keeps_the_report(
    world: World, gates: dict[str, float]
) -> None:
    job = transport(world, put_pair(world), gates={"improves": False, **gates})
    world.run()

    failed = world.job(job)
    assert failed.state == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "gate_failed"
    (name,) = gates
    assert name in failed.error["message"]
    offered = world.status(job).artifacts
    assert {"report", "report_md", "rotation_ledger"} <= set(offered)
    assert "model" not in offered
    assert "model_permuted" not in offered


def test_rotations_are_not_judged_on_texts_they_were_fitted_on(other_world: World) -> None:
    world = other_world
    inputs = put_pair(world)
    fitted = transport(world, inputs, until="rotate")
    again = transport(world, inputs, rotations=f"{fitted}/rotations")
    other_split = transport(world, inputs, rotations=f"{fitted}/rotations", seed=7)
    world.run()

    assert world.job(again).state == "succeeded", world.job(again).error
    error = world.job(other_split).error
    assert error is not None
    assert error["code"] == "data_invalid"
    assert "fitted on other texts" in error["message"]


def test_held_out_texts_are_those_that_say_so(other_world: World) -> None:
    world = other_world
    inputs = {**put_pair(world), "prompts": put_prompts(world, split=True)}
    job = transport(world, inputs, until="capture")
    world.run()

    ledger = json.loads(world.path(job, "ledger").read_text())
    assert [row["split"] for row in ledger["prompts"]] == (["train"] * 3 + ["test"]) * 4
    assert len(ledger["run_id"]) == 16
