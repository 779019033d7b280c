"""`submit` of a file that is sent as it is: one in OpenAI's batch format, or one that is too large to be read here whole.

The server reads it; what is wrong with its lines shows in the batch. Knows no other command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from headrace.batch import CHAT, ROWS, TEXT, Batch
from headrace.cli import console, options
from headrace.dataset import MAX_LINE_BYTES, output_row, read_rows
from headrace.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from headrace.client import Client

LARGE_BYTES: Final = 8 * 1024 * 1024
"""A file of this size is uploaded; the prompts of a smaller one are checked here and sent in the request."""


def endpoint_of(path: Path) -> str | None:
    """Return the endpoint for which a file is to be uploaded, None for one that is sent in the request. Raises `NotFound`."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            first = next((line for line in iter(lambda: file.readline(MAX_LINE_BYTES), b"") if line.strip()), b"")
    except OSError as error:
        raise NotFound(f"{path} can't be read: {error.strerror}") from error
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and {"custom_id", "url", "body"} <= value.keys():
        if value["url"] not in (CHAT, TEXT):
            raise InvalidRequest(f"{path} is for {value['url']!r}; a batch is for {CHAT} or {TEXT}", param="input")
        return str(value["url"])
    return ROWS if size >= LARGE_BYTES else None


def submit(client: Client, arguments: argparse.Namespace, endpoint: str) -> Batch:
    """Upload the file, with progress where that takes a while, and make a batch of it."""
    path: Path = arguments.input
    if arguments.prompt:
        raise InvalidRequest(
            f"{path} is uploaded as it is; send the prompts of --prompt as a batch of their own", param="--prompt"
        )
    if endpoint != ROWS and arguments.gen_config:
        raise InvalidRequest(
            f"each line of {path} has sampling parameters of its own; leave --gen-config out", param="--gen-config"
        )
    size = path.stat().st_size

    def send(on_progress: Callable[[int], None] | None = None) -> Batch:
        return client.submit_file(
            path,
            options.gen_config(arguments) if endpoint == ROWS else None,
            endpoint=endpoint,
            model=arguments.model,
            metadata=options.read_object("--metadata", arguments.metadata) or None,
            priority=arguments.priority,
            completion_window=arguments.completion_window,
            idempotency_key=arguments.idempotency_key,
            on_progress=on_progress,
        )

    if not size >> 20:  # sent before one could look, and "0/0 MiB" says nothing
        return send()
    with console.progress(f"uploading {path.name}, MiB", size >> 20) as bar:
        return send(lambda sent: bar.update(sent >> 20))


def lines_of(client: Client, batch: Batch, source: Path) -> Iterator[str]:
    """Yield the lines of the answers: OpenAI's output and then errors, or rows in the order of the file with its custom_ids."""
    if batch.endpoint != ROWS:
        for file_id in (batch.file_id("output"), batch.file_id("errors")):
            yield from () if file_id is None else client.file_content(file_id)
        return
    for row, completion in zip(read_rows(source), client.results(batch.id), strict=False):
        yield json.dumps(output_row(completion, row.custom_id), ensure_ascii=False)
