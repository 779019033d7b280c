"""Migrations add up to the tables, on SQLite and PostgreSQL, and can be run by anybody from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text
from store_driver import check, submit, take, work_off

from headrace.batch import BatchStatus
from headrace.errors import StoreUnavailable
from headrace.store import Store
from headrace.store.schema import ROOT, alembic_config
from headrace.store.session import Database
from headrace.store.tables import metadata


def differences(database: Database) -> list[Any]:
    """Return what autogenerate would put into a next revision."""

    def compare(connection: Connection) -> list[Any]:
        options = {"compare_type": True, "compare_server_default": True}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    return database.read(compare)


def partial_indexes(database: Database) -> dict[str, str]:
    """Return the condition of each partial index, as the database tells it (autogenerate doesn't compare these)."""

    def read(connection: Connection) -> dict[str, str]:
        found = {}
        for table in metadata.tables:
            for index in inspect(connection).get_indexes(table):
                where = index.get("dialect_options", {}).get(f"{connection.dialect.name}_where")
                if where is not None:
                    found[str(index["name"])] = str(where)
        return found

    return database.read(read)


def tables(database: Database) -> set[str]:
    return set(database.read(lambda connection: inspect(connection).get_table_names()))


def test_the_migrations_end_where_the_tables_are(store: Store) -> None:
    assert differences(store._database) == []
    indexes = {
        index.name
        for table in metadata.tables.values()
        for index in table.indexes
        if index.dialect_options["sqlite"]["where"] is not None
    }
    assert set(partial_indexes(store._database)) == indexes != set()


def test_the_comparison_can_fail(store: Store) -> None:
    store._database.write(lambda connection: connection.execute(text("DROP INDEX ix_chunks_unsent")))
    store._database.write(lambda connection: connection.execute(text("ALTER TABLE workers ADD COLUMN extra INTEGER")))
    assert len(differences(store._database)) == 2


def test_partial_indexes_have_the_tables_conditions(store: Store) -> None:
    made = partial_indexes(store._database)
    for table in metadata.tables.values():
        table_indexes = {index.name: index for index in table.indexes}
        for name in made.keys() & table_indexes.keys():
            wanted = str(table_indexes[name].dialect_options["sqlite"]["where"])
            words = set(wanted.replace("(", " ").replace(")", " ").replace(",", " ").replace("'", " ").split()) - {"IN"}
            assert all(word in made[name] for word in words), (name, made[name])


def test_down_and_up_again(store: Store) -> None:
    database = store._database
    database.change_schema(lambda connection: command.downgrade(alembic_config(connection), "base"))
    assert tables(database) == {"alembic_version"}
    with pytest.raises(StoreUnavailable, match="headrace migrate"):
        store.check_schema()
    store.migrate()
    store.check_schema()
    assert differences(database) == []
    batch = submit(store, 4)
    work_off(store, take(store))
    assert check(store, batch.id).status is BatchStatus.COMPLETED


def test_rows_of_the_first_release_live_through_0002_and_back(store: Store) -> None:
    database = store._database
    database.change_schema(lambda connection: command.downgrade(alembic_config(connection), "0001"))
    row = {
        **dict.fromkeys(("model", "gen_config", "metadata", "idempotency_key"), "{}"), "endpoint": "/v1/batches",
        "completion_window": "24h", "priority": 3, "status": "in_progress", "created_at": 1.0, "expires_at": 9e9, "updated_at": 1.0,
    }  # fmt: skip
    names = ", ".join(row)
    insert = text(f"INSERT INTO batches (id, {names}) VALUES ('batch_{'0' * 32}', {', '.join(':' + name for name in row)})")
    database.write(lambda connection: connection.execute(insert, row))
    store.migrate()
    old = "SELECT owner, lane, turn, reserved, priority, idempotency_key FROM batches"
    assert tuple(database.read(lambda connection: connection.execute(text(old)).one())) == (None, "", 0.0, 0, 3, "{}")
    assert [batch.id for batch in store.list_batches()] == [f"batch_{'0' * 32}"]
    database.change_schema(lambda connection: command.downgrade(alembic_config(connection), "0001"))
    assert database.read(lambda connection: connection.execute(text("SELECT priority FROM batches")).scalars().all()) == [3]
    columns = database.read(lambda connection: {column["name"] for column in inspect(connection).get_columns("batches")})
    assert columns.isdisjoint({"owner", "lane", "turn", "reserved"})


def test_the_answers_of_batches_that_were_over_before_are_listed(store: Store) -> None:
    made = {}
    for endpoint in ("/v1/chat/completions", "/v1/batches"):
        made[endpoint] = submit(store, 2, endpoint=endpoint).id
        work_off(store, take(store))
    submit(store, 2, endpoint="/v1/chat/completions")  # not over
    listed = [(file.id, file.purpose, file.lines, file.is_counted) for file in store.files.list()]
    store._database.change_schema(lambda connection: command.downgrade(alembic_config(connection), "0004"))
    assert store.files.list() == []
    store.migrate()
    assert [(file.id, file.purpose, file.lines, file.is_counted) for file in store.files.list()] == listed
    assert [row[0] for row in listed] == [f"file-{made['/v1/chat/completions'].removeprefix('batch_')}-output"]


def test_a_worker_of_this_release_starts_on_the_schema_of_the_next(store: Store) -> None:
    """A rolling update migrates first; a worker that is restarted meanwhile must not wait for its old schema to come back."""
    store._database.write(lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    store.check_schema()


def test_migrating_again_changes_nothing(store: Store) -> None:
    batch = submit(store, 4)
    store.migrate()
    assert check(store, batch.id).counts.total == 4


def test_several_may_migrate_at_once(store_url: str) -> None:
    def migrate(_: int) -> None:
        with Store(store_url, create=True) as store:
            store.check_schema()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, range(4)))


def test_a_migration_that_fails_leaves_nothing_behind(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic.operations import Operations

    original = Operations.create_table

    def breaks(self: Operations, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "prompts":
            raise RuntimeError("the power went")
        return original(self, name, *args, **kwargs)

    database = Database(store_url)
    with monkeypatch.context() as patch:
        patch.setattr("alembic.op.create_table", lambda *args, **kwargs: breaks(_operations(), *args, **kwargs))
        with pytest.raises(RuntimeError, match="the power went"):
            Store(store_url).migrate()
    assert tables(database) == set()
    database.close()
    with Store(store_url, create=True) as store:
        store.check_schema()


def _operations() -> Any:
    from alembic.op import _proxy  # type: ignore[attr-defined]

    return _proxy


def test_the_history_is_one_line() -> None:
    script = ScriptDirectory.from_config(alembic_config())
    assert len(script.get_heads()) == len(script.get_bases()) == 1


def test_the_alembic_command_reads_the_same_settings(store_url: str, tmp_path: Path) -> None:
    """`alembic upgrade head` in the checkout; `Store.migrate` from elsewhere finds nothing left to do."""
    environ = {**os.environ, "HEADRACE_DATABASE_URL": store_url}
    alembic = [sys.executable, "-m", "alembic"]
    done = subprocess.run([*alembic, "upgrade", "head"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    script = f"from headrace.store import open_store; open_store({store_url!r}, create=True).close()"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={**environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_the_sql_can_be_printed() -> None:
    environ = {**os.environ, "HEADRACE_DATABASE_URL": "postgresql+psycopg://nobody@nowhere/db"}
    command_line = [sys.executable, "-m", "alembic", "upgrade", "head", "--sql"]
    done = subprocess.run(command_line, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CREATE TABLE completions" in done.stdout
