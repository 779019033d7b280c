"""`headrace up`: the whole service on one machine until Ctrl-C. What a stack is made of stands in `headrace.stack`."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

from headrace import login
from headrace.cli import console, options
from headrace.ports import port_or_free
from headrace.settings import check_redis_url
from headrace.stack import Stack, StackOptions, redis_trouble


def add_commands(commands: Any) -> None:
    """Add `up`."""
    command = commands.add_parser(
        "up",
        help="run the whole service on this machine: Redis, worker, API, Flower",
        description="Run the whole service on this machine until Ctrl-C: Redis, SQLite, a worker, the API and Flower. What is kept, and the logs, lie in --state-dir.",
    )
    add_stack_options(command)
    command.add_argument("--host", default="127.0.0.1", help="where the API listens (default: %(default)s)")
    command.add_argument("--port", type=options.port, help="the API's port (default: 8000, or a free one when that is taken)")
    command.add_argument(
        "--flower-port", type=options.port, help="Flower's port (default: 5555, or a free one when that is taken)"
    )
    command.add_argument("--redis-port", type=options.port, default=0, help="the embedded Redis's port (default: a free one)")
    command.add_argument("--no-flower", action="store_true", help="leave Flower out")
    command.set_defaults(run=run)


def add_stack_options(command: argparse.ArgumentParser) -> None:
    """Add what `up` and `demo` share."""
    options.add_state_dir(command)
    command.add_argument("--model", help="a Hugging Face directory, a hub id or 'smollm2' (default: HEADRACE_MODEL)")
    command.add_argument("--engine-config", metavar="JSON", help="fields of PytorchEngineConfig as a JSON object, or @FILE")
    command.add_argument("--database-url", help="default: HEADRACE_DATABASE_URL, else SQLite in the state directory")
    command.add_argument("--redis-url", help="default: HEADRACE_REDIS_URL, else a Redis of the stack's own")
    command.add_argument(
        "--worker-concurrency",
        type=options.positive,
        help="most chunks in flight in the worker (default: HEADRACE_WORKER_CONCURRENCY)",
    )


def stack_options(arguments: argparse.Namespace, **changes: Any) -> StackOptions:
    """Return the stack that the command line and the environment describe."""
    if arguments.redis_url:
        check_redis_url(arguments.redis_url, name="--redis-url")
    engine = None if arguments.engine_config is None else json.dumps(options.checked_engine_fields(arguments.engine_config))
    return StackOptions(
        settings=options.settings_of(
            model=arguments.model,
            engine_config=engine,
            database_url=arguments.database_url,
            redis_url=arguments.redis_url,
            worker_concurrency=arguments.worker_concurrency,
        ),
        state_dir=arguments.state_dir,
        embedded_database=not (arguments.database_url or options.is_set("HEADRACE_DATABASE_URL")),
        embedded_redis=not (arguments.redis_url or options.is_set("HEADRACE_REDIS_URL")),
        **changes,
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the stack until it is asked to stop."""
    stack = Stack(
        stack_options(
            arguments,
            host=arguments.host,
            api_port=port_or_free(8000, arguments.host) if arguments.port is None else arguments.port,
            flower_port=port_or_free(5555) if arguments.flower_port is None else arguments.flower_port,
            redis_port=arguments.redis_port,
            flower=not arguments.no_flower,
        )
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stack.request_stop())
    with spinner() as report:
        stack.start(report)
    urls = stack.urls
    console.say(f"API     {urls.api}/docs")
    if urls.flower:
        where = login.VARIABLE if login.given() else f"{login.path_in(arguments.state_dir)} (user:password)"
        console.say(f"Flower  {urls.flower}, login: {where}")
    password = f", password: {arguments.state_dir}/redis/login.conf" if stack.options.embedded_redis else ""
    console.say(
        f"Redis   {hide_password(urls.redis)}{password}\nSQL     {hide_password(urls.database)}\nlogs    {arguments.state_dir}/logs\nCtrl-C stops all of it."
    )
    if trouble := redis_trouble(urls.redis):
        console.say(
            f"Redis does not answer ({trouble}): batches are stored and wait until it does; check --redis-url (or HEADRACE_REDIS_URL)"
        )
    try:
        stack.supervise(console.say)
    finally:
        stack.stop(console.say)
    console.say("stopped; the database and the queue are kept in " + str(arguments.state_dir))
    return 0


class Steps:
    """Shows the step at work: one changing line on a terminal (until `stop`), lines elsewhere."""

    def __init__(self) -> None:
        self._status: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()

    def __call__(self, step: str) -> None:
        """Show this step."""
        if self._status is None:
            console.say(step)
        else:
            self._status.update(step)

    def stop(self) -> None:
        """Go back to lines."""
        if self._status is not None:
            self._status.stop()
            self._status = None


@contextlib.contextmanager
def spinner() -> Iterator[Steps]:
    """Give a function that shows the step at work."""
    steps = Steps()
    try:
        yield steps
    finally:
        steps.stop()


def hide_password(url: str) -> str:
    """Return a database's or a broker's URL that may be shown. Redis takes a password without a user: `redis://:password@host`."""
    return re.sub(r"([?&]password=)[^&#]*", r"\1***", re.sub(r"(://[^:/@]*):[^/]*@", r"\1:***@", url))


@contextlib.contextmanager
def interrupted_once() -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM interrupt the block; later ones must not interrupt the clearing up."""

    def interrupt(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
