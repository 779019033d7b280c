"""What an operator sets: the HEADRACE_* environment, read once, constant for a process. docs/environment.md lists it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from headrace.crash import check_crash_at
from headrace.errors import InvalidRequest
from headrace.log import check_level

MAX_CHUNK_SIZE: Final = 256
"""Most prompts in a chunk: it is one message in Redis and what one worker computes again after a crash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Field `x_y` is read from HEADRACE_X_Y; the comment under each field says what it is."""

    home: Path = Path("~/.cache/headrace")
    """Where the default model is cached after its one conversion."""
    # URLs and the key are left out of repr: a settings object in a traceback or a log line must not tell a password.
    database_url: str = field(default="sqlite:///.headrace/headrace.db", repr=False)
    """SQLAlchemy URL; sqlite:///PATH or postgresql+psycopg://user:password@host/name."""
    redis_url: str = field(default="redis://127.0.0.1:6379/0", repr=False)
    model: str = "smollm2"
    """Model of this worker: a local directory, a hub id, or 'smollm2' for the default model from its wheel."""
    models: str = ""
    """Comma-separated models that the API accepts; empty: `model` alone."""
    engine_config: str = "{}"
    """JSON object with the fields of PytorchEngineConfig for this worker; without a `max_batch_size` it goes by the device."""
    engine_frontend: str = "engine.frontend:Frontend"
    """Which engine the worker loads, as `module:name` of a class with `worker.host.EngineFrontend`'s methods."""
    engine_stall_s: float = 900.0
    """An engine with prompts in it that made no step for so long counts as stuck: its worker hands its chunks on and ends."""
    worker_concurrency: int = 64
    """Most chunks in flight in one worker: threads of its Celery pool. It takes another while its engine has room for more prompts."""
    chunk_size: int = 64
    """Prompts in a chunk, 1..256."""
    dispatch_window: int = 64
    """Most chunks of one model that wait in Redis or run at one time; where many run, a quarter as many wait. The rest waits in SQL."""
    visibility_timeout_s: float = 60.0
    """After so long without a renewal, Redis delivers a chunk again."""
    lease_s: float = 30.0
    """After so long without a renewal, a worker's claim on a chunk is void."""
    reconcile_interval_s: float = 5.0
    """How often SQL is compared with what is in flight."""
    requeue_grace_s: float = 15.0
    """A chunk that was sent but not claimed for so long is sent again."""
    drain_timeout_s: float = 30.0
    """On SIGTERM running chunks may finish for so long; then their rest is handed back."""
    flush_rows: int = 64
    """Completions that are written in one transaction, at most `flush_interval_s` late."""
    flush_interval_s: float = 0.5
    spool_dir: Path = Path(".headrace/spool")
    """Where a worker keeps answers that the database can't take."""
    spool_bytes: int = 256 * 1024 * 1024
    """Most that one worker keeps there; then it computes no more until the database is back."""
    max_body_bytes: int = 256 * 1024 * 1024
    """Largest request body that the API reads."""
    max_file_bytes: int = 4 * 1024**3
    """Largest file that may be uploaded; it is stored as it arrives, in the database."""
    max_prompt_bytes: int = 1024 * 1024
    """Largest single prompt (UTF-8); a larger one is that prompt's error."""
    max_prompts: int = 1_000_000
    """Most prompts in one batch."""
    max_open_prompts: int = 20_000_000
    """While so many prompts of all batches wait for an answer, further batches are refused with 429."""
    max_database_bytes: float = math.inf
    """While the database is larger, new batches are refused with 507; inf: never."""
    min_free_bytes: int = 256 * 1024 * 1024
    """While SQLite's disk has less space left, new batches are refused with 507: what is accepted must find room for its answers."""
    retention_s: float = math.inf
    """Batches that have been over for so long are deleted with their results; inf: never."""
    api_key: str = field(default="", repr=False)
    """When set, /v1 needs `Authorization: Bearer <key>`."""
    log_level: str = "INFO"
    crash_at: str = ""
    """For tests: a point of `headrace.crash` at which a worker kills itself."""

    @property
    def served_models(self) -> tuple[str, ...]:
        """The models that the API accepts."""
        return tuple(name.strip() for name in self.models.split(",") if name.strip()) or (self.model,)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read HEADRACE_*; raise `InvalidRequest` naming a variable that is unknown or malformed."""
        specs = {f"HEADRACE_{spec.name.upper()}": spec for spec in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, text in environ.items():
            if not name.startswith("HEADRACE_"):
                continue
            spec = specs.get(name)
            if spec is None:
                raise InvalidRequest(
                    f"{name} is not a setting of headrace; the settings are {', '.join(sorted(specs))}", param=name
                )
            kind: Any = Path if isinstance(spec.default, Path) else type(spec.default)
            try:
                values[spec.name] = kind(text)
            except ValueError:
                raise InvalidRequest(f"{name}={text!r} is not a {kind.__name__}", param=name) from None
            if kind in (int, float) and not values[spec.name] > 0:  # `not >` refuses nan too
                raise InvalidRequest(f"{name} must be above 0, not {text}", param=name)
        for spec in specs.values():
            if isinstance(spec.default, Path):
                values[spec.name] = Path(values.get(spec.name, spec.default)).expanduser()
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        """Refuse what would otherwise show as a service that starts and then fails at every request."""
        try:
            check_level(self.log_level)
        except InvalidRequest as error:
            raise InvalidRequest(f"HEADRACE_LOG_LEVEL: {error.message}", param="HEADRACE_LOG_LEVEL") from None
        if self.chunk_size > MAX_CHUNK_SIZE:
            raise InvalidRequest(
                f"HEADRACE_CHUNK_SIZE must be from 1 to {MAX_CHUNK_SIZE}, not {self.chunk_size}", param="HEADRACE_CHUNK_SIZE"
            )
        check_crash_at(self.crash_at)
        check_redis_url(self.redis_url, name="HEADRACE_REDIS_URL")

    def to_environ(self) -> dict[str, str]:
        """Return the variables from which `from_environ` reads these settings in a child process."""
        return {f"HEADRACE_{spec.name.upper()}": str(getattr(self, spec.name)) for spec in dataclasses.fields(self)}


def check_redis_url(url: str, *, name: str) -> None:
    """Raise `InvalidRequest` naming the setting or option `name` unless `url` is redis://… or rediss://… (its password isn't shown)."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("redis", "rediss") and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise InvalidRequest(f"{name} must be a URL such as redis://:password@host:6379/0", param=name)


@cache
def get_settings() -> Settings:
    """Return this process's settings."""
    return Settings.from_environ(os.environ)
