"""Writes what a transport came to: report.json, report.md and pictures; the same bytes always."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.transport.gates import Facts, Gate, as_json
from core.transport.pictures import (
    draw_cosines,
    draw_errors,
    draw_likeness,
    draw_singular_values,
    draw_sizes,
)
from core.transport.report_words import sentences
from core.transport.sanity import inspect

OVERALL = (
    *("cosine", "p5", "seen", "shuffled", "mean_only", "subspace", "difference_rms"),
    *("stream_rms_ratio", "stream_difference_rms", "channel_rms_factor"),
)
TOKENS = ("kl", "top1_agreement", "nats_per_token", "bits_per_character")
SITES = (
    *("cosine", "p5", "seen", "shuffled", "mean_only", "subspace"),
    *("difference_rms", "stream_rms_ratio"),
)
PICTURES = {
    "cosines_png": "held-out cosine at every site, with nulls",
    "sizes_png": "RMS of the streams and of their difference, by site",
    "likeness_png": "likeness of matched attention maps and neurons, by layer",
    "singular_values_png": "singular values of every rotation",
    "errors_png": "errors of orthogonality and round trip, by layer",
}


def write_report(
    folder: Path,
    *,
    title: str,
    facts: Facts,
    gates: Sequence[Gate],
    ledger: Mapping[str, Any] | None = None,
    tolerance: float = 1e-5,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write every file into a folder; nothing timed or dated may be in the arguments.

    Args:
        folder: exists.
        title: of the report.
        facts: what was measured.
        gates: of ``gates.check`` on these facts.
        ledger: of ``rotation_ledger.build``; None where nothing was rotated.
        tolerance: of orthogonality, a line in the picture of errors.
        settings: JSON values shown at the end: what was asked for, of which models.

    Returns:
        Paths by name: report_json, report_md, and of ``PICTURES`` those there is something for.
    """
    paths = {"report_json": folder / "report.json", "report_md": folder / "report.md"}
    paths |= _draw(folder, facts, ledger, tolerance)
    words = sentences(facts, ledger)
    rows = table(facts)
    whole = {
        "title": title,
        "words": words,
        "table": rows,
        "gates": as_json(gates),
        "scores": dict(facts.scores),
        "turns": dict(facts.turns),
        "folds": {name: asdict(fold) for name, fold in facts.folds.items()},
        "permutations": list(facts.permutations),
        "settings": dict(settings or {}),
    }
    text = json.dumps(whole, sort_keys=True, indent=1, allow_nan=False)
    paths["report_json"].write_text(text + "\n", encoding="utf-8")
    drawn = [name for name in PICTURES if name in paths]
    lines = _markdown(title, words, facts, gates, rows, drawn, settings)
    paths["report_md"].write_text("\n".join(lines), encoding="utf-8")
    return paths


def table(facts: Facts) -> list[dict[str, Any]]:
    """Return rows of ``variant, metric, value`` (document 002, section 16.2); None: not to be had.

    The teacher's own surprisal stands beside, under the variant ``teacher``.
    """
    rows: list[dict[str, Any]] = []

    def add(variant: str, metric: str, value: float | None) -> None:
        rows.append({"variant": variant, "metric": metric, "value": value})

    for variant, scores in facts.scores.items():
        for metric in OVERALL:
            add(variant, metric, scores["overall"][metric])
        for metric in TOKENS:
            add(variant, metric, scores["tokens"][metric])
        fold = facts.folds.get(variant)
        if fold is not None:
            add(variant, "logits_relative", fold.logits_relative)
            add(variant, "unfold_error", fold.unfold_error)
    if facts.scores:
        own = list(facts.scores.values())[-1]["teacher_tokens"]
        for metric in ("nats_per_token", "bits_per_character"):
            add("teacher", metric, own[metric])
    return rows


def _draw(
    folder: Path, facts: Facts, ledger: Mapping[str, Any] | None, tolerance: float
) -> dict[str, Path]:
    found = {}

    def at(name: str) -> Path:
        found[name] = folder / f"{name.removesuffix('_png')}.png"
        return found[name]

    if facts.scores:
        draw_cosines(at("cosines_png"), facts.scores)
        draw_sizes(at("sizes_png"), facts.scores)
    if any(not of[what]["skipped"] for of in facts.permutations for what in ("heads", "neurons")):
        draw_likeness(at("likeness_png"), facts.permutations)
    if ledger is not None:
        draw_singular_values(at("singular_values_png"), ledger)
        draw_errors(at("errors_png"), inspect(ledger, tolerance=tolerance), tolerance=tolerance)
    return found


def _markdown(
    title: str,
    words: Sequence[str],
    facts: Facts,
    gates: Sequence[Gate],
    rows: Sequence[Mapping[str, Any]],
    drawn: Sequence[str],
    settings: Mapping[str, Any] | None,
) -> list[str]:
    lines = [f"# {title}", "", *(f"- {sentence}" for sentence in words), ""]
    if rows:
        lines += ["## Variants", "", "| variant | metric | value |", "|---|---|---|"]
        lines += [f"| {of['variant']} | {of['metric']} | {_cell(of['value'])} |" for of in rows]
        lines.append("")
    for name in drawn:
        lines += [f"![{PICTURES[name]}]({name.removesuffix('_png')}.png)", ""]
    lines += ["## Gates", "", "| gate | | value | bound | |", "|---|---|---|---|---|"]
    lines += [
        f"| {gate.name} | {_verdict(gate)} | {_cell(gate.value)} | {_cell(gate.bound)} "
        f"| {_plain(gate.why)} |"
        for gate in gates
    ]
    lines.append("")
    for variant, scores in facts.scores.items():
        lines += _by_site(variant, scores)
    lines += _by_language(facts)
    if settings:
        told = json.dumps(dict(settings), sort_keys=True, indent=1, allow_nan=False)
        lines += ["## Settings", "", "```json", told, "```", ""]
    return lines


def _by_site(variant: str, scores: Mapping[str, Any]) -> list[str]:
    header = ["site", "rows", *SITES]
    lines = [f"## Sites of {variant}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for site, told in scores["sites"].items():
        cells = [site, str(told["rows"]), *(_cell(told[name]) for name in SITES)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _by_language(facts: Facts) -> list[str]:
    header = ["language", "variant", "texts", "tokens", "cosine", *TOKENS]
    lines = ["## Languages", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    found = []
    for variant, scores in facts.scores.items():
        for language, told in scores["languages"].items():
            numbers = [told[name] for name in ("texts", "tokens")]
            cells = [_plain(language), variant, *map(str, numbers)]
            cells += [_cell(told[name]) for name in ("cosine", *TOKENS)]
            found.append(f"| {' | '.join(cells)} |")
    return [*lines, *sorted(found), ""] if found else []


def _verdict(gate: Gate) -> str:
    if gate.passed is None:
        return "-" if gate.value is None else "reported"
    return "holds" if gate.passed else "FAILED"


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def _plain(text: str) -> str:
    """Keep a text within its cell."""
    return text.replace("|", "/").replace("\n", " ")
