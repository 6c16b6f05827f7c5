"""Pause, resume, cancel, and what is told of it, over HTTP, on both databases."""

import asyncio
import json

import pytest

from api.principals import Proof
from api.routes.events import follow, look_at
from tests import life
from tests.api.conftest import KEY, Desk, context_of, key_of, make_project, problem_of, runner_of


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
        first = await look_at(context, by, job, after=0)
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
