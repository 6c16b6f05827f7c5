"""When a queued job will probably start: the pool's next hours, played through in steps of chunks.

An estimate: chunks are taken to last as long as those of the same job or kind did, nobody submits
anything more, and no worker comes or goes.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

STEPS_LIMIT = 20_000
"""Chunks played through at most; a job that starts later is not foretold."""


@dataclass(frozen=True)
class Queued:
    """A job with chunks to come."""

    job_id: str
    project_id: str
    rank: int
    """100 - priority."""
    age: int
    """Place among all jobs by submission, the oldest first."""
    chunks: int
    seconds: float
    """Of a chunk."""
    device: str | None
    memory_bytes: int
    chained: bool = False
    """One chunk at a time."""
    busy_s: float = 0.0
    """Of a chain: until its running chunk ends; ``chunks`` are those after it."""


@dataclass(frozen=True)
class Device:
    """A live worker."""

    kind: str
    memory_bytes: int
    free_in_s: float
    """Until its running chunk ends."""
    project_id: str | None = None
    """Whose chunk that is."""


def starts_in(
    wanted: str,
    jobs: Sequence[Queued],
    devices: Sequence[Device],
    usage: Mapping[str, float],
    weights: Mapping[str, float],
    limits: Mapping[str, int],
) -> float | None:
    """Return the seconds until ``wanted`` starts its next chunk; None where that is not foretold.

    ``usage`` (device seconds, decayed to now), ``weights`` and ``limits`` (on running chunks; none
    where a project is not named) are by project.
    """
    pool = _Pool(jobs, devices, limits)
    used = dict(usage)
    free = [(device.free_in_s, number) for number, device in enumerate(devices)]
    heapq.heapify(free)
    for _ in range(STEPS_LIMIT):
        if not free:
            return None
        at, number = heapq.heappop(free)
        heads = pool.heads(devices[number], at)
        if not heads:
            later = pool.next_end(devices[number])
            if later is not None:
                heapq.heappush(free, (later, number))
            continue
        best = min(heads, key=lambda j: (j.rank, used[j.project_id] / weights[j.project_id], j.age))
        if best.job_id == wanted:
            return at
        used[best.project_id] += best.seconds
        pool.start(best, at)
        heapq.heappush(free, (at + best.seconds, number))
    return None


class _Pool:
    """What is queued, one queue for each project and need, and what runs and counts until when."""

    def __init__(
        self, jobs: Sequence[Queued], devices: Sequence[Device], limits: Mapping[str, int]
    ) -> None:
        self._limits = limits
        self._queues: dict[tuple[str, str | None, int], list[Queued]] = {}
        for job in sorted(jobs, key=lambda job: (job.rank, job.age), reverse=True):
            need = (job.project_id, job.device, job.memory_bytes)
            # The first of a queue stands last in its list.
            self._queues.setdefault(need, []).append(job)
        self._busy_until = {job.job_id: job.busy_s for job in jobs if job.busy_s > 0}
        self._ends = [(d.free_in_s, d.project_id or "") for d in devices if d.free_in_s > 0]
        self._running = Counter(project_id for _, project_id in self._ends)
        self._ends += [(until, "") for until in self._busy_until.values()]
        heapq.heapify(self._ends)

    def heads(self, device: Device, at: float) -> list[Queued]:
        """Return the first job of each queue that may start on a device at an instant."""
        while self._ends and self._ends[0][0] <= at:
            self._running[heapq.heappop(self._ends)[1]] -= 1
        found = (self._head(q, at) for need, q in self._queues.items() if _fits(need, device))
        return [job for job in found if job is not None and self._has_room(job.project_id)]

    def _head(self, queue: list[Queued], at: float) -> Queued | None:
        return next((j for j in reversed(queue) if self._busy_until.get(j.job_id, 0.0) <= at), None)

    def _has_room(self, project_id: str) -> bool:
        limit = self._limits.get(project_id)
        return limit is None or self._running[project_id] < limit

    def next_end(self, device: Device) -> float | None:
        """Return when a running chunk ends, so that what fits the device may start; or None."""
        some = any(queue for need, queue in self._queues.items() if _fits(need, device))
        return self._ends[0][0] if some and self._ends else None

    def start(self, job: Queued, at: float) -> None:
        """Take one chunk of a job from its queue."""
        queue = self._queues[job.project_id, job.device, job.memory_bytes]
        place = next(i for i in range(len(queue) - 1, -1, -1) if queue[i] is job)
        if job.chunks > 1:
            queue[place] = replace(job, chunks=job.chunks - 1)
        else:
            del queue[place]
        end = at + job.seconds
        if job.chained:
            self._busy_until[job.job_id] = end
        self._running[job.project_id] += 1
        heapq.heappush(self._ends, (end, job.project_id))


def _fits(need: tuple[str, str | None, int], device: Device) -> bool:
    _, kind, memory_bytes = need
    return kind in (None, device.kind) and memory_bytes <= device.memory_bytes
