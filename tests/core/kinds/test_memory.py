"""What the kinds declare that a chunk needs, against what was measured of one."""

from __future__ import annotations

from typing import Any

import pytest

from core.errors import SpecInvalid
from core.kinds import distill, evaluate, sweep
from core.kinds._base import Input, Stage

MODEL, STUDENT, PLANES = "0" * 64, "1" * 64, "2" * 64
MIB = 2**20
WIDE = {"name": "mlp", "hidden": 4096, "layers": 3}
GIANT = {"name": "mlp", "hidden": 65_536, "layers": 32}
EMBEDDINGS = Input(
    MODEL,
    "embeddings",
    {"dim": 384, "target_dim": 384, "rows": 1000, "all_rows": 1200, "held_out": 200},
)
ROTATIONS = Input(MODEL, "federated_model", {"dim": 384, "rows": 1000, "clusters": 8})


def stages_of(student: dict[str, Any] | None, model: Input = EMBEDDINGS, **told: Any) -> Any:
    spec = distill.Spec.model_validate({"model": MODEL, "student": student, **told})
    inputs = {"model": model}
    if "codebook" in told:
        inputs["codebook"] = Input(PLANES, "codebook", {"dim": 384, "n_components": 4096})
    return {stage.name: stage.memory_bytes for stage in distill.stages(spec, inputs)}


def test_training_a_wide_student_declares_what_it_was_measured_to_take() -> None:
    """1,147 MiB beside the process."""
    found = stages_of(WIDE)
    assert 1147 * MIB / 2 < found["train"] < 3 * 1147 * MIB
    assert found["export"] > 4 * 36_000_000 * 3, "state and files hold its 36.7 million numbers"
    assert found["targets"] < 100 * MIB, "no student is there yet"


def test_batches_count_by_their_parts_and_by_what_compares_rows() -> None:
    many = Input(MODEL, "embeddings", {**EMBEDDINGS.meta, "rows": 20_000, "all_rows": 24_000})

    def train(student: dict[str, Any] | None, model: Input = many, **told: Any) -> int:
        training = {"batch_size": 16_384, "warmup_steps": 0, **told}
        return int(stages_of(student, model, training=training)["train"])

    whole, parts = train(None), train(None, accumulate=16)
    assert whole - parts > 6 * 8 * (16_384**2 - 1024**2), "neighbour_kl compares every two rows"
    alone, compared = train({"name": "linear"}), train({"name": "linear"}, losses={"gram": 1})
    assert compared - alone == 6 * 8 * 16_384**2
    few = train(None, EMBEDDINGS)
    assert few == train(None, EMBEDDINGS, batch_size=1000), (
        "a batch has no more rows than there are"
    )


def test_planes_of_a_codebook_count() -> None:
    student = {"name": "canonical"}
    found = stages_of(student, ROTATIONS, codebook=PLANES)
    assert found["export"] > 4 * 2 * 4096 * 384
    assert found["train"] > stages_of(student, ROTATIONS)["train"]


def test_a_student_that_nothing_holds_is_refused() -> None:
    told = r"student: 'mlp' of these sizes holds 133\d{9} numbers, 49\d GiB; allowed: .*64 GiB"
    with pytest.raises(SpecInvalid, match=told) as caught:
        stages_of(GIANT)
    assert caught.value.pointer == "/student"
    spec = sweep.Spec.model_validate({"model": MODEL, "students": [{"name": "linear"}, GIANT]})
    with pytest.raises(SpecInvalid, match=r"mlp.*64 GiB") as caught:
        sweep.stages(spec, {"model": ROTATIONS})
    assert caught.value.pointer == "/students"


def test_a_round_of_a_sweep_holds_its_largest_variant() -> None:
    def rounds(*students: dict[str, Any]) -> list[Stage]:
        spec = sweep.Spec.model_validate({"model": MODEL, "students": students})
        return list(sweep.stages(spec, {"model": ROTATIONS}))

    small, both = rounds({"name": "linear"}), rounds({"name": "linear"}, WIDE)
    assert both[1].memory_bytes > small[1].memory_bytes + 1000 * MIB
    assert both[-1].memory_bytes >= both[1].memory_bytes
    assert both[0].memory_bytes == small[0].memory_bytes


def test_judging_codes_declares_what_it_was_measured_to_take() -> None:
    """20,000 rows of 768 dimensions: 452 MiB beside what was imported."""
    meta = {"dim": 768, "target_dim": 768, "rows": 18_000, "all_rows": 20_000, "held_out": 2000}
    inputs = {"model": Input(MODEL, "embeddings", meta)}
    spec = evaluate.Spec.model_validate({"model": MODEL})
    alone = [stage.memory_bytes for stage in evaluate.stages(spec, inputs)]
    assert all(452 * MIB < found < 3 * 452 * MIB for found in alone)

    inputs["student"] = Input(STUDENT, "student", {**meta, "model": MODEL, "student": WIDE})
    judged = evaluate.stages(
        evaluate.Spec.model_validate({"model": MODEL, "student": STUDENT}), inputs
    )
    assert judged[-1].memory_bytes > alone[-1] + 4 * 36_000_000
