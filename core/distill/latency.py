"""How long a teacher and its student take, measured in turns, and from how many heads on who wins.

Both sides run in one process with the same threads, warmed up, in eval and inference mode; a GPU is
waited for before the clock is read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.distill.answering import Answering, checked_rows, in_mode, place_of
from core.distill.students.projection_transformer import ProjectionTransformer
from core.errors import SpecInvalid
from core.specs.architectures import whole_number

BATCHES = (1, 32, 4096)
WARM_UPS, LEAST_ROUNDS = 3, 5
MEASURED_SECONDS = 0.5
"""How long both sides of one batch size are measured together, once warm."""
Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """How long calls of one batch size took, in milliseconds a call."""

    p50_ms: float
    p95_ms: float
    calls: int


@dataclass(frozen=True)
class Measurement:
    """A teacher of so many heads and its student on batches of one size."""

    heads: int
    """N."""
    batch: int
    lda: Timing
    transformer: Timing
    lda_flops: int
    """A query."""
    transformer_flops: int
    """0 where the student does not say its sizes."""
    lda_bytes: int
    """Of parameters and buffers."""
    transformer_bytes: int

    @property
    def times_faster(self) -> float:
        """The teacher's median over the student's: above 1 the student is faster."""
        return self.lda.p50_ms / self.transformer.p50_ms


@dataclass(frozen=True)
class Crossover:
    """From how many heads on the student is the faster one, for batches of one size."""

    batch: int
    heads: float | None
    """Interpolated; None beyond what was measured."""
    words: str
    """``~27``, ``> 4096`` or ``< 18``."""
    flops_heads: float | None
    """Where both need as many operations: from counting, not from a clock. None where the student
    does not say its sizes."""


def benchmark_latency(
    lda: Answering,
    transformer: Answering,
    queries: Tensor,
    batch_size: int = 32,
    *,
    batches: Sequence[int] = BATCHES,
    seconds: float = MEASURED_SECONDS,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Time both on batches cut from ``queries``, which start over where they are too few.

    Document 001 times a cold loop with gradients and takes the mean; these are medians of warm
    calls without. Both sides use the process's own number of threads.

    Args:
        lda: the teacher.
        transformer: the student.
        queries: [n, d], n >= 1, on the device of both.
        batch_size: of ``*_batch_ms``.
        batches: further sizes, for the percentiles.
        seconds: for each size, beyond at least LEAST_ROUNDS calls.
        clock: seconds.

    Returns:
        In milliseconds: ``lda_single_ms, transformer_single_ms`` for one query,
        ``lda_batch_ms, transformer_batch_ms`` for a whole batch; for each size B
        ``lda_p50_ms_per_query_B``, ``lda_p95_ms_per_query_B`` and the transformer's. ``threads``.

    Raises:
        DataInvalid: queries of the wrong shape, or not finite.
        SpecInvalid: a size below 1, or seconds not above 0.
    """
    found: dict[str, float] = {}
    single, whole = 1, whole_number(batch_size, "batch_size", least=1)
    for size in dict.fromkeys((single, whole, *batches)):
        taken = time_in_turns(lda, transformer, queries, batch=size, seconds=seconds, clock=clock)
        for name, timing in zip(("lda", "transformer"), taken, strict=True):
            if size == single:
                found[f"{name}_single_ms"] = timing.p50_ms
            if size == whole:
                found[f"{name}_batch_ms"] = timing.p50_ms
            found[f"{name}_p50_ms_per_query_{size}"] = timing.p50_ms / size
            found[f"{name}_p95_ms_per_query_{size}"] = timing.p95_ms / size
    return {**found, "threads": float(torch.get_num_threads())}


