"""Pause, resume, retry, set, pin, pool, drain, sweep and estimate against the real service."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from client import ApiError, Stillroom
from client.cli import still
from tests.client.service import Service

Run = Callable[..., Result]
LONG = {"kind": "echo", "text": "on and on", "times": 1000}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("steered"))
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def client(service: Service, tmp_path: Path) -> Iterator[Stillroom]:
    with Stillroom(service.url, cache_dir=tmp_path / "cache") as client:
        yield client


@pytest.fixture
def run(service: Service, tmp_path: Path) -> Run:
    def invoke(*arguments: str) -> Result:
        env = {"STILL_URL": service.url, "STILL_CACHE_DIR": str(tmp_path / "cache")}
        result = CliRunner().invoke(still, arguments, env=env)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        assert "Traceback" not in result.output
        return result

    return invoke


@pytest.fixture
def job(client: Stillroom) -> Iterator[str]:
    """A job that runs for long, and its end."""
    job_id = client.submit(LONG)["id"]
    until(client, job_id, lambda job: job["progress"]["done"] > 0)
    yield job_id
    if client.get(job_id)["finished_at"] is None:
        client.cancel(job_id)


def until(client: Stillroom, job_id: str, reached: Callable[[Any], bool]) -> Any:
    for _ in range(300):
        job = client.get(job_id)
        if reached(job):
            return job
        time.sleep(0.1)
    raise AssertionError(job)


def paused(client: Stillroom, job_id: str) -> Any:
    return until(client, job_id, lambda job: job["state"] == "paused")


def test_a_job_is_paused_shown_and_resumed(run: Run, client: Stillroom, job: str) -> None:
    assert run("pause", job).stdout.split() in ([job, "pausing"], [job, "paused"])
    done = paused(client, job)["progress"]["done"]

    shown = run("show", job).stdout
    assert "paused; resume it to go on" in shown
    assert "checkpoints\n  lines" in shown
    assert job in run("ls", "--state", "paused").stdout

    assert json.loads(run("resume", job, "--json").stdout)["state"] == "queued"
    until(client, job, lambda job: job["progress"]["done"] > done)
    assert run("resume", job).exit_code == 1


def test_watch_lives_through_a_pause(client: Stillroom, job: str) -> None:
    seen: list[tuple[str, str | None]] = []
    watching = threading.Thread(
        target=client.wait,
        args=(job, lambda job: seen.append((job["state"], job["waits_for"]))),
    )
    watching.start()
    other = Stillroom(client.url)
    other.pause(job)
    paused(other, job)
    time.sleep(0.5)
    other.resume(job)
    until(other, job, lambda job: job["state"] == "running")
    other.cancel(job)
    watching.join(30)
    other.close()

    assert not watching.is_alive()
    assert ("paused", "paused; resume it to go on") in seen
    assert seen[-1][0] == "cancelled"


def test_watch_of_a_paused_job_waits_for_it(client: Stillroom, job: str) -> None:
    client.pause(job)
    paused(client, job)
    seen: list[str] = []
    watching = threading.Thread(
        target=client.wait, args=(job, lambda job: seen.append(job["state"]))
    )
    watching.start()
    time.sleep(1)
    assert watching.is_alive()
    with Stillroom(client.url) as other:
        other.cancel(job)
    watching.join(30)

    assert (seen[0], seen[-1]) == ("paused", "cancelled")


def test_a_cancelled_job_is_retried_from_where_it_was(
    run: Run, client: Stillroom, job: str
) -> None:
    run("cancel", job)
    old = until(client, job, lambda job: job["state"] == "cancelled")

    result = run("retry", job)

    assert result.exit_code == 0, result.output
    made, state = result.stdout.split()
    assert (state, made != job) == ("queued", True)
    assert f"retry of   {job}" in run("show", made).stdout
    assert client.get(made)["progress"]["done"] >= int(old["progress"]["done"])
    again = run("retry", job)
    assert again.exit_code == 1
    assert made in again.stderr
    client.cancel(made)


def test_retry_tells_what_was_retried_with_it_and_may_be_watched(
    run: Run, client: Stillroom
) -> None:
    failing = client.submit({**LONG, "deadline_s": 0.5})["id"]
    until(client, failing, lambda job: job["state"] == "failed")
    assert client.get(failing)["deadline_at"] is not None

    result = run("retry", failing, "--watch", "--json")

    last = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 1
    assert last["retry_of"] == failing
    assert last["error"]["code"] == "deadline_passed"


def test_set_changes_priority_and_name(run: Run, job: str) -> None:
    result = run("set", job, "--priority", "80", "--name", "the one")

    assert "priority 80, the one" in result.stdout
    assert "priority   80" in run("show", job).stdout
    assert run("set", job).exit_code == 2
    assert run("set", job, "--priority", "101").exit_code == 2


def test_checkpoints_are_pinned_and_unpinned(run: Run, client: Stillroom, job: str) -> None:
    client.pause(job)
    paused(client, job)
    (kept,) = client.checkpoints(job)
    where = (kept["stage"], str(kept["index"]))

    assert "lines" in run("pin", job, *where).stdout
    assert [one["pinned"] for one in client.checkpoints(job)] == [True]
    assert "pinned" in run("show", job).stdout
    assert json.loads(run("unpin", job, *where, "--json").stdout)[0]["pinned"] is False
    gone = run("pin", job, "lines", "999")
    assert gone.exit_code == 1
    assert "no checkpoint of lines 999" in gone.stderr


def test_pool_shows_devices_and_queues(run: Run, client: Stillroom, job: str) -> None:
    until(client, job, lambda _: client.pool()["workers"][0]["running"] is not None)
    lines = run("pool").stdout.splitlines()
    found = json.loads(run("pool", "--json").stdout)

    (worker,) = found["workers"]
    assert (worker["device"], worker["alive"]) == ("cpu", True)
    assert lines[0].startswith(f"{worker['node']}\tactive\tcpu\t")
    assert lines[1].startswith("default\t1\t100%\t")
    assert "1 running" in lines[1]


def test_a_drained_node_takes_no_job_until_it_is_taken_back(run: Run, client: Stillroom) -> None:
    node = client.pool()["nodes"][0]["id"]
    assert run("drain", node, "--note", "new fans").stdout == f"{node} draining: new fans\n"
    try:
        job = client.submit({"kind": "echo", "text": "later"})["id"]
        assert f"{node} is draining: new fans" in run("pool").stdout
        assert run("estimate", "echo", "--text", "x").exit_code == 1
        time.sleep(1)
        assert client.get(job)["state"] == "queued"
    finally:
        assert run("undrain", node).stdout == f"{node} active\n"
    assert client.wait(job)["state"] == "succeeded"
    assert run("drain", "nowhere:cpu").exit_code == 1


def test_sweep_lists_unless_told_to_remove(run: Run) -> None:
    listed = run("sweep")
    assert (listed.stdout, listed.exit_code) == ("", 0)
    assert "0 would go; --yes removes them" in listed.stderr
    assert json.loads(run("sweep", "--yes", "--json").stdout) == {"dry_run": False, "removed": []}


def test_estimate_tells_chunks_and_start_and_submits_nothing(
    run: Run, client: Stillroom, tmp_path: Path
) -> None:
    before = len(list(client.list()))
    text = run("estimate", "echo", "--text", "a", "--times", "5").stdout
    assert "lines: 5 chunks, one after another, on any device" in text
    assert "can run      yes" in text
    assert len(list(client.list())) == before

    spec = tmp_path / "spec.json"
    spec.write_text('{"kind": "echo", "text": "a", "device": "gpu"}')
    result = run("estimate", "--file", str(spec), "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert found["why_not"] == "stage lines needs a gpu; no live worker has one"
    assert run("estimate", "echo").exit_code == 2
    assert run("estimate", "echo", "--text", "").exit_code == 1


def test_submit_has_the_options_of_every_spec(run: Run, client: Stillroom) -> None:
    options = ["--device", "gpu", "--deadline-s", "600", "--keep-checkpoints", "all"]

    job = run("submit", "echo", "--text", "never", *options).stdout.strip()

    spec = client.get(job)["spec"]
    assert (spec["device"], spec["deadline_s"], spec["keep_checkpoints"]) == ("gpu", 600.0, "all")
    text = run("show", job).stdout
    assert "not yet    needs a gpu; no live worker has one" in text
    assert "deadline" in text
    client.cancel(job)


def test_the_client_calls_may_be_refused_with_their_code(client: Stillroom, job: str) -> None:
    with pytest.raises(ApiError) as caught:
        client.retry(job)
    assert caught.value.code == "conflict"
    with pytest.raises(ApiError) as caught:
        client.change(job)
    assert caught.value.code == "spec_invalid"
