"""Two projects on one server: what one owns is for the other as if it were not there."""

import asyncio
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.principals import Proof
from api.routes.events import follow, look_at
from core.db.models import Chunk
from core.db.session import transaction
from core.jobs import pool, service
from core.jobs.pool import Place
from tests.api.conftest import (
    ECHO,
    announce,
    context_of,
    key_of,
    make_project,
    pairs,
    problem_of,
    runner_of,
    send,
    upload,
)
from tests.api.walk import ROUTES
from tests.conftest import Clock, statements

STREAM = {"Accept": "text/event-stream"}
BODIES: dict[str, dict[str, Any]] = {
    "PATCH /v1/jobs/{job_id}": {"priority": 1},
}
"""What a route needs to get as far as the id."""
PARTS = {"name": "text", "stage": "lines", "index": "0"}
"""Parameters that name a part of a thing: the same for both."""


@dataclass(frozen=True)
class Two:
    """A project that owns one of everything, and another that owns nothing."""

    server: TestClient
    mine: dict[str, str]
    other: dict[str, str]
    ids: dict[str, str]
    """Path parameter -> the owner's."""


@pytest.fixture
def two(shared: TestClient) -> Two:
    mine, other = (
        key_of(shared, make_project(shared, name), "read", "submit") for name in ("mine", "other")
    )
    job = shared.post("/v1/jobs", json=ECHO, headers=mine).json()["id"]
    runner = runner_of(shared)
    while runner.run_one():
        pass
    artifact = shared.post(f"{upload(shared, pairs(), mine)}/complete", headers=mine).json()
    url = shared.post("/v1/uploads", json=announce(b"x" * 9), headers=mine).headers["location"]
    ids = {"job_id": job, "sha256": artifact["sha256"], "upload_id": url.rpartition("/")[2]}
    return Two(shared, mine, other, {**ids, **PARTS})


def paths_with_ids() -> list[tuple[str, str]]:
    """Routes that name a thing of a project; admins see all projects and nodes."""
    found = [(method, path) for method, path, scopes in ROUTES if "admin" not in scopes]
    return [(method, path) for method, path in found if "{" in path]


def ask(two: Two, method: str, path: str, key: dict[str, str], ids: dict[str, str]) -> Any:
    url = re.sub(r"\{(\w+)\}", lambda found: ids[found[1]], path)
    headers = {**key, "Upload-Offset": "0"}
    body = BODIES.get(f"{method} {path}", {}) if method in ("POST", "PATCH", "PUT") else None
    if path.startswith("/v1"):
        return two.server.request(method, url, json=body, headers=headers)
    return two.server.request(method, url, headers=headers)


def test_every_route_with_an_id_is_404_for_the_other_project(two: Two) -> None:
    nothing = {"job_id": "job_" + "0" * 26, "sha256": "0" * 64, "upload_id": "up_" + "0" * 26}
    walked = paths_with_ids()

    assert len(walked) > 15
    for method, path in walked:
        foreign = ask(two, method, path, two.other, two.ids)
        absent = ask(two, method, path, two.other, {**nothing, **PARTS})
        assert foreign.status_code == absent.status_code == 404, f"{method} {path}"
        if path.startswith("/v1") and method != "HEAD":
            told = problem_of(foreign, 404, "not_found")["detail"]
            for field, value in nothing.items():
                told = told.replace(two.ids[field], value)
            assert told == absent.json()["detail"], f"{method} {path}"
    # The owner's things are as they were, and it sees them.
    for method, path in walked:
        if method in ("GET", "HEAD"):
            assert ask(two, method, path, two.mine, two.ids).status_code == 200, path


def test_lists_show_the_own_project_alone(two: Two) -> None:
    for path in ("/v1/jobs", "/v1/uploads"):
        assert two.server.get(path, headers=two.mine).json()["items"]
        assert two.server.get(path, headers=two.other).json()["items"] == []
    assert two.ids["job_id"] in two.server.get("/", headers=two.mine).text
    page = two.server.get("/", headers=two.other).text
    assert two.ids["job_id"] not in page
    assert "Project other" in page


def test_the_pool_tells_nothing_of_another_project_but_that_it_is_busy(two: Two) -> None:
    place = Place(node="n:cpu", device="cpu", memory_bytes=1 << 40)
    context = context_of(two.server)
    job = two.server.post("/v1/jobs", json=ECHO, headers=two.mine).json()["id"]
    with context.transaction() as session:
        pool.hello(session, "w", place=place, now=context.clock())
        chunk = session.query(Chunk).filter_by(job_id=job, index=0).one()
        chunk.state, chunk.owner, chunk.started_at = "running", "w", context.clock()
        chunk.lease_until = context.clock()
    mine = two.server.get("/v1/me", headers=two.mine).json()["project"]

    own = two.server.get("/v1/pool", headers=two.mine).text
    other = two.server.get("/v1/pool", headers=two.other)

    assert job in own
    assert job not in other.text
    assert mine["id"] not in other.text
    assert '"mine"' not in other.text
    assert other.json()["workers"][0]["running"] is not None


