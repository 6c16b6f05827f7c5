"""What a transport refuses before any model is loaded: widths, layers, results of other models."""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import SpecInvalid
from core.kinds._transport.plan import Plan
from core.transport import layer_maps
from core.transport.memory import permuted_layers


def check(plan: Plan) -> None:
    """Refuse what does not fit, before any device has worked for it."""
    spec, student, teacher = plan.spec, plan.student, plan.teacher
    for name in ("student", "teacher"):
        if plan.inputs[name].meta["adapters"]:
            raise SpecInvalid(
                f"{name}: a folded student that takes our own module to load (skip adapters, or a "
                "width that transformers refuses); give the model that it was made from",
                pointer=f"/{name}",
            )
    if student.width != teacher.width and spec.fold.variant == "conjugate" and plan.folds:
        raise SpecInvalid(
            f"fold.variant 'conjugate' needs equal widths, and the student's is {student.width}, "
            f"the teacher's {teacher.width}; allowed: global, sliced",
            pointer="/fold/variant",
        )
    most = min(student.width, teacher.width)
    if isinstance(spec.rotate.k, int) and spec.rotate.k > most:
        raise SpecInvalid(
            f"rotate.k {spec.rotate.k}: the smaller width is {most}; allowed: 1 to {most}",
            pointer="/rotate/k",
        )
    _check_layers(plan)
    _check_artifacts(plan)
    _check_prompts(plan)


def _check_prompts(plan: Plan) -> None:
    """Refuse texts of which none could be fitted on, or none held out."""
    told = plan.inputs["prompts"].meta
    if told["prompts"] < 2:
        raise SpecInvalid(
            "prompts: 1 text; needed at least 2, one of them held out", pointer="/prompts"
        )
    lacking = {0: "test", told["prompts"]: "train"}.get(told["held_out"])
    if lacking is not None and not told["unsplit"]:
        raise SpecInvalid(
            f"prompts: none of the {told['prompts']} texts is of split {lacking!r}; needed some "
            "of both, or without a split",
            pointer="/prompts",
        )
    asked = plan.spec.evaluate.test_fraction
    for name in ("moments", "states"):
        if name in plan.inputs and asked is not None:
            frozen = plan.inputs[name].meta["test_fraction"]
            if asked != frozen:
                raise SpecInvalid(
                    f"evaluate.test_fraction {asked}: the {name} were taken with {frozen}; leave "
                    "it out",
                    pointer="/evaluate/test_fraction",
                )


def _check_layers(plan: Plan) -> None:
    spec, student, teacher = plan.spec, plan.student, plan.teacher
    layer_maps.without_states(plan.capture.layer_map, student.layers, teacher.layers)
    _within(spec.evaluate.layers, student.layers, "evaluate.layers", "/evaluate/layers")
    if plan.permute is not None and isinstance(plan.permute.layers, tuple):
        _within(plan.permute.layers, student.layers, "permute.layers", "/permute/layers")


def _within(layers: Sequence[int], count: int, name: str, pointer: str) -> None:
    for layer in layers:
        if layer >= count:
            raise SpecInvalid(f"{name}: layer {layer}; allowed: 0 to {count - 1}", pointer=pointer)


def _check_artifacts(plan: Plan) -> None:
    """Refuse results of earlier stages that are of other models."""
    for name in ("moments", "states", "permutations", "rotations"):
        if name not in plan.inputs:
            continue
        of = plan.inputs[name].meta
        for model in ("student", "teacher"):
            if of[model] != plan.inputs[model].sha256:
                raise SpecInvalid(
                    f"{name}: of {model} {of[model][:12]}…, not {plan.inputs[model].sha256[:12]}…",
                    pointer=f"/{name}",
                )
    if "moments" in plan.inputs:
        _check_moments(plan)
    if "folded" in plan.inputs:
        _check_folded(plan)
    if "rotations" in plan.inputs and plan.folds:
        _check_rotations(plan)


def _check_folded(plan: Plan) -> None:
    """Refuse a folded student that cannot be this one's."""
    folded, student = plan.inputs["folded"].meta, plan.inputs["student"].meta
    for name in ("family", "layers", "heads", "neurons", "vocabulary", "tokenizer"):
        if folded[name] != student[name]:
            raise SpecInvalid(
                f"folded: {name} {folded[name]}, and the student's is {student[name]}; give a fold "
                "of this student",
                pointer="/folded",
            )


def _check_rotations(plan: Plan) -> None:
    """Refuse to fold what is no rotation, or several where one goes through the whole stream."""
    given = plan.inputs["rotations"].meta
    if not given["orthogonal"]:
        raise SpecInvalid(
            "rotations: fitted on z-scores (whiten), so they are none and cannot be folded",
            pointer="/rotations",
        )
    if plan.spec.fold.variant == "global" and given["tie"] != "global":
        raise SpecInvalid(
            f"rotations: tied by {given['tie']}; fold.variant 'global' needs one for all; allowed: "
            "sliced, conjugate",
            pointer="/rotations",
        )


def _check_moments(plan: Plan) -> None:
    """Refuse to make of moments what they were not taken for."""
    kept = plan.inputs["moments"].meta
    if plan.spec.rotate.k == "held_out" and plan.rotates and not kept["validation"]:
        raise SpecInvalid(
            "rotate.k 'held_out': these moments were taken without texts set aside to choose it; "
            "allowed: a number or null",
            pointer="/rotate/k",
        )
    if plan.spec.permute is None:
        return
    layers = {*kept["neuron_layers"], *kept["head_layers"]}
    for layer in permuted_layers(plan.permute, plan.student.layers):
        if layer not in layers:
            raise SpecInvalid(
                f"moments: no statistics of layer {layer}'s heads and neurons were kept; leave "
                "permute out, or name the layers that have them",
                pointer="/permute",
            )
