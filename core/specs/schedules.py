"""Temperatures of a curriculum's stages: pure arithmetic, the same for a job and for a script."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from core.errors import SpecInvalid

ScheduleType = Literal["linear", "exponential", "cosine"]
COLDEST, HOTTEST = 1e-6, 1e3
"""Temperatures: at the coldest a digit of a float32 cosine tells rows apart, at the hottest all
cosines are alike to three digits. Between them no square and no ratio leaves a float's range."""
SCHEDULE_TYPES: tuple[str, ...] = get_args(ScheduleType)

_SHARES: Mapping[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, share: start + (end - start) * share,
    "exponential": lambda start, end, share: start * (end / start) ** share,
    "cosine": lambda start, end, share: end + (start - end) * (1 + math.cos(math.pi * share)) / 2,
}


@dataclass(frozen=True)
class TauSchedule:
    """From a stage to its temperature: ``start_tau`` at stage 0, ``end_tau`` at the last one.

    ``linear``: equal steps. ``exponential``: equal ratios, so its first steps are the largest.
    ``cosine``: half a cosine, its steps small at both ends. Stages outside [0, num_stages) have
    the temperature of the nearest one, and a single stage has ``end_tau``.
    """

    start_tau: float
    end_tau: float
    num_stages: int
    schedule_type: ScheduleType = "linear"

    def __post_init__(self) -> None:
        check_tau("start_tau", self.start_tau)
        check_tau("end_tau", self.end_tau)
        if type(self.num_stages) is not int or self.num_stages < 1:
            raise SpecInvalid(
                f"num_stages {self.num_stages!r}; allowed: a whole number from 1",
                pointer="/num_stages",
            )
        if self.schedule_type not in SCHEDULE_TYPES:
            raise SpecInvalid(
                f"schedule_type {self.schedule_type!r}; allowed: {', '.join(SCHEDULE_TYPES)}",
                pointer="/schedule_type",
            )

    def __call__(self, stage: int) -> float:
        """Return the temperature of a stage, counted from 0.

        Raises:
            SpecInvalid: ``stage`` is not a whole number.
        """
        if type(stage) is not int:
            raise SpecInvalid(f"stage {stage!r}; allowed: a whole number", pointer="/stage")
        last = self.num_stages - 1
        if stage >= last:
            return float(self.end_tau)
        if stage <= 0:
            return float(self.start_tau)
        share = _SHARES[self.schedule_type]
        return share(float(self.start_tau), float(self.end_tau), stage / last)


def create_curriculum_schedule(
    start_tau: float, end_tau: float, num_stages: int, schedule_type: ScheduleType = "linear"
) -> TauSchedule:
    """Make the temperature of every stage of a curriculum (names of document 004).

    Linear from 4.0 to 0.5 in 5 stages gives 4.0, 3.125, 2.25, 1.375, 0.5.

    Args:
        start_tau: of stage 0, 1e-6 to 1e3.
        end_tau: of the last stage, 1e-6 to 1e3; may be above ``start_tau``.
        num_stages: >= 1; of a single stage the temperature is ``end_tau``.
        schedule_type: ``linear``, ``exponential`` or ``cosine``. Document 004 says of
            ``exponential`` that its first changes are gradual: in ratio they are like all others,
            in difference the largest.

    Raises:
        SpecInvalid: which of them, what it is and what is allowed.
    """
    return TauSchedule(start_tau, end_tau, num_stages, schedule_type)


def check_tau(name: str, value: Any) -> None:
    """Raise SpecInvalid unless ``value`` is a temperature: a number from COLDEST to HOTTEST."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and COLDEST <= value <= HOTTEST:
        return
    raise SpecInvalid(
        f"{name} {told(value)}; allowed: a number, {COLDEST:g} to {HOTTEST:g}", pointer=f"/{name}"
    )


def told(value: Any) -> str:
    """Return a wrong argument as a message may hold it: short, whatever it is."""
    # Python refuses to write out a whole number of more than 4300 digits.
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a whole number of over 30 digits"
    return reprlib.repr(value)
