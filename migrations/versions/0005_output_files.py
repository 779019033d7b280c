"""The files of answers in the list of files, those of batches that are over already too; their bytes are counted by the API."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | None = None
depends_on: str | None = None

_COUNTING = sa.text("state = 'counting'")


def upgrade() -> None:
    op.create_index("ix_files_counting", "files", ["updated_at"], sqlite_where=_COUNTING, postgresql_where=_COUNTING)
    for kind, lines in (("output", "completed"), ("errors", "failed")):
        op.execute(
            "INSERT INTO files (id, owner, purpose, filename, state, lines, created_at, updated_at) "  # noqa: S608  # the words are ours
            f"SELECT 'file-' || substr(id, 7) || '-{kind}', owner, 'batch_output', id || '_{kind}.jsonl', 'counting', {lines}, "
            "COALESCE(completed_at, expired_at, cancelled_at, created_at), 0 FROM batches "
            "WHERE endpoint IN ('/v1/chat/completions', '/v1/completions') "
            f"AND status IN ('completed', 'expired', 'cancelled') AND {lines} > 0"
        )


def downgrade() -> None:
    op.execute("DELETE FROM files WHERE purpose = 'batch_output'")
    op.drop_index("ix_files_counting", table_name="files")
