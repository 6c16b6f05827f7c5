"""What a job would take, before it is submitted; on both databases."""

from typing import Any

import pytest
from sqlalchemy import Engine, event, func, select
from starlette.testclient import TestClient

from core.db.models import AuditEntry, Chunk, Event, Job, JobInput
from core.db.session import reading, transaction
from core.jobs import pool
from tests import life
from tests.api.conftest import (
    ECHO,
    OPERATOR,
    context_of,
    key_of,
    make_project,
    pairs,
    problem_of,
    runner_of,
    upload,
)
from tests.conftest import Clock

PLACE = life.place("host-7:cpu", "cpu", 16 << 30)


def ask(server: TestClient, spec: dict[str, Any], key: dict[str, str] = OPERATOR) -> Any:
    return server.post("/v1/jobs/estimate", json=spec, headers=key)


def estimate(server: TestClient, spec: dict[str, Any]) -> dict[str, Any]:
    answer = ask(server, spec)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture
def worker(engine: Engine, clock: Clock, shared: TestClient) -> None:
    with transaction(engine) as session:
        pool.hello(session, "w1", place=PLACE, now=clock())


def test_a_first_job_of_its_kind_has_no_history(shared: TestClient, worker: None) -> None:
    found = estimate(shared, {**ECHO, "times": 7})

    assert found["chunks"] == 7
    assert found["stages"] == [
        {
            "name": "lines",
            "chunks": 7,
            "chained": True,
            "device": None,
            "memory_bytes": 0,
            "seconds_per_chunk": None,
        }
    ]
    assert found["device_seconds"] is None
    assert found["device_seconds_from"] == "no echo job of the project has succeeded yet"
    assert found["cache_hits"] is None
    assert (found["can_run"], found["why_not"]) == (True, None)
    assert found["queue_position"] == 1


def test_an_idle_pool_would_start_it_at_once(
    shared: TestClient, worker: None, clock: Clock
) -> None:
    assert estimate(shared, ECHO)["predicted_start_at"] == clock().isoformat().replace(
        "+00:00", "Z"
    )


def test_nothing_is_kept(shared: TestClient, engine: Engine) -> None:
    tables = (Job, Chunk, JobInput, Event, AuditEntry)

    def counts() -> list[int | None]:
        with reading(engine) as session:
            return [session.scalar(select(func.count()).select_from(one)) for one in tables]

    before = counts()
    estimate(shared, ECHO)

    assert counts() == before
    assert shared.get("/v1/jobs", headers=OPERATOR).json()["items"] == []


def test_device_time_is_that_of_finished_jobs_of_the_kind(
    shared: TestClient, engine: Engine, clock: Clock
) -> None:
    shared.post("/v1/jobs", json={**ECHO, "times": 2}, headers=OPERATOR)
    for _ in range(2):
        claimed = life.claim(engine, clock)
        clock.tick(seconds=3)
        life.finish(engine, claimed, clock, life.some_file(role="checkpoint"))

    found = estimate(shared, {**ECHO, "times": 10, "text": "other"})

    assert found["stages"][0]["seconds_per_chunk"] == pytest.approx(3.0)
    assert found["device_seconds"] == pytest.approx(30.0)
    assert "latest 1 echo job(s)" in found["device_seconds_from"]


def test_how_long_the_jobs_of_others_took_is_not_told(
    shared: TestClient, engine: Engine, clock: Clock, worker: None
) -> None:
    other = key_of(shared, make_project(shared, "other"))
    shared.post("/v1/jobs", json={**ECHO, "times": 1}, headers=OPERATOR)
    claimed = life.claim(engine, clock)
    clock.tick(seconds=3)
    life.finish(engine, claimed, clock, life.some_file())

    found = ask(shared, {**ECHO, "times": 1}, other).json()

    assert found["stages"][0]["seconds_per_chunk"] is None
    assert found["device_seconds_from"] == "no echo job of the project has succeeded yet"
    assert estimate(shared, ECHO)["stages"][0]["seconds_per_chunk"] == pytest.approx(3.0)


