"""What a retry is made of: the failed prompts of a batch that is over, and where they came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Final

from sqlalchemy import Connection, exists, select

from headrace.batch import Batch, Item
from headrace.config import GenerationConfig
from headrace.store.batches import get
from headrace.store.ranges import read_page
from headrace.store.session import Database
from headrace.store.tables import completions, prompts

MAX_METADATA: Final = 16
_PAGE: Final = 500


def failed_prompts(database: Database, batch_id: str) -> Iterator[Item]:
    """Yield the prompts whose completion is an error, by index, with one page in memory; those refused at the rim have no body.

    Raises `NotFound` when the batch is deleted meanwhile.
    """
    after = -1
    while page := database.read(partial(_page, batch_id=batch_id, after=after)):
        yield from (item for _, item in page)
        after = page[-1][0]
    # Deleted while it was read, the old batch looks as if it ended here: half of its prompts must not pass for all of them.
    database.read(partial(get, batch_id=batch_id))


def metadata_of(old: Batch) -> dict[str, str]:
    """Return the metadata of a retry: the old ones and where they came from, if that doesn't make more than a batch may have."""
    metadata = {**old.metadata, "retry_of": old.id}
    return metadata if len(metadata) <= MAX_METADATA else dict(old.metadata)


def _page(connection: Connection, *, batch_id: str, after: int) -> list[tuple[int, Item]]:
    failed = exists().where(
        completions.c.batch_id == prompts.c.batch_id,
        completions.c.index == prompts.c.index,
        completions.c.error_code.is_not(None),
    )
    query = select(prompts.c.index, prompts.c.body, prompts.c.gen_config, prompts.c.custom_id).where(
        prompts.c.batch_id == batch_id, prompts.c.body.is_not(None), failed
    )
    rows = read_page(connection, query, prompts.c.index, batch_id=batch_id, after=after, limit=_PAGE)
    return [
        (index, Item(json.loads(body), None if config is None else GenerationConfig.from_dict(json.loads(config)), custom_id))
        for index, body, config, custom_id in rows
    ]
