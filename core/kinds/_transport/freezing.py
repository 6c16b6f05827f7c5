"""Stage ``ledger``: what a transport runs on is written down before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.kinds._base import Chunk, ChunkResult, Metric
from core.kinds._files import write_json
from core.kinds._transport.given import Given
from core.kinds._transport.spec import Spec

if TYPE_CHECKING:
    from core.transport.ledger import Side

ROWS = 2048
"""By which layers are compared: their Gram matrices take 32 MiB each."""


def ledger(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Tokenise every text, fix split and layer map, and freeze all of it under a run_id."""
    from core.transport import ledger as ledgers

    given = Given(spec, chunk)
    told = ledgers.build(
        given.prompts,
        chunk.input("prompts").sha256,
        student=_side(given, "student"),
        teacher=_side(given, "teacher"),
        capture=given.capture,
        test_fraction=spec.evaluate.test_fraction,
        seed=spec.seed,
        layer_map=_by_cka(given) if spec.capture.layer_map == "cka" else None,
        report=chunk.progress,
    )
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


def _side(given: Given, name: str) -> Side:
    from core.transport.ledger import Side

    tokenizer = given.tokenizers[0 if name == "student" else 1]
    return Side(given.language_model(name), given.chunk.input(name).sha256, tokenizer)


def _by_cka(given: Given) -> tuple[int, ...]:
    """Compare layers on texts that are not held out: those of the training split."""
    from core.transport import layer_maps
    from core.transport.held_out import draw
    from core.transport.samples import sample_layers

    spec = given.spec
    splits = draw(given.prompts, test_fraction=spec.evaluate.test_fraction, seed=spec.seed)
    rows = [row for row, split in enumerate(splits) if split == "train"]
    models = [given.load(given.folder(name)) for name in ("student", "teacher")]
    states = sample_layers(
        models[0],
        models[1],
        given.pairs(rows),
        rows=ROWS,
        batch_tokens=given.capture.batch_tokens,
        report=given.chunk.progress,
    )
    return layer_maps.cka(*states)[1]
