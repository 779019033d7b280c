"""What the sweeps look for every few seconds, without a look at every batch and file that is over."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | None = None
depends_on: str | None = None

_INDEXES = (
    ("ix_batches_gone", "batches", "id", sa.text("status = 'deleting'")),
    ("ix_files_arriving", "files", "updated_at", sa.text("state = 'uploading'")),
    ("ix_files_expires_at", "files", "expires_at", sa.text("expires_at IS NOT NULL")),
)


def upgrade() -> None:
    for name, table, column, where in _INDEXES:
        op.create_index(name, table, [column], sqlite_where=where, postgresql_where=where)


def downgrade() -> None:
    for name, table, _, _ in _INDEXES:
        op.drop_index(name, table_name=table)
