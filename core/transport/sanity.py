"""A rotation ledger looked at again: orthogonality recomputed, laid beside what was written down.

The script ``scripts/rotation_sanity.py`` and the notebook of the same name show what this finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import DataInvalid
from core.transport.checks import turn_facts, worst_error
from core.transport.rotation_ledger import entries, name_of
from core.transport.rotations import RotationSet

TOLERANCE = 1e-5
"""Document 002, section 16.3: ``allclose(R R^T, I, atol=1e-5)``."""
AGREES = 1e-6
"""How far singular values may be from those of the file, relative to the largest."""
HEADER = (
    *("layer", "group", "k", "error", "core", "round trip", "cosine before", "after", "null"),
)


@dataclass(frozen=True)
class Row:
    """One layer, or the final norm."""

    name: str
    group: str
    k: int
    error: float
    """The worst of the map's errors of orthogonality, ``checks.worst_error``."""
    core: float
    """max abs(R~^T R~ - I)."""
    round_trip: float | None
    """max abs of either way there and back; None of a map that is no rotation."""
    before: float | None
    """Held-out cosine of the base, mean over the layer's points."""
    after: float | None
    null: float | None
    """The larger of shuffled pairs and the mean alone."""
    recomputed: bool
    """Whether the errors come from the rotations themselves, not from the ledger."""
    problems: tuple[str, ...]
    """What is not as it should be; empty: nothing."""

    def cells(self) -> list[object]:
        """Return what a table shows, as ``HEADER`` says."""
        numbers = (self.error, self.core, self.round_trip)
        cosines = (self.before, self.after, self.null)
        return [
            *(self.name, self.group, self.k),
            *("-" if value is None else f"{value:.1e}" for value in numbers),
            *("-" if value is None else f"{value:.4f}" for value in cosines),
        ]


def inspect(
    ledger: Mapping[str, Any],
    rotations: RotationSet | None = None,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> list[Row]:
    """Look at every layer of a ledger.

    Args:
        ledger: of ``rotation_ledger.read``.
        rotations: the maps themselves: their errors are computed anew, and what the ledger says of
            them is held against them. None: the ledger is believed.
        tolerance: of every error, max abs.
        seed: of the random rows that round trips are tried on.

    Raises:
        DataInvalid: the rotations are of another tie, or lack a group that the ledger has.
    """
    found = {} if rotations is None else _measured(ledger, rotations, seed)
    return [
        _row(entry, found.get(entry["group"]), rotations, tolerance) for entry in entries(ledger)
    ]


def _measured(
    ledger: Mapping[str, Any], rotations: RotationSet, seed: int
) -> dict[str, dict[str, Any]]:
    if rotations.tie != ledger.get("tie"):
        raise DataInvalid(
            f"rotations are tied by {rotations.tie}, the ledger's by {ledger.get('tie')}: they "
            "are not of one run"
        )
    groups = {entry["group"] for entry in entries(ledger)}
    if missing := sorted(groups - rotations.maps.keys()):
        raise DataInvalid(f"rotations: {missing[0]} is missing; the ledger has it")
    return {group: turn_facts(rotations.maps[group], seed=seed) for group in sorted(groups)}


def _row(
    entry: Mapping[str, Any],
    measured: Mapping[str, Any] | None,
    rotations: RotationSet | None,
    tolerance: float,
) -> Row:
    facts = measured or entry["rotation"]
    ways = [facts[way] for way in ("round_trip", "round_trip_back") if facts[way] is not None]
    cosines = [point["cosine"] for point in entry["points"].values()]
    nulls = [_mean([of.get(null) for of in cosines]) for null in ("shuffled", "mean_only")]
    error, round_trip = worst_error(facts), max(ways, default=None)
    problems = [
        f"{name} {value:.3g} is above {tolerance:g}"
        for name, value in (("error", error), ("round trip", round_trip))
        if value is not None and not value <= tolerance
    ]
    if rotations is not None:
        problems += _differences(entry, rotations)
    return Row(
        name=name_of(entry),
        group=entry["group"],
        k=entry["k"],
        error=error,
        core=facts["errors"]["core"],
        round_trip=round_trip,
        before=_mean([of.get("base") for of in cosines]),
        after=_mean([of.get("rotated") for of in cosines]),
        null=max((null for null in nulls if null is not None), default=None),
        recomputed=measured is not None,
        problems=tuple(problems),
    )


def _differences(entry: Mapping[str, Any], rotations: RotationSet) -> list[str]:
    """Say where ledger and rotations tell different things."""
    one = rotations.maps[entry["group"]]
    k, values = int(one.core.shape[0]), one.singular_values.tolist()
    if k != entry["k"]:
        return [f"k is {k} in the rotations and {entry['k']} in the ledger"]
    told = entry["singular_values"]
    largest = max(map(abs, values), default=0.0)
    if len(told) != len(values) or any(
        abs(a - b) > AGREES * largest for a, b in zip(told, values, strict=True)
    ):
        return ["the singular values are not those of the rotations"]
    return []


def problems(rows: Sequence[Row]) -> list[str]:
    """Return every problem with its layer."""
    return [f"{row.name}: {problem}" for row in rows for problem in row.problems]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
