import asyncio
import hashlib
import io
import pickle
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from api.lanes import Lane
from api.problems import Busy
from core.errors import DataInvalid
from tests.api.conftest import (
    announce,
    context_of,
    make_settings,
    pairs,
    problem_of,
    send,
    serving,
    upload,
)
from tests.conftest import Clock
from tests.core.artifacts import hostile_pickles

BYTES = {"Content-Type": "application/octet-stream"}


@pytest.fixture(autouse=True)
def tidy(client: TestClient) -> Iterator[None]:
    yield
    for part in context_of(client).settings.uploads.glob("*.part"):
        client.delete(f"/v1/uploads/{part.stem}")


def test_file_sent_in_parts_becomes_an_artifact_with_lineage(client: TestClient) -> None:
    content = pairs()
    made = client.post("/v1/uploads", json=announce(content))
    opened = made.json()
    url = made.headers["location"]
    assert made.status_code == 201
    assert opened["state"] == "open"
    assert (opened["received_bytes"], opened["artifact"], opened["error"]) == (0, None, None)
    assert opened["part_limit_bytes"] == 64 << 20

    assert send(client, url, 0, content[:100]).json()["received_bytes"] == 100
    assert client.get(url).json()["received_bytes"] == 100
    assert send(client, url, 100, content[100:]).json()["received_bytes"] == len(content)
    done = client.post(f"{url}/complete")

    assert done.status_code == 201, done.text
    artifact = done.json()
    assert artifact["format"] == "pairs"
    assert artifact["produced_by"] == []
    named = {"upload_id": opened["id"], "file_name": "pairs.npz", "sha256": opened["sha256"]}
    notes = ["no ids in the file: row numbers are used"]
    assert artifact["uploaded_as"] == [{**named, "notes": notes}]
    assert client.post(f"{url}/complete").json() == artifact
    assert client.get(f"/v1/artifacts/{artifact['sha256']}").json() == artifact
    stored = client.get(f"/v1/artifacts/{artifact['sha256']}/content").content
    assert hashlib.sha256(stored).hexdigest() == artifact["sha256"]
    shown = client.get(url).json()
    assert (shown["state"], shown["artifact"]) == ("complete", artifact["sha256"])


def test_what_an_import_left_out_is_told_with_the_upload_it_was_in(client: TestClient) -> None:
    first, second = (upload(client, content) for content in (pairs(), pairs(foo=np.zeros(3))))
    same = client.post(f"{first}/complete").json()
    told = client.post(f"{second}/complete").json()

    assert told["sha256"] == same["sha256"], "the canonical bytes are equal"
    assert ["foo" in " ".join(sent["notes"]) for sent in told["uploaded_as"][-2:]] == [False, True]
    assert "foo" in " ".join(client.get(second).json()["notes"])


def test_wrong_offset_is_409_and_changes_nothing(client: TestClient) -> None:
    url = client.post("/v1/uploads", json=announce(b"x" * 10)).headers["location"]
    send(client, url, 0, b"x" * 4)

    for offset in (0, 3, 5, 10):
        problem_of(send(client, url, offset, b"x"), 409, "upload_incomplete")
    assert client.get(url).json()["received_bytes"] == 4
    problem_of(client.post(f"{url}/complete"), 409, "upload_incomplete")


def test_more_bytes_than_announced_are_413(client: TestClient) -> None:
    url = client.post("/v1/uploads", json=announce(b"x" * 10)).headers["location"]

    problem_of(send(client, url, 0, b"x" * 11), 413, "too_large")
    assert client.get(url).json()["received_bytes"] == 0


def test_bad_content_fails_the_upload_and_removes_its_bytes(client: TestClient) -> None:
    content = b"not a file of any known format"
    url = client.post("/v1/uploads", json=announce(content)).headers["location"]
    send(client, url, 0, content)

    problem_of(client.post(f"{url}/complete"), 422, "data_invalid")

    shown = client.get(url).json()
    assert (shown["state"], shown["error"]["code"]) == ("failed", "data_invalid")
    assert list(context_of(client).settings.uploads.glob("*.part")) == []
    problem_of(send(client, url, 0, content), 409, "conflict")


