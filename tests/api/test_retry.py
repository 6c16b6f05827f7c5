"""Retry, over HTTP, on both databases."""

import pytest

from tests.api.conftest import Desk, pairs, problem_of, runner_of, upload


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
