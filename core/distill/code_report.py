"""Writes what judging codes found: report.json, report.md, pictures; the same bytes always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from core.distill.code_evaluation import PCA, RIDGE, CodeEvaluation, CodeRow
from core.distill.neighbours import NEAREST
from core.distill.report_parts import (
    QUIET,
    STRONG,
    figure_of,
    plain,
    save_figure,
    settings_of,
    table_of,
    write_files,
)
from core.tensors.shards import Array

HEADER = "| | dimensions | recall@10 | trustworthiness | group purity |"
COLOURED = 10
"""Groups that have a colour of their own in the map, the largest ones."""
LABEL = 40
"""Characters of a group's name that are shown."""


def write_code_report(
    folder: Path,
    evaluation: CodeEvaluation,
    *,
    codes: Mapping[str, Array],
    groups: Sequence[str] | None,
    title: str,
    history: Sequence[Mapping[str, float]] = (),
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write every file into ``folder``; nothing timed or dated may be in the arguments.

    Args:
        folder: exists.
        evaluation: what was measured.
        codes: name -> [n, k]; the first of them is drawn.
        groups: [n] labels, or none.
        title: of the report.
        history: of the training.
        facts: JSON values.

    Returns:
        Paths by name: report_json, report_md, recall_png, map_png and, with a history,
        loss_curve_png.
    """
    name, drawn = next(iter(codes.items()))
    pictures = {
        "recall": partial(draw_recall, evaluation=evaluation),
        "map": partial(draw_map, name=name, codes=drawn, groups=groups),
    }
    text = markdown(evaluation, title=title, facts=facts, trained=bool(history))
    return write_files(
        folder, evaluation.as_json(), text, pictures, title=title, history=history, facts=facts
    )


def markdown(
    evaluation: CodeEvaluation,
    *,
    title: str,
    facts: Mapping[str, Any] | None = None,
    trained: bool = False,
) -> str:
    """Return the report for people."""
    own = evaluation.teacher_purity
    pure = "" if own is None else f" The teacher's own neighbours have group purity {own:.4f}."
    lines = [
        f"# {title}",
        "",
        f"{evaluation.held_out} held-out rows, their nearest {NEAREST} looked for among "
        f"{evaluation.among} rows: by cosine in the teacher's space, by distance in a code's."
        f"{pure}",
        "",
        *(f"- {sentence}" for sentence in evaluation.words),
        "",
        *table_of(HEADER, (_line(row) for row in evaluation.rows)),
        "",
        "![recall of every row](recall.png)",
        "",
        "![the codes in two dimensions](map.png)",
        "",
        *(("![loss and validation per epoch](loss_curve.png)", "") if trained else ()),
        *_axes(evaluation),
        *settings_of(facts),
    ]
    return "\n".join(lines)


def _line(row: CodeRow) -> str:
    measured = ("-" if v is None else f"{v:.4f}" for v in (row.trustworthiness, row.purity))
    return f"| {' | '.join([row.name, str(row.dim), f'{row.recall:.4f}', *measured])} |"


def _axes(evaluation: CodeEvaluation) -> list[str]:
    if not evaluation.axes:
        return []
    rows = [
        f"| {axis.number} | {', '.join(axis.low)} | {', '.join(axis.high)} |"
        for axis in evaluation.axes
    ]
    head = [
        "## What each dimension says",
        "",
        "| | lowest tenth | highest tenth |",
        "|---|---|---|",
    ]
    return [*head, *rows, ""]


@plain
def draw_recall(path: Path, evaluation: CodeEvaluation) -> None:
    """Draw the recall of every row as bars."""
    rows = evaluation.rows
    figure, axes = figure_of(height=1 + 0.45 * len(rows))
    colours = [QUIET if row.name.startswith((PCA, RIDGE)) else STRONG for row in rows]
    bars = axes.barh([row.name for row in rows], [row.recall for row in rows], 0.6, color=colours)
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=f"share of the teacher's nearest {NEAREST} that are kept")
    axes.margins(x=0.15)
    save_figure(figure, path)


@plain
def draw_map(path: Path, name: str, codes: Array, groups: Sequence[str] | None) -> None:
    """Draw the codes along their two principal directions, the largest groups coloured."""
    centred = codes.astype(np.float64) - codes.mean(axis=0)
    _, axes_of = np.linalg.eigh(centred.T @ centred)
    leading = axes_of[:, ::-1][:, :2]
    leading = leading * np.sign(leading[np.abs(leading).argmax(axis=0), range(leading.shape[1])])
    points = centred @ leading
    if points.shape[1] == 1:
        points = np.column_stack([points, np.zeros(len(points))])
    figure, axes = figure_of(height=5)
    axes.scatter(points[:, 0], points[:, 1], s=4, color=QUIET, linewidths=0)
    if groups is not None:
        labels = np.array(groups)
        names, counts = np.unique(labels, return_counts=True)
        for group in names[np.argsort(-counts, kind="stable")][:COLOURED]:
            some = labels == group
            x, y = points[some, 0], points[some, 1]
            # A space first: what starts with "_" would be left out of a legend.
            axes.scatter(x, y, s=4, linewidths=0, label=f" {group}"[:LABEL])
        legend = figure.legend(loc="outside right upper", frameon=False, markerscale=3, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a "$" is the label's own
    axes.set(title=f"{name}, along its two principal directions", xticks=[], yticks=[])
    save_figure(figure, path)
