"""Which anchor strength and temperature a fit takes: what is tried, how judged, which wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import DataInvalid

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 1e6)
"""Tried where none is given, in pairs that agree with the anchor; the last is the anchor itself."""
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5, 2.0)
"""Tried where none is given, times the mean squared length of a training query. At the last one
neighbours weigh nearly alike."""


@dataclass(frozen=True)
class Score:
    """How well one strength and temperature answers the inner held-out queries."""

    strength: float
    temperature: float
    log_score: float
    """Mean log probability of the right target, in nats; see ``Index.log_score``."""
    hit1: float
    cosine: float
    """Mean cosine to the right target."""


def choose(scores: Sequence[Score]) -> Score:
    """Pick the best log score; among equals the strongest anchor.

    The log score weighs every hidden query, so it tells settings apart that hit@1 over a few
    hundred queries cannot.

    Raises:
        DataInvalid: a log score is NaN or infinite; no order holds then.
    """
    for found in scores:
        if not math.isfinite(found.log_score):
            raise DataInvalid(
                f"scores: the log score of strength {found.strength:g} and temperature "
                f"{found.temperature:g} is {found.log_score}; needed finite numbers"
            )
    return max(scores, key=lambda found: (found.log_score, found.strength, found.temperature))


def edges(manifest: Mapping[str, Any]) -> list[str]:
    """Say in words which setting was chosen at the end of what was tried, and may lie beyond.

    Args:
        manifest: of a model: ``scores``, and the ``strength`` and ``temperature`` in force.
    """
    ends = []
    for name, unbounded in (("strength", STRENGTHS[-1]), ("temperature", None)):
        tried = sorted({found[name] for found in manifest.get("scores", ())})
        value = manifest.get(name)
        if len(tried) < 2 or value not in (tried[0], tried[-1]) or value == unbounded:
            continue
        end = "smallest" if value == tried[0] else "largest"
        ends.append(
            f"The {name} chosen, {value:.3g}, is the {end} of the {len(tried)} that were tried: "
            "a better one may lie beyond."
        )
    return ends
