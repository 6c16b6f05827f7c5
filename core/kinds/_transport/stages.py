"""The stages of a transport, what a chunk of each needs, and what all would take. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.architectures.shape import ITEM_BYTES
from core.kinds._base import Cost, Input, Stage, StageCost
from core.kinds._transport.checks import check
from core.kinds._transport.plan import Plan
from core.kinds._transport.spec import Spec
from core.transport import cost

SCRATCH_BYTES = 2**28
"""What a chunk holds beside what is counted: tokenizers, one batch's bookkeeping, pictures."""


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Freeze the ledger, capture, permute, rotate, fold, evaluate; each as far as it is asked for.

    Raises:
        SpecInvalid: widths, layers or inputs do not fit each other.
    """
    plan = Plan(spec, inputs)
    check(plan)
    models = _models_bytes(plan)
    moments = cost.moments_bytes(plan.student, plan.teacher)
    pair = cost.pair_bytes(plan.student, plan.teacher)
    wide = cost.widened(plan.student, plan.teacher)
    judged, told = spec.runs("evaluate"), int(spec.runs("permute"))
    looks = SCRATCH_BYTES if plan.capture.layer_map != "cka" else models
    found = [
        Stage("ledger", int(not plan.frozen), memory_bytes=looks),
        Stage("capture", plan.captures * plan.blocks, memory_bytes=models + moments),
        Stage("collect", int(plan.captures), memory_bytes=SCRATCH_BYTES),
        Stage(
            "permute",
            int(plan.permute is not None and spec.runs("permute")),
            memory_bytes=SCRATCH_BYTES + 4 * 8 * plan.student.neurons**2,
        ),
        Stage(
            "rotate",
            plan.rotates * len(plan.groups),
            memory_bytes=SCRATCH_BYTES + 3 * pair + 8 * 8 * wide**2,
        ),
        Stage("bind", int(plan.rotates), memory_bytes=SCRATCH_BYTES + 8 * 8 * wide**2),
        Stage(
            "fold",
            plan.folds * len(plan.fold_chunks),
            memory_bytes=SCRATCH_BYTES + _fold_bytes(plan),
        ),
        Stage("pack", int(plan.folds), memory_bytes=SCRATCH_BYTES),
        Stage(
            "evaluate",
            judged * len(plan.judged),
            memory_bytes=round(models * wide / plan.student.width),
        ),
        Stage("report", told, memory_bytes=SCRATCH_BYTES + 8 * 8 * wide**2),
        Stage("gates", told, memory_bytes=SCRATCH_BYTES + 8 * 8 * wide**2),
    ]
    return [stage for stage in found if stage.chunks]


def _models_bytes(plan: Plan) -> int:
    """Both models and what one batch of tokens makes of itself in them."""
    item = 4 if plan.capture.dtype == "float32" else 2
    batch = plan.capture.batch_tokens
    both = 0
    for shape in (plan.student, plan.teacher):
        weights = shape.parameters * max(item, ITEM_BYTES[shape.dtype])
        both += weights + 4 * batch * (8 * shape.width + 4 * shape.neurons)
    return both + SCRATCH_BYTES


def _fold_bytes(plan: Plan) -> int:
    """Two of the largest shard at most, and the maps."""
    meta = plan.inputs["student"].meta
    wide = cost.widened(plan.student, plan.teacher)
    grown = meta["largest_shard_bytes"] * wide // plan.student.width
    maps = 8 * plan.student.width * wide * len(plan.groups)
    return int(2 * grown + maps)


def count_cost(spec: Spec, inputs: Mapping[str, Input]) -> Cost:
    """Count operations and bytes of every stage that runs; torch-free."""
    plan = Plan(spec, inputs)
    texts = cost.Texts.of(inputs["prompts"].meta, capture=plan.capture, evaluate=spec.evaluate)
    lines = cost.price(
        plan.student,
        plan.teacher,
        texts,
        capture=plan.capture,
        permute=plan.permute,
        rotate=spec.rotate,
        fold=spec.fold,
        evaluate=spec.evaluate,
    )
    runs = {
        "capture": plan.captures,
        "permute": plan.permute is not None and spec.runs("permute"),
        "rotate": plan.rotates,
        "fold": plan.folds,
        "evaluate": spec.runs("evaluate"),
    }
    kept = [line for line in lines if runs[line.stage]]
    train, held = texts.train * texts.tokens, texts.held_out * texts.tokens
    each = round(plan.captures * train + spec.runs("evaluate") * len(plan.judged) * held)
    rates = cost.ONE_GPU
    return Cost(
        stages=[
            StageCost(
                line.stage,
                line.operations,
                line.read_bytes,
                line.written_bytes,
                line.seconds(rates),
            )
            for line in kept
        ],
        passes={"student": each, "teacher": each},
        assumes={**rates.told(), "texts": f"{cost.CHARACTERS_PER_TOKEN:g} characters a token"},
    )
