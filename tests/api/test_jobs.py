import base64
from dataclasses import replace
from typing import Any

import pytest
from anyio import to_thread
from starlette.testclient import TestClient

from core.jobs import pool
from core.jobs.pool import Place
from tests.api.conftest import ECHO, KEY, context_of, pairs, problem_of, runner_of, upload
from tests.conftest import Clock

PLACE = Place(node="host-7:cpu", device="cpu", memory_bytes=1 << 30)
FIELDS = {
    "id", "kind", "name", "state", "priority", "labels", "spec", "created_at", "started_at",
    "finished_at", "deadline_at", "retry_of", "submitted_by", "progress", "queue_position",
    "waits_for", "predicted_start_at", "error", "attempts", "device_seconds", "cache_hits",
    "inputs", "artifacts",
}  # fmt: skip

SOME_ID = "job_" + "0" * 26


def test_submitted_job_is_shown_whole_and_found_at_its_location(client: TestClient) -> None:
    answer = client.post("/v1/jobs", json={**ECHO, "name": "n", "labels": {"team": "a:b"}})

    assert answer.status_code == 201
    job = answer.json()
    assert set(job) == FIELDS
    assert job["state"] == "queued"
    assert job["queue_position"] >= 1
    assert job["waits_for"] == "no worker is alive"
    assert job["created_at"].endswith("Z")
    assert set(job["progress"]) == {"done", "total", "fraction", "stage", "rate", "eta_s"}
    assert job["progress"]["total"] == 2
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert client.get(answer.headers["location"]).json()["spec"] == job["spec"]


def test_finished_job_shows_artifacts_metrics_and_checkpoints(
    client: TestClient, done: dict[str, Any]
) -> None:
    url = f"/v1/jobs/{done['id']}"

    assert done["progress"]["fraction"] == 1.0
    assert done["waits_for"] is None
    assert client.get(f"{url}/metrics").json() == {"metrics": {"lines": [[0, 1.0], [1, 2.0]]}}
    (output,) = client.get(f"{url}/artifacts").json()["items"]
    assert output["sha256"] == done["artifacts"]["text"]
    assert (output["name"], output["role"], output["format"]) == ("text", "artifact", "text")
    assert (output["file_name"], output["size_bytes"]) == ("echo.txt", 12)


def test_running_job_shows_what_its_next_chunk_starts_from(alone: TestClient) -> None:
    url = alone.post("/v1/jobs", json=ECHO).headers["location"]
    assert runner_of(alone).run_one()

    (kept,) = alone.get(f"{url}/checkpoints").json()["items"]

    assert (kept["name"], kept["role"], kept["size_bytes"]) == ("so_far", "checkpoint", 6)
    assert alone.get(f"{url}/artifacts").json()["items"] == []


def test_same_key_and_body_answer_with_the_first_job(client: TestClient) -> None:
    headers = {"Idempotency-Key": "key-1"}
    first = client.post("/v1/jobs", json=ECHO, headers=headers)
    # The same spec, said in another order.
    again = client.post("/v1/jobs", json=dict(reversed(ECHO.items())), headers=headers)

    assert again.status_code == 201
    assert again.json()["id"] == first.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]


def test_same_key_with_another_body_is_refused(client: TestClient) -> None:
    headers = {"Idempotency-Key": "key-2"}
    client.post("/v1/jobs", json=ECHO, headers=headers)

    other = client.post("/v1/jobs", json={**ECHO, "text": "other"}, headers=headers)

    problem_of(other, 422, "spec_invalid")


@pytest.mark.parametrize("key", ["", "x" * 256, "two words"])
def test_useless_idempotency_key_is_refused(client: TestClient, key: str) -> None:
    answer = client.post("/v1/jobs", json=ECHO, headers={"Idempotency-Key": key})

    body = problem_of(answer, 422, "spec_invalid")
    assert body["errors"][0]["pointer"] == "/header/idempotency-key"


