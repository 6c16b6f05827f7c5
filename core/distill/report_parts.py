"""What every report is made of: its JSON, its settings, how it draws, and the loss curve."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec

from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

P = ParamSpec("P")
SMALLEST_ANGLE = 1e-3
"""Degrees; what is nearer is drawn here, for a log scale has no zero."""
TOLD_STAGES = 8
"""Stages of a curriculum whose temperature is written into the loss curve, at most about."""
INK, QUIET, STRONG = "#20242a", "#9aa5b1", "#2f6f9f"


Draw = Callable[[Path], None]
"""Writes one picture."""


def write_files(
    folder: Path,
    evaluation: Mapping[str, Any],
    text: str,
    pictures: Mapping[str, Draw],
    *,
    title: str,
    history: Sequence[Mapping[str, float]],
    facts: Mapping[str, Any] | None,
) -> dict[str, Path]:
    """Write a whole report: its JSON, its text, its pictures and, with a history, the loss curve.

    Args:
        folder: exists.
        evaluation: what was measured, as JSON values.
        text: of report.md.
        pictures: name -> what draws NAME.png.
        title: of the report.
        history: of the training, one row per epoch; without one there is no loss curve.
        facts: JSON values: settings, sizes.

    Returns:
        Paths by name: report_json, report_md, NAME_png of each picture, loss_curve_png.
    """
    paths = {"report_json": folder / "report.json", "report_md": folder / "report.md"}
    _write_json(paths["report_json"], evaluation, title=title, history=history, facts=facts)
    paths["report_md"].write_text(text, encoding="utf-8")
    drawn = dict(pictures)
    if history:
        drawn["loss_curve"] = partial(draw_loss, history=history)
    for name, draw in drawn.items():
        paths[f"{name}_png"] = folder / f"{name}.png"
        draw(paths[f"{name}_png"])
    return paths


def _write_json(
    path: Path,
    evaluation: Mapping[str, Any],
    *,
    title: str,
    history: Sequence[Mapping[str, float]],
    facts: Mapping[str, Any] | None,
) -> None:
    """Write report.json: what was measured, of what, and how the student was trained."""
    whole = {
        "title": title,
        "evaluation": evaluation,
        "facts": dict(facts or {}),
        "history": [dict(row) for row in history],
    }
    text = json.dumps(whole, sort_keys=True, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def settings_of(facts: Mapping[str, Any] | None) -> list[str]:
    """Return the lines that show facts at a report's end."""
    if not facts:
        return []
    settings = json.dumps(dict(facts), sort_keys=True, indent=1, allow_nan=False)
    return ["```json", settings, "```", ""]


def table_of(header: str, rows: Iterable[str]) -> list[str]:
    """Return the lines of a Markdown table: its head, the line below it, its rows."""
    return [header, "|---" * (header.count("|") - 1) + "|", *rows]


def plain(draw: Callable[P, None]) -> Callable[P, None]:
    """Draw by matplotlib's own defaults, whatever a matplotlibrc of this machine says."""

    @wraps(draw)
    def plainly(*args: P.args, **kwargs: P.kwargs) -> None:
        with rc_context(rcParamsDefault):
            draw(*args, **kwargs)

    return plainly


def figure_of(*, height: float) -> tuple[Figure, Axes]:
    """Make a figure of one plot, ``height`` inches high."""
    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.subplots()


def degrees(cosine: float) -> float:
    """Return the angle of a cosine, at least SMALLEST_ANGLE."""
    return max(math.degrees(math.acos(min(1.0, max(-1.0, cosine)))), SMALLEST_ANGLE)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without its writer's version."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


@plain
def draw_loss(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Draw loss (log scale) and the validation score against the epoch, one curve a stage.

    Of a curriculum's stages each loss stands by itself, since each has its own temperature. Says
    so where no epoch ran.
    """
    figure, axes = figure_of(height=4)
    if not history:
        axes.text(0.5, 0.5, "nothing to train: no epoch ran", ha="center", color=INK)
        axes.set_axis_off()
        save_figure(figure, path)
        return
    losses = [row["loss"] for row in history]
    stages = _by_stage(history)
    step = math.ceil(len(stages) / TOLD_STAGES)
    for number, rows in enumerate(stages):
        epochs = [row["epoch"] for row in rows]
        label = None if number else "loss"
        marker = "." if len(rows) == 1 else None
        axes.plot(epochs, [row["loss"] for row in rows], color=INK, label=label, marker=marker)
        if number:
            axes.axvline(epochs[0] - 0.5, color=QUIET, linewidth=0.8, linestyle=":")
        if "tau" in rows[0] and number % step == 0:
            at = axes.get_xaxis_transform()  # x in epochs, y from bottom to top
            told = f"tau {rows[0]['tau']:.3g}"
            axes.text(epochs[0], 1.0, told, transform=at, fontsize=7, color=QUIET, va="top")
    axes.set(xlabel="epoch", ylabel="loss", yscale="log" if min(losses) > 0 else "linear")
    name = next(key for key in history[0] if key.startswith("validation_"))
    right = axes.twinx()
    scores = [row[name] for row in history]
    label = name.replace("_", " ")
    marker = "." if len(history) == 1 else None  # a line of one point would not be seen
    epochs = [row["epoch"] for row in history]
    right.plot(epochs, scores, color=STRONG, label=label, marker=marker)
    right.set_ylabel(_SCORES.get(name, label), color=STRONG)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)


_SCORES = {
    "validation_cosine": "cosine to the teacher",
    "validation_recall": "recall of the teacher's nearest",
}


def _by_stage(history: Sequence[Mapping[str, float]]) -> list[list[Mapping[str, float]]]:
    stages: dict[float, list[Mapping[str, float]]] = {}
    for row in history:
        stages.setdefault(row.get("stage", 0.0), []).append(row)
    return list(stages.values())
