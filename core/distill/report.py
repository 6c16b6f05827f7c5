"""Writes what was found: report.json, report.md and pictures, the same bytes every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from core.distill.evaluation import TEACHER, Evaluation, Row
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
from core.distill.selection import Selection

LABELLED = 16
"""Candidates up to which each has its name in the picture of their scores."""
HEADER = (
    "| | hit@1 | hit@5 | hit@10 | hit@1 - raw (95 %) | hit@1 - global (95 %) "
    "| hit@1 - teacher (95 %) | cosine | p5 | min | overlap@10 | gap closed | of raw | norm drift |"
)


def write_report(
    folder: Path,
    evaluation: Evaluation,
    *,
    title: str,
    history: Sequence[Mapping[str, float]] = (),
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write every file into ``folder``; nothing timed or dated may be in the arguments.

    Args:
        folder: exists.
        evaluation: what was measured.
        title: of the report.
        history: of the training, one row per epoch; without one there is no loss curve.
        facts: JSON values: settings, sizes.

    Returns:
        Paths by name: report_json, report_md, hits_png, cosines_png and, with a history,
        loss_curve_png.
    """
    pictures = {
        "hits": partial(draw_hits, evaluation=evaluation),
        "cosines": partial(draw_cosines, evaluation=evaluation),
    }
    text = markdown(evaluation, title=title, facts=facts, trained=bool(history))
    return write_files(
        folder, evaluation.as_json(), text, pictures, title=title, history=history, facts=facts
    )


def markdown(
    evaluation: Evaluation,
    *,
    title: str,
    facts: Mapping[str, Any] | None = None,
    trained: bool = False,
) -> str:
    """Return the report for people: the findings in words, the table, pictures, the settings.

    The pictures lie beside the report; ``trained``: there is a loss curve among them.
    """
    dropped = ""
    if evaluation.dropped:
        dropped = f" ({evaluation.dropped} left out: repeats, or queries the model was trained on)"
    lines = [
        f"# {title}",
        "",
        f"{evaluation.queries} held-out queries{dropped}, searched among {evaluation.targets} "
        "distinct targets. Cosine, overlap and gap are against the exact teacher: the gap closed "
        "of what one global rotation leaves, and of what the raw query leaves.",
        "",
        *(f"- {sentence}" for sentence in evaluation.words),
        "",
        *table_of(HEADER, (_line(row) for row in evaluation.rows)),
        "",
        "![hit@1, 5 and 10 of every row](hits.png)",
        "",
        "![angle to the exact teacher of every row](cosines.png)",
        "",
        *(("![loss and validation cosine per epoch](loss_curve.png)", "") if trained else ()),
    ]
    lines += settings_of(facts)
    return "\n".join(lines)


@plain
def draw_hits(path: Path, evaluation: Evaluation) -> None:
    """Draw hit@1, 5 and 10 of every row as bars."""
    rows = evaluation.rows
    figure, axes = figure_of(height=1 + 0.55 * len(rows))
    for shift, (k, colour) in zip(
        (-0.26, 0, 0.26), ((1, STRONG), (5, QUIET), (10, "#d5dbe1")), strict=True
    ):
        places = [place + shift for place in range(len(rows))]
        bars = axes.barh(
            places, [row.hits[k] for row in rows], 0.24, color=colour, label=f"hit@{k}"
        )
        if k == 1:
            axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.05), xlabel="share of held-out queries")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, path)


