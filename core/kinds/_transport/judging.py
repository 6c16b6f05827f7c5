"""Stages ``evaluate``, ``report`` and ``gates``: how near each variant came, and what must hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.kinds._base import Chunk, ChunkResult, Metric, Produced
from core.kinds._files import read_json, write_json
from core.kinds._transport.given import Given
from core.kinds._transport.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from core.transport.evaluation import Terms
    from core.transport.pairs import Pair

COMPARED = 8
"""Held-out texts on which logits of an exact fold are compared with the student's."""


def evaluate(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one variant beside the teacher over the texts held out."""
    from core.transport.evaluation import evaluate_variant
    from core.transport.ledger import held_out_rows

    given = Given(spec, chunk)
    variant = given.plan.judged[chunk.index]
    rows = held_out_rows(given.ledger)
    texts, languages = given.pairs(rows), [given.prompts.languages[row] for row in rows]
    student = given.load(given.folder_of(given.folded(variant), variant))
    change = {} if variant == "base" else _logits(given, student, texts)
    teacher = given.load(given.folder("teacher"))
    scores = evaluate_variant(
        student, teacher, texts, languages, _terms(given), report=chunk.progress
    )
    told = {"variant": variant, "scores": scores, "logits": change}
    made = write_json(chunk.workdir / "scores.json", told, format_name="transport_scores")
    cosines = [
        Metric(f"hidden_cosine_{variant}", place, found["cosine"])
        for place, found in enumerate(scores["sites"].values())
        if found["cosine"] is not None
    ]
    return ChunkResult(checkpoints={"scores": made}, metrics=cosines)


def _terms(given: Given) -> Terms:
    from core.transport.evaluation import Terms
    from core.transport.rotations import Rotation

    rotations = given.rotations
    subspaces = {
        site: one.teacher_basis
        for one in rotations.maps.values()
        if isinstance(one, Rotation)
        for site in one.sites
    }
    return Terms(
        layer_map=given.ledger["layer_map"],
        capture=given.capture,
        layers=given.spec.evaluate.layers,
        means=rotations.means,
        subspaces=subspaces,
        shared=given.ledger["vocabularies"]["shared"],
        seed=given.spec.seed,
    )


def _logits(given: Given, student: PreTrainedModel, texts: list[Pair]) -> dict[str, Any]:
    """Compare a fold's logits with those of the student it was made from."""
    from core.transport.predictions import logits_change
    from core.transport.streams import first_device

    base = given.load(given.folder("student"))
    ids = [text.student.ids for text in texts[:COMPARED]]
    found = logits_change(base, student, ids, device=first_device(base))
    return {
        "largest_change": found.largest_change,
        "largest_logit": found.largest_logit,
        "relative": found.relative,
        "kl": found.kl,
        "tokens": found.tokens,
    }
