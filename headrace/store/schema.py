"""The schema's version: migrated in this process, by Alembic, under a lock. It knows no table."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from headrace.errors import StoreUnavailable
from headrace.store.session import Database

ROOT: Final = Path(__file__).resolve().parents[2]
"""The checkout, which holds `migrations` and Alembic's settings in pyproject.toml."""
_LOCK_KEY: Final = 0x68656164_72616365  # "headrace"


def alembic_config(connection: Connection | None = None) -> Config:
    """Return Alembic's configuration, for any working directory; `env.py` uses `connection` when there is one."""
    if not (ROOT / "migrations" / "env.py").is_file():
        raise StoreUnavailable(f"the migrations are not in {ROOT}: migrate from a checkout of headrace")
    config = Config(toml_file=ROOT / "pyproject.toml")
    config.attributes["connection"] = connection
    return config


def migrate(database: Database) -> None:
    """Upgrade to this release's schema in one transaction; whoever comes second waits and finds nothing to do."""
    if database.is_sqlite and database.url.database:
        Path(database.url.database).parent.mkdir(parents=True, exist_ok=True)

    def once(connection: Connection) -> None:
        if not database.is_sqlite:  # SQLite's lock is the BEGIN IMMEDIATE of the transaction
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
        command.upgrade(alembic_config(connection), "head")

    database.change_schema(once)


def newest() -> str:
    """Return the version where this release's migrations end."""
    return str(ScriptDirectory.from_config(alembic_config()).get_current_head())


def check(database: Database) -> None:
    """Raise `StoreUnavailable` unless the database stands where this release's migrations end, or further on.

    Further on is a rolling update: migrations only add to what the release before works with, so its workers go on, and a killed one
    comes back. Revisions are numbers of four digits.
    """
    wanted = newest()
    found = database.read(lambda connection: MigrationContext.configure(connection).get_current_revision())
    if found is None or found < wanted:
        raise StoreUnavailable(
            f"the database's schema is {found or 'empty'}, this release needs {wanted}; run `headrace migrate`"
        )
