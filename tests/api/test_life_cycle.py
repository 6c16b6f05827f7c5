"""Pause, resume, retry, change and pin, over HTTP, on both databases."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.principals import Proof
from api.routes.events import follow, look_at
from core.db.session import transaction
from core.errors import OutOfMemory
from core.jobs import lease
from core.jobs.lease import Claim
from tests import life
from tests.api.conftest import (
    ECHO,
    KEY,
    OPERATOR,
    context_of,
    key_of,
    make_project,
    pairs,
    problem_of,
    runner_of,
    upload,
)
from tests.api.test_pages import check_page
from tests.conftest import Clock

STREAM = {"Accept": "text/event-stream"}


@dataclass(frozen=True)
class Desk:
    """A server and the key of whoever works with it."""

    server: TestClient
    engine: Engine
    clock: Clock
    key: dict[str, str]

    def submit(self, **changes: Any) -> str:
        answer = self.server.post("/v1/jobs", json={**ECHO, **changes}, headers=self.key)
        assert answer.status_code == 201, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def act(self, method: str, path: str, **more: Any) -> Any:
        return self.server.request(method, f"/v1/jobs/{path}", headers=self.key, **more)

    def show(self, job_id: str) -> dict[str, Any]:
        shown: dict[str, Any] = self.act("GET", job_id).json()
        return shown

    def events(self, job_id: str) -> list[str]:
        return [one["type"] for one in self.act("GET", f"{job_id}/events").json()["items"]]

    def noted(self) -> list[tuple[str, str, dict[str, Any]]]:
        """What the audit log says, the oldest first."""
        found = self.server.get("/v1/audit", headers=OPERATOR).json()["items"]
        return [(one["action"], one["target"], one["data"]) for one in reversed(found)]

    def claim(self) -> Claim:
        return life.claim(self.engine, self.clock)

    def hand_back(self, claimed: Claim) -> None:
        with transaction(self.engine) as session:
            lease.hand_back(session, claimed, now=self.clock(), rules=life.RULES)

    def fail(self) -> None:
        life.give_up(self.engine, self.claim(), OutOfMemory("32 GiB needed"), self.clock)


@pytest.fixture
def desk(shared: TestClient, engine: Engine, clock: Clock) -> Desk:
    return Desk(shared, engine, clock, key_of(shared, "prj_default", "read", "submit"))


def test_a_queued_job_is_paused_at_once_and_goes_on_where_it_was(desk: Desk) -> None:
    job = desk.submit()

    paused = desk.act("POST", f"{job}/pause")
    again = desk.act("POST", f"{job}/pause")
    assert paused.status_code == again.status_code == 200
    assert paused.json()["state"] == "paused"
    assert paused.json()["waits_for"] == "paused; resume it to go on"
    assert life.try_claim(desk.engine, desk.clock) is None

    assert desk.act("POST", f"{job}/resume").json()["state"] == "queued"
    assert desk.claim().job_id == job
    assert desk.events(job)[-3:] == ["job.paused", "job.unpaused", "job.started"]


def test_a_running_job_is_pausing_until_its_chunk_is_handed_back(desk: Desk) -> None:
    job = desk.submit()
    claimed = desk.claim()

    assert desk.act("POST", f"{job}/pause").json()["state"] == "pausing"
    assert desk.show(job)["waits_for"] is None
    desk.hand_back(claimed)
    assert desk.show(job)["state"] == "paused"
    assert desk.act("POST", f"{job}/resume").json()["state"] == "queued"
    assert desk.claim().index == claimed.index
    assert desk.show(job)["attempts"] == 2


def test_pausing_can_be_taken_back(desk: Desk) -> None:
    job = desk.submit()
    desk.claim()
    desk.act("POST", f"{job}/pause")

    assert desk.act("POST", f"{job}/resume").json()["state"] == "running"


def test_a_paused_job_can_be_cancelled(desk: Desk) -> None:
    job = desk.submit()
    desk.act("POST", f"{job}/pause")

    assert desk.act("POST", f"{job}/cancel").json()["state"] == "cancelled"


@pytest.mark.parametrize("what", ["pause", "resume", "cancel"])
def test_what_is_over_is_not_steered_any_more(desk: Desk, what: str) -> None:
    job = desk.submit()
    desk.act("POST", f"{job}/cancel")

    assert "cancelled" in problem_of(desk.act("POST", f"{job}/{what}"), 409, "conflict")["detail"]


@pytest.mark.parametrize("state", ["queued", "running"])
def test_only_what_is_paused_is_resumed(desk: Desk, state: str) -> None:
    job = desk.submit()
    if state == "running":
        desk.claim()

    told = problem_of(desk.act("POST", f"{job}/resume"), 409, "conflict")["detail"]

    assert f"is {state}, not paused" in told


def test_a_retry_is_a_new_job_that_keeps_what_was_done(desk: Desk) -> None:
    job = desk.submit(times=3, name="long", priority=70)
    runner_of(desk.server).run_one()
    desk.fail()
    assert desk.show(job)["state"] == "failed"

    answer = desk.act("POST", f"{job}/retry")

    assert answer.status_code == 201
    made = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{made['id']}"
    assert made["id"] != job
    assert (made["retry_of"], made["state"], made["name"]) == (job, "queued", "long")
    assert made["priority"] == 70
    assert (made["progress"]["done"], made["progress"]["total"]) == (1.0, 3)
    assert made["retried_with"] == []
    shown = desk.show(made["id"])
    assert made == {**shown, "retried_with": []}
    while runner_of(desk.server).run_one():
        pass
    assert desk.show(made["id"])["state"] == "succeeded"
    assert desk.show(job)["state"] == "failed"
    assert "job.retried" in desk.events(job)


def test_a_second_retry_names_the_first(desk: Desk) -> None:
    job = desk.submit()
    desk.act("POST", f"{job}/cancel")
    made = desk.act("POST", f"{job}/retry").json()["id"]

    told = problem_of(desk.act("POST", f"{job}/retry"), 409, "conflict")["detail"]

    assert made in told


@pytest.mark.parametrize("state", ["queued", "succeeded"])
def test_what_did_not_end_badly_is_not_retried(desk: Desk, state: str) -> None:
    job = desk.submit()
    while state == "succeeded" and runner_of(desk.server).run_one():
        pass

    told = problem_of(desk.act("POST", f"{job}/retry"), 409, "conflict")["detail"]

    assert f"is {state}; allowed: failed, cancelled" in told


def test_jobs_that_failed_for_want_of_an_output_are_retried_with_it(desk: Desk) -> None:
    url = upload(desk.server, pairs(), desk.key)
    sha256 = desk.server.post(f"{url}/complete", headers=desk.key).json()["sha256"]
    spec = {"kind": "fit_federated", "pairs": sha256}
    first = desk.server.post("/v1/jobs", json=spec, headers=desk.key).json()["id"]
    spec = {"kind": "cache_targets", "model": f"{first}/model", "name": "after"}
    after = desk.server.post("/v1/jobs", json=spec, headers=desk.key).json()["id"]
    desk.fail()
    assert desk.show(after)["error"]["code"] == "upstream_failed"

    made = desk.act("POST", f"{first}/retry").json()

    (also,) = made["retried_with"]
    assert (also["retry_of"], also["kind"], also["name"]) == (after, "cache_targets", "after")
    waiting = desk.show(also["id"])
    assert waiting["state"] == "waiting"
    assert waiting["inputs"]["model"]["job_id"] == made["id"]


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


def test_every_change_is_in_the_audit_log(desk: Desk) -> None:
    job = desk.submit(times=3)
    runner_of(desk.server).run_one()
    desk.act("POST", f"{job}/checkpoints/lines/0/pin")
    desk.act("DELETE", f"{job}/checkpoints/lines/0/pin")
    desk.act("PATCH", job, json={"priority": 60})
    desk.act("POST", f"{job}/pause")
    desk.act("POST", f"{job}/resume")
    desk.act("POST", f"{job}/cancel")
    made = desk.act("POST", f"{job}/retry").json()["id"]
    desk.act("POST", f"{job}/retry")  # refused: changes nothing

    chunk = {"stage": "lines", "index": 0}
    assert [one for one in desk.noted() if one[0].startswith(("job", "checkpoint"))] == [
        ("job.submit", job, {"kind": "echo"}),
        ("checkpoint.pin", job, chunk),
        ("checkpoint.unpin", job, chunk),
        ("job.change", job, {"priority": 60}),
        ("job.pause", job, {}),
        ("job.resume", job, {}),
        ("job.cancel", job, {}),
        ("job.retry", made, {"of": job}),
    ]


def test_another_project_can_do_nothing_to_a_job(desk: Desk) -> None:
    job = desk.submit(times=3)
    runner_of(desk.server).run_one()
    other = {"headers": key_of(desk.server, make_project(desk.server, "other"))}
    checkpoint = f"/v1/jobs/{job}/checkpoints/lines/0/pin"

    for what in ("pause", "resume", "retry", "cancel"):
        problem_of(desk.server.post(f"/v1/jobs/{job}/{what}", **other), 404, "not_found")
    problem_of(
        desk.server.patch(f"/v1/jobs/{job}", json={"priority": 1}, **other), 404, "not_found"
    )
    problem_of(desk.server.post(checkpoint, **other), 404, "not_found")
    problem_of(desk.server.delete(checkpoint, **other), 404, "not_found")
    assert desk.show(job)["state"] == "running"
    assert desk.show(job)["priority"] == 50


def test_the_stream_tells_why_a_job_does_not_run_and_lives_through_a_pause(desk: Desk) -> None:
    job = desk.submit()
    context = context_of(desk.server)
    by = context.principals.find(Proof(bearer=KEY))
    steps = iter(
        [
            lambda: desk.act("POST", f"{job}/pause"),
            lambda: desk.act("POST", f"{job}/resume"),
            lambda: [runner_of(desk.server).run_one() for _ in range(2)],
        ]
    )

    async def listen() -> str:
        heard = []
        first = look_at(context, by, job, after=0)
        async for text in follow(context, by, job, first, 0):
            heard.append(text)
            if not text.startswith(":"):
                await asyncio.to_thread(next(steps, lambda: None))
        return "".join(heard)

    heard = asyncio.run(asyncio.wait_for(listen(), 60))

    types = [line.removeprefix("event: ") for line in heard.splitlines() if line[:6] == "event:"]
    assert [one for one in types if one.startswith("job.")] == [
        "job.submitted",
        "job.planned",
        "job.paused",
        "job.unpaused",
        "job.started",
        "job.succeeded",
    ]
    told = [
        json.loads(block.split("data: ")[1])
        for block in heard.split("\n\n")[:-1]
        if "event: progress" in block
    ]
    whys = [one.get("waits_for") for one in told]
    assert whys[:2] == ["no worker is alive", "paused; resume it to go on"]
    assert whys[-1] is None
    assert told[-1]["done"] == 2.0


def test_a_paused_job_says_so_in_lists(desk: Desk) -> None:
    job = desk.submit()
    desk.act("POST", f"{job}/pause")

    (found,) = desk.server.get("/v1/jobs?state=paused", headers=desk.key).json()["items"]

    assert (found["id"], found["waits_for"]) == (job, "paused; resume it to go on")
    assert desk.server.get("/v1/jobs?state=pausing", headers=desk.key).json()["items"] == []


def press(desk: Desk, path: str, **more: Any) -> Any:
    """Send a form as a browser does, with the operator's cookie."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    return desk.server.post(path, headers={**desk.key, **form}, **more)