def test_what_no_live_worker_can_run_is_told_with_the_reason(
    shared: TestClient, engine: Engine, clock: Clock
) -> None:
    nobody = estimate(shared, ECHO)
    assert (nobody["can_run"], nobody["why_not"]) == (False, "no worker is alive")

    with transaction(engine) as session:
        pool.hello(session, "w1", place=PLACE, now=clock())

    gpu = estimate(shared, {**ECHO, "device": "gpu"})
    assert gpu["can_run"] is False
    assert gpu["why_not"] == "stage lines needs a gpu; no live worker has one"
    assert gpu["stages"][0]["device"] == "gpu"
    assert gpu["predicted_start_at"] is None

    shared.post("/v1/pool/nodes/host-7:cpu/drain", headers=OPERATOR)
    drained = estimate(shared, ECHO)
    assert drained["why_not"] == "stage lines has only workers on nodes that drain or are excluded"


def test_a_job_that_waits_for_another_is_not_planned_yet(shared: TestClient, worker: None) -> None:
    url = upload(shared, pairs(), OPERATOR)
    sha256 = shared.post(f"{url}/complete", headers=OPERATOR).json()["sha256"]
    spec = {"kind": "fit_federated", "pairs": sha256}
    whole = estimate(shared, spec)
    first = shared.post("/v1/jobs", json=spec, headers=OPERATOR).json()["id"]

    found = estimate(shared, {"kind": "cache_targets", "model": f"{first}/model"})

    assert [stage["name"] for stage in whole["stages"]] == ["prepare", "score", "fit", "assemble"]
    assert found["stages"] is found["chunks"] is found["device_seconds"] is None
    assert found["waits_for"] == f"waits for {first}/model"
    assert found["can_run"] is True
    gpu = estimate(shared, {"kind": "cache_targets", "model": f"{first}/model", "device": "gpu"})
    assert gpu["why_not"] == "needs a gpu; no live worker has one"


def test_the_same_work_done_before_tells_the_cache_hits(shared: TestClient, worker: None) -> None:
    done = shared.post("/v1/jobs", json=ECHO, headers=OPERATOR).json()["id"]
    while runner_of(shared).run_one():
        pass

    again = estimate(shared, {**ECHO, "name": "again", "priority": 3})
    other = estimate(shared, {**ECHO, "text": "other"})

    assert (again["cache_hits"], again["cache_hits_from"]) == (0, f"{done} did the same work")
    assert other["cache_hits"] is None
    assert "no earlier job" in other["cache_hits_from"]


def test_the_work_of_another_project_is_not_told(shared: TestClient, worker: None) -> None:
    shared.post("/v1/jobs", json=ECHO, headers=OPERATOR)
    while runner_of(shared).run_one():
        pass
    other = key_of(shared, make_project(shared, "other"))

    assert ask(shared, ECHO, other).json()["cache_hits"] is None


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "echo", "text": ""},
        {"kind": "echo", "text": "a", "times": "3"},
        {"kind": "nothing"},
        {"kind": "fit_federated", "pairs": "0" * 64},
        {"kind": "cache_targets", "model": f"job_{'0' * 26}/model"},
        {},
    ],
)
def test_what_could_not_be_submitted_is_refused_alike(
    client: TestClient, spec: dict[str, Any]
) -> None:
    asked = problem_of(client.post("/v1/jobs/estimate", json=spec), 422, "spec_invalid")
    sent = problem_of(client.post("/v1/jobs", json=spec), 422, "spec_invalid")

    assert asked["errors"] == sent["errors"]
    assert asked["detail"] == sent["detail"]


def test_limits_hold_for_an_estimate_too(shared: TestClient) -> None:
    key = key_of(shared, make_project(shared, "small", queued_limit=1))
    assert ask(shared, ECHO, key).status_code == 200
    shared.post("/v1/jobs", json=ECHO, headers=key)

    told = problem_of(ask(shared, ECHO, key), 429, "quota_exceeded")["detail"]

    assert "queued_limit" in told


def test_a_job_of_many_chunks_is_estimated_without_writing_them(
    shared: TestClient, engine: Engine, worker: None
) -> None:
    spec = {**ECHO, "times": 1_000}
    written: list[int] = []

    def count(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.lstrip().upper().startswith("INSERT INTO CHUNKS"):
            written.append(len(parameters) if isinstance(parameters, list) else 1)

    looked_at = context_of(shared).engine
    event.listen(looked_at, "before_cursor_execute", count)
    try:
        found = shared.post("/v1/jobs/estimate", json=spec, headers=OPERATOR).json()
    finally:
        event.remove(looked_at, "before_cursor_execute", count)

    assert found["chunks"] == 1_000
    assert found["stages"][0]["chunks"] == 1_000
    assert written == [1]
