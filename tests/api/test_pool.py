"""The pool as each project sees it, draining, and the sweep; on both databases."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from core.db.session import transaction
from core.jobs import housekeeping, pool
from tests import life
from tests.api.conftest import (
    ECHO,
    OPERATOR,
    context_of,
    key_of,
    make_project,
    pairs,
    problem_of,
    upload,
)
from tests.api.test_pages import check_page
from tests.conftest import Clock, wait_for

GPU = life.place("host-7:cuda:0", "cuda:0", 80 << 30)
CPU = life.place("host-7:cpu", "cpu", 16 << 30)


def arrive(engine: Engine, clock: Clock, *workers: tuple[str, pool.Place]) -> None:
    with transaction(engine) as session:
        for worker_id, place in workers:
            pool.hello(session, worker_id, place=place, now=clock())


def submit(server: TestClient, key: dict[str, str], **changes: Any) -> str:
    answer = server.post("/v1/jobs", json={**ECHO, **changes}, headers=key)
    assert answer.status_code == 201, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def look(server: TestClient, key: dict[str, str]) -> dict[str, Any]:
    answer = server.get("/v1/pool", headers=key)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture
def mine(shared: TestClient) -> dict[str, str]:
    """A key of a project with a part of the pool."""
    project = make_project(shared, "mine", weight=3, running_limit=2, queued_limit=9)
    return key_of(shared, project, "read", "submit")


def test_devices_are_shown_with_what_they_run_and_how_busy_they_were(
    shared: TestClient, engine: Engine, clock: Clock, mine: dict[str, str]
) -> None:
    arrive(engine, clock, ("w-gpu", GPU), ("w-cpu", CPU))
    job = submit(shared, mine, times=4)
    clock.tick(seconds=10)
    life.claim(engine, clock, "w-cpu", at=CPU)
    clock.tick(seconds=10)

    cpu, gpu = look(shared, mine)["workers"]

    assert (cpu["id"], cpu["node"], cpu["device"], cpu["kind"]) == (
        "w-cpu", "host-7:cpu", "cpu", "cpu",
    )  # fmt: skip
    assert (gpu["kind"], gpu["memory_bytes"], gpu["threads"]) == ("gpu", 80 << 30, 1)
    assert gpu["running"] is None
    assert gpu["utilisation"] == 0.0
    running = cpu["running"]
    assert (running["job_id"], running["stage"], running["index"]) == (job, "lines", 0)
    assert running["kind"] == "echo"
    assert cpu["utilisation"] == 0.5


def test_a_worker_that_is_silent_is_not_alive(
    shared: TestClient, engine: Engine, clock: Clock, mine: dict[str, str]
) -> None:
    arrive(engine, clock, ("w1", CPU))
    assert [one["alive"] for one in look(shared, mine)["workers"]] == [True]

    clock.tick(seconds=pool.ALIVE_FOR.total_seconds() + 1)

    assert [one["alive"] for one in look(shared, mine)["workers"]] == [False]


def test_the_own_queue_is_told_by_name_with_its_limits(
    shared: TestClient, engine: Engine, clock: Clock, mine: dict[str, str]
) -> None:
    arrive(engine, clock, ("w1", CPU))
    submit(shared, mine, times=5)
    paused = submit(shared, mine, times=2)
    shared.post(f"/v1/jobs/{paused}/pause", headers=mine)
    life.claim(engine, clock, "w1", at=CPU)

    own, others = look(shared, mine)["projects"]

    assert (own["name"], own["weight"]) == ("mine", 3.0)
    assert (own["running_limit"], own["queued_limit"]) == (2, 9)
    assert own["jobs"] == {"paused": 1, "running": 1}
    assert own["chunks_left"] == 7
    assert own["running_chunks"] == 1
    assert own["share"] == 1.0
    assert own["usage"] == life.RULES.fairness.entry_penalty.total_seconds()
    assert (others["project_id"], others["name"], others["jobs"]) == (None, "others", {})


def test_of_other_projects_only_sums_are_told_but_to_an_admin(
    shared: TestClient, engine: Engine, clock: Clock, mine: dict[str, str]
) -> None:
    theirs = [key_of(shared, make_project(shared, name)) for name in ("rivals", "strangers")]
    arrive(engine, clock, ("w1", CPU))
    job = submit(shared, theirs[0], times=3)
    life.claim(engine, clock, "w1", at=CPU)
    submit(shared, theirs[1], times=2)

    text = shared.get("/v1/pool", headers=mine).text
    own, others = look(shared, mine)["projects"]
    for secret in (job, "rivals", "strangers"):
        assert secret not in text
    assert look(shared, mine)["workers"][0]["running"] == dict.fromkeys(
        ("job_id", "kind", "stage", "index", "since", "progress")
    )
    assert own["share"] == 0.0
    assert others["jobs"] == {"queued": 1, "running": 1}
    assert (others["running_chunks"], others["chunks_left"], others["share"]) == (1, 5, 1.0)
    assert others["running_limit"] is None

    seen = look(shared, OPERATOR)
    assert [one["name"] for one in seen["projects"]] == ["default", "mine", "rivals", "strangers"]
    assert seen["workers"][0]["running"]["job_id"] == job


def test_a_drained_node_takes_no_chunk_until_it_is_resumed(
    shared: TestClient, engine: Engine, clock: Clock, mine: dict[str, str]
) -> None:
    arrive(engine, clock, ("w-gpu", GPU))
    job = submit(shared, mine)

    drained = shared.post("/v1/pool/nodes/host-7:cuda:0/drain?note=new+fans", headers=OPERATOR)

    assert drained.status_code == 200
    assert drained.json()["state"] == "draining"
    assert drained.json()["note"] == "new fans"
    assert life.try_claim(engine, clock, "w-gpu", at=GPU) is None
    # On a slow machine what was foretold a moment ago is told once more.
    wait_for(
        lambda: shared.get(f"/v1/jobs/{job}", headers=mine).json()["predicted_start_at"] is None
    )
    (node,) = look(shared, mine)["nodes"]
    assert (node["id"], node["state"]) == ("host-7:cuda:0", "draining")
    # A restarted process does not take it back.
    arrive(engine, clock, ("w-gpu-2", GPU))
    assert life.try_claim(engine, clock, "w-gpu-2", at=GPU) is None

    resumed = shared.post("/v1/pool/nodes/host-7%3Acuda%3A0/resume", headers=OPERATOR)
    assert (resumed.json()["state"], resumed.json()["note"]) == ("active", None)
    assert life.try_claim(engine, clock, "w-gpu", at=GPU) is not None


def test_draining_says_who_did_it_and_is_in_the_audit_log(
    shared: TestClient, engine: Engine, clock: Clock
) -> None:
    arrive(engine, clock, ("w1", CPU))
    shared.post("/v1/pool/nodes/host-7:cpu/drain", headers=OPERATOR)
    shared.post("/v1/pool/nodes/host-7:cpu/resume", headers=OPERATOR)

    found = shared.get("/v1/audit?target=host-7:cpu", headers=OPERATOR).json()["items"]

    assert [(one["action"], one["data"]) for one in reversed(found)] == [
        ("node.draining", {"note": "drained by operator"}),
        ("node.active", {"note": None}),
    ]


def test_a_node_nobody_heard_of_is_404(shared: TestClient, mine: dict[str, str]) -> None:
    for what in ("drain", "resume"):
        answer = shared.post(f"/v1/pool/nodes/nowhere:cpu/{what}", headers=OPERATOR)
        assert "no node nowhere:cpu" in problem_of(answer, 404, "not_found")["detail"]
        refused = shared.post(f"/v1/pool/nodes/nowhere:cpu/{what}", headers=mine)
        problem_of(refused, 403, "forbidden")


def test_the_sweep_lists_first_and_takes_only_when_told(shared: TestClient, clock: Clock) -> None:
    url = upload(shared, pairs(), OPERATOR)
    used = shared.post(f"{url}/complete", headers=OPERATOR).json()["sha256"]
    store = context_of(shared).store
    lost = store.put(context_of(shared).settings.data_dir / "key.secret").sha256
    later = clock() + housekeeping.ORPHANED_AFTER + timedelta(hours=10_000)
    clock.now = later

    listed = shared.post("/v1/sweep", headers=OPERATOR).json()
    assert listed == {"dry_run": True, "removed": [lost]}
    assert shared.post("/v1/sweep?dry_run=true", headers=OPERATOR).json() == listed
    swept = shared.post("/v1/sweep?dry_run=false", headers=OPERATOR).json()
    assert swept == {"dry_run": False, "removed": [lost]}
    assert shared.post("/v1/sweep", headers=OPERATOR).json()["removed"] == []
    assert shared.get(f"/v1/artifacts/{used}", headers=OPERATOR).status_code == 200
    noted = shared.get("/v1/audit?action=sweep", headers=OPERATOR).json()["items"]
    assert [one["data"] for one in noted] == [{}]


def test_the_sweep_is_for_admins(shared: TestClient, mine: dict[str, str]) -> None:
    problem_of(shared.post("/v1/sweep?dry_run=true", headers=mine), 403, "forbidden")
    problem_of(shared.post("/v1/sweep?dry_run=perhaps", headers=OPERATOR), 422, "spec_invalid")


def test_the_page_shows_devices_queues_and_the_buttons_of_an_admin(
    shared: TestClient, engine: Engine, clock: Clock, mine: dict[str, str]
) -> None:
    check_page(shared.get("/pool", headers=mine))
    arrive(engine, clock, ("w-gpu", GPU), ("w-cpu", CPU))
    job = submit(shared, OPERATOR, times=3)
    life.claim(engine, clock, "w-cpu", at=CPU)

    own = shared.get("/pool", headers=mine)
    check_page(own)
    assert "another project" in own.text
    assert job not in own.text
    assert "Drain" not in own.text

    seen = shared.get("/pool", headers=OPERATOR)
    check_page(seen)
    assert f'href="/jobs/{job}"' in seen.text
    form = {"Content-Type": "application/x-www-form-urlencoded", **OPERATOR}
    drained = shared.post("/pool/nodes/host-7%3Acuda%3A0/drain", headers=form)
    assert drained.headers["location"] == "/pool"
    assert "/pool/nodes/host-7%3Acuda%3A0/drain" not in shared.get("/pool", headers=OPERATOR).text
    assert shared.post("/pool/nodes/host-7%3Acuda%3A0/resume", headers=form).status_code == 303
    assert look(shared, mine)["nodes"][1]["state"] == "active"
