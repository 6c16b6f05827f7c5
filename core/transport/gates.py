"""What must hold after a transport, or the job fails (document 002, sections 10, 14 and 16.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from core.specs.transport import Gates
from core.transport.checks import worst_error

SIXTEEN_BIT = 64.0
"""How much more a logit may change where weights, or what they compute, are of 16 bits."""
AT_THE_TOP = 1e-6
"""A mean cosine that is short of 1 by no more is 1."""
RMS_KEPT = 1e-3
"""Most that a fold may change the RMS of the residual stream, relative; times SIXTEEN_BIT too."""


@dataclass(frozen=True)
class Gate:
    """One thing that was looked at."""

    name: str
    passed: bool | None
    """None: reported, or not to be had; it fails nothing."""
    value: float | None
    bound: float | None
    why: str
    """What the value is and which of several it is the worst of, or why there is none."""

    def __str__(self) -> str:
        told = "not measured" if self.value is None else f"{self.value:.4g}"
        bound = "" if self.bound is None else f" (bound {self.bound:.4g})"
        return f"{self.name}: {told}{bound}; {self.why}"


@dataclass(frozen=True)
class FoldFacts:
    """What was measured of one folded model."""

    fold: str
    """``none``: permuted alone; ``global``, ``sliced``, ``conjugate``; ``given``: made before."""
    exact: bool
    """Whether it is to compute what the model computes."""
    sixteen_bit: bool = False
    """Whether its weights are rounded to 16 bits, or were, or what was compared ran in them."""
    unfold_error: float | None = None
    """``unfolding.round_trip``, the worst of the shards."""
    unfold_weight: str = ""
    """Where that was."""
    unfold_lost: int = 0
    """Entries of gammas that are 0."""
    logits_relative: float | None = None
    """``predictions.LogitsChange.relative``."""
    rope_changes: tuple[str, ...] | None = None
    """``checks.rope_changes``."""
    norms_off: float | None = None
    """``checks.norms_off``; of a fold that leaves the norms alone None."""


@dataclass(frozen=True)
class Facts:
    """All that the gates look at; what is missing was not measured."""

    turns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``checks.turn_facts`` by group."""
    folds: Mapping[str, FoldFacts] = field(default_factory=dict)
    """By variant: ``permuted``, ``rotated``."""
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``evaluation.evaluate_variant`` by variant: ``base``, ``permuted``, ``rotated``."""
    permutations: Sequence[Mapping[str, Any]] = ()
    """``permute.match_layer``'s reports."""
    checksums: int | None = None
    """Raw shards whose bytes were found to be those of their sidecars; None: none were kept."""


def check(gates: Gates, facts: Facts) -> list[Gate]:
    """Hold facts against bounds; the same gates in the same order whatever was measured."""
    return [
        _orthogonality(gates, facts),
        _round_trip(gates, facts),
        *(gate for name, fold in facts.folds.items() for gate in _fold_gates(gates, name, fold)),
        _rms_kept(facts),
        _improves(gates, facts),
        _hidden_cosine(gates, facts),
        _rms_ratio(gates, facts),
        _resemblance("attention_maps", "heads", facts),
        _resemblance("neurons", "neurons", facts),
        _checksums(facts),
    ]


def failed(found: Iterable[Gate]) -> list[Gate]:
    """Return those that were missed."""
    return [gate for gate in found if gate.passed is False]


def as_json(found: Iterable[Gate]) -> list[dict[str, Any]]:
    """Return the gates as JSON values; what is not finite becomes a word in ``why``."""
    return [asdict(gate) for gate in found]


def at_most(name: str, value: float, bound: float, why: str) -> Gate:
    """Make a gate that a value passes at its bound; a NaN or infinity fails it."""
    if not math.isfinite(value):
        return Gate(name, passed=False, value=None, bound=bound, why=f"{value}: {why}")
    return Gate(name, passed=value <= bound, value=value, bound=bound, why=why)


