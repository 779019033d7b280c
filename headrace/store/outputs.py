"""Completions with the names of their prompts, as stored: what output files are made of.

Every function works inside the caller's transaction. Formats are not known here.
"""

from __future__ import annotations

from sqlalchemy import Connection, select

from headrace.batch import OutputKind, OutputRow
from headrace.store.tables import completions, prompts


def page(connection: Connection, batch_id: str, kind: OutputKind, *, after: int, limit: int) -> list[OutputRow]:
    """Return up to `limit` rows with an index above `after`, by index: the answers, or the errors."""
    columns = completions.c
    is_wanted = columns.error_code.is_(None) if kind == "output" else columns.error_code.is_not(None)
    rows = connection.execute(
        select(
            columns.index, columns.error_code, columns.prompt_tokens, columns.cached_tokens, columns.completion_tokens,
            columns.recorded_at, columns.body,
        )
        .where(columns.batch_id == batch_id, columns.index > after, is_wanted)
        .order_by(columns.index)
        .limit(limit)
    ).all()  # fmt: skip
    if not rows:
        return []
    indexes = [row[0] for row in rows]
    # Two ranges of one table each: a join of the two is at the mercy of statistics that a new batch has none of.
    named = select(prompts.c.index.label("position"), prompts.c.custom_id).where(prompts.c.batch_id == batch_id)
    if indexes[-1] - indexes[0] < 4 * len(indexes):
        named = named.where(prompts.c.index >= indexes[0], prompts.c.index <= indexes[-1])
    else:
        named = named.where(prompts.c.index.in_(indexes))
    names = {row.position: row.custom_id for row in connection.execute(named)}
    return [OutputRow(row[0], names.get(row[0]), *row[1:]) for row in rows]
