"""Lists by state and by kind, old idempotency keys and a project's stored bytes without a walk."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

OLD = ("ix_jobs_kind_jobs_state_jobs_created_at", ["kind", "state", "created_at"])
NEW = (
    (
        "ix_jobs_project_id_jobs_kind_jobs_state_jobs_created_at",
        ["project_id", "kind", "state", "created_at"],
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
    op.drop_index(OLD[0], "jobs")
    for name, columns in NEW:
        op.create_index(name, "jobs", columns)
    op.create_index(KEYS[0], "idempotency_keys", KEYS[1])
    op.add_column(
        "projects", sa.Column("made_bytes", sa.BigInteger(), nullable=False, server_default="0")
    )
    op.add_column("projects", sa.Column("made_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("projects") as table:
        table.drop_column("made_at")
        table.drop_column("made_bytes")
    op.drop_index(KEYS[0], "idempotency_keys")
    for name, _ in NEW:
        op.drop_index(name, "jobs")
    op.create_index(OLD[0], "jobs", OLD[1])
