"""Files: uploads in bounded parts, batches that are read from one, and prompts with a name and a config of their own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=True),
        sa.Column("purpose", sa.String(length=32), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("lines", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("parts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    op.create_index("ix_files_created_at_id", "files", ["created_at", "id"])
    op.create_index("ix_files_owner_created_at_id", "files", ["owner", "created_at", "id"])
    op.create_table(
        "file_parts",
        sa.Column("file_id", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name=op.f("fk_file_parts_file_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("file_id", "number", name=op.f("pk_file_parts")),
    )
    op.create_table(
        "ingests",
        sa.Column("batch_id", sa.String(length=64), nullable=False),
        sa.Column("file_id", sa.String(length=64), nullable=False),
        sa.Column("chunk_size", sa.Integer(), nullable=False),
        sa.Column("part", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("offset", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("line", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("rows", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("errors", sa.Text(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("epoch", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lease_until", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_ingests_batch_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("batch_id", name=op.f("pk_ingests")),
    )
    op.create_index("ix_ingests_file_id", "ingests", ["file_id"])
    op.add_column("batches", sa.Column("input_file_id", sa.String(length=64), nullable=True))
    op.add_column("batches", sa.Column("resent", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.create_index("ix_batches_input_file_id", "batches", ["input_file_id"])
    with op.batch_alter_table("prompts") as table:
        table.alter_column("body", existing_type=sa.Text(), nullable=True)
        table.add_column(sa.Column("custom_id", sa.Text(), nullable=True))
        table.add_column(sa.Column("gen_config", sa.Text(), nullable=True))


def downgrade() -> None:
    # Refused lines have a name and no prompt; before this revision they had no row.
    op.execute("DELETE FROM prompts WHERE body IS NULL")
    with op.batch_alter_table("prompts") as table:
        table.drop_column("gen_config")
        table.drop_column("custom_id")
        table.alter_column("body", existing_type=sa.Text(), nullable=False)
    op.drop_index("ix_batches_input_file_id", table_name="batches")
    op.drop_column("batches", "resent")
    op.drop_column("batches", "input_file_id")
    op.drop_table("ingests")
    op.drop_table("file_parts")
    op.drop_table("files")
