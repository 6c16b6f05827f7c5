"""When a job will start, computed by hand."""

from dataclasses import replace

import pytest

from core.jobs import forecast
from core.jobs.forecast import Device, Queued
from tests.life import GIB

CPU = Device("cpu", 8 * GIB, 0.0)
GPU = Device("gpu", 80 * GIB, 0.0)


def job(name: str, chunks: int = 1, seconds: float = 10.0, **values: object) -> Queued:
    """A job of the project that its name begins with, as old as its name says: ``a1``, ``b2``."""
    known = {"rank": 50, "device": None, "memory_bytes": 0, **values}
    return Queued(
        job_id=name,
        project_id=name[0],
        age=int(name[1:]),
        chunks=chunks,
        seconds=seconds,
        **known,  # type: ignore[arg-type]
    )


def starts(
    wanted: str,
    jobs: list[Queued],
    *devices: Device,
    usage: dict[str, float] | None = None,
    weights: dict[str, float] | None = None,
    limits: dict[str, int] | None = None,
) -> float | None:
    used = {"a": 0.0, "b": 0.0, "c": 0.0, **(usage or {})}
    shares = {"a": 1.0, "b": 1.0, "c": 1.0, **(weights or {})}
    return forecast.starts_in(wanted, jobs, devices, used, shares, limits or {})


def test_it_starts_when_a_device_is_free() -> None:
    assert starts("a1", [job("a1")], CPU) == 0
    assert starts("a1", [job("a1")], replace(CPU, free_in_s=7), replace(CPU, free_in_s=4)) == 4


def test_jobs_of_a_project_go_by_priority_then_age() -> None:
    jobs = [job("a1", chunks=3), job("a2"), job("a3", rank=40, seconds=5)]

    assert [starts(name, jobs, CPU) for name in ("a3", "a1", "a2")] == [0, 5, 35]
    assert starts("a2", jobs, CPU, CPU) == 15  # a3 and a1; a1 at 5; a1 and a2 at 10 and 15


def test_projects_take_turns_by_use_over_weight() -> None:
    jobs = [job(f"a{n}") for n in (1, 2, 3)] + [job(f"b{n}") for n in (4, 5, 6)]

    assert [starts(f"b{n}", jobs, CPU) for n in (4, 5, 6)] == [10, 30, 50]
    assert [starts(f"b{n}", jobs, CPU, usage={"a": 25}) for n in (4, 5, 6)] == [0, 10, 20]
    # Levels after each start, a then b: 10/0, 10/5, 10/10, 20/10, 20/15
    assert [starts(f"b{n}", jobs, CPU, weights={"b": 2}) for n in (4, 5, 6)] == [10, 20, 40]
    urgent = [*jobs, job("c7", rank=0)]
    assert starts("c7", urgent, CPU, usage={"c": 1e9}) == 0


def test_what_does_not_fit_waits_for_its_device_and_blocks_nobody() -> None:
    jobs = [
        job("a1", device="gpu", chunks=2),
        job("a2", memory_bytes=16 * GIB),
        job("a3"),
        job("a4", memory_bytes=100 * GIB),
    ]

    assert [starts(f"a{n}", jobs, CPU) for n in (1, 2, 3, 4)] == [None, None, 0, None]
    assert [starts(f"a{n}", jobs, GPU) for n in (1, 2, 3, 4)] == [0, 20, 30, None]
    assert [starts(f"a{n}", jobs, CPU, GPU) for n in (1, 2, 3)] == [0, 20, 0]
    assert starts("a3", jobs) is None


def test_a_chain_takes_one_device_and_others_pass_it() -> None:
    jobs = [job("a1", chunks=3, chained=True), job("a2", chunks=3), job("a3")]

    assert starts("a2", jobs, CPU, CPU) == 0
    assert starts("a3", jobs, CPU, CPU) == 30
    assert starts("a3", jobs[:1] + jobs[2:], CPU, CPU) == 0


def test_a_chain_whose_chunk_runs_waits_for_its_end() -> None:
    running = replace(CPU, free_in_s=6.0, project_id="a")
    chain = job("a1", chunks=2, chained=True, busy_s=6.0)

    assert starts("a1", [chain], CPU, running) == 6
    assert starts("a2", [chain, job("a2")], CPU, running) == 0
    assert starts("a1", [chain], CPU) == 6, "though its worker is not counted any more"


def test_a_project_at_its_limit_waits_for_one_of_its_own_to_end() -> None:
    running = replace(CPU, free_in_s=6.0, project_id="a")
    jobs = [job("a1"), job("a2"), job("b3")]

    assert starts("a1", jobs, CPU, running, limits={"a": 1}) == 6
    assert starts("a2", jobs, CPU, running, limits={"a": 1}) == 16
    assert starts("b3", jobs, CPU, running, limits={"a": 1}) == 0
    assert starts("a1", jobs, CPU, running, limits={"a": 0}) is None
    assert starts("a2", jobs, CPU, CPU, CPU, limits={"a": 2}) == 0


def test_what_starts_after_very_many_chunks_is_not_foretold() -> None:
    many = job("a1", chunks=forecast.STEPS_LIMIT - 1)

    assert starts("a2", [many, job("a2")], CPU) == pytest.approx((forecast.STEPS_LIMIT - 1) * 10)
    assert starts("a2", [replace(many, chunks=many.chunks + 1), job("a2")], CPU) is None
