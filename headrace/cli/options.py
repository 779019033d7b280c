"""Options that several commands share, parsed once into the values that the rooms use. Raises `InvalidRequest` naming the option."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from headrace.config import GenerationConfig, PytorchEngineConfig
from headrace.errors import InvalidRequest
from headrace.settings import Settings
from headrace.stack import DEFAULT_STATE_DIR, read_urls

DEFAULT_URL = "http://127.0.0.1:8000"
MAX_PORT = 65535


def add_state_dir(command: argparse.ArgumentParser) -> None:
    """Add --state-dir."""
    command.add_argument(
        "--state-dir",
        type=Path,
        default=DEFAULT_STATE_DIR,
        help="where the embedded stack keeps its state (default: .headrace)",
    )


def add_database(command: argparse.ArgumentParser) -> None:
    """Add what names a database without a running server."""
    command.add_argument("--database-url", help="default: HEADRACE_DATABASE_URL, else SQLite in the state directory")
    add_state_dir(command)


def database_url(arguments: argparse.Namespace) -> str:
    """Return the database's URL: what was given, what the operator set, or the one of the stack on the state directory."""
    if arguments.database_url or is_set("HEADRACE_DATABASE_URL"):
        return arguments.database_url or settings_of().database_url
    return f"sqlite:///{arguments.state_dir.absolute()}/headrace.db"


def add_json(command: argparse.ArgumentParser) -> None:
    """Add --json."""
    command.add_argument("--json", action="store_true", help="print JSON for machines")


def add_gen_config(command: argparse.ArgumentParser) -> None:
    """Add --gen-config."""
    command.add_argument("--gen-config", metavar="JSON", help="fields of GenerationConfig as a JSON object, or @FILE")


def add_server(command: argparse.ArgumentParser) -> None:
    """Add what a client needs to find its server."""
    command.add_argument("--url", help=f"the API (default: the stack that runs on --state-dir, else {DEFAULT_URL})")
    command.add_argument("--api-key", help="default: HEADRACE_API_KEY")
    add_state_dir(command)


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def port(text: str) -> int:
    """Parse a TCP port; 0 means a free one."""
    value = int(text)
    if not 0 <= value <= MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {MAX_PORT}")
    return value


def check_output(output: Path | None, *, source: Path | None = None) -> None:
    """Make the folder of the answers; raise `InvalidRequest` before any work where they would go into a directory or over the prompts."""
    if output is None:
        return
    if output.is_dir():
        raise InvalidRequest(f"-o {output} is a directory; name a file", param="-o")
    if source is not None and output.exists() and source.exists() and output.samefile(source):
        raise InvalidRequest(f"-o {output} is the input, which the answers would replace; name another file", param="-o")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"-o {output}: its folder can't be made: {error.strerror}", param="-o") from None
    if not os.access(output.parent, os.W_OK):
        raise InvalidRequest(f"-o {output}: its folder can't be written to; name another", param="-o")


def read_object(option: str, text: str | None) -> dict[str, Any]:
    """Return a JSON object given as text or as @FILE; empty for None."""
    if text is None:
        return {}
    try:
        value = json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
    except OSError as error:
        raise InvalidRequest(f"{option}: {text[1:]} can't be read: {error.strerror}", param=option) from None
    except ValueError as error:
        raise InvalidRequest(f"{option} is not JSON: {error}", param=option) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{option} must be a JSON object, not {type(value).__name__}", param=option)
    return value


def gen_config(arguments: argparse.Namespace) -> GenerationConfig:
    """Return the config of --gen-config."""
    return GenerationConfig.from_dict(read_object("--gen-config", arguments.gen_config))


def engine_config(text: str | None) -> PytorchEngineConfig:
    """Return the config of --engine-config (or of HEADRACE_ENGINE_CONFIG)."""
    return PytorchEngineConfig.for_batches(read_object("--engine-config", text))


def checked_engine_fields(text: str) -> dict[str, Any]:
    """Return the object of --engine-config as it was given, once `engine_config` takes it: a worker tells what was said from what was not."""
    engine_config(text)
    return read_object("--engine-config", text)


def server_url(arguments: argparse.Namespace) -> str:
    """Return the API's base URL: what was given, the stack on the state directory, or the usual port."""
    return str(arguments.url or read_urls(arguments.state_dir).get("api") or DEFAULT_URL).rstrip("/")


def is_set(name: str) -> bool:
    """Whether an operator set this variable to something."""
    return bool(os.environ.get(name))


def settings_of(**changes: Any) -> Settings:
    """Return this process's settings with what the command line changes (None: unchanged)."""
    from dataclasses import replace

    from headrace.settings import get_settings

    return replace(get_settings(), **{name: value for name, value in changes.items() if value is not None})
