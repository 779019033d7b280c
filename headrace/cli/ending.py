"""`retry` and `delete`: what is done with batches that are over."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from headrace.batch import Batch
from headrace.cli import console, options
from headrace.cli.batches import client_of, exit_code, show_batch, wait_with_progress
from headrace.errors import Conflict, InvalidRequest


def add_commands(commands: Any) -> None:
    """Add both commands."""
    retry = commands.add_parser(
        "retry", help="make a new batch of a finished one's failed prompts; answers are not computed again"
    )
    retry.add_argument("batch_id")
    retry.add_argument("--wait", action="store_true", help="wait for the new batch's end, with progress")
    retry.add_argument(
        "--idempotency-key", help="sending the same retry under the same key again returns the first one's batch"
    )
    retry.set_defaults(run=run_retry)

    delete = commands.add_parser("delete", help="delete batches that are over, with their prompts and answers, for good")
    delete.add_argument("batch_id", nargs="+")
    delete.add_argument("--yes", action="store_true", help="don't ask")
    delete.set_defaults(run=run_delete)
    for command in (retry, delete):
        options.add_server(command)
        options.add_json(command)


def run_retry(arguments: argparse.Namespace) -> int:
    """Compute again what failed."""
    with client_of(arguments) as client:
        batch = client.retry(arguments.batch_id, idempotency_key=arguments.idempotency_key)
        if not arguments.wait:
            show_batch(batch, as_json=arguments.json)
            return 0
        console.say(batch.id)
        batch = wait_with_progress(client, batch)
        show_batch(batch, as_json=arguments.json)
        return exit_code(batch)


def run_delete(arguments: argparse.Namespace) -> int:
    """Delete batches after a look at each."""
    with client_of(arguments) as client:
        # All are looked at before one is deleted: a wrong id among ten must not leave half of them gone.
        found = [client.get(batch_id) for batch_id in dict.fromkeys(arguments.batch_id)]
        running = [batch.id for batch in found if not batch.status.is_terminal]
        if running:
            raise Conflict(
                f"nothing was deleted: {', '.join(running)} is not over; cancel it first (headrace cancel {running[0]})"
            )
        if not (arguments.yes or _agreed(found)):
            console.say("nothing was deleted")
            return 1
        for batch in found:
            client.delete(batch.id)
            console.say(f"{batch.id} is deleted")
    if arguments.json:
        console.out_json([{"id": batch.id, "deleted": True} for batch in found])
    return 0


def _agreed(found: list[Batch]) -> bool:
    """Show what would go and ask. Without a terminal nobody can answer."""
    if not sys.stdin.isatty():
        raise InvalidRequest("delete asks before it deletes, and there is no terminal to ask on; give --yes", param="--yes")
    for batch in found:
        console.say(f"{batch.id}: {batch.status}, {batch.counts.completed} answers, {batch.counts.failed} errors")
    print(
        f"Delete {len(found)} batch{'es' if len(found) > 1 else ''} with all prompts and answers, for good? [y/N] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")
