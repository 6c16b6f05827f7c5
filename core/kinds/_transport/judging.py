"""Stages ``evaluate``, ``report`` and ``gates``: how near each variant came, and what must hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.errors import DataInvalid, GateFailed
from core.kinds._base import Chunk, ChunkResult, Metric, Produced
from core.kinds._files import read_json, write_json
from core.kinds._transport.given import Given
from core.kinds._transport.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from core.tensors.language_models import LanguageModel
    from core.transport.evaluation import Terms
    from core.transport.gates import Facts, FoldFacts
    from core.transport.pairs import Pair

SORTS = {
    "json": ("report", "application/json"),
    "md": ("report_md", "text/markdown"),
    "png": ("picture", "image/png"),
}
"""Format and media type of a report's file, by the end of its name."""
COMPARED = 8
"""Held-out texts on which logits of an exact fold are compared with the student's."""


def evaluate(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one variant beside the teacher over the texts held out."""
    from core.transport.evaluation import evaluate_variant
    from core.transport.ledger import held_out_rows

    given = Given(spec, chunk)
    _check_unseen(given)
    variant = given.plan.judged[chunk.index]
    rows = held_out_rows(given.ledger)
    texts, languages = given.pairs(rows), [given.prompts.languages[row] for row in rows]
    student = given.load(given.folder_of(given.folded(variant), variant))
    change = {} if variant == "base" else _logits(given, student, texts)
    teacher = given.load(given.folder("teacher"))
    scores = evaluate_variant(
        student,
        teacher,
        texts,
        languages,
        _terms(given),
        report=chunk.progress,
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


def _check_unseen(given: Given) -> None:
    """Refuse to hold out texts that given rotations may have been fitted on."""
    told = given.rotations.sources.get("fitted_on")
    if told != given.fitted_on:
        raise DataInvalid(
            "rotations: fitted on other texts than those of split 'train' here, so what is held "
            "out may be among them; give the prompts, seed and evaluate.test_fraction they were "
            "fitted with, or their moments"
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


def report(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Write what every stage that ran has to tell: tables, words, pictures, the rotation ledger."""
    from core.transport.gates import check
    from core.transport.report import write_report
    from core.transport.rotation_ledger import write_ledger

    given = Given(spec, chunk)
    facts = gather(given)
    kept = _rotation_ledger(given, facts) if spec.runs("rotate") else None
    chunk.progress(1, 3)
    sources = [given.language_model(name).source for name in ("student", "teacher")]
    made = write_report(
        chunk.workdir,
        title=f"Rotation transport of {sources[0]} to {sources[1]}",
        facts=facts,
        gates=check(spec.gates, facts),
        ledger=kept,
        tolerance=spec.gates.orthogonality,
        settings=_settings(given),
    )
    chunk.progress(2, 3)
    outputs = {}
    for name, path in made.items():
        output, _, ending = name.rpartition("_")
        sort, media_type = SORTS[ending]
        shown = name if ending == "md" else output
        outputs[shown] = Produced(path, sort, path.name, media_type)
    if kept is not None:
        path = chunk.workdir / "rotation_ledger.json"
        write_ledger(path, kept)
        outputs["rotation_ledger"] = Produced(
            path, "rotation_ledger", path.name, "application/json", {"run_id": kept["run_id"]}
        )
    return ChunkResult(outputs=outputs)


def _rotation_ledger(given: Given, facts: Facts) -> dict[str, Any]:
    from core.transport.rotation_ledger import build

    return build(
        given.rotations,
        run_id=given.ledger["run_id"],
        layer_map=given.ledger["layer_map"],
        permutations=given.permutations,
        likeness=facts.permutations,
        scores=facts.scores,
        seed=given.spec.seed,
    )


def _settings(given: Given) -> dict[str, Any]:
    """Return what was asked for and of what, as the report shows it."""
    spec = given.spec
    parts = ("rotate", "refine", "fold", "evaluate", "gates")
    asked = {name: getattr(spec, name).model_dump(mode="json") for name in parts}
    permute = given.plan.permute and given.plan.permute.model_dump(mode="json")
    return {
        **given.sources,
        "run_id": given.ledger["run_id"],
        "seed": spec.seed,
        "vocabularies": given.ledger["vocabularies"],
        "totals": given.ledger["totals"],
        **asked,
        "capture": given.capture.model_dump(mode="json"),
        "permute": permute,
    }


def gather(given: Given) -> Facts:
    """Return what the gates look at, as far as the stages that ran have measured it."""
    from core.transport.checks import turn_facts
    from core.transport.gates import Facts

    spec, chunk = given.spec, given.chunk
    turns = {}
    if spec.runs("rotate"):
        maps = given.rotations.maps
        turns = {group: turn_facts(one, seed=spec.seed) for group, one in maps.items()}
    judged = chunk.outputs("evaluate") if spec.runs("evaluate") else ()
    told = [_in_order(given, read_json(one["scores"].path)) for one in judged]
    folds: dict[str, FoldFacts] = {}
    logits = {each["variant"]: each["logits"] for each in told}
    if spec.folded is not None:
        folds = {"rotated": given_facts(given, logits.get("rotated", {}))}
    elif given.plan.folds:
        folds = {
            variant: fold_facts(given, variant, logits.get(variant, {}))
            for variant in given.plan.folded
        }
    return Facts(
        turns=turns,
        folds=folds,
        scores={each["variant"]: each["scores"] for each in told},
        permutations=likeness(given),
        checksums=None if spec.states is None else len(given.states_list["shards"]),
    )


def _in_order(given: Given, told: dict[str, Any]) -> dict[str, Any]:
    """Return a variant's scores with the sites in the order of the stream, which JSON sorted."""
    from core.transport.sites import sites

    scores = told["scores"]
    order = [site for site in sites(given.plan.student) if site in scores["sites"]]
    ordered = {site: scores["sites"][site] for site in order}
    return {**told, "scores": {**scores, "sites": ordered}}


def likeness(given: Given) -> list[dict[str, Any]]:
    """Return what the matching of heads and neurons said of each layer."""
    path = given.permutations_file if given.spec.runs("permute") else None
    return [] if path is None else list(read_json(path)["reports"])


def given_facts(given: Given, logits: dict[str, Any]) -> FoldFacts:
    """Return what can be measured of a fold that another job made."""
    from core.transport.checks import norms_off, rope_changes
    from core.transport.gates import FoldFacts

    student, folded = given.language_model("student"), given.folded("rotated")
    shards = [given.chunk.fetch(file.sha256) for file in folded.shards]
    dtypes = (student.shape.dtype, folded.shape.dtype, given.capture.dtype)
    return FoldFacts(
        fold="given",
        exact=folded.exact,
        sixteen_bit=any("16" in dtype for dtype in dtypes),
        logits_relative=logits.get("relative"),
        rope_changes=rope_changes(*(_config(given, model) for model in (student, folded))),
        norms_off=norms_off(shards, folded.shape) if folded.exact else None,
    )


def _config(given: Given, model: LanguageModel) -> Any:
    config = next(file for file in model.files if file.name == "config.json")
    return read_json(given.chunk.fetch(config.sha256))


def fold_facts(given: Given, variant: str, logits: dict[str, Any]) -> FoldFacts:
    """Return what was measured of one variant's weights while they were folded."""
    from core.kinds._transport.folding import fold_plan
    from core.transport.checks import norms_off, rope_changes
    from core.transport.gates import FoldFacts

    chunk, plan = given.chunk, fold_plan(given, variant)
    made = [read_json(one["facts"].path) for one in chunk.outputs("fold")]
    mine = [fact for fact in made if fact["variant"] == variant and fact["unfold"] is not None]
    worst = max(mine, key=lambda fact: fact["unfold"])
    folded = given.folded(variant)
    dtypes = (plan.shape.dtype, folded.shape.dtype, given.capture.dtype)
    configs = [_config(given, model) for model in (given.language_model("student"), folded)]
    shards = [chunk.fetch(file.sha256) for file in folded.shards]
    return FoldFacts(
        fold=plan.variant,
        exact=plan.exact,
        sixteen_bit=any("16" in dtype for dtype in dtypes),
        unfold_error=worst["unfold"],
        unfold_weight=worst["unfold_weight"],
        unfold_lost=sum(fact["lost"] for fact in mine),
        logits_relative=logits.get("relative"),
        rope_changes=rope_changes(*configs),
        norms_off=norms_off(shards, folded.shape) if plan.absorbs else None,
    )


def gates(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Offer the folded models where all that must hold does.

    Raises:
        GateFailed: something does not; the report, made before, stays.
    """
    from core.kinds._transport.folding import offer
    from core.transport.gates import check, failed

    given = Given(spec, chunk)
    missed = failed(check(spec.gates, gather(given)))
    if missed:
        told = "; ".join(str(gate) for gate in missed)
        raise GateFailed(f"{len(missed)} of the gates failed: {told}")
    return ChunkResult(outputs=offer(chunk, chunk.outputs("pack")[0]) if given.plan.folds else {})
