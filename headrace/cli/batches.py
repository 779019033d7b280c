"""`submit`, `status`, `results`, `cancel`: a running server from the command line, through `headrace.client.Client`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.batch import Batch
from headrace.cli import batch_files, console, options
from headrace.completion import CompletionError
from headrace.dataset import Row, output_row, read_rows
from headrace.errors import InvalidRequest

if TYPE_CHECKING:
    from headrace.client import Client
    from headrace.completion import Completion

MAX_SHOWN = 5


def add_commands(commands: Any) -> None:
    """Add the four commands."""
    submit = commands.add_parser("submit", help="send a JSONL file (or --prompt) to a running server as one batch")
    submit.add_argument(
        "input",
        nargs="?",
        type=Path,
        help="JSONL file: strings, objects with prompt or messages, or OpenAI's batch format; a large one is uploaded",
    )
    submit.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    submit.add_argument("--model", help="default: the server's first")
    options.add_gen_config(submit)
    submit.add_argument("--metadata", metavar="JSON", help="up to 16 pairs of texts")
    submit.add_argument("--priority", type=int, default=0, help="higher is served first (default: %(default)s)")
    submit.add_argument(
        "--completion-window",
        default="24h",
        metavar="TIME",
        help="what is not answered by then expires: 90s, 15m, 24h, 7d (default: %(default)s)",
    )
    submit.add_argument("--idempotency-key", help="sending the same batch under the same key again returns the first one")
    submit.add_argument("--wait", action="store_true", help="wait for the end, with progress")
    submit.add_argument("-o", "--output", type=Path, help="with --wait: write the answers here as JSONL")
    submit.set_defaults(run=run_submit)

    status = commands.add_parser("status", help="show one batch, or the newest ones")
    status.add_argument("batch_id", nargs="?")
    status.add_argument("--wait", action="store_true", help="wait for the batch's end, with progress")
    status.add_argument("--limit", type=options.positive, default=20, help="how many batches to list (default: %(default)s)")
    status.set_defaults(run=run_status)

    results = commands.add_parser("results", help="print the answers of a batch as JSONL, in the input's order")
    results.add_argument("batch_id")
    results.add_argument("-o", "--output", type=Path, help="write them to a file instead")
    results.add_argument("--follow", action="store_true", help="wait for answers that are not there yet")
    results.add_argument("--after", type=int, default=-1, metavar="INDEX", help="start behind this index")
    results.set_defaults(run=run_results)

    cancel = commands.add_parser("cancel", help="stop a batch; what is answered stays")
    cancel.add_argument("batch_id")
    cancel.set_defaults(run=run_cancel)
    for command in (submit, status, results, cancel):
        options.add_server(command)
        options.add_json(command)


@contextlib.contextmanager
def client_of(arguments: argparse.Namespace) -> Iterator[Client]:
    """Give a client of the server that the command line names."""
    from headrace.client import Client
    from headrace.settings import get_settings

    with Client(
        options.server_url(arguments), api_key=arguments.api_key or get_settings().api_key or None, max_retries=3
    ) as client:
        yield client


def run_submit(arguments: argparse.Namespace) -> int:
    """Send a batch."""
    if arguments.output and not arguments.wait:
        raise InvalidRequest(
            "-o needs --wait: without it the answers are not there yet (later: headrace results BATCH_ID -o FILE)", param="-o"
        )
    options.check_output(arguments.output, source=arguments.input)
    if arguments.input and (endpoint := batch_files.endpoint_of(arguments.input)) is not None:
        return _submit_file(arguments, endpoint)
    rows = [*(read_rows(arguments.input) if arguments.input else ()), *_typed(arguments.prompt)]
    if not rows:
        raise InvalidRequest("there is nothing to send: name a JSONL file or give --prompt", param="input")
    refuse_bad_rows(rows)
    with client_of(arguments) as client:
        batch = client.submit(
            [row.prompt for row in rows if not isinstance(row.prompt, CompletionError)],
            options.gen_config(arguments),
            model=arguments.model,
            metadata=options.read_object("--metadata", arguments.metadata) or None,
            priority=arguments.priority,
            completion_window=arguments.completion_window,
            idempotency_key=arguments.idempotency_key,
        )
        if not arguments.wait:
            if any(row.custom_id is not None for row in rows):
                console.say("the custom_ids stay in the file: answers have indexes, which count its rows from 0")
            show_batch(batch, as_json=arguments.json)
            return 0
        console.say(batch.id)
        batch = wait_with_progress(client, batch)
        if arguments.output:
            write_results(arguments.output, client.results(batch.id), [row.custom_id for row in rows])
        show_batch(batch, as_json=arguments.json)
        return exit_code(batch)


def _submit_file(arguments: argparse.Namespace, endpoint: str) -> int:
    with client_of(arguments) as client:
        batch = batch_files.submit(client, arguments, endpoint)
        if not arguments.wait:
            show_batch(batch, as_json=arguments.json)
            return 0
        console.say(batch.id)
        batch = wait_with_progress(client, batch)
        # Nothing of a file that is wrong as a whole was answered.
        if arguments.output and batch.counts.total:
            write_lines(arguments.output, batch_files.lines_of(client, batch, arguments.input))
        show_batch(batch, as_json=arguments.json)
        return exit_code(batch)


def _typed(prompts: Sequence[str]) -> Iterator[Row]:
    for index, prompt in enumerate(prompts):
        yield Row(index=index, line=0, custom_id=None, prompt=prompt)


def refuse_bad_rows(rows: Iterable[Row]) -> None:
    """Raise `InvalidRequest` for lines that are no prompts, each reason once: a server would refuse the whole body for them."""
    lines: dict[str, list[int]] = {}
    for row in rows:
        if isinstance(row.prompt, CompletionError):
            lines.setdefault(row.prompt.message, []).append(row.line)
    if lines:
        named = "; ".join(f"{_lines(numbers)}: {reason}" for reason, numbers in list(lines.items())[:MAX_SHOWN])
        more = f"; and {len(lines) - MAX_SHOWN} other reasons" if len(lines) > MAX_SHOWN else ""
        raise InvalidRequest(f"nothing was sent, because of {named}{more}", param="input")


def _lines(numbers: Sequence[int]) -> str:
    """Return `line 2`, or `lines 2, 3, 4 and 97 more`."""
    shown = ", ".join(str(number) for number in numbers[:MAX_SHOWN])
    more = f" and {len(numbers) - MAX_SHOWN} more" if len(numbers) > MAX_SHOWN else ""
    return f"line{'s' if len(numbers) > 1 else ''} {shown}{more}"


def run_status(arguments: argparse.Namespace) -> int:
    """Show one batch or a list."""
    with client_of(arguments) as client:
        if arguments.batch_id is None:
            batches = list(islice(client.list(page_size=min(arguments.limit, 100)), arguments.limit))
            if arguments.json:
                console.out_json([batch_dict(batch) for batch in batches])
            else:
                rows = [
                    (b.id, console.moment(b.created_at), b.status, f"{b.counts.done}/{b.counts.total}", b.counts.failed,
                     b.usage.completion_tokens, b.model)
                    for b in batches
                ]  # fmt: skip
                console.out(console.table(("BATCH", "CREATED", "STATUS", "DONE", "FAILED", "TOKENS", "MODEL"), rows))
            return 0
        batch = client.get(arguments.batch_id)
        if arguments.wait:
            batch = wait_with_progress(client, batch)
        show_batch(batch, as_json=arguments.json)
        return exit_code(batch) if arguments.wait else 0


def run_results(arguments: argparse.Namespace) -> int:
    """Print or write the answers."""
    options.check_output(arguments.output)
    with client_of(arguments) as client:
        completions = client.results(arguments.batch_id, after=arguments.after, follow=arguments.follow)
        if arguments.output:
            count = write_results(arguments.output, completions)
            console.say(f"{arguments.output}: {count} rows")
            return 0
        for completion in completions:
            print(json.dumps(output_row(completion), ensure_ascii=False))
        sys.stdout.flush()
    return 0


def run_cancel(arguments: argparse.Namespace) -> int:
    """Stop a batch."""
    with client_of(arguments) as client:
        show_batch(client.cancel(arguments.batch_id), as_json=arguments.json)
    return 0


def wait_with_progress(client: Client, batch: Batch) -> Batch:
    """Wait for the batch's end with a bar or lines; who interrupts it is told that the batch goes on."""
    try:
        return _wait(client, batch)
    except KeyboardInterrupt:
        console.say(
            f"{batch.id} goes on: `headrace status {batch.id} --wait` waits for it again, `headrace cancel {batch.id}` stops it"
        )
        raise


