import pytest

from client import ApiError, Stillroom, Unreachable
from client.views import Job
from tests.client.fake import Fault, World
from tests.client.samples import JOB, job_view

HALF = {"done": 1.5, "total": 3, "fraction": 0.5, "stage": "lines", "rate": 1.0, "eta_s": 1.5}


def happenings(last: str = "job.succeeded") -> list[tuple[int | None, str, dict[str, object]]]:
    return [
        (3, "job.submitted", {}),
        (None, "progress", dict(HALF)),
        (5, "chunk.done", {"index": 0}),
        (9, "chunk.done", {"index": 1}),
        (10, last, {}),
    ]


def test_events_come_in_order_and_end_with_the_job(client: Stillroom, world: World) -> None:
    world.jobs[JOB] = job_view(state="running")
    world.events = happenings()

    events = list(client.events(JOB))

    assert [event.id for event in events] == [3, None, 5, 9, 10]
    assert events[1].data["fraction"] == 0.5
    assert len(world.seen) == 1


@pytest.mark.parametrize("cut_after", [1, 2, 3])
def test_a_cut_stream_goes_on_where_it_was_left(
    client: Stillroom, world: World, cut_after: int
) -> None:
    world.jobs[JOB] = job_view(state="running")
    world.events = happenings()
    world.cut_stream_after = cut_after

    numbered = [event.id for event in client.events(JOB) if event.id is not None]

    assert numbered == [3, 5, 9, 10]
    resumed = [headers["last-event-id"] for headers in world.requests("GET", "events")]
    assert resumed[0] == "0"
    assert resumed[1] == str(numbered[cut_after - 1])


def test_a_stream_lives_through_a_server_that_is_away(client: Stillroom, world: World) -> None:
    world.jobs[JOB] = job_view(state="running")
    world.events = happenings()
    world.cut_stream_after = 2
    client.ready()
    world.faults += [Fault("GET", "events", "503", times=3), Fault("GET", "events", "drop")]

    assert [event.id for event in client.events(JOB) if event.id] == [3, 5, 9, 10]


def test_a_finished_job_read_to_its_end_yields_nothing(client: Stillroom, world: World) -> None:
    world.jobs[JOB] = job_view()
    world.events = happenings()
    assert [event for event in client.events(JOB, after=10) if event.id is not None] == []


def test_an_unknown_job_is_no_outage(client: Stillroom, world: World) -> None:
    world.faults.append(Fault("GET", "events", "plain"))
    with pytest.raises(ApiError):
        list(client.events(JOB))


def test_a_stream_that_stays_away_ends_in_an_error(client: Stillroom, world: World) -> None:
    client.ready()
    world.faults.append(Fault("GET", "events", "drop", times=10_000))
    with pytest.raises(Unreachable):
        list(client.events(JOB))


@pytest.mark.parametrize("last", ["succeeded", "failed", "cancelled"])
def test_wait_returns_the_job_in_its_last_state(client: Stillroom, world: World, last: str) -> None:
    world.jobs[JOB] = job_view(state="running")
    world.events = happenings(f"job.{last}")
    shown: list[float] = []

    job = client.wait(JOB, lambda job: shown.append(job["progress"]["fraction"]))

    assert job["state"] == last
    assert 0.5 in shown


def test_wait_tells_when_the_reason_to_wait_changes(client: Stillroom, world: World) -> None:
    world.jobs[JOB] = job_view(state="queued", waits_for="no worker is alive")
    shown: list[str | None] = []

    def show(job: Job) -> None:
        shown.append(job["waits_for"])
        follows = {1: {"waits_for": "3 jobs are ahead"}, 2: {"state": "succeeded"}}
        world.jobs[JOB] |= follows.get(len(shown), {})

    assert client.wait(JOB, show)["state"] == "succeeded"
    assert shown[:2] == ["no worker is alive", "3 jobs are ahead"]


def test_wait_for_a_finished_job_asks_once(client: Stillroom, world: World) -> None:
    world.jobs[JOB] = job_view(state="failed")
    assert client.wait(JOB)["state"] == "failed"
    assert len(world.seen) == 1


def test_a_server_with_numbers_of_its_own_starts_over(client: Stillroom, world: World) -> None:
    world.jobs[JOB] = job_view(state="succeeded")
    world.events = [(1, "job.submitted", {}), (2, "job.succeeded", {})]

    told = [(event.id, event.type) for event in client.events(JOB, after=70)]

    assert told == [(None, "reset"), (1, "job.submitted"), (2, "job.succeeded")]
