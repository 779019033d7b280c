"""`keys`: who may call the API. Works on the database itself, so it needs no running server and no key."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from headrace.cli import console, options

if TYPE_CHECKING:
    from headrace.store import ApiKey, Store


def add_commands(commands: Any) -> None:
    """Add `keys` and what it can do."""
    keys = commands.add_parser("keys", help="make, list and revoke API keys", description=__doc__)
    actions = keys.add_subparsers(dest="action", metavar="ACTION", required=True)

    create = actions.add_parser("create", help="make a key and show it, once")
    create.add_argument("name", help="whose it is; one key in use has it")
    create.add_argument("--max-prompts", type=options.positive, metavar="N", help="most unanswered prompts at a time")
    create.add_argument("--max-batches", type=options.positive, metavar="N", help="most batches at a time that are not over")
    create.add_argument("--max-priority", type=int, metavar="P", help="highest priority its batches may ask for (default: any)")
    create.add_argument(
        "--weight", type=options.positive, default=1, metavar="N",
        help="share of the workers beside other keys of the same priority (default: %(default)s)",
    )  # fmt: skip
    create.add_argument("--admin", action="store_true", help="it sees and changes everybody's batches and files")
    create.set_defaults(run=run_create)

    listing = actions.add_parser("list", help="show the keys, not their secrets")
    listing.add_argument("--all", action="store_true", help="revoked ones too")
    listing.set_defaults(run=run_list)

    revoke = actions.add_parser("revoke", help="shut a key out, from the next request on; its batches go on")
    revoke.add_argument("key", help="its name or id")
    revoke.set_defaults(run=run_revoke)
    for action in (create, listing, revoke):
        options.add_database(action)
        options.add_json(action)


@contextmanager
def store_of(arguments: argparse.Namespace, *, create: bool = False) -> Iterator[Store]:
    """Give the store that the command line names."""
    from headrace.store import open_store

    store = open_store(options.database_url(arguments), create=create)
    try:
        yield store
    finally:
        store.close()


def run_create(arguments: argparse.Namespace) -> int:
    """Make a key."""
    from headrace.store import Role

    with store_of(arguments, create=True) as store:
        made = store.keys.create(
            arguments.name,
            role=Role.ADMIN if arguments.admin else Role.USER,
            max_active_prompts=arguments.max_prompts,
            max_active_batches=arguments.max_batches,
            max_priority=arguments.max_priority,
            weight=arguments.weight,
        )
    if arguments.json:
        console.out_json({"key": made.text, **key_dict(made.key)})
        return 0
    console.say(f"key {made.key.id} for {made.key.name}. It is shown this once; only its hash is stored:")
    console.out(made.text)
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    """Show the keys."""
    with store_of(arguments) as store:
        keys = [key for key in store.keys.list() if arguments.all or key.revoked_at is None]
    if arguments.json:
        console.out_json([key_dict(key) for key in keys])
        return 0
    columns = (
        "ID", "NAME", "KEY", "ROLE", "MAX PROMPTS", "MAX BATCHES", "MAX PRIORITY", "WEIGHT", "MADE", "LAST USED", "REVOKED",
    )  # fmt: skip
    rows = [
        (key.id, key.name, f"{key.prefix}…", key.role, key.max_active_prompts or "-", key.max_active_batches or "-",
         "-" if key.max_priority is None else key.max_priority, key.weight, _day(key.created_at), _day(key.last_used_at), _day(key.revoked_at))
        for key in keys
    ]  # fmt: skip
    console.out(console.table(columns, rows))
    return 0


def run_revoke(arguments: argparse.Namespace) -> int:
    """Shut a key out."""
    with store_of(arguments) as store:
        key = store.keys.revoke(arguments.key)
    if arguments.json:
        console.out_json(key_dict(key))
    else:
        console.say(f"{key.name} ({key.id}) is shut out")
    return 0


def key_dict(key: ApiKey) -> dict[str, Any]:
    """Return what --json prints of a key."""
    return dataclasses.asdict(key)


def _day(at: float | None) -> str:
    return "-" if at is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(at))