def _wait(client: Client, batch: Batch) -> Batch:
    # Not Client.wait: it asks as seldom as the server wishes, and a bar that moves every ten seconds looks stuck.
    with console.progress(batch.id[:14], batch.counts.total) as bar:
        while True:
            rate = "" if batch.tokens_per_second is None else f"{batch.tokens_per_second:.0f} tok/s · "
            failed = f"{batch.counts.failed} failed · " if batch.counts.failed else ""
            left = f"{console.seconds(batch.eta_s)} left" if batch.eta_s else str(batch.status)
            bar.update(batch.counts.done, total=batch.counts.total, note=f"{rate}{failed}{left}")
            if batch.status.is_terminal:
                return batch
            time.sleep(1.0)
            batch = client.get(batch.id)


def write_results(path: Path, completions: Iterable[Completion], custom_ids: Sequence[str | None] = ()) -> int:
    """Write the rows as `write_lines` does."""

    def line(completion: Completion) -> str:
        custom_id = custom_ids[completion.index] if completion.index < len(custom_ids) else None
        return json.dumps(output_row(completion, custom_id), ensure_ascii=False)

    return write_lines(path, map(line, completions))


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write the lines in one piece and return how many; a file that is there stays as it was until the last line is written."""
    scratch = path.with_name(f".{path.name}.tmp")
    count = 0
    try:
        with scratch.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(line + "\n")
                count += 1
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return count


def batch_dict(batch: Batch) -> dict[str, Any]:
    """Return the batch object of the API."""
    from headrace.schemas import BatchOut

    return BatchOut.of(batch).model_dump(mode="json")


def show_batch(batch: Batch, *, as_json: bool) -> None:
    """Print one batch."""
    if as_json:
        console.out_json(batch_dict(batch))
        return
    counts, usage = batch.counts, batch.usage
    rows = [
        ("batch", batch.id),
        ("status", batch.status),
        ("model", batch.model),
        ("created", console.moment(batch.created_at)),
        ("prompts", f"{counts.total}: {counts.completed} answered, {counts.failed} failed, {counts.total - counts.done} open"),
        (
            "tokens",
            f"{usage.prompt_tokens} prompt ({usage.cached_tokens} from the prefix cache), {usage.completion_tokens} generated",
        ),
        ("rate", "" if batch.tokens_per_second is None else f"{batch.tokens_per_second:.1f} generated tokens a second"),
    ]
    if batch.eta_s and not batch.status.is_terminal:
        rows.append(("left", console.seconds(batch.eta_s)))
    if batch.expires_at is not None and not batch.status.is_terminal:
        rows.append(("expires", console.moment(batch.expires_at)))
    rows += [("error", _told(error)) for error in batch.errors[:MAX_SHOWN]]
    if len(batch.errors) > MAX_SHOWN:
        rows.append(("error", f"and {len(batch.errors) - MAX_SHOWN} more (--json shows them)"))
    console.out("\n".join(f"{name:8} {value}" for name, value in rows if value))


def _told(error: Mapping[str, Any]) -> str:
    place = "" if error.get("line") is None else f"line {error['line']}: "
    return f"{place}{error.get('message')}"


def exit_code(batch: Batch) -> int:
    """Return 0 when the batch ran to its end and something in it was answered."""
    return 0 if batch.status == "completed" and batch.counts.completed else 1
