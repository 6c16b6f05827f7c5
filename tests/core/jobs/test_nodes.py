"""A place where chunks fail that succeed elsewhere takes no more of them."""

import pytest
from sqlalchemy import Engine, select

from core.db.models import Event
from core.db.session import reading, transaction
from core.errors import NotFound, SpecInvalid, Stalled
from core.jobs import pool, recovery
from core.jobs.lease import Claim
from tests.conftest import Clock
from tests.core.jobs.acts import crash, node, set_chunks, within, worker
from tests.life import claim, finish, place, release, state, submit, try_claim


def _fails_here_and_succeeds_there(engine: Engine, clock: Clock) -> None:
    submit(engine, clock)
    crash(engine, claim(engine, clock, "bad"), clock)
    finish(engine, claim(engine, clock, "good"), clock)


def test_a_node_is_excluded_after_three_chunks_that_succeed_elsewhere(
    engine: Engine, clock: Clock
) -> None:
    for name in ("bad", "good"):
        worker(engine, clock, name)
    for count in (1, 2):
        _fails_here_and_succeeds_there(engine, clock)
        assert (node(engine, "host:bad").state, node(engine, "host:bad").blamed) == (
            "active",
            count,
        )
    _fails_here_and_succeeds_there(engine, clock)

    bad = node(engine, "host:bad")
    assert (bad.state, bad.note) == (
        "excluded",
        "3 chunks in a row failed here and succeeded elsewhere",
    )
    submit(engine, clock)
    assert try_claim(engine, clock, "bad") is None
    assert try_claim(engine, clock, "good") is not None
    with reading(engine) as session:
        told = session.scalars(select(Event.data).where(Event.type == "node.excluded")).all()
    assert told == [{"node": "host:bad"}]
    within(engine, pool.set_node_state, "host:bad", pool.ACTIVE, note=None, now=clock())
    assert (node(engine, "host:bad").note, node(engine, "host:bad").blamed) == (None, 0)


def test_a_success_and_a_chunk_that_fails_everywhere_speak_for_a_node(
    engine: Engine, clock: Clock
) -> None:
    for name in ("bad", "good"):
        worker(engine, clock, name)
    for _ in range(3):
        for _ in range(2):
            _fails_here_and_succeeds_there(engine, clock)
        submit(engine, clock)
        finish(engine, claim(engine, clock, "bad"), clock)
        assert node(engine, "host:bad").blamed == 0
    for _ in range(3):
        submit(engine, clock)
        for name in ("bad", "good", "bad"):
            crash(engine, claim(engine, clock, name), clock)
    assert (node(engine, "host:bad").state, node(engine, "host:bad").blamed) == ("active", 0)


def test_a_worker_that_dies_speaks_against_its_node(engine: Engine, clock: Clock) -> None:
    for name in ("bad", "good"):
        worker(engine, clock, name)
    for _ in range(3):
        submit(engine, clock)
        claim(engine, clock, "bad")
        clock.tick(seconds=30)
        assert release(engine, clock) == 1
        finish(engine, claim(engine, clock, "good"), clock)

    assert node(engine, "host:bad").state == "excluded"


def test_draining_is_kept_whatever_a_node_does(engine: Engine, clock: Clock) -> None:
    for name in ("bad", "good"):
        worker(engine, clock, name)
    for _ in range(2):
        _fails_here_and_succeeds_there(engine, clock)
    submit(engine, clock)
    held = claim(engine, clock, "bad")
    within(engine, pool.set_node_state, "host:bad", pool.DRAINING, note="for repair", now=clock())
    crash(engine, held, clock)
    finish(engine, claim(engine, clock, "good"), clock)

    assert (node(engine, "host:bad").state, node(engine, "host:bad").note) == (
        "draining",
        "for repair",
    )
    with pytest.raises(NotFound), transaction(engine) as session:
        pool.set_node_state(session, "host:no", pool.DRAINING, note=None, now=clock())
    with pytest.raises(SpecInvalid, match="no node state 'off'"), transaction(engine) as session:
        pool.set_node_state(session, "host:bad", "off", note=None, now=clock())


