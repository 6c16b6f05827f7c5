"""Writes what judging answers found: report.json, report.md, pictures; the same bytes always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from core.distill.answer_evaluation import TEACHER, AnswerEvaluation, AnswerRow
from core.distill.report_parts import (
    INK,
    QUIET,
    STRONG,
    degrees,
    figure_of,
    plain,
    save_figure,
    settings_of,
    table_of,
    write_files,
)

HEADER = "| | cosine | min | max | std | centred | right answers | right - teacher (95 %) |"


def write_answer_report(
    folder: Path,
    evaluation: AnswerEvaluation,
    *,
    title: str,
    history: Sequence[Mapping[str, float]] = (),
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write every file into ``folder``; nothing timed or dated may be in the arguments.

    Returns:
        Paths by name: report_json, report_md, hits_png, cosines_png and, with a history,
        loss_curve_png.
    """
    pictures = {
        "hits": partial(draw_accuracy, evaluation=evaluation),
        "cosines": partial(draw_spread, evaluation=evaluation),
    }
    text = markdown(evaluation, title=title, facts=facts, trained=bool(history))
    return write_files(
        folder, evaluation.as_json(), text, pictures, title=title, history=history, facts=facts
    )


def markdown(
    evaluation: AnswerEvaluation,
    *,
    title: str,
    facts: Mapping[str, Any] | None = None,
    trained: bool = False,
) -> str:
    """Return the report for people."""
    dropped = ""
    if evaluation.dropped:
        dropped = f" ({evaluation.dropped} left out: repeats, or questions of the training)"
    lines = [
        f"# {title}",
        "",
        f"{evaluation.questions} held-out questions{dropped}, answered among "
        f"{evaluation.answers} distinct answers. Cosines are to the teacher's answers; centred: "
        "after its mean answer is taken from both.",
        "",
        *(f"- {sentence}" for sentence in evaluation.words),
        "",
        *table_of(HEADER, (_line(row) for row in evaluation.rows)),
        "",
        "![share of right answers of every row](hits.png)",
        "",
        "![angle to the teacher of every row](cosines.png)",
        "",
        *(("![loss and validation per epoch](loss_curve.png)", "") if trained else ()),
        *settings_of(facts),
    ]
    return "\n".join(lines)


def _line(row: AnswerRow) -> str:
    gap = row.versus_teacher
    cells = [
        row.name,
        f"{row.cosine_mean:.5f}",
        f"{row.cosine_min:.5f}",
        f"{row.cosine_max:.5f}",
        f"{row.cosine_std:.5f}",
        "-" if row.centred is None else f"{row.centred:.5f}",
        f"{row.accuracy:.4f}",
        f"{100 * gap.difference:+.2f} ({100 * gap.low:+.2f} to {100 * gap.high:+.2f})",
    ]
    return f"| {' | '.join(cells)} |"


@plain
def draw_accuracy(path: Path, evaluation: AnswerEvaluation) -> None:
    """Draw the share of right answers of every row as bars."""
    rows = evaluation.rows
    figure, axes = figure_of(height=1 + 0.45 * len(rows))
    bars = axes.barh(
        [row.name for row in rows],
        [row.accuracy for row in rows],
        0.6,
        color=[QUIET if row.name != TEACHER else STRONG for row in rows],
    )
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1), xlabel="share of held-out questions answered right")
    save_figure(figure, path)


@plain
def draw_spread(path: Path, evaluation: AnswerEvaluation) -> None:
    """Draw how far every row is from the teacher, in degrees (log scale): mean and worst."""
    rows = [row for row in evaluation.rows if row.name != TEACHER]
    figure, axes = figure_of(height=1 + 0.45 * len(rows))
    means, worst = (
        [degrees(value) for value in values]
        for values in ([row.cosine_mean for row in rows], [row.cosine_min for row in rows])
    )
    places = range(len(rows))
    axes.hlines(places, means, worst, color=QUIET, linewidth=2)
    axes.plot(means, places, "o", color=STRONG, label="mean cosine", linestyle="none")
    axes.plot(worst, places, "x", color=INK, label="worst", linestyle="none")
    axes.set_yticks(places, [row.name for row in rows])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="angle to the teacher, degrees")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)