def time_in_turns(
    lda: Answering,
    transformer: Answering,
    queries: Tensor,
    *,
    batch: int,
    seconds: float = MEASURED_SECONDS,
    clock: Clock = time.perf_counter,
) -> tuple[Timing, Timing]:
    """Call both in turns on the same batches, so that whatever disturbs one disturbs the other.

    Arguments as for ``benchmark_latency``.
    """
    rows = checked_rows(queries, "queries")
    size = whole_number(batch, "batches", least=1)
    if not 0 < seconds < math.inf:
        raise SpecInvalid(f"seconds {seconds!r}; allowed: above 0", pointer="/seconds")
    parts = _parts(rows, size)
    taken: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as modes, torch.inference_mode():
        for side in (lda, transformer):
            modes.enter_context(in_mode(side, training=False))
        for turn in range(WARM_UPS):
            for side in (lda, transformer):
                _timed(side, parts[turn % len(parts)], clock)
        until, turn = clock() + seconds, 0
        while turn < LEAST_ROUNDS or clock() < until:
            part = parts[turn % len(parts)]
            first = turn % 2  # who goes first changes: the second finds the batch in cache
            for which in (first, 1 - first):
                taken[which].append(_timed((lda, transformer)[which], part, clock))
            turn += 1
    return _timing(taken[0]), _timing(taken[1])


def measure_crossover(
    clusters: Sequence[int] = (18, 64, 400, 4096),
    dim: int = 384,
    batches: Sequence[int] = BATCHES,
    student_for: Callable[[int], nn.Module] | None = None,
    seconds: float = MEASURED_SECONDS,
    *,
    teacher_for: Callable[[Tensor, Tensor], nn.Module],
    out_dim: int | None = None,
    seed: int = 0,
) -> list[Measurement]:
    """Time synthetic teachers of N heads and a student each, as long for any N and batch size.

    Args:
        clusters: the N, each from 1 up.
        dim: d, of the queries.
        batches: sizes.
        student_for: N -> a student from d to m; None: document 001's (4 heads, 2 layers, 512).
        seconds: for each N and size.
        teacher_for: (centroids [N, d], answers [N, m], unit rows drawn from ``seed``) -> a teacher.
        out_dim: m, of the answers; None: d.
        seed: of the draws.

    Returns:
        One per size and N: sizes in turn, N ascending within each.
    """
    m = dim if out_dim is None else out_dim
    student_for = student_for or (lambda _: ProjectionTransformer(dim, 4, 2, 512, out_dim=m))
    generator = torch.Generator().manual_seed(seed)
    heads = sorted({whole_number(n, "clusters", least=1) for n in clusters})
    found = []
    for n in heads:
        centroids, answers, queries = (
            nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)
            for rows, width in ((n, dim), (n, m), (max(batches), dim))
        )
        teacher, student = teacher_for(centroids, answers), student_for(n)
        place = place_of(student)
        teacher = teacher.to(place.device)
        found += [
            measure(teacher, student, queries.to(place), heads=n, batch=size,
                    seconds=seconds)
            for size in batches
        ]  # fmt: skip
    order = {size: number for number, size in enumerate(batches)}
    return sorted(found, key=lambda each: (order[each.batch], each.heads))


def measure(
    lda: Answering,
    transformer: Answering,
    queries: Tensor,
    *,
    heads: int,
    batch: int,
    seconds: float = MEASURED_SECONDS,
    clock: Clock = time.perf_counter,
) -> Measurement:
    """Time both on batches of one size, and count what they need and hold."""
    mine, theirs = time_in_turns(
        lda, transformer, queries, batch=batch, seconds=seconds, clock=clock
    )
    with torch.no_grad(), in_mode(lda, training=False):
        answer_dim = lda(queries[:1]).shape[1]
    config = getattr(transformer, "config", {})
    return Measurement(
        heads=heads,
        batch=batch,
        lda=mine,
        transformer=theirs,
        lda_flops=flops_lda(heads, queries.shape[1], answer_dim),
        transformer_flops=_flops_of(config),
        lda_bytes=_bytes(lda),
        transformer_bytes=_bytes(transformer),
    )