def test_an_excluded_node_gets_another_chance_after_an_hour(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session:
        pool.hello(session, "w1", place=place("host:bad"), now=clock())
        pool.set_node_state(session, "host:bad", pool.EXCLUDED, note="bad", now=clock())

    assert recovery.readmit(engine, now=clock()) == 0
    clock.tick(hours=1, seconds=1)
    assert [recovery.readmit(engine, now=clock()) for _ in range(2)] == [1, 0]

    with transaction(engine) as session:
        assert pool.node_state(session, "host:bad") == pool.ACTIVE
        assert pool.blame(session, "host:bad", now=clock()), "one failure more excludes it again"


def test_a_worker_of_the_same_name_may_offer_something_else(engine: Engine, clock: Clock) -> None:
    for device, memory in (("cpu", 1), ("cuda:0", 2)):
        with transaction(engine) as session:
            there = place(f"host:{device}", device, memory)
            pool.hello(session, "host:1", place=there, now=clock())

    with reading(engine) as session:
        [(worker, alive)] = pool.workers(session, now=clock())
    assert alive
    assert (worker.kind, worker.memory_bytes, worker.node_id) == ("gpu", 2, "host:cuda:0")


def test_a_place_nobody_came_back_to_is_forgotten_unless_something_is_known_of_it(
    engine: Engine, clock: Clock
) -> None:
    for name in ("random", "drained"):
        worker(engine, clock, name)
    with transaction(engine) as session:
        pool.set_node_state(session, "host:drained", pool.DRAINING, note="moved", now=clock())
    clock.tick(days=1, seconds=1)

    for name in ("one", "two"):  # the first forgets the workers, the second their places
        worker(engine, clock, name)

    with reading(engine) as session:
        left = {node.id for node in pool.nodes(session)}
    assert left == {"host:drained", "host:one", "host:two"}


def test_a_chunk_that_failed_is_left_to_the_other_nodes_while_they_could_take_it(
    engine: Engine, clock: Clock
) -> None:
    for name in ("bad", "good"):
        worker(engine, clock, name)
    job_id = submit(engine, clock)
    crash(engine, claim(engine, clock, "bad"), clock)

    clock.tick(seconds=15)
    assert try_claim(engine, clock, "bad") is None, "the good one is busy, and comes back"
    set_chunks(engine, job_id, memory_bytes=1 << 41)
    big = place("host:bad", memory_bytes=1 << 42)
    assert try_claim(engine, clock, "bad", at=big) is not None, "too large for the good one"


def test_a_chunk_comes_back_to_where_it_failed_when_nobody_else_takes_it(
    engine: Engine, clock: Clock
) -> None:
    for name in ("bad", "good"):
        worker(engine, clock, name)
    for gone, alive in ((25, False), (650, True)):
        submit(engine, clock)
        crash(engine, claim(engine, clock, "bad"), clock)
        clock.tick(seconds=gone)
        if alive:
            within(engine, pool.seen, "good", now=clock())
        finish(engine, claim(engine, clock, "bad"), clock)
        within(engine, pool.seen, "good", now=clock())


def test_a_node_on_which_everything_fails_costs_no_job(engine: Engine, clock: Clock) -> None:
    names = ("bad", "good1", "good2")
    for name in names:
        worker(engine, clock, name)
    jobs = [submit(engine, clock) for _ in range(12)]
    held: dict[str, tuple[Claim, int]] = {}
    for second in range(0, 240, 2):
        for name in names:
            within(engine, pool.seen, name, now=clock())
            found = held.pop(name, None)
            if found is not None and name == "bad":
                crash(engine, found[0], clock)
            elif found is not None and second < found[1]:
                held[name] = found
            elif found is not None:
                finish(engine, found[0], clock)
            if name not in held and (fresh := try_claim(engine, clock, name)) is not None:
                held[name] = (fresh, second + 30)
        clock.tick(seconds=2)

    assert {state(engine, job_id) for job_id in jobs} == {"succeeded"}
    assert node(engine, "host:bad").state == "excluded"


def test_a_limit_of_the_jobs_own_blames_no_node(engine: Engine, clock: Clock) -> None:
    for name in ("cold", "warm"):
        worker(engine, clock, name)
    for _ in range(3):
        submit(engine, clock, stall_limit_s=1)
        crash(engine, claim(engine, clock, "cold"), clock, Stalled("no progress for 1 s"))
        finish(engine, claim(engine, clock, "warm"), clock)

    assert (node(engine, "host:cold").state, node(engine, "host:cold").blamed) == ("active", 0)
