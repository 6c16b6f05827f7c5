"""A whole transport of one tiny model to another, in memory: what its ledger and report hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from bench._tiny_models import tiny_model
from core.specs.transport import Capture, Gates, Permute, Refine, Rotate
from core.transport.capture import capture
from core.transport.checks import turn_facts
from core.transport.evaluation import Terms, evaluate_variant
from core.transport.gates import Facts, FoldFacts, Gate, check
from core.transport.moments import Captured
from core.transport.permutations import LayerPermutation
from core.transport.permute import LayerSums, match_layer
from core.transport.predictions import logits_change
from core.transport.refine import refine
from core.transport.rotate import cross_moment, solve
from core.transport.rotation_ledger import build
from core.transport.rotations import Rotation, RotationSet
from core.transport.sites import Tie, groups
from core.transport.streams import shape_of
from tests.core.transport.held_out import LANGUAGES, TEXTS, random_rotation, read, turned

WORDS = ("river", "castle", "garden", "market")
TRAIN = tuple(f"{text} {word} {word[::-1]}" for text in TEXTS for word in WORDS)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Transported:
    """What came of it."""

    rotations: RotationSet
    ledger: dict[str, Any]
    facts: Facts
    gates: list[Gate]


@cache
def transported(tie: Tie = "global") -> Transported:
    """Rotate a model to a disturbed and turned copy of itself; rows are turned, not folded."""
    student = tiny_model()
    student.set_attn_implementation("eager")
    teacher = _disturbed()
    options = Capture()
    sums = capture(
        student,
        teacher,
        read(TRAIN),
        options=options,
        layer_map=range(3),
        permute=Permute(),
        report=lambda done, total: None,
    )
    permutations, likeness = _matched(sums, student)
    rotations = _rotated(sums, tie, student)
    turns = {group: one for group, one in rotations.maps.items() if isinstance(one, Rotation)}
    maps = {site: one.full for one in turns.values() for site in one.sites}
    bases = {site: one.teacher_basis for one in turns.values() for site in one.sites}
    terms = Terms(range(3), options, means=rotations.means, subspaces=bases, shared=257)
    base = evaluate_variant(student, teacher, read(), LANGUAGES, terms)
    scores = {
        "base": base,
        "permuted": base,
        "rotated": evaluate_variant(student, teacher, read(), LANGUAGES, terms, maps=maps),
    }
    folded = turned(student, maps["final"])
    change = logits_change(student, folded, [text.student.ids for text in read()], device=CPU)
    fold = FoldFacts(
        fold="global",
        exact=True,
        unfold_error=1e-12,
        unfold_weight="lm_head.weight",
        logits_relative=change.relative if tie == "global" else None,
        rope_changes=(),
        norms_off=0.0,
    )
    facts = Facts(
        turns={group: turn_facts(one, seed=0) for group, one in rotations.maps.items()},
        folds={"rotated": fold},
        scores=scores,
        permutations=likeness,
    )
    ledger = build(
        rotations,
        run_id="0123456789abcdef",
        layer_map=range(3),
        permutations=permutations,
        likeness=likeness,
        scores=scores,
        seed=0,
    )
    return Transported(rotations, ledger, facts, check(Gates(), facts))


def _disturbed() -> PreTrainedModel:
    teacher = tiny_model()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=random))
    teacher = turned(teacher, random_rotation(32, seed=9)).float()
    teacher.set_attn_implementation("eager")
    return teacher


def _matched(
    sums: Captured, student: PreTrainedModel
) -> tuple[dict[int, LayerPermutation], list[dict[str, Any]]]:
    shape = shape_of(student)
    orders, likeness = {}, []
    for layer in range(3):
        kept = LayerSums(sums.neurons[layer], sums.heads[layer])
        orders[layer], told = match_layer(layer, kept, student=shape, teacher=shape)
        likeness.append(told)
    return orders, likeness


def _rotated(sums: Captured, tie: Tie, student: PreTrainedModel) -> RotationSet:
    maps, diagnostics = {}, {}
    for group, of in groups(shape_of(student), tie=tie, stage_layers=2).items():
        moments = {site: sums.sites[site] for site in of}
        found, told = solve(moments, Rotate(tie=tie, stage_layers=2, k=24), group)
        assert isinstance(found, Rotation)
        cross = cross_moment(moments, centre=False)
        maps[group], told["refine"] = refine(found, cross, Refine(), det="any")
        diagnostics[group] = told
    means = {site: each.sum_y / each.n for site, each in sums.sites.items()}
    return RotationSet(tie, 2, 3, 32, 32, maps, {}, diagnostics, means)
