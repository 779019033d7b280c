"""How many prompts workers have begun with, beside how many are done: a rate without those that run is far too low at first."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | None = None
depends_on: str | None = None

_TABLES = ("batches", "chunks")


def upgrade() -> None:
    for table in _TABLES:
        op.add_column(table, sa.Column("begun", sa.BigInteger(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    for table in reversed(_TABLES):
        op.drop_column(table, "begun")
