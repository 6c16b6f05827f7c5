"""Pictures of a transport: cosines, singular values, errors, sizes and likeness, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from core.transport.rotation_ledger import entries
from core.transport.sanity import Row

P = ParamSpec("P")
INK, QUIET, STRONG, WARM = "#20242a", "#9aa5b1", "#2f6f9f", "#b5643c"
NAMED = 12
"""Places along an axis up to which each has its name, and groups up to which each has a line's."""
SMALLEST = 1e-17
"""What is smaller is drawn here: a log scale has no zero."""


def plain(draw: Callable[P, None]) -> Callable[P, None]:
    """Draw by matplotlib's own defaults, whatever a matplotlibrc of this machine says."""

    @wraps(draw)
    def plainly(*args: P.args, **kwargs: P.kwargs) -> None:
        with rc_context(rcParamsDefault):
            draw(*args, **kwargs)

    return plainly


@plain
def draw_cosines(path: Path, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the held-out cosine at every site: of every variant, of both nulls, and in k dimensions.

    Args:
        path: of the PNG.
        scores: ``evaluation.evaluate_variant`` by variant, at least one.
    """
    figure, axes = _figure(4.2)
    last = scores.get("rotated") or list(scores.values())[-1]
    sites = list(last["sites"])
    looks: Mapping[str, Mapping[str, Any]] = {
        "base": {"color": INK, "linestyle": "--"},
        "permuted": {"color": WARM, "linestyle": ":"},
        "rotated": {"color": STRONG, "linewidth": 2.2},
    }
    for name, told in scores.items():
        _line(axes, [told["sites"][site]["cosine"] for site in sites], name, **looks.get(name, {}))
    nulls: Mapping[str, tuple[str, Mapping[str, Any]]] = {
        "shuffled": ("shuffled pairs", {"color": QUIET, "linestyle": "-"}),
        "mean_only": ("the mean alone", {"color": QUIET, "linestyle": "-."}),
        "subspace": ("in the shared k dimensions", {"color": STRONG, "linestyle": ":"}),
    }
    for score, (label, look) in nulls.items():
        _line(axes, [last["sites"][site][score] for site in sites], label, **look)
    _name_places(axes, sites)
    axes.set(ylabel="held-out cosine to the teacher", ylim=(None, 1.02))
    axes.axhline(0.75, color=QUIET, linewidth=0.6)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    _save(figure, path)


@plain
def draw_sizes(path: Path, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw, site by site, how large the student's stream is beside the teacher's.

    Three rows: the RMS ratio of the streams, the RMS of the difference over the teacher's, and the
    median factor between the channels' RMS.
    """
    figure = Figure(figsize=(7, 7.5), layout="constrained")
    panes: Any = figure.subplots(3, 1, sharex=True)
    names = {
        "stream_rms_ratio": "stream RMS / teacher's",
        "difference_rms": "RMS of difference / teacher's",
        "channel_rms_factor": "factor of channels' RMS",
    }
    sites = list(next(iter(scores.values()))["sites"])
    for axes, (score, label) in zip(panes, names.items(), strict=True):
        for (name, told), colour in zip(scores.items(), (INK, WARM, STRONG), strict=False):
            values = [told["sites"][site][score] for site in sites]
            _line(axes, values, name, color=colour, linestyle=":" if colour == WARM else "-")
        axes.set_ylabel(label, fontsize=8)
    _name_places(panes[-1], sites)
    figure.legend(*panes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    _save(figure, path)


@plain
def draw_singular_values(path: Path, ledger: Mapping[str, Any]) -> None:
    """Draw the singular values of every rotation, each over its largest (log scale)."""
    figure, axes = _figure(4)
    groups = {entry["group"]: entry["singular_values"] for entry in entries(ledger)}
    for number, (group, values) in enumerate(groups.items()):
        largest = max(values, default=0.0) or 1.0
        depth = number / max(1, len(groups) - 1)
        axes.plot(
            range(1, len(values) + 1),
            [max(value / largest, SMALLEST) for value in values],
            color=_between(STRONG, WARM, depth),
            linewidth=1.2,
            marker="." if len(values) == 1 else None,
            label=group if len(groups) <= NAMED else None,
        )
    axes.set(yscale="log", xlabel="number", ylabel="singular value / the largest")
    if len(groups) <= NAMED:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)


@plain
def draw_errors(path: Path, rows: Sequence[Row], *, tolerance: float) -> None:
    """Draw every layer's errors of orthogonality and round trip (log scale), and their bound."""
    figure, axes = _figure(4)
    looks = {
        "error": ("worst of R R^T - I and its parts", STRONG, "o"),
        "core": ("core", INK, "x"),
        "round_trip": ("round trip", WARM, "+"),
    }
    for name, (label, colour, marker) in looks.items():
        values = [getattr(row, name) for row in rows]
        drawn = [None if value is None else max(value, SMALLEST) for value in values]
        _line(axes, drawn, label, color=colour, marker=marker, linestyle="none")
    axes.axhline(tolerance, color=QUIET, linestyle="--", label="allowed")
    axes.set(yscale="log", ylabel="max abs")
    _name_places(axes, [row.name for row in rows])
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    _save(figure, path)


@plain
def draw_likeness(path: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Draw how like the teacher's matched heads and neurons are, before and after, by layer.

    Args:
        path: of the PNG.
        reports: ``permute.match_layer``'s, of which at least one was not skipped.
    """
    figure, axes = _figure(4)
    shown = {"heads": ("attention maps", STRONG), "neurons": ("neurons", WARM)}
    places = [f"layer_{of['layer']}" for of in reports]
    for what, (label, colour) in shown.items():
        for when, style in (("before", ":"), ("after", "-")):
            values = [
                None if of[what]["skipped"] else of[what].get(f"held_out_{when}", of[what][when])
                for of in reports
            ]
            _line(axes, values, f"{label} {when}", color=colour, linestyle=style, marker=".")
    axes.set_ylabel("mean likeness of matched ones")
    _name_places(axes, places)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    _save(figure, path)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.subplots()


def _line(axes: Axes, values: Sequence[float | None], label: str, **look: Any) -> None:
    """Draw what there is; nothing where there is nothing."""
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    if known:
        places, there = zip(*known, strict=True)
        axes.plot(places, there, label=label, **look)


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // NAMED)
    shown = range(0, len(names), step)
    axes.set_xticks(list(shown), [names[place] for place in shown], rotation=45, ha="right")


def _between(first: str, last: str, share: float) -> str:
    """Mix two colours."""
    pairs = zip(*(_numbers(colour) for colour in (first, last)), strict=True)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def _numbers(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG without its writer's version."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
