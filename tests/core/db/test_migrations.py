"""The migrations make the tables of models.py, and can be taken back."""

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect

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