def checkpoint(pickled: bytes) -> bytes:
    """A file as torch.save writes it, around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("teacher/data.pkl", pickled)
        file.writestr("teacher/byteorder", "little")
        file.writestr("teacher/version", "3\n")
    return out.getvalue()


@pytest.mark.parametrize("attack", ["posix.system", "new object, keywords"])
def test_hostile_checkpoint_is_refused_and_nothing_of_it_runs_or_stays(
    client: TestClient, tmp_path: Path, attack: str
) -> None:
    folder, marker = context_of(client).settings.data_dir, tmp_path / "executed"
    every = {**hostile_pickles.armed(str(marker)), **hostile_pickles.quiet(str(marker))}
    content = checkpoint(every[attack])
    kept = stored(folder)
    url = client.post("/v1/uploads", json=announce(content, "teacher.pt")).headers["location"]
    send(client, url, 0, content)

    answer = problem_of(client.post(f"{url}/complete"), 422, "data_invalid")

    assert "pickle" in answer["detail"]
    assert not marker.exists()
    assert (client.get(url).json()["state"], client.get(url).json()["artifact"]) == ("failed", None)
    assert stored(folder) == kept


def stored(folder: Path) -> set[Path]:
    """Files that hold bytes of anything: those of the database and of locks left out."""
    return {
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock" and not path.name.startswith("stillroom.db")
    }


def test_checkpoint_without_embeddings_is_told_what_it_holds(client: TestClient) -> None:
    content = checkpoint(pickle.dumps({"weights": [1, 2], "bias": 3}, 2))
    url = client.post("/v1/uploads", json=announce(content, "teacher.pt")).headers["location"]
    send(client, url, 0, content)

    answer = problem_of(client.post(f"{url}/complete"), 422, "data_invalid")

    assert "holds 'weights', 'bias'; needed a dict with 'embeddings'" in answer["detail"]


def test_other_bytes_than_announced_are_refused(client: TestClient) -> None:
    content = pairs()
    url = client.post("/v1/uploads", json=announce(content)).headers["location"]
    send(client, url, 0, content[:-1] + b"?")

    problem_of(client.post(f"{url}/complete"), 422, "data_invalid")


def test_discarded_upload_is_gone(client: TestClient) -> None:
    url = client.post("/v1/uploads", json=announce(b"x")).headers["location"]

    answer = client.delete(url)

    assert answer.status_code == 204
    assert answer.content == b""
    problem_of(client.get(url), 404, "not_found")


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"sha256": "x"}, "/sha256"),
        ({"sha256": "A" * 64}, "/sha256"),
        ({"size_bytes": 0}, "/size_bytes"),
        ({"size_bytes": -1}, "/size_bytes"),
        ({"size_bytes": 1.5}, "/size_bytes"),
        ({"size_bytes": 1.0}, "/size_bytes"),
        ({"size_bytes": "1"}, "/size_bytes"),
        ({"size_bytes": True}, "/size_bytes"),
        ({"size_bytes": 10**30}, "/size_bytes"),
        ({"file_name": ""}, "/file_name"),
        ({"file_name": "x" * 256}, "/file_name"),
        ({"path": "/etc/passwd"}, "/path"),
    ],
)
def test_wrong_announcement_names_the_field(
    client: TestClient, change: dict[str, Any], pointer: str
) -> None:
    answer = client.post("/v1/uploads", json={**announce(b"x"), **change})

    assert problem_of(answer, 422, "spec_invalid")["errors"][0]["pointer"] == pointer


def test_announced_size_over_the_limit_is_413(client: TestClient) -> None:
    answer = client.post("/v1/uploads", json={**announce(b"x"), "size_bytes": 2**50})

    problem_of(answer, 413, "too_large")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/cron.d/x", "a\nb", "CON", "💥" * 50])
def test_hostile_file_name_is_only_shown(client: TestClient, name: str) -> None:
    folder = context_of(client).settings.data_dir
    before = {path for path in folder.rglob("*") if path.parent.name != "uploads"}
    url = client.post("/v1/uploads", json=announce(b"x", name)).headers["location"]
    send(client, url, 0, b"x")

    assert client.get(url).json()["file_name"] == name
    assert {path for path in folder.rglob("*") if path.parent.name != "uploads"} == before


@pytest.mark.parametrize("offset", ["", "-1", "x", "1e3", "9" * 40])
def test_strange_offset_is_422(client: TestClient, offset: str) -> None:
    url = client.post("/v1/uploads", json=announce(b"x")).headers["location"]

    body = problem_of(send(client, url, offset, b"x"), 422, "spec_invalid")
    assert body["errors"][0]["pointer"] == "/header/Upload-Offset"


def test_missing_offset_is_422(client: TestClient) -> None:
    url = client.post("/v1/uploads", json=announce(b"x")).headers["location"]

    problem_of(client.patch(url, content=b"x", headers=BYTES), 422, "spec_invalid")


def test_part_over_the_limit_is_413_however_it_is_sent(alone: TestClient) -> None:
    content = b"x" * ((1 << 16) + 1)
    url = alone.post("/v1/uploads", json=announce(content)).headers["location"]

    problem_of(send(alone, url, 0, content), 413, "too_large")
    problem_of(send(alone, url, 0, iter([content[:9], content[9:]])), 413, "too_large")
    assert send(alone, url, alone.get(url).json()["received_bytes"], b"x").status_code == 200


def test_too_many_unfinished_uploads_are_413(alone: TestClient) -> None:
    for _ in range(3):
        assert alone.post("/v1/uploads", json=announce(b"x")).status_code == 201

    problem_of(alone.post("/v1/uploads", json=announce(b"x")), 413, "too_large")


def test_uploads_are_listed_newest_first_by_state(alone: TestClient, api_clock: Clock) -> None:
    made = []
    for _ in range(3):
        api_clock.tick(seconds=1)
        made.append(alone.post("/v1/uploads", json=announce(b"x")).json())
    send(alone, f"/v1/uploads/{made[0]['id']}", 0, b"x")
    alone.post(f"/v1/uploads/{made[0]['id']}/complete")

    def listed(query: str) -> list[str]:
        return [one["id"] for one in alone.get(f"/v1/uploads{query}").json()["items"]]

    newest = [one["id"] for one in reversed(made)]
    assert listed("") == newest
    assert listed("?limit=1") == newest[:1]
    assert listed("?state=open") == newest[:2]
    assert listed("?state=failed") == newest[2:]
    assert listed("?state=complete") == []
    assert alone.get("/v1/uploads?state=open").json()["items"][0] == made[2]
    for wrong in ("state=gone", "limit=0", "limit=201"):
        body = problem_of(alone.get(f"/v1/uploads?{wrong}"), 422, "spec_invalid")
        assert body["errors"][0]["pointer"] == f"/query/{wrong.partition('=')[0]}"


def test_a_lane_runs_so_many_at_once_and_turns_away_who_waited_too_long() -> None:
    running: list[int] = []
    most: list[int] = []

    def work() -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()

    async def crowd() -> None:
        lane = Lane("things", 2, wait_s=60)
        await asyncio.gather(*(lane.run(work, project=f"p{n}") for n in range(8)))
        narrow = Lane("things", 1, wait_s=0.01)
        first = asyncio.ensure_future(narrow.run(work, project="a"))
        await asyncio.sleep(0.005)
        with pytest.raises(Busy, match="things"):
            await narrow.run(work, project="b")
        await first
        await narrow.run(work, project="b")  # the place is free again

    asyncio.run(crowd())

    assert max(most) == 2
    assert len(most) == 10


def test_a_project_that_fills_a_lane_leaves_half_of_it_to_others() -> None:
    go_on = threading.Event()

    async def crowd() -> None:
        lane = Lane("things", 4, wait_s=0.2)
        long = [asyncio.ensure_future(lane.run(go_on.wait, project="many")) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await lane.run(int, project="many")
        assert await lane.run(int, project="few") == 0
        go_on.set()
        await asyncio.gather(*long)
        assert await lane.run(int, project="many") == 0

    asyncio.run(crowd())


def test_imports_wait_for_their_turn_and_leave_everything_else_alone(
    tmp_path: Path, api_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slowly(*_: Any, **__: Any) -> None:
        begun.release()
        go_on.wait(60)
        raise DataInvalid("nothing of the sort")

    monkeypatch.setattr("core.jobs.uploads.import_file", slowly)
    settings = make_settings(tmp_path, imports_at_once=4, import_timeout=0.3)
    with serving(settings, api_clock) as client, ThreadPoolExecutor(3) as threads:
        urls = [upload(client, bytes([number])) for number in range(3)]
        try:
            first = [threads.submit(client.post, f"{url}/complete") for url in urls[:2]]
            assert begun.acquire(timeout=30)
            assert begun.acquire(timeout=30)

            third = client.post(f"{urls[2]}/complete")

            assert problem_of(third, 503, "busy")["retryable"]
            assert third.headers["retry-after"]
            assert client.get(urls[2]).json()["state"] == "open"
            problem_of(client.post(f"{urls[0]}/complete"), 409, "conflict")  # said at once
            assert not begun.acquire(blocking=False)
        finally:
            go_on.set()
        for answer in first:
            problem_of(answer.result(60), 422, "data_invalid")
        problem_of(client.post(f"{urls[2]}/complete"), 422, "data_invalid")
