"""Who changed what: every route that changes something is made to, and found in the log."""

from typing import Any

from starlette.testclient import TestClient

from core.jobs import pool
from core.jobs.pool import Place
from tests.api.conftest import (
    ECHO,
    KEY,
    OPERATOR,
    announce,
    context_of,
    key_of,
    make_project,
    pairs,
    runner_of,
    upload,
)
from tests.api.walk import ROUTES

ACTIONS = {
    "POST /v1/jobs": "job.submit",
    "PATCH /v1/jobs/{job_id}": "job.change",
    "POST /v1/jobs/{job_id}/cancel": "job.cancel",
    "POST /v1/jobs/{job_id}/pause": "job.pause",
    "POST /v1/jobs/{job_id}/resume": "job.resume",
    "POST /v1/jobs/{job_id}/retry": "job.retry",
    "POST /v1/jobs/{job_id}/checkpoints/{stage}/{index}/pin": "checkpoint.pin",
    "DELETE /v1/jobs/{job_id}/checkpoints/{stage}/{index}/pin": "checkpoint.unpin",
    "POST /v1/uploads": "upload.create",
    "POST /v1/uploads/{upload_id}/complete": "upload.complete",
    "DELETE /v1/uploads/{upload_id}": "upload.discard",
    "POST /v1/projects": "project.create",
    "PATCH /v1/projects/{project_id}": "project.change",
    "POST /v1/keys": "key.create",
    "DELETE /v1/keys/{key_id}": "key.revoke",
    "POST /v1/pool/nodes/{node_id}/drain": "node.draining",
    "POST /v1/pool/nodes/{node_id}/resume": "node.active",
    "POST /v1/sweep": "sweep",
}
QUIET = {
    "POST /v1/jobs/estimate",  # keeps nothing
    "PATCH /v1/uploads/{upload_id}",  # the parts of what was announced
}


def test_every_route_that_changes_something_is_here() -> None:
    changing = {
        f"{method} {path}"
        for method, path, _ in ROUTES
        if method not in ("GET", "HEAD") and path.startswith("/v1")  # pages call the same
    }

    assert changing == ACTIONS.keys() | QUIET


def done(answer: Any) -> Any:
    assert answer.status_code in (200, 201, 204, 303), answer.text
    return answer


def test_every_change_is_in_the_log_without_a_secret(shared: TestClient) -> None:
    context = context_of(shared)
    project = make_project(shared, "seen")
    done(shared.patch(f"/v1/projects/{project}", json={"weight": 2}, headers=OPERATOR))
    key = key_of(shared, project)
    me = shared.get("/v1/me", headers=key).json()["actor"]

    def post(path: str, **more: Any) -> Any:
        return done(shared.post(path, headers={**key, **more.pop("headers", {})}, **more))

    job = post("/v1/jobs", json={**ECHO, "times": 3}, headers={"Idempotency-Key": "k"}).json()["id"]
    post("/v1/jobs", json={**ECHO, "times": 3}, headers={"Idempotency-Key": "k"})  # a replay
    done(shared.patch(f"/v1/jobs/{job}", json={"priority": 60}, headers=key))
    post(f"/v1/jobs/{job}/pause")
    post(f"/v1/jobs/{job}/resume")
    assert runner_of(shared).run_one()
    kept = f"/v1/jobs/{job}/checkpoints/lines/0/pin"
    post(kept)
    done(shared.delete(kept, headers=key))
    post(f"/v1/jobs/{job}/cancel")
    assert shared.post(f"/v1/jobs/{job}/cancel", headers=key).status_code == 409
    again = post(f"/v1/jobs/{job}/retry").json()["id"]
    page = post("/submit", data={"spec": '{"kind": "echo", "text": "x"}'}).headers["location"]
    post(f"{page}/cancel")
    whole = upload(shared, pairs(), key).rpartition("/")[2]
    post(f"/v1/uploads/{whole}/complete")
    post(f"/v1/uploads/{whole}/complete")  # again: the same artifact
    gone = post("/v1/uploads", json=announce(b"x")).json()["id"]
    done(shared.delete(f"/v1/uploads/{gone}", headers=key))
    with context.transaction() as session:
        place = Place(node="n:cpu", device="cpu", memory_bytes=1)
        pool.hello(session, "w", place=place, now=context.clock())
    post("/v1/pool/nodes/n:cpu/drain")
    post("/v1/pool/nodes/n:cpu/resume")
    post("/v1/sweep?dry_run=true")
    post("/v1/sweep?dry_run=false")
    done(shared.delete(f"/v1/keys/{me}", headers=OPERATOR))

    found = shared.get(f"/v1/audit?project={project}", headers=OPERATOR).json()["items"]
    told = [(one["actor"], one["action"], one["target"]) for one in reversed(found)]
    form = page.rpartition("/")[2]
    assert told == [
        ("operator", "project.create", project),
        ("operator", "project.change", project),
        ("operator", "key.create", me),
        (me, "job.submit", job),
        (me, "job.change", job),
        (me, "job.pause", job),
        (me, "job.resume", job),
        (me, "checkpoint.pin", job),
        (me, "checkpoint.unpin", job),
        (me, "job.cancel", job),
        (me, "job.retry", again),
        (me, "job.submit", form),
        (me, "job.cancel", form),
        (me, "upload.create", whole),
        (me, "upload.complete", whole),
        (me, "upload.create", gone),
        (me, "upload.discard", gone),
        (me, "node.draining", "n:cpu"),
        (me, "node.active", "n:cpu"),
        (me, "sweep", "store"),
        ("operator", "key.revoke", me),
    ]
    assert {action for _, action, _ in told} == set(ACTIONS.values())
    assert key["Authorization"].rpartition("_")[2] not in str(found)
    assert KEY not in str(found)


def test_a_change_that_fails_leaves_nothing_in_the_log(shared: TestClient) -> None:
    project = make_project(shared, "small", queued_limit=0)
    key = key_of(shared, project)
    before = shared.get("/v1/audit", headers=OPERATOR).json()["items"]

    assert shared.post("/v1/jobs", json=ECHO, headers=key).status_code == 429
    assert shared.post("/v1/projects", json={"name": "small"}, headers=OPERATOR).status_code == 409
    wrong = {"project": "prj_none", "name": "k"}
    assert shared.post("/v1/keys", json=wrong, headers=OPERATOR).status_code == 422

    assert shared.get("/v1/audit", headers=OPERATOR).json()["items"] == before
