"""Which of the libraries that compute the same teacher is the fastest here: by measuring."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.distill.teachers._base import Bivectors, teachers
from core.distill.teachers._logs import bivector_block
from core.errors import SpecInvalid
from core.specs.teachers import Blending
from core.tensors.formats import Federated

BACKENDS = ("rotational", "rotational_jax")
"""Teachers that give the same answers but for their last bits; of equally fast ones the first."""
ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """What one backend took for a block of queries."""

    name: str
    queries_per_second: float
    """In the best of several rounds."""
    compile_seconds: float
    """What the first call took beyond that: compiling, warming up."""
    difference: float
    """Longest row of the difference to the first backend's answers: 2-norm."""


@dataclass(frozen=True)
class Comparison:
    """Backends measured in turns on one device."""

    device: str
    queries: int
    timings: tuple[Timing, ...]
    """At least one."""
    left_out: tuple[tuple[str, str], ...] = ()
    """(name, why) of those that cannot run here."""

    @property
    def fastest(self) -> str:
        """The name of the backend with most queries a second, compiling apart."""
        return max(self.timings, key=lambda timing: timing.queries_per_second).name

    @property
    def difference(self) -> float:
        """The largest difference of any backend to the first: 2-norm of a row."""
        return max(timing.difference for timing in self.timings)


def compare_backends(
    model: Federated,
    spec: Blending,
    device: str | torch.device,
    *,
    queries: int,
    bivectors: Bivectors | None = None,
    among: tuple[str, ...] = BACKENDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time one block of targets with each backend that can run here.

    Changes nothing but the libraries' own caches of what they compiled. Takes ROUNDS + 1 blocks
    of each backend, and the memory of a teacher each.

    Args:
        model: the teacher's.
        spec: what to ask of it; its name does not matter.
        device: where.
        queries: how many, >= 1: the model's training queries, over again where they are fewer.
        bivectors: of the model; computed where absent.
        among: names of ``BACKENDS``, the one to compare with first.
        clock: seconds.

    Raises:
        SpecInvalid: no backend can run here, a name is unknown, or ``queries`` is below 1.
    """
    unknown = [name for name in among if name not in BACKENDS]
    if unknown or not among:
        raise SpecInvalid(f"backends: {unknown or 'none'}; allowed: {', '.join(BACKENDS)}")
    if queries < 1:
        raise SpecInvalid(f"queries: {queries}; allowed: from 1 up")
    given = bivectors or bivector_block(model, spec, 0, len(model.rotations))
    block = model.queries[np.arange(queries) % len(model.queries)]
    told = spec.model_dump(exclude={"name"})
    works: dict[str, Callable[[], Tensor]] = {}
    left_out: list[tuple[str, str]] = []
    for name in among:
        plugin = teachers()[name]
        own: Any = plugin.spec.model_validate(told)
        try:
            teacher = plugin.build(model, own, device, given)
        except SpecInvalid as error:
            left_out.append((name, error.message))
        else:
            works[name] = partial(teacher.targets, block)
    if not works:
        raise SpecInvalid("; ".join(why for _, why in left_out))
    timings = time_in_turns(works, torch.device(device), queries=queries, clock=clock)
    return Comparison(str(device), queries, timings, tuple(left_out))


def time_in_turns(
    works: Mapping[str, Callable[[], Tensor]],
    device: torch.device,
    *,
    queries: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Timing, ...]:
    """Call each once to warm up, then ROUNDS times in turns; keep the best of each.

    Args:
        works: name -> what answers the queries: [Q, d] on the device.
        device: a GPU is waited for before the clock is read.
        queries: Q.
        clock: seconds.
    """

    def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
        start = clock()
        answers = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start, answers

    first = {name: timed(work) for name, work in works.items()}
    rounds = [{name: timed(work)[0] for name, work in works.items()} for _ in range(ROUNDS)]
    compared_with = next(iter(first.values()))[1].double()
    timings = []
    for name, (seconds, answers) in first.items():
        best = min(taken[name] for taken in rounds)
        gap = torch.linalg.vector_norm(answers.double() - compared_with, dim=1).max()
        rate = queries / max(best, 1e-9)
        timings.append(Timing(name, rate, max(0.0, seconds - best), float(gap)))
    return tuple(timings)
