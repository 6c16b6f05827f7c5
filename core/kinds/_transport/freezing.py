"""Stage ``ledger``: what a transport runs on is written down before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Metric
from core.kinds._files import write_json
from core.kinds._transport.capturing import VALIDATION
from core.kinds._transport.given import Given
from core.kinds._transport.spec import Spec


def ledger(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Tokenise every text, fix split and layer map, and freeze all of it under a run_id."""
    from core.transport import ledger as ledgers

    given = Given(spec, chunk)
    told = ledgers.build(
        given.prompts,
        chunk.input("prompts").sha256,
        student=given.sides[0],
        teacher=given.sides[1],
        capture=given.capture,
        held_out=given.held_out,
        layer_map=_by_cka(given) if given.plan.capture.layer_map == "cka" else None,
        report=chunk.progress,
    )
    if given.plan.captures and spec.rotate.k == "held_out":
        _check_chooses(told)
    totals = told["totals"]
    made = write_json(
        chunk.workdir / "ledger.json",
        told,
        format_name="transport_ledger",
        run_id=told["run_id"],
        **given.sources,
    )
    metrics = [Metric(f"{split}_pairs", 0, float(totals[split]["pairs"])) for split in totals]
    return ChunkResult(outputs={"ledger": made}, metrics=metrics)


def _check_chooses(told: Mapping[str, Any]) -> None:
    """Refuse too few texts for one of them to choose k, before any is captured."""
    from core.transport.ledger import training_rows

    usable = sum(1 for row in training_rows(told) if told["prompts"][row]["pairs"])
    if usable < VALIDATION:
        raise SpecInvalid(
            f"rotate.k 'held_out': {usable} training texts have paired tokens, and every "
            f"{VALIDATION}th chooses k; needed {VALIDATION} or more, or k as a number or null",
            pointer="/rotate/k",
        )


def _by_cka(given: Given) -> tuple[int, ...]:
    """Compare layers on texts that are not held out: those of the training split."""
    from core.transport.cka import cka
    from core.transport.held_out import draw
    from core.transport.memory import CKA_ROWS
    from core.transport.samples import sample_layers

    splits = draw(given.prompts, given.held_out)
    rows = [row for row, split in enumerate(splits) if split == "train"]
    models = [given.load(given.folder(name)) for name in ("student", "teacher")]
    states = sample_layers(
        models[0],
        models[1],
        given.pairs(rows),
        rows=CKA_ROWS,
        batch_tokens=given.capture.batch_tokens,
        report=given.chunk.progress,
    )
    return cka(*states)[1]
