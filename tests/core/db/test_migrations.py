"""The migrations make the tables of models.py, and can be taken back."""

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

from core.db.models import Base
from core.db.session import migrating, upgrade


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
