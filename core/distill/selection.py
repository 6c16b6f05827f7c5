"""Which of several students to take: AIC, BIC or a held-out log score, of a density on the sphere.

The working form. An answer m and a teacher's target y are directions; y is taken for von
Mises-Fisher around m (Mardia & Jupp 2000, Directional Statistics, section 9.3.2). At high
concentration k, 2 k (1 - m.y) = k s is nearly chi-squared with d - 1 degrees of freedom, s = |y -
m|^2 the squared chord, so that

    log f(y) = (d - 1) / 2 log(k / 2 pi) - k s / 2,

whose maximum over k is at k = (d - 1) / S with S the mean of s (section 10.3.1), where

    -2 log L = n (d - 1) log S + constant = n (d - 1) log(1 - R^2) + constant'

with R^2 = 1 - S / S_0, the share of the squared chord that is explained beyond a baseline, here one
global rotation; it cancels in every difference. Two things make n (d - 1) too much. Rows of a
cluster err alike: n becomes n_eff, by a design effect. Residuals fill few directions: d - 1 becomes
d_eff, their participation ratio. Hence

    AIC = n_eff d_eff log(1 - R^2) + 2 k,    BIC = n_eff d_eff log(1 - R^2) + k ln n_eff

with k now the free parameters. n_eff and d_eff are those of the candidate that fits best, for all
alike: between unlike weights no difference would mean anything (Burnham & Anderson 2002, section
2.5, do so with their one dispersion). The trap is to standardise each candidate's residuals by its
own sigma: their squares then sum to n (d - 1) whatever it does, and 2 k alone decides.

Both are undefined where k > n_eff: S can be driven to zero there, and tells nothing. Then the mean
log density of rows that were not trained on decides, with the exact density and the concentration
of the training rows, by the rule of one standard error (Breiman et al. 1984, section 3.4.3): the
smallest candidate that is no more than one standard error below the best. Smallest in bytes, not
in k: unseen rows tell what was learnt by heart, so what is left to save is what a student weighs,
and one that holds the training queries weighs them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from core.distill import vmf
from core.distill.judging import Judged
from core.tensors.shards import Array

Criterion = Literal["auto", "aic", "bic", "held_out"]
Used = Literal["aic", "bic", "held_out"]
FEW = 10
"""Clusters below which a standard error by cluster is itself little known."""
CLOSE = 0.999
"""Held-out cosine from which a search hardly tells a student from its teacher."""
NAMED = 3
"""Candidates a sentence names before it counts the others."""


@dataclass(frozen=True)
class Line:
    """One candidate beside the others."""

    name: str
    parameters: int
    stored_bytes: int
    r2: float
    """Share of the held-in squared chord explained beyond one global rotation."""
    aic: float | None
    """Against one global rotation, which has 0; None where undefined."""
    bic: float | None
    cosine: float
    """Mean over the held-out rows."""
    concentration: float
    """Of the held-in rows."""
    log_score: float
    """Mean log density of the held-out targets, in nats."""
    standard_error: float | None
    """Of the log score, by cluster; None of a single row."""
    behind: float
    """Log score of the best less its own."""
    behind_error: float | None
    """Standard error of that difference, row by row, by cluster."""


@dataclass(frozen=True)
class Selection:
    """All candidates, and the one to take; a function of what was judged."""

    chosen: str
    used: Used
    """What decided."""
    asked: Criterion
    lines: list[Line]
    """In the order given."""
    undefined: list[str]
    """Candidates with more parameters than there are effective rows."""
    effective_rows: float
    effective_dim: float
    held_in: int
    held_out: int
    groups: int
    """Clusters among the held-out rows."""
    baseline_cosine: float
    """Mean on the held-in rows that one global rotation has, fitted to them."""
    words: list[str]
    """Which to take and why, then what to know about it."""

    def line(self, name: str) -> Line:
        """Return one candidate by name."""
        return next(line for line in self.lines if line.name == name)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def select(
    candidates: Sequence[Judged], *, dim: int, baseline: float, criterion: Criterion = "auto"
) -> Selection:
    """Compare candidates judged on the same rows, and say which to take.

    Args:
        candidates: at least one, under different names.
        dim: d, of the vectors.
        baseline: mean squared chord of one global rotation on the held-in rows.
        criterion: auto: AIC where it is defined for all, else the held-out log score. Where AIC
            or BIC is asked for and undefined for some, the words say so and the log score decides.
    """
    best_fit = min(candidates, key=lambda found: float(found.held_in.mean()))
    rows, width = best_fit.effective_rows, best_fit.effective_dim
    undefined = [found.name for found in candidates if found.parameters > rows]
    used = _used(criterion, undefined=bool(undefined))
    scores = [_log_scores(found, dim) for found in candidates]
    top = max(
        range(len(scores)), key=lambda at: (float(scores[at].mean()), -candidates[at].stored_bytes)
    )
    lines = [
        _line(found, score, scores[top], dim, (rows, width), baseline)
        for found, score in zip(candidates, scores, strict=True)
    ]
    found = Selection(
        chosen=lines[_choice(lines, used)].name,
        used=used,
        asked=criterion,
        lines=lines,
        undefined=undefined,
        effective_rows=rows,
        effective_dim=width,
        held_in=len(best_fit.held_in),
        held_out=len(best_fit.held_out),
        groups=len(np.unique(best_fit.groups)),
        baseline_cosine=1 - baseline / 2,
        words=[],
    )
    untrained = [each.name for each in candidates if not each.trained]
    return replace(found, words=_words(found, untrained))


def one_standard_error(lines: Sequence[Line]) -> int:
    """Return the place of the smallest whose log score is no more than the best's error below it.

    Among equally small ones the better score, then the first. Of a single row there is no error:
    then the best itself.
    """
    best = _best(lines)
    least = best.log_score - (best.standard_error or 0.0)
    return min(
        (place for place, line in enumerate(lines) if line.log_score >= least),
        key=lambda place: (lines[place].stored_bytes, -lines[place].log_score, place),
    )


def cluster_error(values: Array, groups: Array) -> float | None:
    """Standard error of a mean whose independent units are clusters of rows.

    sqrt(G / (G - 1) sum_c (sum of deviations in c)^2) / n, the linearised error of a ratio of
    cluster totals (Cochran 1977, section 9A.3 without the finite population's term). Where all rows
    are of one cluster, rows are taken as the units.

    Args:
        values: [n] float64.
        groups: [n] int64.

    Returns:
        None where a single row says nothing about its error.
    """
    if len(values) < 2:
        return None
    _, unit = np.unique(groups, return_inverse=True)
    if unit.max() == 0:
        unit = np.arange(len(values))
    sums = np.bincount(unit, weights=values - values.mean())
    units = len(sums)
    return math.sqrt(units / (units - 1) * float(np.square(sums).sum())) / len(values)


def _used(criterion: Criterion, *, undefined: bool) -> Used:
    if criterion == "held_out" or undefined:
        return "held_out"
    return "aic" if criterion == "auto" else criterion


def _log_scores(found: Judged, dim: int) -> Array:
    """Log density of each held-out row: [v], in nats."""
    k = vmf.concentration(float(found.held_in.mean()), dim)
    return vmf.log_density(found.held_out, k, dim)


def _line(
    found: Judged, scores: Array, best: Array, dim: int, size: tuple[float, float], baseline: float
) -> Line:
    rows, width = size
    chord = float(found.held_in.mean())
    unexplained = max(chord, vmf.FLOOR) / max(baseline, vmf.FLOOR)  # 1 - R^2
    fit = rows * width * math.log(unexplained)
    defined = found.parameters <= rows
    return Line(
        name=found.name,
        parameters=found.parameters,
        stored_bytes=found.stored_bytes,
        r2=1 - unexplained,
        aic=fit + 2 * found.parameters if defined else None,
        bic=fit + found.parameters * math.log(rows) if defined else None,
        cosine=float(1 - found.held_out.mean() / 2),
        concentration=vmf.concentration(chord, dim),
        log_score=float(scores.mean()),
        standard_error=cluster_error(scores, found.groups),
        behind=float((best - scores).mean()),
        behind_error=cluster_error(best - scores, found.groups),
    )


def _choice(lines: Sequence[Line], used: Used) -> int:
    if used == "held_out":
        return one_standard_error(lines)
    values = [line.aic if used == "aic" else line.bic for line in lines]
    return min(range(len(lines)), key=lambda at: (values[at], lines[at].parameters, at))


def _best(lines: Sequence[Line]) -> Line:
    """Return the best log score, the smaller among equals, then the first."""
    return max(lines, key=lambda line: (line.log_score, -line.stored_bytes))


def _words(found: Selection, untrained: Sequence[str]) -> list[str]:
    nothing = []
    if untrained:
        nothing.append(
            f"Nothing is trained of {_named(untrained)}: the teacher's own routing and planes."
        )
    return [
        _taken(found),
        _criterion_words(found),
        *_edge_words(found),
        *_baseline_words(found),
        *_close_words(found),
        *_error_words(found),
        *nothing,
        "The held-out rows are the validation rows of the training, which also picked each "
        "candidate's best epoch: all scores flatter a little, and alike. Rows that the model "
        "held out were not touched: `evaluate` judges the one that is taken on those.",
    ]


def _taken(found: Selection) -> str:
    """Say which to take, and why."""
    chosen, count = found.line(found.chosen), len(found.lines)
    if count == 1:
        return f"Take {chosen.name}: it is the only candidate."
    if found.used != "held_out":
        return _lowest(found, chosen)
    best = _best(found.lines)
    score, error = f"{chosen.log_score:.3f} nats a query", best.standard_error
    margin = "no error is known of one row" if error is None else f"one standard error, {error:.3f}"
    if best is chosen:
        return (
            f"Take {chosen.name}: its held-out log score, {score}, is the best of {count}, and no "
            f"smaller candidate comes within its margin ({margin})."
        )
    return (
        f"Take {chosen.name}: with {megabytes(chosen)} it is the smallest of {count} "
        f"whose held-out log score ({score}) lies within the margin ({margin}) of the best, that "
        f"of {best.name} ({best.log_score:.3f}; {megabytes(best)})."
    )


def megabytes(line: Line) -> str:
    """Write what a candidate weighs."""
    return f"{line.stored_bytes / 1e6:.3g} MB"


def _lowest(found: Selection, chosen: Line) -> str:
    values = {line.name: line.aic if found.used == "aic" else line.bic for line in found.lines}
    own = values.pop(chosen.name) or 0.0
    name, value = min(values.items(), key=lambda item: item[1] or 0.0)
    gap = (value or 0.0) - own
    close = " Less than 2 hardly tells them apart." if gap < 2 else ""
    return (
        f"Take {chosen.name}: of {len(found.lines)} candidates its {found.used.upper()} is lowest; "
        f"that of {name}, the next, is {gap:.1f} higher.{close}"
    )


def _criterion_words(found: Selection) -> str:
    rows = f"{found.effective_rows:.1f} effective rows ({found.held_in} distinct queries)"
    if found.undefined:
        refused = "AIC and BIC are"
        if found.asked in ("aic", "bic"):
            refused = f"{found.asked.upper()} was asked for and is refused: it is"
        return (
            f"{refused} undefined for {_named(found.undefined)}, of more free parameters than the "
            f"{rows}. The held-out log score decides."
        )
    if found.used == "held_out":
        return f"The held-out log score decides, as asked; AIC is defined for all: {rows}."
    return (
        f"{found.used.upper()} decides: every candidate has fewer free parameters than the {rows}; "
        f"residuals fill {found.effective_dim:.1f} dimensions."
    )


def _named(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _edge_words(found: Selection) -> list[str]:
    chosen = found.line(found.chosen)
    sizes = sorted({line.stored_bytes for line in found.lines})
    words = []
    if len(sizes) > 1 and chosen.stored_bytes == sizes[-1]:
        words.append("It is the largest that was tried: a larger one may do better.")
    if len(sizes) > 1 and chosen.stored_bytes == sizes[0]:
        words.append("It is the smallest that was tried: a smaller one may do as well.")
    if chosen.r2 <= 0:
        words.append(
            f"Warning: {chosen.name} is no nearer to the teacher than one global rotation."
        )
    return words


def _baseline_words(found: Selection) -> list[str]:
    """Warn where one rotation, which needs no student, leaves next to nothing to choose by."""
    if found.baseline_cosine < CLOSE:
        return []
    return [
        f"Warning: one global rotation alone has a cosine of {found.baseline_cosine:.6f} to the "
        "teacher on the training queries; what the students differ in is less than "
        f"{1 - found.baseline_cosine:.1g}. `evaluate` says whether that finds anything more."
    ]


def _close_words(found: Selection) -> list[str]:
    """Name a smaller student that is close already: no criterion knows where it stops to matter."""
    chosen = found.line(found.chosen)
    close = [line for line in found.lines if line.cosine >= CLOSE]
    smallest = min(close, key=lambda line: line.stored_bytes, default=chosen)
    if smallest.stored_bytes >= chosen.stored_bytes:
        return []
    return [
        "A teacher has no noise of its own, so a nearer student scores higher down to the last "
        f"digit. Where a held-out cosine of {CLOSE} is enough, {smallest.name} has "
        f"{smallest.cosine:.5f} with {megabytes(smallest)}."
    ]


def _error_words(found: Selection) -> list[str]:
    if found.held_out < 2:
        return ["One held-out query alone: its log score has no standard error."]
    if found.groups == 1:
        return ["All held-out queries are of one cluster: standard errors take them for unrelated."]
    if found.groups < FEW:
        return [
            f"Standard errors rest on {found.groups} clusters, and are themselves little known."
        ]
    return []
