"""The migrations make the tables of models.py, and can be taken back."""

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

from core.db.models import Base, ServiceFact
from core.db.session import insert_new, migrating, reading, transaction, upgrade
from core.jobs import control, service
from tests import life
from tests.conftest import Clock


def test_migrated_schema_is_the_models_schema(engine: Engine) -> None:
    with engine.begin() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_upgrade_twice_changes_nothing(engine: Engine) -> None:
    upgrade(engine)

    assert set(inspect(engine).get_table_names()) == {*Base.metadata.tables, "alembic_version"}


def test_downgrade_leaves_nothing(engine: Engine) -> None:
    with migrating(engine) as config:
        command.downgrade(config, "base")

    assert inspect(engine).get_table_names() == ["alembic_version"]


def test_a_chunk_that_ended_with_nothing_adopted_is_not_done(engine: Engine) -> None:
    """The first version called it done; a retry would go on from what is not there."""
    with migrating(engine) as config:
        command.downgrade(config, "0001")
    instant = "2026-01-01 00:00:00"
    with engine.begin() as connection:
        for job, state in (("job_a", "cancelled"), ("job_b", "succeeded")):
            connection.execute(
                text(
                    "INSERT INTO jobs (id, kind, spec, labels, priority, state, created_at) "
                    "VALUES (:id, 'echo', '{}', '{}', 90, :state, :at)"
                ),
                {"id": job, "state": state, "at": instant},
            )
            connection.execute(
                text(
                    'INSERT INTO chunks (job_id, stage, stage_index, "index", chained, state, '
                    "attempt, failures, progress, seconds) "
                    "VALUES (:id, 'lines', 0, 0, true, 'done', 1, 0, 1, 2.5)"
                ),
                {"id": job},
            )

    upgrade(engine)

    with engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT jobs.id, chunks.state, chunks_over, attempts, device_seconds, rank "
                "FROM jobs JOIN chunks ON chunks.job_id = jobs.id ORDER BY jobs.id"
            )
        ).all()
    assert [tuple(row) for row in rows] == [
        ("job_a", "cancelled", 0, 1, 2.5, 10),
        ("job_b", "done", 1, 1, 2.5, 10),
    ]


def test_what_a_later_checkpoint_made_needless_stays_done(engine: Engine, clock: Clock) -> None:
    job_id = life.submit(engine, clock, times=5)
    for seed in range(3):
        made = life.some_file(f"{seed:064x}", role="checkpoint")
        life.finish(engine, life.claim(engine, clock), clock, made)
    with transaction(engine) as session:
        control.cancel(session, job_id, project=life.PROJECT, now=clock())
    with migrating(engine) as config:
        command.downgrade(config, "0002")

    upgrade(engine)

    with engine.connect() as connection:
        query = text('SELECT state FROM chunks ORDER BY "index"')
        assert connection.scalars(query).all() == ["done"] * 3 + ["cancelled"] * 2


def test_a_reader_sees_one_snapshot(engine: Engine) -> None:
    count = text("SELECT COUNT(*) FROM service_facts")
    with reading(engine) as session:
        before = session.scalar(count)
        with transaction(engine) as other:
            insert_new(other, ServiceFact, {"key": "new", "value": "1"})
        assert session.scalar(count) == before


def test_older_jobs_are_found_by_their_labels(engine: Engine, clock: Clock) -> None:
    labelled = life.submit(engine, clock, labels={"team": "ads", "run": "7"})
    life.submit(engine, clock, labels={"team": "search"})
    with migrating(engine) as config:
        command.downgrade(config, "0003")

    upgrade(engine)

    with reading(engine) as session:
        for labels in ({"team": "ads"}, {"run": "7", "team": "ads"}):
            found, _ = service.list_jobs(session, project=life.PROJECT, limit=9, labels=labels)
            assert [job.id for job in found] == [labelled]
