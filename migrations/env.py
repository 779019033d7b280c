"""Alembic's entry: on the connection that `Store.migrate` hands over, or on HEADRACE_DATABASE_URL for the `alembic` command."""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import Connection

from headrace.settings import Settings
from headrace.store.session import Database
from headrace.store.tables import metadata


def run(connection: Connection) -> None:
    """Migrate on `connection`, inside its transaction (SQLite's DDL is transactional when nobody commits in between)."""
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    """Pick the connection, or only print the SQL (`--sql`)."""
    url = os.environ.get("HEADRACE_DATABASE_URL", str(Settings().database_url))
    if context.is_offline_mode():
        context.configure(url=url, target_metadata=metadata, literal_binds=True, render_as_batch=True)
        with context.begin_transaction():
            context.run_migrations()
        return
    connection = context.config.attributes.get("connection")
    if connection is not None:
        run(connection)
    else:
        Database(url).change_schema(run)


main()
