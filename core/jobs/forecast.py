"""When a queued job will probably start: the pool's next hours, played through in steps of chunks.

An estimate: chunks are taken to last as long as those of the same job or kind did, nobody submits
anything more, and no worker comes or goes.
"""

import heapq
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


@dataclass(frozen=True)
class Device:
    """A live worker."""

    kind: str
    memory_bytes: int
    free_in_s: float
    """Until its running chunk ends."""


def starts_in(
    wanted: str,
    jobs: Sequence[Queued],
    devices: Sequence[Device],
    usage: Mapping[str, float],
    weights: Mapping[str, float],
) -> float | None:
    """Return the seconds until ``wanted`` starts its next chunk; None where that is not foretold.

    ``usage`` (device seconds, decayed to now) and ``weights`` are by project.
    """
    queues = _queues(jobs)
    used = dict(usage)
    busy_until: dict[str, float] = {}
    free = [(device.free_in_s, number) for number, device in enumerate(devices)]
    heapq.heapify(free)
    for _ in range(STEPS_LIMIT):
        if not free:
            return None
        at, number = heapq.heappop(free)
        heads = [head for queue in queues if (head := _head(queue, devices[number]))]
        ready = [job for job in heads if busy_until.get(job.job_id, 0.0) <= at]
        if not ready:
            if heads:  # chains whose chunk runs elsewhere
                heapq.heappush(free, (min(busy_until[job.job_id] for job in heads), number))
            continue
        best = min(ready, key=lambda j: (j.rank, used[j.project_id] / weights[j.project_id], j.age))
        if best.job_id == wanted:
            return at
        used[best.project_id] += best.seconds
        end = at + best.seconds
        heapq.heappush(free, (end, number))
        if best.chained:
            busy_until[best.job_id] = end
        _take_one(queues, best)
    return None


def _queues(jobs: Sequence[Queued]) -> list[list[Queued]]:
    """Return each project's jobs, the first of its queue last."""
    by_project: dict[str, list[Queued]] = {}
    for job in sorted(jobs, key=lambda job: (job.rank, job.age), reverse=True):
        by_project.setdefault(job.project_id, []).append(job)
    return list(by_project.values())


def _head(queue: list[Queued], device: Device) -> Queued | None:
    return next((job for job in reversed(queue) if _fits(job, device)), None)


def _take_one(queues: list[list[Queued]], job: Queued) -> None:
    for queue in queues:
        for place in range(len(queue) - 1, -1, -1):
            if queue[place] is job:
                if job.chunks > 1:
                    queue[place] = replace(job, chunks=job.chunks - 1)
                else:
                    del queue[place]
                return


def _fits(job: Queued, device: Device) -> bool:
    return job.device in (None, device.kind) and job.memory_bytes <= device.memory_bytes