def test_list_is_newest_first_and_pages_meet_without_gap_or_overlap(
    client: TestClient, api_clock: Clock
) -> None:
    made = []
    for _ in range(5):
        api_clock.tick(seconds=1)
        spec = {**ECHO, "labels": {"walk": "1"}}
        made.append(client.post("/v1/jobs", json=spec).json()["id"])

    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        query = {"label": "walk:1", "limit": "2", **cursor}
        page = client.get("/v1/jobs", params=query).json()
        seen += [job["id"] for job in page["items"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}

    assert seen == made[::-1]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("name=needle", 1),
        ("label=tool:needle", 1),
        ("label=tool:needle&label=deep:a:b", 1),
        ("label=tool:needle&label=deep:other", 0),
        ("name=needle&kind=echo&state=queued", 1),
        ("name=needle&kind=none", 0),
        ("name=needle&state=failed", 0),
        ("name=need", 0),
        ("label=a.b:c", 0),
        ("label=a.b:%27", 0),
    ],
)
def test_filters(client: TestClient, query: str, found: int) -> None:
    if not client.get("/v1/jobs?name=needle").json()["items"]:
        labels = {"tool": "needle", "deep": "a:b"}
        client.post("/v1/jobs", json={**ECHO, "name": "needle", "labels": labels})

    answer = client.get(f"/v1/jobs?{query}")

    assert answer.status_code == 200, answer.text
    assert len(answer.json()["items"]) == found


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("limit=0", "/query/limit"),
        ("limit=201", "/query/limit"),
        ("limit=1e400", "/query/limit"),
        ("limit=" + "9" * 5000, "/query/limit"),
        ("state=gone", "/query/state"),
        ("label=nocolon", "/query/label"),
        ("label=:x", "/query/label"),
        ("label=a:1&label=a:2", "/query/label"),
        ('label=a"b:c', "/query/label"),
        ("label=$[0]:c", "/query/label"),
        ("label=%27:c", "/query/label"),
        ("cursor=x", "/query/cursor"),
        ("cursor=%ff%fe", "/query/cursor"),
        ("cursor=" + "QUFB" * 400, "/query/cursor"),
    ],
)
def test_bad_query_names_the_parameter(client: TestClient, query: str, pointer: str) -> None:
    body = problem_of(client.get(f"/v1/jobs?{query}"), 422, "spec_invalid")

    assert body["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize(
    "said",
    [
        "0001-01-01T00:00+14:00 " + SOME_ID,
        "9999-12-31T23:59-14:00 " + SOME_ID,
        "2026-01-01T00:00:00 " + SOME_ID,
        "2026-01-01 00:00:00+00:00 " + SOME_ID,
        "2026-01-01T02:00:00+02:00 " + SOME_ID,
        "2026-01-01T00:00:00+00:00 a\0b",
        "2026-01-01T00:00:00+00:00 " + SOME_ID[:-1] + "\0",
        "2026-01-01T00:00:00+00:00 " + SOME_ID + "\n",
        "2026-01-01T00:00:00+00:00 job",
    ],
)
def test_cursor_that_no_list_gave_out_is_refused(client: TestClient, said: str) -> None:
    cursor = base64.urlsafe_b64encode(said.encode()).decode()

    refused = problem_of(client.get("/v1/jobs", params={"cursor": cursor}), 422, "spec_invalid")
    assert refused["errors"][0]["pointer"] == "/query/cursor"


def test_cursor_of_a_job_that_never_was_only_says_where_to_go_on(client: TestClient) -> None:
    for at in ("2000-01-01T00:00:00+00:00", "2000-01-01T00:00:00.000001+00:00"):
        cursor = base64.urlsafe_b64encode(f"{at} {SOME_ID}".encode()).decode()
        assert client.get("/v1/jobs", params={"cursor": cursor}).json()["items"] == []


def test_queued_job_is_cancelled_at_once_and_only_once(client: TestClient) -> None:
    job_id = client.post("/v1/jobs", json=ECHO).json()["id"]

    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelled"
    problem_of(client.post(f"/v1/jobs/{job_id}/cancel"), 409, "conflict")


def fit(client: TestClient) -> dict[str, Any]:
    """A queued job that fits a model to uploaded pairs."""
    artifact = client.post(f"{upload(client, pairs())}/complete").json()
    answer = client.post("/v1/jobs", json={"kind": "fit_federated", "pairs": artifact["sha256"]})
    assert answer.status_code == 201, answer.text
    job: dict[str, Any] = answer.json()
    assert job["inputs"]["pairs"]["sha256"] == artifact["sha256"]
    return job


def test_job_that_reads_another_jobs_output_says_what_it_waits_for(alone: TestClient) -> None:
    upstream = fit(alone)["id"]
    spec = {"kind": "cache_targets", "model": f"{upstream}/model"}

    answer = alone.post("/v1/jobs", json=spec)

    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert job["state"] == "waiting"
    assert job["waits_for"] == f"waits for {upstream}/model"
    assert job["inputs"] == {"model": {"sha256": None, "job_id": upstream, "output": "model"}}
    assert (job["progress"]["total"], job["queue_position"]) == (None, None)
    assert f"waits for {upstream}/model" in alone.get(f"/jobs/{job['id']}").text

    alone.post(f"/v1/jobs/{upstream}/cancel")

    ended = alone.get(f"/v1/jobs/{job['id']}").json()
    assert (ended["state"], ended["error"]["code"]) == ("failed", "upstream_failed")
    assert ended["waits_for"] is None
    body = problem_of(alone.post("/v1/jobs", json=spec), 422, "spec_invalid")
    assert "cancelled" in body["errors"][0]["detail"]


@pytest.mark.parametrize(
    ("output", "told"), [("student", "it makes: "), ("report", "it makes: "), (None, "no job")]
)
def test_input_that_will_never_be_made_is_refused(
    alone: TestClient, output: str | None, told: str
) -> None:
    named = f"job_{'0' * 26}/model" if output is None else f"{fit(alone)['id']}/{output}"

    answer = alone.post("/v1/jobs", json={"kind": "cache_targets", "model": named})

    body = problem_of(answer, 422, "spec_invalid")
    assert body["errors"][0]["pointer"] == "/model"
    assert told in body["errors"][0]["detail"]


