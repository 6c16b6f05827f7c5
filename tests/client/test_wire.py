import time

import pytest

from client import ApiError, Retry, Stillroom, Unreachable
from client.errors import NotSendable
from tests.client.conftest import SOON
from tests.client.fake import Fault, World, serving
from tests.client.samples import JOB, job_view


@pytest.mark.parametrize("what", ["503", "drop"])
def test_outages_are_sat_out(client: Stillroom, world: World, what: str) -> None:
    world.jobs[JOB] = job_view()
    client.ready()
    world.faults.append(Fault("GET", f"/v1/jobs/{JOB}", what, times=4))

    assert client.get(JOB)["state"] == "succeeded"


def test_an_outage_ends_at_the_limit(client: Stillroom, world: World) -> None:
    world.faults.append(Fault("GET", "/v1/kinds", "503", times=10_000))
    began = time.monotonic()

    with pytest.raises(ApiError) as caught:
        client.kinds()

    assert caught.value.status == 503
    assert 0.5 < time.monotonic() - began < 20


def test_a_server_that_never_answered_is_given_up_soon() -> None:
    with Stillroom("http://127.0.0.1:9", retry=SOON) as client:
        began = time.monotonic()
        with pytest.raises(Unreachable):
            client.kinds()
    assert time.monotonic() - began < 10


def test_a_submit_whose_answer_was_lost_makes_one_job(client: Stillroom, world: World) -> None:
    world.faults.append(Fault("POST", "/v1/jobs", "cut"))

    job = client.submit({"kind": "echo", "text": "hi"})

    keys = [headers["idempotency-key"] for headers in world.requests("POST", "/v1/jobs")]
    assert len(keys) == 2
    assert len(set(keys)) == 1
    assert list(world.jobs) == [job["id"]]


def test_problems_become_api_errors(client: Stillroom) -> None:
    with pytest.raises(ApiError) as caught:
        client.submit({"kind": "echo", "text": "refused"})

    error = caught.value
    assert (error.status, error.code, error.detail) == (422, "spec_invalid", "the text is refused")
    assert error.errors == ({"pointer": "/text", "detail": "too short"},)
    assert "/text: too short" in str(error)


def test_an_error_of_a_proxy_is_told_by_its_status(client: Stillroom, world: World) -> None:
    world.faults.append(Fault("GET", "/v1/kinds", "plain"))

    with pytest.raises(ApiError, match="418") as caught:
        client.kinds()

    assert caught.value.code == "http_418"


def test_an_answer_that_is_no_json_is_not_tried_again(world: World) -> None:
    sha256 = world.put(b"<html>")
    with Stillroom(world.url, retry=SOON) as client, pytest.raises(Unreachable, match="JSON"):
        client._wire.call("GET", f"/v1/artifacts/{sha256}/content")
    assert len(world.seen) == 1


def test_list_walks_every_page_and_only_as_far_as_asked(client: Stillroom, world: World) -> None:
    world.jobs = {str(n): job_view(id=str(n)) for n in range(120)}

    assert [job["id"] for job in client.list()] == [str(n) for n in range(120)]
    assert len(world.seen) == 3
    assert next(client.list(state="succeeded", labels={"a": "b"}))["id"] == "0"
    assert "label=a%3Ab" in world.seen[-1][1]


def test_the_key_is_sent(world: World) -> None:
    world.api_key = "k" * 16
    with Stillroom(world.url, api_key="k" * 16) as client:
        assert client.kinds()
    with Stillroom(world.url) as client, pytest.raises(ApiError, match="a key is needed"):
        client.kinds()


def test_each_wait_is_told() -> None:
    told: list[str] = []
    retry = Retry(0.1, 0.1, 0.01, 0.02, on_retry=lambda error: told.append(str(error)))
    with Stillroom("http://127.0.0.1:9", retry=retry) as client, pytest.raises(Unreachable):
        client.kinds()
    assert told
    assert "127.0.0.1:9" in told[0]


def test_cancel_of_a_finished_job_is_a_conflict(client: Stillroom, world: World) -> None:
    world.jobs[JOB] = job_view(state="running")

    assert client.cancel(JOB)["state"] == "cancelled"
    with pytest.raises(ApiError) as caught:
        client.cancel(JOB)
    assert caught.value.status == 409


def test_what_no_request_can_hold_is_told(client: Stillroom) -> None:
    with pytest.raises(NotSendable, match="too long"):
        next(client.list(name="a" * 70_000))
    with pytest.raises(NotSendable, match="surrogates"):
        client.submit({"kind": "echo", "text": "\ud800"})
    with Stillroom("http://..", retry=SOON) as nowhere, pytest.raises(NotSendable):
        nowhere.kinds()


def test_a_restarted_server_is_found_again(world: World) -> None:
    first = World(jobs={JOB: job_view()})
    with serving(first) as port:
        client = Stillroom(first.url, retry=SOON)
        client.get(JOB)
    with serving(first, port), client:
        assert client.get(JOB)["id"] == JOB
