"""Changed and pinned later, over HTTP, on both databases."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api.conftest import ECHO, Desk, problem_of, runner_of


def test_priority_and_name_change_later(desk: Desk) -> None:
    first, second = desk.submit(), desk.submit(name="second")

    changed = desk.act("PATCH", second, json={"priority": 90, "name": "urgent"})

    assert changed.status_code == 200
    assert (changed.json()["priority"], changed.json()["name"]) == (90, "urgent")
    assert desk.claim().job_id == second
    assert desk.show(first)["priority"] == 50
    assert desk.act("PATCH", first, json={"name": "slow"}).json()["priority"] == 50
    assert desk.events(second)[-2:] == ["job.changed", "job.started"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, ""),
        ({"priority": "80"}, "/priority"),
        ({"priority": 80.5}, "/priority"),
        ({"priority": True}, "/priority"),
        ({"priority": 101}, "/priority"),
        ({"priority": -1}, "/priority"),
        ({"priority": None}, "/priority"),
        ({"name": ""}, "/name"),
        ({"name": "n" * 201}, "/name"),
        ({"name": None}, "/name"),
        ({"priority": 1, "seed": 2}, "/seed"),
        ([], ""),
    ],
)
def test_a_change_is_read_strictly(client: TestClient, body: Any, pointer: str) -> None:
    job = client.post("/v1/jobs", json={**ECHO, "name": "as it was"}).json()["id"]

    told = problem_of(client.patch(f"/v1/jobs/{job}", json=body), 422, "spec_invalid")

    assert [one["pointer"] for one in told["errors"]] == [pointer]
    shown = client.get(f"/v1/jobs/{job}").json()
    assert (shown["name"], shown["priority"]) == ("as it was", 50)


def test_a_job_that_is_over_can_be_renamed_but_not_hurried(desk: Desk) -> None:
    job = desk.submit()
    desk.act("POST", f"{job}/cancel")

    problem_of(desk.act("PATCH", job, json={"priority": 90}), 409, "conflict")
    assert desk.act("PATCH", job, json={"name": "of old"}).json()["name"] == "of old"


def test_a_pinned_checkpoint_outlives_retention(desk: Desk) -> None:
    job = desk.submit(times=5)
    runner = runner_of(desk.server)
    runner.run_one()
    (kept,) = desk.act("GET", f"{job}/checkpoints").json()["items"]
    assert (kept["stage"], kept["index"], kept["name"]) == ("lines", 0, "so_far")
    assert (kept["score"], kept["pinned"], kept["role"]) == (None, False, "checkpoint")

    pinned = desk.act("POST", f"{job}/checkpoints/lines/0/pin")

    assert pinned.status_code == 200
    assert pinned.json()["items"] == [{**kept, "pinned": True}]
    runner.run_one()
    runner.run_one()
    left = desk.act("GET", f"{job}/checkpoints").json()["items"]
    assert [(one["index"], one["pinned"]) for one in left] == [(0, True), (2, False)]

    freed = desk.act("DELETE", f"{job}/checkpoints/lines/0/pin")
    assert [one["pinned"] for one in freed.json()["items"]] == [False]
    runner.run_one()
    left = desk.act("GET", f"{job}/checkpoints").json()["items"]
    assert [one["index"] for one in left] == [3]


def test_a_checkpoint_that_is_not_there_is_not_pinned(desk: Desk) -> None:
    job = desk.submit()

    for path, status in (("lines/0", 404), ("other/0", 404), ("lines/x", 422), ("lines/-1", 422)):
        assert desk.act("POST", f"{job}/checkpoints/{path}/pin").status_code == status