def test_cursor_of_one_project_leads_to_nothing_of_it_for_another(two: Two) -> None:
    two.server.post("/v1/jobs", json=ECHO, headers=two.mine)
    cursor = two.server.get("/v1/jobs?limit=1", headers=two.mine).json()["next_cursor"]

    found = two.server.get(f"/v1/jobs?cursor={cursor}", headers=two.other)

    assert found.json()["items"] == []


def test_references_to_what_another_project_owns_name_nothing(two: Two) -> None:
    spec = {"kind": "fit_federated", "pairs": two.ids["sha256"]}
    spec_of_job = {"kind": "fit_federated", "pairs": f"{two.ids['job_id']}/text"}

    foreign = two.server.post("/v1/jobs", json=spec, headers=two.other)
    absent = two.server.post("/v1/jobs", json={**spec, "pairs": "0" * 64}, headers=two.other)
    told = problem_of(foreign, 422, "spec_invalid")
    assert told["errors"][0]["pointer"] == "/pairs"
    assert told["detail"].replace(two.ids["sha256"], "0" * 64) == absent.json()["detail"]
    of_job = two.server.post("/v1/jobs", json=spec_of_job, headers=two.other)
    assert f"no job {two.ids['job_id']}" in problem_of(of_job, 422, "spec_invalid")["detail"]
    for one in (spec, spec_of_job):
        foreign = two.server.post("/v1/jobs/estimate", json=one, headers=two.other)
        assert problem_of(foreign, 422, "spec_invalid")["errors"][0]["pointer"] == "/pairs"
    assert two.server.post("/v1/jobs", json=spec, headers=two.mine).status_code == 201
    form = {"spec": f'{{"kind": "fit_federated", "pairs": "{two.ids["sha256"]}"}}'}
    page = two.server.post("/submit", data=form, headers=two.other)
    assert page.status_code == 422


def test_idempotency_keys_are_of_a_project(two: Two) -> None:
    said = {"Idempotency-Key": "same"}
    first = two.server.post("/v1/jobs", json=ECHO, headers={**two.mine, **said})
    body = {**ECHO, "text": "other"}
    other = two.server.post("/v1/jobs", json=body, headers={**two.other, **said})
    again = two.server.post("/v1/jobs", json=ECHO, headers={**two.mine, **said})

    assert first.status_code == other.status_code == 201
    assert other.json()["id"] != first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in other.headers


def test_same_bytes_are_shared_in_the_store_but_seen_only_by_who_brought_them(two: Two) -> None:
    sha256 = two.ids["sha256"]
    assert two.server.get(f"/v1/artifacts/{sha256}", headers=two.other).status_code == 404

    url = upload(two.server, pairs(), two.other)
    brought = two.server.post(f"{url}/complete", headers=two.other).json()

    assert brought["sha256"] == sha256
    assert [one["upload_id"] for one in brought["uploaded_as"]] == [url.rpartition("/")[2]]
    shown = two.server.get(f"/v1/artifacts/{sha256}", headers=two.mine).json()
    assert len(shown["uploaded_as"]) == 1
    assert shown["uploaded_as"] != brought["uploaded_as"]


def test_an_artifact_has_the_name_and_time_of_the_own_project(two: Two, clock: Clock) -> None:
    sha256 = two.ids["sha256"]
    first = two.server.get(f"/v1/artifacts/{sha256}", headers=two.mine).json()
    for name in ("theirs.npz", "again.npz"):
        clock.tick(seconds=60)
        asked = announce(pairs(), name)
        sent = two.server.post("/v1/uploads", json=asked, headers=two.other)
        url = sent.headers["location"]
        send(two.server, url, 0, pairs(), two.other)
        done = two.server.post(f"{url}/complete", headers=two.other).json()
        assert done["file_name"] == "theirs.safetensors"

    seen = two.server.get(f"/v1/artifacts/{sha256}", headers=two.other).json()
    assert seen["file_name"] == "theirs.safetensors"
    assert datetime.fromisoformat(seen["created_at"]) == clock() - timedelta(seconds=60)
    file = two.server.get(f"/v1/artifacts/{sha256}/content", headers=two.other)
    assert "theirs.safetensors" in file.headers["content-disposition"]
    still = two.server.get(f"/v1/artifacts/{sha256}", headers=two.mine).json()
    assert (still["file_name"], still["created_at"]) == ("pairs.safetensors", first["created_at"])
    file = two.server.get(f"/v1/artifacts/{sha256}/content", headers=two.mine)
    assert "pairs.safetensors" in file.headers["content-disposition"]