def test_input_of_another_format_is_refused(client: TestClient) -> None:
    upstream = client.post("/v1/jobs", json=ECHO).json()["id"]

    answer = client.post("/v1/jobs", json={"kind": "fit_federated", "pairs": f"{upstream}/text"})

    body = problem_of(answer, 422, "spec_invalid")
    assert body["errors"][0]["pointer"] == "/pairs"
    assert "needed: pairs" in body["errors"][0]["detail"]


PATHS = [
    ("GET", "/v1/jobs/{}"),
    ("POST", "/v1/jobs/{}/cancel"),
    ("GET", "/v1/jobs/{}/events"),
    ("GET", "/v1/jobs/{}/metrics"),
    ("GET", "/v1/jobs/{}/artifacts"),
    ("GET", "/v1/jobs/{}/checkpoints"),
    ("GET", "/v1/jobs/{}/artifacts/text/content"),
    ("GET", "/v1/artifacts/{}"),
    ("GET", "/v1/artifacts/{}/content"),
    ("GET", "/v1/uploads/{}"),
    ("DELETE", "/v1/uploads/{}"),
    ("POST", "/v1/uploads/{}/complete"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("name", ["nothing", "%2e%2e", "0" * 64, "%F0%9F%92%A9", "' OR 1=1 --"])
def test_unknown_id_is_404(client: TestClient, method: str, path: str, name: str) -> None:
    problem_of(client.request(method, path.format(name)), 404, "not_found")


def test_unknown_id_is_404_for_a_stream_too(client: TestClient) -> None:
    headers = {"Accept": "text/event-stream"}

    problem_of(client.get("/v1/jobs/nothing/events", headers=headers), 404, "not_found")


def test_kinds_offer_examples_that_validate(client: TestClient) -> None:
    kinds = client.get("/v1/kinds").json()["items"]

    assert "echo" in {kind["kind"] for kind in kinds}
    for kind in kinds:
        assert set(kind) == {"kind", "summary", "schema", "example", "inputs", "outputs"}
        assert kind["schema"]["type"] == "object"
        answer = client.post("/v1/jobs", json=kind["example"])
        # An example may name an artifact that is not here; its form must be right all the same.
        blamed = {blame["pointer"].split("/")[1] for blame in answer.json().get("errors", ())}
        assert answer.status_code == 201 or blamed <= set(kind["inputs"]), answer.text


def test_health_and_readiness_are_open_and_plain(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert ready.status_code == 200
    fine = {"status": "ok", "database": "ok", "store": "ok"}
    assert ready.json() == {**fine, "workers_alive": 0, "workers": []}


def test_readiness_names_the_workers_only_to_who_has_the_key(
    locked: TestClient, api_clock: Clock
) -> None:
    context = context_of(locked)
    with context.transaction() as session:
        pool.hello(session, "host-7:4711:cpu", place=PLACE, now=api_clock())

    stranger = locked.get("/readyz")
    known = locked.get("/readyz", headers={"Authorization": f"Bearer {KEY}"})

    assert stranger.status_code == known.status_code == 200
    assert "host-7" not in stranger.text
    assert (stranger.json()["workers_alive"], stranger.json()["workers"]) == (1, None)
    assert known.json()["workers_alive"] == 1
    assert known.json()["workers"][0]["id"] == "host-7:4711:cpu"


def test_server_with_workers_of_its_own_is_ready_once_one_lives(
    alone: TestClient, api_clock: Clock
) -> None:
    context = replace(context_of(alone), embedded=True)
    alone.app.state.context = context  # type: ignore[attr-defined]

    before = alone.get("/readyz")
    with context.transaction() as session:
        pool.hello(session, "w", place=PLACE, now=api_clock())

    assert (before.status_code, before.json()["status"]) == (503, "no_worker")
    assert (alone.get("/readyz").status_code, alone.get("/readyz").json()["status"]) == (200, "ok")
    api_clock.tick(seconds=60)
    assert alone.get("/readyz").json()["workers_alive"] == 0


def test_health_needs_no_thread(alone: TestClient) -> None:
    async def take_all() -> None:
        limiter = to_thread.current_default_thread_limiter()
        for _ in range(int(limiter.available_tokens)):
            limiter.acquire_on_behalf_of_nowait(object())

    assert alone.portal is not None
    alone.portal.call(take_all)

    assert alone.get("/healthz").json() == {"status": "ok"}


def test_not_ready_says_what_is_wrong(alone: TestClient) -> None:
    with context_of(alone).engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE workers RENAME TO away")

    ready = alone.get("/readyz")

    assert ready.status_code == 503
    assert ready.json()["status"] == "unavailable"
    assert "does not answer" in ready.json()["database"]
    assert alone.get("/healthz").status_code == 200
