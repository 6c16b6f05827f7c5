"""The stages of a transport, what a chunk of each needs, and what all would take. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.kinds._base import Cost, Input, Stage, StageCost
from core.kinds._transport.checks import check
from core.kinds._transport.needs import SCRATCH_BYTES, Needs
from core.kinds._transport.plan import Plan
from core.kinds._transport.spec import Spec
from core.transport import cost


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Freeze the ledger, capture, permute, rotate, fold, evaluate; each as far as it is asked for.

    Raises:
        SpecInvalid: widths, layers or inputs do not fit each other.
    """
    plan = Plan(spec, inputs)
    check(plan)
    need = Needs(plan)
    judged, told = spec.runs("evaluate"), int(spec.runs("permute"))
    matches = int(plan.permute is not None and spec.runs("permute"))
    found = [
        Stage("ledger", int(not plan.frozen), memory_bytes=need.ledger),
        Stage("capture", plan.captures * plan.blocks, memory_bytes=need.capture),
        Stage("collect", int(plan.captures), memory_bytes=SCRATCH_BYTES),
        Stage("permute", matches, memory_bytes=need.permute),
        Stage("rotate", plan.rotates * len(plan.groups), memory_bytes=need.rotate),
        Stage("bind", int(plan.rotates), memory_bytes=need.rotations),
        Stage("fold", plan.folds * len(plan.fold_chunks), memory_bytes=need.fold),
        Stage("pack", int(plan.folds), memory_bytes=SCRATCH_BYTES),
        Stage("evaluate", judged * len(plan.judged), memory_bytes=need.evaluate),
        Stage("report", told, memory_bytes=need.rotations),
        Stage("gates", told, memory_bytes=need.rotations),
    ]
    return [stage for stage in found if stage.chunks]


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
