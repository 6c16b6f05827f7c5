"""Lists by state, kind and label, old idempotency keys and stored bytes without a walk."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

OLD = (
    ("ix_jobs_kind_jobs_state_jobs_created_at", ["kind", "state", "created_at"]),
    ("ix_jobs_project_id_jobs_name_jobs_created_at", ["project_id", "name", "created_at"]),
)
NEW = (
    (
        "ix_jobs_project_id_jobs_kind_jobs_state_jobs_created_at_jobs_id",
        ["project_id", "kind", "state", "created_at", "id"],
    ),
    (
        "ix_jobs_project_id_jobs_name_jobs_created_at_jobs_id",
        ["project_id", "name", "created_at", "id"],
    ),
    (
        "ix_jobs_project_id_jobs_state_jobs_created_at_jobs_id",
        ["project_id", "state", "created_at", "id"],
    ),
    (
        "ix_jobs_project_id_jobs_kind_jobs_created_at_jobs_id",
        ["project_id", "kind", "created_at", "id"],
    ),
)
KEYS = ("ix_idempotency_keys_created_at", ["created_at"])


def upgrade() -> None:
    for name, _ in OLD:
        op.drop_index(name, "jobs")
    for name, columns in NEW:
        op.create_index(name, "jobs", columns)
    op.create_index(KEYS[0], "idempotency_keys", KEYS[1])
    op.add_column(
        "projects", sa.Column("made_bytes", sa.BigInteger(), nullable=False, server_default="0")
    )
    op.add_column("projects", sa.Column("made_at", sa.DateTime(timezone=True), nullable=True))

    _label()


def _label() -> None:
    labels = op.create_table(
        "job_labels",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_labels_job_id"),
        sa.PrimaryKeyConstraint("job_id", "key", name="pk_job_labels"),
    )
    op.create_index(
        "ix_job_labels_list",
        "job_labels",
        ["project_id", "key", "value", "created_at", "job_id"],
    )
    jobs = sa.table(
        "jobs",
        sa.column("id", sa.String()),
        sa.column("project_id", sa.String()),
        sa.column("created_at", sa.DateTime(timezone=True)),
        sa.column("labels", sa.JSON()),
    )
    connection = op.get_bind()
    rows = [
        {"job_id": i, "key": k, "value": str(v), "project_id": p, "created_at": at}
        for i, p, at, found in connection.execute(sa.select(*jobs.c)).all()
        for k, v in (found or {}).items()
    ]
    if rows:
        connection.execute(labels.insert(), rows)


def downgrade() -> None:
    op.drop_table("job_labels")
    with op.batch_alter_table("projects") as table:
        table.drop_column("made_at")
        table.drop_column("made_bytes")
    op.drop_index(KEYS[0], "idempotency_keys")
    for name, _ in NEW:
        op.drop_index(name, "jobs")
    for name, columns in OLD:
        op.create_index(name, "jobs", columns)
