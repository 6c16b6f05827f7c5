"""The sentences of a transport's report: what each toggle bought, what it cost, what is unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from core.transport.gates import Facts, FoldFacts
from core.transport.rotation_ledger import entries

TOLD = 3
"""Names that a sentence lists at most."""
ROUNDING = 1e-9
"""Of two means of the same numbers."""
HOPED = 0.75
"""Hidden cosine that document 002 hopes for (sections 7 and 10)."""


def sentences(facts: Facts, ledger: Mapping[str, Any] | None) -> list[str]:
    """Return the report's findings in words, the most important first.

    Args:
        facts: what was measured.
        ledger: of ``rotation_ledger.build``; None where nothing was rotated.
    """
    return [
        *_rotation(facts),
        *_permutation(facts),
        *_predictions(facts),
        *_regressions(facts),
        *_languages(facts),
        *_refinement(ledger),
        *_unavailable(facts),
    ]


def _rotation(facts: Facts) -> list[str]:
    old, new = facts.scores.get("base"), facts.scores.get("rotated")
    if old is None or new is None:
        return ["Nothing was compared before and after a rotation."]
    before, after = old["overall"], new["overall"]
    if before["cosine"] is None or after["cosine"] is None:
        return ["A site has no row that counts, so there is no mean cosine."]
    error = new["standard_error"]
    give = "" if error is None else f" (standard error over texts {error:.4f})"
    told = [
        f"Rotating took the held-out cosine to the teacher from {before['cosine']:.4f} to "
        f"{after['cosine']:.4f}{give}, mean over {len(new['sites'])} sites; shuffled pairs "
        f"give {_number(after['shuffled'])}, the teacher's mean alone "
        f"{_number(after['mean_only'])}."
    ]
    if after["seen"] is not None and after["seen"] > after["cosine"] + ROUNDING:
        told.append(
            f"In the teacher's own coordinates it is {after['seen']:.4f}: the student is wider, "
            "and no rotation takes away what it has beyond."
        )
    nulls = [after[name] for name in ("shuffled", "mean_only") if after[name] is not None]
    if nulls and after["seen"] is not None and after["seen"] <= max(nulls):
        told.append(
            "That is no more than a null gives, which knows nothing of the token: the rotation "
            "aligns nothing that is worth having."
        )
    if after["cosine"] < HOPED:
        told.append(
            f"The {HOPED} that document 002 hopes for is not reached over the full width: of what "
            "two models compute only a part is the same up to a rotation."
        )
    if after["subspace"] is not None:
        told.append(
            f"Within the shared subspace alone the cosine is {after['subspace']:.4f}; what lies "
            "outside it turns along and is not aligned."
        )
    told.append(
        f"The RMS of the difference over the teacher's went from {before['difference_rms']:.4f} to "
        f"{after['difference_rms']:.4f}."
    )
    return told


def _permutation(facts: Facts) -> list[str]:
    told = []
    for what, name in (("heads", "attention maps"), ("neurons", "SwiGLU neurons")):
        matched = [of for of in facts.permutations if not of[what]["skipped"]]
        reasons = sorted({of[what]["skipped"] for of in facts.permutations} - {None})
        told += [f"{name[0].upper()}{name[1:]} were not matched: {reason}." for reason in reasons]
        if not matched:
            continue
        before, after = (_mean([_like(of[what], when) for of in matched]) for when in _WHEN)
        told.append(
            f"Matching {name} took their mean likeness to the teacher's from {before:.4f} to "
            f"{after:.4f} over {len(matched)} layers."
        )
        hurt = [f"layer {of['layer']}" for of in matched if _hurt(of[what])]
        told.append(
            f"Matching hurt {_listed(hurt)}: there {name} resemble the teacher's less than before."
            if hurt
            else f"It hurt no layer's {name}."
        )
    if facts.permutations:
        told.append(
            "An order of heads and neurons changes neither the residual stream nor a prediction: "
            "the cosine of `permuted` is that of `base`."
        )
    return told


_WHEN = ("before", "after")


def _like(of: Mapping[str, Any], when: str) -> float:
    found: float = of.get(f"held_out_{when}", of[when])
    return found


def _hurt(of: Mapping[str, Any]) -> bool:
    """Whether matched ones are less alike than before, by more than the rounding of two means."""
    return _like(of, "before") - _like(of, "after") > ROUNDING


def _predictions(facts: Facts) -> list[str]:
    told = []
    for variant, fold in facts.folds.items():
        told += _fold(variant, fold)
    old, new = facts.scores.get("base"), facts.scores.get("rotated")
    if old is not None and new is not None and old["tokens"]["kl"] is not None:
        a, b = old["tokens"]["kl"], new["tokens"]["kl"]
        told.append(f"KL to the teacher: {a:.4f} nats per token before, {b:.4f} after.")
    told.append(
        "A change of basis transfers no knowledge: it makes two models comparable, mergeable and "
        "sliceable. Knowledge moves where something is trained or fitted afterwards."
    )
    return told


def _fold(variant: str, fold: FoldFacts) -> list[str]:
    if fold.logits_relative is None:
        return []
    if fold.exact:
        return [
            f"`{variant}` computes what the student computed: its logits changed by at most "
            f"{fold.logits_relative:.1e} of the largest, so KL and surprisal cannot change but by "
            "rounding."
        ]
    return [
        f"`{variant}` is folded as document 002 prints it ({fold.fold}), block by block without "
        "turning the stream between: it does not compute what the student computed. Its logits "
        f"changed by {fold.logits_relative:.1e} of the largest."
    ]


def _regressions(facts: Facts) -> list[str]:
    old, new = facts.scores.get("base"), facts.scores.get("rotated")
    if old is None or new is None:
        return []
    worse = [
        site
        for site, told in new["sites"].items()
        if told["cosine"] is not None
        and old["sites"][site]["cosine"] is not None
        and told["cosine"] < old["sites"][site]["cosine"]
    ]
    if worse:
        return [f"Regressions: the rotation lowered the cosine at {_listed(worse)}."]
    return ["No site's cosine fell by the rotation."]


def _languages(facts: Facts) -> list[str]:
    old, new = facts.scores.get("base"), facts.scores.get("rotated")
    if old is None or new is None or len(new["languages"]) < 2:
        return []
    gains = {
        language: told["cosine"] - old["languages"][language]["cosine"]
        for language, told in new["languages"].items()
        if told["cosine"] is not None and old["languages"][language]["cosine"] is not None
    }
    order = sorted(gains, key=lambda language: (-gains[language], language))
    if not order:
        return []
    best = ", ".join(f"{language} {gains[language]:+.4f}" for language in order[:TOLD])
    told = [f"The cosine gained most in: {best}; least in {order[-1]} {gains[order[-1]]:+.4f}."]
    few = [language for language in order if new["languages"][language]["texts"] < 5]
    if few:
        told.append(f"Of {_listed(few)} fewer than five texts were held out: too few to tell.")
    return told


def _refinement(ledger: Mapping[str, Any] | None) -> list[str]:
    if ledger is None:
        return []
    told: dict[str, list[str]] = {}
    for entry in entries(ledger):
        refined = (entry["diagnostics"] or {}).get("refine")
        if refined is None:
            continue
        done = (
            refined["skipped"]
            or f"{refined['reflections']} reflections, which gained {refined['measured']:.3g} of "
            f"tr(R^T C) = {refined['before']:.4g}"
        )
        groups = told.setdefault(done, [])
        if entry["group"] not in groups:
            groups.append(entry["group"])
    return [f"Householder refinement of {_listed(of)}: {done}." for done, of in told.items()]


def _unavailable(facts: Facts) -> list[str]:
    reasons: dict[str, set[str]] = {}
    for scores in facts.scores.values():
        for metric, why in scores["unavailable"].items():
            reasons.setdefault(why, set()).add(metric)
    return [
        f"Not to be had: {', '.join(f'`{name}`' for name in sorted(of))}: {why}."
        for why, of in reasons.items()
    ]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:TOLD])
    return shown if len(names) <= TOLD else f"{shown} and {len(names) - TOLD} more"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4f}"
