"""Writes which student to take and why: sweep.json, sweep.md, a picture; the same bytes always."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.distill.report import draw_scores
from core.distill.report_parts import table_of
from core.distill.selection import Line, Selection, megabytes

HEADER = (
    "| | free parameters | size | dAIC | dBIC | held-out log score (1 s.e.) "
    "| behind the best (1 s.e.) | held-out cosine | R^2 | concentration |"
)


def write_sweep(
    folder: Path, selection: Selection, *, title: str, facts: Mapping[str, Any]
) -> dict[str, Path]:
    """Write every file into ``folder``; nothing timed or dated may be in the arguments.

    Args:
        folder: exists.
        selection: what was compared, and the choice.
        title: of the report.
        facts: JSON values: the candidates' specs, how they were trained.

    Returns:
        Paths by name: sweep_json, sweep_md, scores_png.
    """
    names = {"sweep_json": "sweep.json", "sweep_md": "sweep.md", "scores_png": "scores.png"}
    paths = {key: folder / name for key, name in names.items()}
    whole = {"title": title, "selection": selection.as_json(), "facts": dict(facts)}
    text = json.dumps(whole, sort_keys=True, indent=1, allow_nan=False)
    paths["sweep_json"].write_text(text + "\n", encoding="utf-8")
    paths["sweep_md"].write_text(markdown(selection, title=title, facts=facts), encoding="utf-8")
    draw_scores(paths["scores_png"], selection)
    return paths


def markdown(selection: Selection, *, title: str, facts: Mapping[str, Any]) -> str:
    """Return the report for people: which to take, the table, the picture, the settings."""
    first, *others = selection.words
    settings = json.dumps(dict(facts), sort_keys=True, indent=1, allow_nan=False)
    lines = [
        f"# {title}",
        "",
        f"**{first}**",
        "",
        *(f"- {sentence}" for sentence in others),
        "",
        *table_of(HEADER, (_row(line, selection) for line in selection.lines)),
        "",
        f"{selection.held_in} distinct training queries, worth {selection.effective_rows:.1f} "
        f"independent ones; residuals fill {selection.effective_dim:.1f} dimensions. "
        f"{selection.held_out} distinct held-out queries of {selection.groups} clusters. dAIC and "
        "dBIC are above the lowest; R^2 is the share of the squared chord on the training queries "
        "that one global rotation leaves and the student explains.",
        "",
        "![held-out log score against size](scores.png)",
        "",
        "```json",
        settings,
        "```",
        "",
    ]
    return "\n".join(lines)


def _row(line: Line, selection: Selection) -> str:
    name = f"**{line.name}**" if line.name == selection.chosen else line.name
    cells = [
        name,
        f"{line.parameters:,}",
        megabytes(line),
        _above(line.aic, [each.aic for each in selection.lines]),
        _above(line.bic, [each.bic for each in selection.lines]),
        f"{line.log_score:.3f} ({_error(line.standard_error)})",
        f"{line.behind:.3f} ({_error(line.behind_error)})",
        f"{line.cosine:.5f}",
        f"{line.r2:.5f}",
        f"{line.concentration:.4g}",
    ]
    return f"| {' | '.join(cells)} |"


def _above(value: float | None, others: list[float | None]) -> str:
    if value is None:
        return "undefined"
    return f"{value - min(each for each in others if each is not None):.1f}"


def _error(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
