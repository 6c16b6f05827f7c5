"""Says from this machine's measurements when to use the teacher and when the student.

Timings differ from run to run, so nothing here goes into a job's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcParamsDefault
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from core.distill.latency import Crossover, Measurement, crossover
from core.distill.report_parts import INK, QUIET, STRONG

HEADER = ("batch", "heads", "LDA ms", "p95", "student ms", "p95", "faster")


def table(measurements: Sequence[Measurement]) -> list[tuple[str, ...]]:
    """Return the cells of each measurement, below ``HEADER``: times of a whole batch."""
    return [
        (
            str(each.batch),
            str(each.heads),
            f"{each.lda.p50_ms:.3f}",
            f"{each.lda.p95_ms:.3f}",
            f"{each.transformer.p50_ms:.3f}",
            f"{each.transformer.p95_ms:.3f}",
            _faster(each),
        )
        for each in measurements
    ]


def advise(measurements: Sequence[Measurement]) -> str:
    """Say when to use which, by what was measured here: a table, then a sentence per batch size.

    Args:
        measurements: of one machine, any batch sizes and numbers of heads, at least one.

    Raises:
        SpecInvalid: there are none.
    """
    crossings = crossover(measurements)
    rows = [HEADER, *table(measurements)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    smallest = min(measurements, key=lambda each: each.heads).heads
    words = [_sentence(each, smallest) for each in crossings]
    return "\n".join([*lines, "", *words, _memory(measurements), FIT])


FIT = (
    "Clusters that change often speak for the LDA: it takes new heads without training, and its\n"
    "weights can be read."
)


def draw_crossover(path: Path, measurements: Sequence[Measurement]) -> None:
    """Draw both sides' time per query against the number of heads, one panel per batch size.

    Args:
        path: of the PNG.
        measurements: at least one.

    Raises:
        SpecInvalid: there are none.
    """
    crossings = crossover(measurements)
    with rc_context(rcParamsDefault):
        figure = Figure(figsize=(1 + 3 * len(crossings), 3.6), layout="constrained")
        panels = figure.subplots(1, len(crossings), squeeze=False)[0]
        for axes, found in zip(panels, crossings, strict=True):
            _panel(axes, [each for each in measurements if each.batch == found.batch], found)
        panels[0].set_ylabel("ms per query, median")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        FigureCanvasAgg(figure)
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _panel(axes: Any, rows: list[Measurement], found: Crossover) -> None:
    rows = sorted(rows, key=lambda each: each.heads)
    heads = [each.heads for each in rows]
    for name, colour, times in (
        ("LDA", INK, [each.lda.p50_ms for each in rows]),
        ("student", STRONG, [each.transformer.p50_ms for each in rows]),
    ):
        per_query = [taken / found.batch for taken in times]
        axes.plot(heads, per_query, "o-", color=colour, label=name)
    if found.heads is not None:
        axes.axvline(found.heads, color=QUIET, linestyle="--", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="heads N",
        title=f"batch {found.batch}: {found.words}",
    )


def _faster(each: Measurement) -> str:
    if each.times_faster >= 1:
        return f"student {each.times_faster:.1f}x"
    return f"LDA {1 / each.times_faster:.1f}x"


def _sentence(found: Crossover, smallest: int) -> str:
    size = "single queries" if found.batch == 1 else f"batches of {found.batch}"
    if found.heads is not None:
        return f"For {size}: the LDA below {found.heads:.0f} heads, the student from there on."
    if found.words.startswith(">"):
        return f"For {size}: the LDA, up to {found.words[2:]} heads at least."
    return f"For {size}: the student, from {smallest} heads on at least."


def _memory(measurements: Sequence[Measurement]) -> str:
    """Where both hold as many bytes; the teacher's grow with its heads."""
    last = max(measurements, key=lambda each: each.heads)
    if not last.lda_bytes or not last.transformer_bytes:
        return "Memory: one side does not say what it holds."
    even = last.transformer_bytes * last.heads / last.lda_bytes
    return (
        f"Memory: the student holds {last.transformer_bytes / 1e6:.1f} MB, as the LDA does with "
        f"{even:.0f} heads."
    )