@plain
def draw_cosines(path: Path, evaluation: Evaluation) -> None:
    """Draw how far every row is from the teacher, in degrees (log scale): mean, p95 and worst."""
    rows = [row for row in evaluation.rows if row.name != TEACHER]
    figure, axes = figure_of(height=1 + 0.45 * len(rows))
    places = range(len(rows))
    angles = [
        [degrees(cosine) for cosine in cosines]
        for cosines in zip(*((r.cosine_mean, r.cosine_p5, r.cosine_min) for r in rows), strict=True)
    ]
    axes.hlines(places, angles[0], angles[2], color=QUIET, linewidth=2)
    for values, mark, colour, label in zip(
        angles, ("o", "|", "x"), (STRONG, INK, INK), ("mean cosine", "p5", "worst"), strict=True
    ):
        axes.plot(values, places, mark, color=colour, label=label, linestyle="none")
    axes.set_yticks(places, [row.name for row in rows])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="angle to the exact teacher, degrees")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, path)


def draw_scores(path: Path, selection: Selection) -> None:
    """Draw held-out log scores against size in MB, one standard error each way.

    The choice is marked, and the line that the rule of one standard error draws below the best.
    """
    lines = sorted(selection.lines, key=lambda line: line.stored_bytes)
    figure, axes = figure_of(height=4.5)
    sizes, scores = [line.stored_bytes / 1e6 for line in lines], [line.log_score for line in lines]
    errors = [line.standard_error or 0.0 for line in lines]
    axes.errorbar(sizes, scores, errors, fmt="o", color=INK, ecolor=QUIET, capsize=3)
    best = max(lines, key=lambda line: line.log_score)
    least = best.log_score - (best.standard_error or 0.0)
    axes.axhline(least, color=QUIET, linestyle="--", linewidth=1, label="best - 1 standard error")
    chosen = selection.line(selection.chosen)
    ring: dict[str, Any] = {
        "s": 160,
        "facecolors": "none",
        "edgecolors": STRONG,
        "linewidths": 2,
        "zorder": 3,
    }
    place = (chosen.stored_bytes / 1e6, chosen.log_score)
    axes.scatter(*place, label=f"take {chosen.name}", **ring)
    told = lines if len(lines) <= LABELLED else [best, chosen]
    for number, line in enumerate(told):
        up = 8 if number % 2 == 0 else -14
        at = (line.stored_bytes / 1e6, line.log_score)
        axes.annotate(line.name, at, (6, up), textcoords="offset points", fontsize=7)
    axes.set(xlabel="size, MB", ylabel="held-out log score, nats a query")
    if sizes[0] > 0 and sizes[-1] > 20 * sizes[0]:
        axes.set_xscale("log")
    axes.margins(x=0.15, y=0.12)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)


@plain
def draw_explained(path: Path, explained: Sequence[float], *, together: float) -> None:
    """Draw what each plane of a codebook explains as bars, and what all do as a line.

    Args:
        path: of the PNG.
        explained: shares of single planes, in the codebook's order.
        together: the share that all planes explain; below the sum where planes overlap.
    """
    figure, axes = figure_of(height=4)
    if not any(explained):
        axes.text(0.5, 0.5, "made from nothing: no share to show", ha="center", color=INK)
        axes.set_axis_off()
        save_figure(figure, path)
        return
    axes.bar(range(1, len(explained) + 1), explained, color=STRONG)
    axes.set(xlabel="plane", ylabel="share of the squared bivectors")
    figure.suptitle(f"{len(explained)} planes explain {100 * together:.1f} % together", color=INK)
    save_figure(figure, path)


def _line(row: Row) -> str:
    cells = [
        row.name,
        *(f"{row.hits[k]:.4f}" for k in row.hits),
        *(
            f"{100 * span.difference:+.2f} ({100 * span.low:+.2f} to {100 * span.high:+.2f})"
            for span in (row.versus_raw[1], row.versus_global[1], row.versus_teacher[1])
        ),
        *(f"{value:.5f}" for value in (row.cosine_mean, row.cosine_p5, row.cosine_min)),
        f"{row.overlap:.4f}",
        *("-" if gap is None else f"{gap:.4f}" for gap in (row.gap_closed, row.gap_closed_raw)),
        f"{row.norm_drift:.1e}",
    ]
    return f"| {' | '.join(cells)} |"
