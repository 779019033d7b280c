"""The files of a batch's answers: their rows in the list of files, and the completions, with the names of prompts, that they are made of.

Every function works inside the caller's transaction. Formats are not known here, so neither are sizes: who knows them counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Row, delete, select

from headrace.batch import OUTPUT_KINDS, OutputKind, OutputRow, has_output_files, output_file_id
from headrace.store.ranges import read_page
from headrace.store.session import insert_new
from headrace.store.tables import completions, files, now, prompts

PURPOSE: Final = "batch_output"
COUNTING: Final = "counting"
COUNTED: Final = "counted"
"""In `files.state`, where an upload has other words: no query for uploads meets a file that has no parts."""


def announce(connection: Connection, batch: Row[Any]) -> None:
    """List the files of a batch that is over, their sizes to be counted. A second time changes nothing."""
    if not has_output_files(batch.endpoint):
        return
    lines: dict[OutputKind, int] = {"output": batch.completed, "errors": batch.failed}
    rows = [
        {"id": output_file_id(batch.id, kind), "owner": batch.owner, "purpose": PURPOSE, "filename": f"{batch.id}_{kind}.jsonl",
         "state": COUNTING, "lines": lines[kind]}
        for kind in OUTPUT_KINDS if lines[kind]
    ]  # fmt: skip
    for row in rows:
        # Touched never: whoever looks for work takes it at once.
        connection.execute(insert_new(connection, files).values(**row, created_at=now(), updated_at=0.0))


def forget(connection: Connection, batch_id: str) -> None:
    """Take the files of a batch out of the list."""
    connection.execute(delete(files).where(files.c.id.in_([output_file_id(batch_id, kind) for kind in OUTPUT_KINDS])))


def page(connection: Connection, batch_id: str, kind: OutputKind, *, after: int, limit: int) -> list[OutputRow]:
    """Return up to `limit` rows with an index above `after`, by index: the answers, or the errors."""
    columns = completions.c
    is_wanted = columns.error_code.is_(None) if kind == "output" else columns.error_code.is_not(None)
    query = select(
        columns.index, columns.error_code, columns.prompt_tokens, columns.cached_tokens, columns.completion_tokens,
        columns.recorded_at, columns.body,
    ).where(columns.batch_id == batch_id, is_wanted)  # fmt: skip
    rows = read_page(connection, query, columns.index, batch_id=batch_id, after=after, limit=limit)
    names = names_of(connection, batch_id, [row[0] for row in rows])
    return [OutputRow(row[0], names.get(row[0]), *row[1:]) for row in rows]


def names_of(connection: Connection, batch_id: str, indexes: Sequence[int]) -> dict[int, str]:
    """Return, by index, what their sender calls those of the prompts at the ascending `indexes` that have a name."""
    if not indexes:
        return {}
    # A range of its own table: a join with the completions is at the mercy of statistics that a new batch has none of.
    named = select(prompts.c.index.label("position"), prompts.c.custom_id).where(
        prompts.c.batch_id == batch_id, prompts.c.custom_id.is_not(None)
    )
    if indexes[-1] - indexes[0] < 4 * len(indexes):
        named = named.where(prompts.c.index >= indexes[0], prompts.c.index <= indexes[-1])
    else:
        named = named.where(prompts.c.index.in_(indexes))
    return {row.position: row.custom_id for row in connection.execute(named)}