def _orthogonality(gates: Gates, facts: Facts) -> Gate:
    name = "orthogonality"
    if not facts.turns:
        return _missing(name, gates.orthogonality, "no rotation was given")
    errors = {group: worst_error(of) for group, of in facts.turns.items()}
    group = max(errors, key=lambda one: _rank(errors[one]))
    why = f"max abs of R R^T - I, R^T R - I, of core and bases; the worst is {group}"
    if whitened := [one for one, of in facts.turns.items() if not of["orthogonal"]]:
        why += (
            f"; {len(whitened)} of {len(facts.turns)} maps were fitted on z-scores: of those core "
            "and bases alone, for undone they are no rotations"
        )
    return at_most(name, errors[group], gates.orthogonality, why)


def _round_trip(gates: Gates, facts: Facts) -> Gate:
    name, found = "round_trip", {}
    for group, of in facts.turns.items():
        told = [of[way] for way in ("round_trip", "round_trip_back") if of[way] is not None]
        if told:
            found[group] = max(told, key=_rank)
    if not found:
        return _missing(name, gates.round_trip, "no rotation was given")
    group = max(found, key=lambda one: _rank(found[one]))
    why = f"max abs of x R R^T - x, and of x R^T R - x where R is square; the worst is {group}"
    return at_most(name, found[group], gates.round_trip, why)


def _fold_gates(gates: Gates, variant: str, fold: FoldFacts) -> list[Gate]:
    return [
        _unfold(gates, variant, fold),
        _logits(gates, variant, fold),
        _rope(variant, fold),
        _norms(variant, fold),
    ]


def _unfold(gates: Gates, variant: str, fold: FoldFacts) -> Gate:
    name = f"unfold.{variant}"
    if fold.unfold_error is None:
        return _missing(name, gates.unfold, "the fold was not undone")
    why = "unfolded weights against the old, before rounding, over the largest of a weight"
    why += f"; the worst is {fold.unfold_weight or 'none'}"
    if fold.unfold_lost:
        why += f"; {fold.unfold_lost} entries of gammas are 0: what they multiply does not return"
    return at_most(name, fold.unfold_error, gates.unfold, why)


def _logits(gates: Gates, variant: str, fold: FoldFacts) -> Gate:
    name = f"logits.{variant}"
    bound = gates.logits * (SIXTEEN_BIT if fold.sixteen_bit else 1.0)
    if fold.logits_relative is None:
        return _missing(name, bound, "logits were not compared with the model's own")
    why = "largest change of a logit over the largest logit"
    if not fold.exact:
        why += f"; fold {fold.fold} does not compute what the model computed, so it is reported"
        return _reported(name, fold.logits_relative, why)
    return at_most(name, fold.logits_relative, bound, why)


def _rope(variant: str, fold: FoldFacts) -> Gate:
    name = f"rope.{variant}"
    if fold.rope_changes is None:
        return _missing(name, 0.0, "configurations were not compared")
    told = ", ".join(fold.rope_changes) or "nothing"
    why = f"entries of config.json about positions that changed: {told}"
    return at_most(name, float(len(fold.rope_changes)), 0.0, why)


def _norms(variant: str, fold: FoldFacts) -> Gate:
    name = f"norms.{variant}"
    if fold.norms_off is None:
        return _missing(name, None, f"fold {fold.fold} leaves the norms' gammas as they are")
    return at_most(name, fold.norms_off, 0.0, "largest deviation of a gamma from 1 after the fold")


def _rms_kept(facts: Facts) -> Gate:
    """Document 002, section 16.1: RMSNorm statistics before and after a fold."""
    name, fold = "rms_kept", facts.folds.get("rotated")
    bound = RMS_KEPT * (SIXTEEN_BIT if fold is not None and fold.sixteen_bit else 1.0)
    old, new = facts.scores.get("base"), facts.scores.get("rotated")
    if old is None or new is None:
        return _missing(name, bound, "needs the scores of base and rotated")
    changes = {}
    for site, told in old["sites"].items():
        before, after = told["stream_rms_ratio"], new["sites"][site]["stream_rms_ratio"]
        if before and after is not None:
            changes[site] = abs(after / before - 1)
    if not changes:
        return _missing(name, bound, "no site has rows of both")
    site = max(changes, key=lambda one: _rank(changes[one]))
    why = f"largest relative change of the residual stream's RMS by the fold, at {site}"
    if fold is not None and not fold.exact:
        return _reported(name, changes[site], f"{why}; fold {fold.fold} is not exact")
    return at_most(name, changes[site], bound, why)


