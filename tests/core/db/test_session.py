"""What an error of the database means."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from core.db.models import ServiceFact
from core.db.session import (
    RESTED_S,
    SILENCE_S,
    deadlocked,
    glancing,
    insert_new,
    is_away,
    make_engine,
    transaction,
)

ON_POSTGRES = pytest.mark.parametrize("engine", ["postgresql"], indirect=True)


@ON_POSTGRES
def test_a_standby_is_a_database_that_is_away(engine: Engine) -> None:
    standby = engine.execution_options(postgresql_readonly=True)
    with pytest.raises(DBAPIError) as caught, transaction(standby) as session:
        insert_new(session, ServiceFact, {"key": "new", "value": "1"})

    assert is_away(caught.value)
    assert not deadlocked(caught.value)


def test_nobody_there_is_away_and_a_broken_rule_is_not(engine: Engine) -> None:
    nobody = make_engine("postgresql+psycopg://u:p@127.0.0.1:1/x")
    with pytest.raises(DBAPIError) as absent, nobody.connect():
        pass
    with pytest.raises(DBAPIError) as broken, transaction(engine) as session:
        session.execute(text("INSERT INTO service_facts (key) VALUES ('no value')"))

    assert is_away(absent.value)
    assert not is_away(broken.value)
    assert not is_away(ValueError("of another world"))


def test_a_glance_leaves_its_connection_as_it_was(engine: Engine) -> None:
    """One connection serves all: what glanced once still takes back what failed."""
    mine = make_engine(engine.url.render_as_string(hide_password=False))
    count = select(func.count()).select_from(ServiceFact).where(ServiceFact.key == "mine")

    def break_off(session: Session) -> None:
        insert_new(session, ServiceFact, {"key": "mine", "value": ""})
        raise RuntimeError

    for _ in range(2):
        with glancing(mine) as session:
            assert session.scalar(count) == 0
        with pytest.raises(RuntimeError), transaction(mine) as session:
            break_off(session)
    with transaction(mine) as session:
        insert_new(session, ServiceFact, {"key": "mine", "value": ""})
    with glancing(mine) as session:
        assert session.scalar(count) == 1
    mine.dispose()


@ON_POSTGRES
def test_a_deadlock_is_no_outage(engine: Engine) -> None:
    keys = ("a", "b")
    with transaction(engine) as session:
        for key in keys:
            insert_new(session, ServiceFact, {"key": key, "value": ""})
    gate = threading.Barrier(2)

    def lock(first: str, second: str) -> None:
        with transaction(engine) as session:
            for key in (first, second):
                where = ServiceFact.key == key
                session.execute(update(ServiceFact).where(where).values(value=first))
                if key == first:
                    gate.wait()

    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(lock, *keys), threads.submit(lock, *reversed(keys))]
        errors = [one.exception() for one in both]

    [victim] = [error for error in errors if error is not None]
    assert isinstance(victim, DBAPIError)
    assert deadlocked(victim)
    assert not is_away(victim)


@ON_POSTGRES
def test_a_connection_that_died_while_it_rested_is_replaced(engine: Engine) -> None:
    mine = make_engine(engine.url.render_as_string(hide_password=False))
    with mine.connect() as connection:
        pid = connection.scalar(text("SELECT pg_backend_pid()"))
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    time.sleep(RESTED_S)

    with mine.connect() as connection:
        assert connection.scalar(text("SELECT pg_backend_pid()")) != pid
    mine.dispose()


@ON_POSTGRES
def test_a_process_that_falls_silent_in_a_transaction_holds_its_locks_not_for_long(
    engine: Engine,
) -> None:
    frozen = make_engine(engine.url.render_as_string(hide_password=False))
    lock = text("SELECT value FROM service_facts WHERE key = 'turn' FOR UPDATE")
    with transaction(engine) as session:
        insert_new(session, ServiceFact, {"key": "turn", "value": ""})

    waited_s = []

    def fall_silent() -> None:
        with transaction(frozen) as silent:
            silent.execute(lock)
            began = time.monotonic()
            with transaction(engine) as session:
                session.execute(lock)  # waits until the other's is gone
            waited_s.append(time.monotonic() - began)
            silent.execute(lock)

    with pytest.raises(DBAPIError) as caught:
        fall_silent()

    assert SILENCE_S / 2 < waited_s[0] < 2 * SILENCE_S
    assert is_away(caught.value)
    frozen.dispose()
