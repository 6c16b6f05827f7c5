"""One pool for several projects: keys, shares, needs of chunks, nodes; sums on the job."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


FIRST_PROJECT = "prj_default"
"""Owns what was there before projects were."""


def upgrade() -> None:
    op.create_table(
        "nodes",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("note", sa.String(), nullable=True),
        sa.Column("blamed", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_nodes")),
    )
    op.create_table(
        "projects",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("running_limit", sa.BigInteger(), nullable=True),
        sa.Column("queued_limit", sa.BigInteger(), nullable=True),
        sa.Column("storage_limit_bytes", sa.BigInteger(), nullable=True),
        sa.Column("usage", sa.Double(), nullable=False),
        sa.Column("usage_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
        sa.UniqueConstraint("name", name=op.f("uq_projects_name")),
    )
    projects = sa.table(
        "projects",
        *map(sa.column, ("id", "name", "weight", "usage")),
        sa.column("usage_at", sa.DateTime(timezone=True)),
        sa.column("created_at", sa.DateTime(timezone=True)),
    )
    now = sa.func.current_timestamp()
    op.execute(
        projects.insert().values(
            id=FIRST_PROJECT, name="default", weight=1.0, usage=0.0, usage_at=now, created_at=now
        )
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("prefix", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_api_keys_project_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_keys_digest")),
    )
    with op.batch_alter_table("api_keys") as batch_op:
        batch_op.create_index(batch_op.f("ix_api_keys_project_id"), ["project_id"])

    op.create_table(
        "audit",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_audit_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("audit") as batch_op:
        batch_op.create_index(
            batch_op.f("ix_audit_project_id_audit_id"), ["project_id", "id"], unique=False
        )

    with op.batch_alter_table("chunks") as batch_op:
        batch_op.add_column(sa.Column("device", sa.String(), nullable=True))
        batch_op.add_column(
            sa.Column("memory_bytes", sa.BigInteger(), nullable=False, server_default="0")
        )
        batch_op.add_column(sa.Column("failed_on", sa.String(), nullable=True))
        batch_op.add_column(sa.Column("retry_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("score", sa.Double(), nullable=True))
        batch_op.drop_column("failures")
        batch_op.add_column(sa.Column("failures", sa.JSON(), nullable=False, server_default="{}"))
        batch_op.drop_index(batch_op.f("ix_chunks_state"))
        batch_op.create_index(
            "ix_chunks_open",
            ["job_id", "stage_index", "index"],
            unique=False,
            sqlite_where=sa.text("state NOT IN ('done', 'skipped')"),
            postgresql_where=sa.text("state NOT IN ('done', 'skipped')"),
        )
        batch_op.create_index(
            "ix_chunks_ready",
            ["job_id", "stage_index", "index"],
            unique=False,
            sqlite_where=sa.text("state = 'ready'"),
            postgresql_where=sa.text("state = 'ready'"),
        )
        batch_op.create_index(
            "ix_chunks_running",
            ["lease_until"],
            unique=False,
            sqlite_where=sa.text("state = 'running'"),
            postgresql_where=sa.text("state = 'running'"),
        )

    # A day's memory of answered requests: not worth moving to the new key.
    op.drop_table("idempotency_keys")
    _make_idempotency_keys(sa.Column("project_id", sa.String(), nullable=False))
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.add_column(
            sa.Column("project_id", sa.String(), nullable=False, server_default=FIRST_PROJECT)
        )
        batch_op.add_column(sa.Column("rank", sa.BigInteger(), nullable=False, server_default="50"))
        batch_op.add_column(sa.Column("submitted_by", sa.String(), nullable=True))
        batch_op.add_column(sa.Column("retry_of", sa.String(), nullable=True))
        batch_op.add_column(sa.Column("trace", sa.String(), nullable=True))
        batch_op.add_column(sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("stage", sa.String(), nullable=True))
        batch_op.add_column(sa.Column("chunks", sa.BigInteger(), nullable=True))
        batch_op.add_column(
            sa.Column("chunks_over", sa.BigInteger(), nullable=False, server_default="0")
        )
        batch_op.add_column(
            sa.Column("attempts", sa.BigInteger(), nullable=False, server_default="0")
        )
        batch_op.add_column(
            sa.Column("device_seconds", sa.Double(), nullable=False, server_default="0")
        )
        batch_op.add_column(
            sa.Column("cache_hits", sa.BigInteger(), nullable=False, server_default="0")
        )
        batch_op.drop_index(batch_op.f("ix_jobs_created_at_jobs_id"))
        batch_op.drop_index(batch_op.f("ix_jobs_state_jobs_created_at"))
        batch_op.create_index(
            "ix_jobs_deadline",
            ["deadline_at"],
            unique=False,
            sqlite_where=sa.text("finished_at IS NULL AND deadline_at IS NOT NULL"),
            postgresql_where=sa.text("finished_at IS NULL AND deadline_at IS NOT NULL"),
        )
        batch_op.create_index(
            batch_op.f("ix_jobs_kind_jobs_state_jobs_created_at"), ["kind", "state", "created_at"]
        )
        batch_op.create_index(
            batch_op.f("ix_jobs_project_id_jobs_name_jobs_created_at"),
            ["project_id", "name", "created_at"],
        )
        batch_op.create_index(
            "ix_jobs_open",
            ["state", "project_id"],
            unique=False,
            sqlite_where=sa.text("finished_at IS NULL"),
            postgresql_where=sa.text("finished_at IS NULL"),
        )
        batch_op.create_index(
            batch_op.f("ix_jobs_project_id_jobs_created_at_jobs_id"),
            ["project_id", "created_at", "id"],
        )
        batch_op.create_index(
            "ix_jobs_over",
            ["project_id", "kind", "state", "device_seconds", "attempts", "cache_hits"],
            unique=False,
            sqlite_where=sa.text("finished_at IS NOT NULL"),
            postgresql_where=sa.text("finished_at IS NOT NULL"),
        )
        batch_op.create_index(
            "ix_jobs_queue",
            ["project_id", "rank", "created_at", "id"],
            unique=False,
            sqlite_where=sa.text("state IN ('queued', 'running')"),
            postgresql_where=sa.text("state IN ('queued', 'running')"),
        )
        batch_op.create_index(batch_op.f("ix_jobs_retry_of"), ["retry_of"])
        batch_op.create_foreign_key(
            batch_op.f("fk_jobs_project_id"), "projects", ["project_id"], ["id"]
        )
        batch_op.create_foreign_key(batch_op.f("fk_jobs_retry_of"), "jobs", ["retry_of"], ["id"])

    _sum_up_jobs()
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.drop_column("priority")

    with op.batch_alter_table("outputs") as batch_op:
        batch_op.add_column(
            sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false())
        )
        batch_op.create_index(
            "ix_outputs_checkpoints",
            ["sha256"],
            unique=False,
            sqlite_where=sa.text("role = 'checkpoint'"),
            postgresql_where=sa.text("role = 'checkpoint'"),
        )
    op.create_index("ix_artifacts_size", "artifacts", ["sha256", "size_bytes"])
    op.create_index(
        "ix_events_failed",
        "events",
        ["id"],
        unique=False,
        sqlite_where=sa.text("type = 'chunk.failed'"),
        postgresql_where=sa.text("type = 'chunk.failed'"),
    )

    with op.batch_alter_table("uploads") as batch_op:
        batch_op.add_column(
            sa.Column("project_id", sa.String(), nullable=False, server_default=FIRST_PROJECT)
        )
        batch_op.create_index(
            batch_op.f("ix_uploads_project_id_uploads_created_at"), ["project_id", "created_at"]
        )
        batch_op.create_foreign_key(
            batch_op.f("fk_uploads_project_id"), "projects", ["project_id"], ["id"]
        )

    # Whoever is alive says so again within seconds.
    op.execute("DELETE FROM workers")
    with op.batch_alter_table("workers") as batch_op:
        batch_op.add_column(sa.Column("node_id", sa.String(), nullable=False))
        batch_op.add_column(sa.Column("kind", sa.String(), nullable=False))
        batch_op.add_column(
            sa.Column("memory_bytes", sa.BigInteger(), nullable=False, server_default="0")
        )
        batch_op.add_column(sa.Column("threads", sa.BigInteger(), nullable=False))
        batch_op.add_column(sa.Column("busy_seconds", sa.Double(), nullable=False))
        batch_op.create_foreign_key(batch_op.f("fk_workers_node_id"), "nodes", ["node_id"], ["id"])


def _make_idempotency_keys(*scope: sa.Column[str]) -> None:
    columns = [
        *scope,
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("body_sha256", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint(*(c.name for c in scope), "key", name="pk_idempotency_keys"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_idempotency_keys_job_id"),
    ]
    if scope:
        name = "fk_idempotency_keys_project_id"
        columns.append(sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=name))
    op.create_table("idempotency_keys", *columns)


def _sum_up_jobs() -> None:
    """Fill what jobs keep of their chunks from now on."""
    chunks = "FROM chunks WHERE chunks.job_id = jobs.id"
    open_ = "chunks.state NOT IN ('done', 'skipped')"
    op.execute(
        f"""
        UPDATE jobs SET
            rank = 100 - priority,
            chunks = (SELECT NULLIF(COUNT(*), 0) {chunks}),
            chunks_over = (SELECT COUNT(*) {chunks} AND NOT {open_}),
            attempts = (SELECT COALESCE(SUM(chunks.attempt), 0) {chunks}),
            device_seconds = (SELECT COALESCE(SUM(chunks.seconds), 0) {chunks}),
            cache_hits = (
                SELECT COUNT(*) FROM outputs WHERE outputs.job_id = jobs.id AND outputs.cached
            ),
            stage = (
                SELECT chunks.stage {chunks} AND {open_}
                ORDER BY chunks.stage_index, chunks."index" LIMIT 1
            )
        """
    )


def downgrade() -> None:
    with op.batch_alter_table("workers") as batch_op:
        batch_op.drop_constraint(batch_op.f("fk_workers_node_id"), type_="foreignkey")
        batch_op.drop_column("busy_seconds")
        batch_op.drop_column("threads")
        batch_op.drop_column("memory_bytes")
        batch_op.drop_column("kind")
        batch_op.drop_column("node_id")

    with op.batch_alter_table("uploads") as batch_op:
        batch_op.drop_constraint(batch_op.f("fk_uploads_project_id"), type_="foreignkey")
        batch_op.drop_index(batch_op.f("ix_uploads_project_id_uploads_created_at"))
        batch_op.drop_column("project_id")

    op.drop_index("ix_events_failed", table_name="events")
    op.drop_index("ix_artifacts_size", table_name="artifacts")
    with op.batch_alter_table("outputs") as batch_op:
        batch_op.drop_index("ix_outputs_checkpoints")
        batch_op.drop_column("pinned")

    with op.batch_alter_table("jobs") as batch_op:
        batch_op.add_column(
            sa.Column("priority", sa.BigInteger(), nullable=False, server_default="50")
        )
        batch_op.drop_constraint(batch_op.f("fk_jobs_retry_of"), type_="foreignkey")
        batch_op.drop_constraint(batch_op.f("fk_jobs_project_id"), type_="foreignkey")
        batch_op.drop_index(batch_op.f("ix_jobs_retry_of"))
        batch_op.drop_index(
            "ix_jobs_queue",
            sqlite_where=sa.text("state IN ('queued', 'running')"),
            postgresql_where=sa.text("state IN ('queued', 'running')"),
        )
        batch_op.drop_index(batch_op.f("ix_jobs_project_id_jobs_created_at_jobs_id"))
        batch_op.drop_index(
            "ix_jobs_open",
            sqlite_where=sa.text("finished_at IS NULL"),
            postgresql_where=sa.text("finished_at IS NULL"),
        )
        batch_op.drop_index("ix_jobs_over")
        batch_op.drop_index(batch_op.f("ix_jobs_kind_jobs_state_jobs_created_at"))
        batch_op.drop_index(batch_op.f("ix_jobs_project_id_jobs_name_jobs_created_at"))
        batch_op.drop_index(
            "ix_jobs_deadline",
            sqlite_where=sa.text("finished_at IS NULL AND deadline_at IS NOT NULL"),
            postgresql_where=sa.text("finished_at IS NULL AND deadline_at IS NOT NULL"),
        )
        batch_op.create_index(
            batch_op.f("ix_jobs_state_jobs_created_at"), ["state", "created_at"], unique=False
        )
        batch_op.create_index(
            batch_op.f("ix_jobs_created_at_jobs_id"), ["created_at", "id"], unique=False
        )
        batch_op.drop_column("cache_hits")
        batch_op.drop_column("device_seconds")
        batch_op.drop_column("attempts")
        batch_op.drop_column("chunks_over")
        batch_op.drop_column("chunks")
        batch_op.drop_column("stage")
        batch_op.drop_column("deadline_at")
        batch_op.drop_column("trace")
        batch_op.drop_column("retry_of")
        batch_op.drop_column("submitted_by")
        batch_op.drop_column("project_id")

    op.execute("UPDATE jobs SET priority = 100 - rank")
    with op.batch_alter_table("jobs") as batch_op:
        batch_op.drop_column("rank")

    op.drop_table("idempotency_keys")
    _make_idempotency_keys()
    with op.batch_alter_table("chunks") as batch_op:
        batch_op.drop_index(
            "ix_chunks_running",
            sqlite_where=sa.text("state = 'running'"),
            postgresql_where=sa.text("state = 'running'"),
        )
        batch_op.drop_index(
            "ix_chunks_ready",
            sqlite_where=sa.text("state = 'ready'"),
            postgresql_where=sa.text("state = 'ready'"),
        )
        batch_op.drop_index(
            "ix_chunks_open",
            sqlite_where=sa.text("state NOT IN ('done', 'skipped')"),
            postgresql_where=sa.text("state NOT IN ('done', 'skipped')"),
        )
        batch_op.create_index(batch_op.f("ix_chunks_state"), ["state"])
        batch_op.drop_column("failures")
        batch_op.add_column(
            sa.Column("failures", sa.BigInteger(), nullable=False, server_default="0")
        )
        batch_op.drop_column("score")
        batch_op.drop_column("retry_at")
        batch_op.drop_column("failed_on")
        batch_op.drop_column("memory_bytes")
        batch_op.drop_column("device")

    with op.batch_alter_table("audit") as batch_op:
        batch_op.drop_index(batch_op.f("ix_audit_project_id_audit_id"))

    op.drop_table("audit")
    with op.batch_alter_table("api_keys") as batch_op:
        batch_op.drop_index(batch_op.f("ix_api_keys_project_id"))

    op.drop_table("api_keys")
    op.drop_table("projects")
    op.drop_table("nodes")
