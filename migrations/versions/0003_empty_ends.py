"""A chunk that ended while its job was being cancelled is not done: nothing of it was adopted.

The first version called it done; a retry would take it over and go on from nothing. A chunk of a
chain that has none because a later one made its checkpoint needless is done all the same.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    cancelled = "SELECT id FROM jobs WHERE state IN ('cancelled', 'cancelling')"
    op.execute(
        f"""
        UPDATE chunks SET state = 'cancelled'
        WHERE state = 'done' AND job_id IN ({cancelled})
          AND NOT EXISTS (SELECT 1 FROM outputs WHERE outputs.chunk_id = chunks.id)
          AND NOT (chained AND EXISTS (
              SELECT 1 FROM chunks AS later
              WHERE later.job_id = chunks.job_id AND later.stage_index = chunks.stage_index
                AND later."index" > chunks."index" AND later.state = 'done'
          ))
        """
    )
    op.execute(
        """
        UPDATE jobs SET chunks_over = (
            SELECT COUNT(*) FROM chunks
            WHERE chunks.job_id = jobs.id AND chunks.state IN ('done', 'skipped')
        )
        WHERE state IN ('cancelled', 'cancelling')
        """
    )


def downgrade() -> None:
    """Which chunks were called done wrongly is not kept: nothing to take back."""