def test_the_buttons_of_the_page_are_those_that_the_state_allows(desk: Desk) -> None:
    job = desk.submit(times=3)

    def buttons() -> set[str]:
        answer = desk.server.get(f"/jobs/{job}", headers=desk.key)
        actions = [at.get("action") or "" for tag, at in check_page(answer).found if tag == "form"]
        return {action.removeprefix(f"/jobs/{job}/") for action in actions} - {"/logout"}

    assert buttons() == {"pause", "cancel", "priority"}
    assert press(desk, f"/jobs/{job}/pause").headers["location"] == f"/jobs/{job}"
    assert buttons() == {"resume", "cancel", "priority"}
    press(desk, f"/jobs/{job}/resume")
    runner_of(desk.server).run_one()
    assert buttons() == {"pause", "cancel", "priority", "checkpoints/lines/0/pin"}
    press(desk, f"/jobs/{job}/checkpoints/lines/0/pin")
    assert "checkpoints/lines/0/unpin" in buttons()
    press(desk, f"/jobs/{job}/checkpoints/lines/0/unpin")
    assert press(desk, f"/jobs/{job}/priority", data={"priority": "77"}).status_code == 303
    assert desk.show(job)["priority"] == 77
    press(desk, f"/jobs/{job}/cancel")
    assert "retry" in buttons()
    made = press(desk, f"/jobs/{job}/retry").headers["location"]
    assert "retry" not in buttons()
    assert f'href="{made}"' in desk.server.get(f"/jobs/{job}", headers=desk.key).text
    assert f'href="/jobs/{job}"' in desk.server.get(made, headers=desk.key).text


@pytest.mark.parametrize("text", ["", "high", "101", "-1", "5.5", "²", "1" * 50])
def test_a_wrong_priority_is_told_on_a_page(client: TestClient, text: str) -> None:
    job = client.post("/v1/jobs", json=ECHO).json()["id"]

    answer = client.post(f"/jobs/{job}/priority", data={"priority": text})

    check_page(answer, 422)
    assert "allowed: 0 to 100" in answer.text
    check_page(client.post("/jobs/nothing/priority", data={"priority": text}), 404)


def test_who_may_only_read_sees_no_button(desk: Desk) -> None:
    job = desk.submit()
    reader = key_of(desk.server, "prj_default", "read")

    answer = desk.server.get(f"/jobs/{job}", headers=reader)

    assert f"/jobs/{job}/" not in [at.get("action") for _, at in check_page(answer).found]
    assert "Pause" not in answer.text
    assert "no worker is alive" in answer.text