def test_what_another_project_has_costs_what_nothing_costs(two: Two) -> None:
    two.server.get("/v1/me", headers=two.other)  # the key is known from here on
    engine = context_of(two.server).engine
    job, sha256 = two.ids["job_id"], two.ids["sha256"]
    waits = two.server.post("/v1/jobs", json=ECHO, headers=two.mine).json()["id"]
    nothing = "job_" + "0" * 26
    spec = {"kind": "fit_federated"}
    asked: list[tuple[str, str, str, Any]] = [
        ("GET", f"/v1/artifacts/{sha256}", f"/v1/artifacts/{'0' * 64}", None),
        ("GET", f"/v1/jobs/{job}", f"/v1/jobs/{nothing}", None),
        ("GET", f"/v1/jobs/{waits}", f"/v1/jobs/{nothing}", None),
        ("POST", f"/v1/jobs/{job}/cancel", f"/v1/jobs/{nothing}/cancel", None),
    ]
    for method, foreign, absent, body in asked:
        said = []
        for path in (foreign, absent):
            with statements(engine) as sent:
                assert two.server.request(method, path, json=body, headers=two.other).is_error
            said.append(sent)
        assert said[0] == said[1], foreign
    for reference in (sha256, f"{job}/text"):
        said = []
        for name in (reference, reference.replace(sha256, "0" * 64).replace(job, nothing)):
            with statements(engine) as sent:
                body = {**spec, "pairs": name}
                two.server.post("/v1/jobs", json=body, headers=two.other)
            said.append(sent)
        assert said[0] == said[1], reference
        assert not any("FROM artifacts" in one for one in said[0])


def test_nobody_waits_for_the_lock_of_a_foreign_job(two: Two, engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        return  # there one lock is all locks
    job = two.ids["job_id"]
    spec = {"kind": "fit_federated", "pairs": f"{job}/text"}
    with transaction(engine) as session:
        service.get(session, job, lock=True)
        url = f"/v1/jobs/{job}/cancel"
        assert two.server.post(url, headers=two.other).status_code == 404
        assert two.server.post("/v1/jobs", json=spec, headers=two.other).status_code == 422


def test_equal_results_of_both_show_each_its_own_lineage(two: Two) -> None:
    made = two.server.get(f"/v1/jobs/{two.ids['job_id']}", headers=two.mine).json()
    text = made["artifacts"]["text"]
    assert two.server.get(f"/v1/artifacts/{text}/content", headers=two.other).status_code == 404

    job = two.server.post("/v1/jobs", json=ECHO, headers=two.other).json()["id"]
    runner = runner_of(two.server)
    while runner.run_one():
        pass

    shown = two.server.get(f"/v1/artifacts/{text}", headers=two.other).json()
    assert {one["job_id"] for one in shown["produced_by"]} == {job}
    assert two.server.get(f"/v1/artifacts/{text}/content", headers=two.other).content


def test_stream_of_a_foreign_job_is_404_and_ends_with_its_key(two: Two, clock: Clock) -> None:
    url = f"/v1/jobs/{two.ids['job_id']}/events"
    assert two.server.get(url, headers={**two.other, **STREAM}).status_code == 404
    assert two.server.get(url, headers={**two.mine, **STREAM}).status_code == 200

    job = two.server.post("/v1/jobs", json=ECHO, headers=two.mine).json()["id"]
    context = context_of(two.server)
    by = context.principals.find(Proof(bearer=two.mine["Authorization"].split()[1]))

    async def listen() -> int:
        heard = 0
        first = await look_at(context, by, job, after=0)
        async for _ in follow(context, by, job, first, 0, heartbeat_s=0.05):
            heard += 1
            if heard == 2:
                two.server.delete(f"/v1/keys/{by.actor}", headers=_operator(two))
                clock.tick(seconds=2)
        return heard

    assert asyncio.run(asyncio.wait_for(listen(), 20)) < 5


def _operator(two: Two) -> dict[str, str]:
    return {"Authorization": f"Bearer {context_of(two.server).settings.api_key.get_secret_value()}"}  # type: ignore[union-attr]


def test_upload_parts_of_a_foreign_upload_are_not_taken(two: Two) -> None:
    url = f"/v1/uploads/{two.ids['upload_id']}"

    assert send(two.server, url, 0, b"x", two.other).status_code == 404
    assert two.server.get(url, headers=two.mine).json()["received_bytes"] == 0
    assert send(two.server, url, 0, b"x" * 9, two.mine).status_code == 200
    assert two.server.delete(url, headers=two.other).status_code == 404
    assert two.server.delete(url, headers=two.mine).status_code == 204
