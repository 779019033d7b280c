"""A batch's rows in the order of their index, a page at a time.

`ORDER BY index LIMIT 500` alone lets PostgreSQL fetch every row behind the page and sort them, which it does where its statistics
don't know the batch yet (measured: 35 ms a page of a batch of 100,000, ten times that of a million). So a page is read in ranges of the
index: whatever the plan, no more rows are touched than the range has.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Column, Connection, Row, Select, select

from headrace.store.tables import batches

_GROWTH: Final = 4
"""So much wider is each further range of a page: what is far apart (three errors in a million rows) is found in a few."""
_LAST_INDEX: Final = 2**31 - 1


def read_page(
    connection: Connection, query: Select[Any], index: Column[int], *, batch_id: str, after: int, limit: int
) -> list[Row[*tuple[Any, ...]]]:
    """Return up to `limit` rows of `query`, which is about one batch, with an `index` above `after`, by index."""
    total = connection.execute(select(batches.c.total).where(batches.c.id == batch_id)).scalar()
    # 0: not all of its prompts are stored yet, and those that were refused have completions already.
    stop = total or _LAST_INDEX
    rows: list[Row[*tuple[Any, ...]]] = []
    start, width = after + 1, limit
    while start < stop and len(rows) < limit:
        end = min(start + width, stop)
        found = query.where(index >= start, index < end).order_by(index).limit(limit - len(rows))
        rows += connection.execute(found).all()
        start, width = end, width * _GROWTH
    return rows