def _improves(gates: Gates, facts: Facts) -> Gate:
    name = "improves"
    if "base" not in facts.scores or "rotated" not in facts.scores:
        return _missing(name, 0.0, "needs the scores of base and rotated")
    before, after = (facts.scores[variant]["overall"] for variant in ("base", "rotated"))
    rivals = {
        "before": before["seen"],
        "shuffled pairs": after["shuffled"],
        "the mean alone": after["mean_only"],
    }
    known = {rival: value for rival, value in rivals.items() if value is not None}
    if after["seen"] is None or not known:
        return _missing(name, 0.0, "a site has no row that counts")
    nearest = max(known, key=lambda rival: known[rival])
    margin = after["seen"] - known[nearest]
    told = ", ".join(f"{rival} {value:.4f}" for rival, value in known.items())
    why = (
        f"held-out cosine after the rotation, in the teacher's coordinates, {after['seen']:.4f}, "
        f"above the largest of: {told}"
    )
    # Where nothing is left to gain, as of a model beside itself, none is asked for.
    passed = margin > 0 or after["seen"] >= 1 - AT_THE_TOP if gates.improves else None
    return Gate(name, passed=passed, value=margin, bound=0.0, why=why)


def _hidden_cosine(gates: Gates, facts: Facts) -> Gate:
    name, bound = "hidden_cosine", gates.hidden_cosine
    value = _overall(facts, "cosine")
    if value is None:
        return _asked(name, bound, "needs the scores of rotated")
    why = "held-out mean cosine over all sites after the rotation; document 002 hopes for 0.75"
    if bound is None:
        return _reported(name, value, why)
    return Gate(name, passed=value >= bound, value=value, bound=bound, why=why)


def _rms_ratio(gates: Gates, facts: Facts) -> Gate:
    name, bound = "rms_ratio", gates.rms_ratio
    value = _overall(facts, "channel_rms_factor")
    if value is None:
        return _asked(name, bound, "needs the scores of rotated, and channels on both sides")
    why = "factor between a channel's RMS and the teacher's, median over channels, then over sites"
    return _reported(name, value, why) if bound is None else at_most(name, value, bound, why)


def _overall(facts: Facts, score: str) -> float | None:
    rotated = facts.scores.get("rotated")
    found: float | None = None if rotated is None else rotated["overall"][score]
    return found


def _resemblance(name: str, what: str, facts: Facts) -> Gate:
    told = [of[what] for of in facts.permutations if not of[what]["skipped"]]
    if not told:
        reasons = sorted({of[what]["skipped"] for of in facts.permutations})
        return _missing(name, None, "; ".join(reasons) or "no permutation was fitted")
    held_out = all("held_out_after" in of for of in told)
    prefix = "held_out_" if held_out else ""
    before, after = (
        math.fsum(of[f"{prefix}{when}"] for of in told) / len(told) for when in ("before", "after")
    )
    where = "held-out texts" if held_out else "the texts that they were matched on"
    why = (
        f"mean likeness of matched {what} after the permutation, {before:.4f} before it, over "
        f"{len(told)} layers, on {where}"
    )
    return _reported(name, after, why)


def _checksums(facts: Facts) -> Gate:
    if facts.checksums is None:
        return _missing("checksums", None, "no raw shards were kept")
    why = "raw shards whose bytes are those that their sidecars name, checked before use"
    return Gate("checksums", passed=True, value=float(facts.checksums), bound=None, why=why)


def _missing(name: str, bound: float | None, why: str) -> Gate:
    return Gate(name, passed=None, value=None, bound=bound, why=why)


def _asked(name: str, bound: float | None, why: str) -> Gate:
    """A bound that was asked for and cannot be looked at is missed."""
    return Gate(name, passed=None if bound is None else False, value=None, bound=bound, why=why)


def _reported(name: str, value: float, why: str) -> Gate:
    return Gate(name, passed=None, value=value, bound=None, why=why)


def _rank(value: float) -> float:
    """Order NaN above all."""
    return math.inf if math.isnan(value) else value