def flops_lda(n_flat_heads: int, dim: int, out_dim: int | None = None) -> int:
    """Count a query's operations: 2 N d for the scores and 2 N m for the answer (4 N d if m = d).

    The softmax and the query's length, some N + d, are left out.
    """
    return 2 * n_flat_heads * (dim + (dim if out_dim is None else out_dim))


def flops_transformer(
    embed_dim: int, num_layers: int, ff_dim: int, out_dim: int | None = None
) -> int:
    """Count a query's operations in the products: 2 d^2 + L (4 d^2 + 4 d f) + 2 d m.

    As ``ProjectionTransformer`` computes them: queries and keys over a sequence of length 1 have
    no effect and are not formed (they would add 4 d^2 a layer).
    """
    m = embed_dim if out_dim is None else out_dim
    layer = 4 * embed_dim**2 + 4 * embed_dim * ff_dim
    return 2 * embed_dim**2 + num_layers * layer + 2 * embed_dim * m


def crossover(measurements: Sequence[Measurement]) -> list[Crossover]:
    """Find for each batch size from how many heads on the student is the faster one, and stays so.

    Between two N the logarithm of the ratio of times is interpolated along log N. Beyond the
    largest or below the smallest N measured nothing is claimed.

    Raises:
        SpecInvalid: no measurements.
    """
    if not measurements:
        raise SpecInvalid("measurements: none; at least one is needed", pointer="/measurements")
    found = []
    for batch in dict.fromkeys(each.batch for each in measurements):
        rows = sorted((m for m in measurements if m.batch == batch), key=lambda m: m.heads)
        heads = [row.heads for row in rows]
        at = _crossing(heads, [row.times_faster for row in rows])
        if at is not None:
            words = f"~{at:.0f}"
        else:
            beyond = rows[-1].times_faster < 1
            words = f"> {heads[-1]}" if beyond else f"< {heads[0]}"
        found.append(Crossover(batch, at, words, _flops_crossing(rows)))
    return found


def _crossing(heads: Sequence[float], ratios: Sequence[float]) -> float | None:
    """Where a ratio last rises through 1; None where it does not between two N."""
    if ratios[-1] < 1:
        return None
    for low in range(len(heads) - 2, -1, -1):
        if ratios[low] < 1:
            a, b = math.log(ratios[low]), math.log(ratios[low + 1])
            x, y = math.log(heads[low]), math.log(heads[low + 1])
            return math.exp(x + (y - x) * -a / (b - a))
    return None


def _flops_crossing(rows: Sequence[Measurement]) -> float | None:
    """N at which both need as many operations, for the student measured nearest to that N."""
    found = [
        (row.transformer_flops * row.heads / row.lda_flops, row.heads)
        for row in rows
        if row.transformer_flops and row.lda_flops
    ]
    return min(found, key=lambda each: abs(math.log(each[0] / each[1])))[0] if found else None


def _parts(rows: Tensor, size: int) -> list[Tensor]:
    """Whole batches of ``size``: [B, d] each, starting over where rows are too few."""
    count = max(1, len(rows) // size)
    at = torch.arange(count * size, device=rows.device) % len(rows)
    return list(rows[at].split(size))


def _timed(side: Answering, part: Tensor, clock: Clock) -> float:
    start = clock()
    side(part)
    if part.is_cuda:
        torch.cuda.synchronize(part.device)
    return clock() - start


def _timing(seconds: list[float]) -> Timing:
    taken = torch.tensor(seconds, dtype=torch.float64) * 1000
    middle, late = taken.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return Timing(middle, late, len(seconds))


def _flops_of(config: Any) -> int:
    names = ("dim", "num_layers", "ff_dim", "target_dim")
    if not all(name in config for name in names):
        return 0
    return flops_transformer(*(config[name] for name in names))


def _bytes(side: object) -> int:
    held = [*side.parameters(), *side.buffers()] if isinstance(side, nn.Module) else []
    return sum(value.numel() * value.element_size() for value in held)
