"""API keys, who owns a batch, and what fair sharing counts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None

_RUNNING = sa.text("status = 'in_progress'")
_QUEUED = sa.text("state = 'queued'")
_UNSENT = sa.text("state = 'queued' AND sent_at IS NULL")
_BATCH_COLUMNS = ("owner", "lane", "turn", "reserved")


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=16), server_default=sa.text("'user'"), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.Column("last_used_at", sa.Double(), nullable=True),
        sa.Column("max_active_prompts", sa.BigInteger(), nullable=True),
        sa.Column("max_active_batches", sa.Integer(), nullable=True),
        sa.Column("weight", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("hash", name=op.f("uq_api_keys_hash")),
    )
    op.create_table(
        "lanes",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("lane", sa.String(length=64), nullable=False),
        sa.Column("began", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("ended", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("clock", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("passed_over", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("model", "priority", "lane", name=op.f("pk_lanes")),
    )
    op.add_column("batches", sa.Column("owner", sa.String(length=64), nullable=True))
    op.add_column("batches", sa.Column("lane", sa.String(length=64), server_default=sa.text("''"), nullable=False))
    op.add_column("batches", sa.Column("turn", sa.Double(), server_default=sa.text("0"), nullable=False))
    op.add_column("batches", sa.Column("reserved", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.create_index("ix_batches_owner_created_at_id", "batches", ["owner", "created_at", "id"])
    op.create_index(
        "ix_batches_turn",
        "batches",
        ["model", "priority", "lane", "turn", "created_at", "id"],
        sqlite_where=_RUNNING,
        postgresql_where=_RUNNING,
    )
    op.drop_index("ix_chunks_queued", table_name="chunks")
    op.create_index("ix_chunks_unsent", "chunks", ["batch_id", "number"], sqlite_where=_UNSENT, postgresql_where=_UNSENT)


def downgrade() -> None:
    op.drop_index("ix_chunks_unsent", table_name="chunks")
    op.create_index(
        "ix_chunks_queued",
        "chunks",
        ["model", "rank", "created_at", "batch_id", "number"],
        sqlite_where=_QUEUED,
        postgresql_where=_QUEUED,
    )
    op.drop_index("ix_batches_turn", table_name="batches")
    op.drop_index("ix_batches_owner_created_at_id", table_name="batches")
    # Not batch_alter_table: it would build the table anew, and SQLite drops single columns by itself.
    for name in reversed(_BATCH_COLUMNS):
        op.drop_column("batches", name)
    op.drop_table("lanes")
    op.drop_table("api_keys")
