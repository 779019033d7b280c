"""A whole service of real processes whose worker has the real engine, on a tiny random model: Redis, a database, the API, one worker."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from servers import PostgresServer, RedisServer, free_port
from service import Service
from tiny_models import save_tiny_model
from worker_process import HeadraceProcess, wait_for

from headrace.client import Client
from headrace.settings import Settings

HARSH = str(Path(__file__).with_name("harsh_engine.py"))
ENGINE: Mapping[str, Any] = {
    "session_len": 256, "num_gpu_blocks": 512, "block_size": 16, "max_batch_size": 32, "tp": 1, "device": "cpu",
}  # fmt: skip


class TinyService:
    """Used as a context manager: everything is up inside, and nothing of it is left after."""

    def __init__(
        self,
        folder: Path,
        *,
        database: str = "sqlite",
        engine: Mapping[str, Any] = ENGINE,
        environ: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """`database`: 'postgres' or 'sqlite'; `environ`: for the worker and its engine; `settings`: fields of `Settings`."""
        self.folder = folder
        self._database = database
        self._engine = engine
        self._environ = dict(environ or {})
        self._settings = settings
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            model = self.folder / "tiny-llama"
            if not model.exists():
                save_tiny_model(model)
            self.redis = stack.enter_context(RedisServer())
            self.postgres = stack.enter_context(PostgresServer()) if self._database == "postgres" else None
            url = f"sqlite:///{self.folder}/headrace.db"
            if self.postgres is not None:
                url = stack.enter_context(self.postgres.database())
            self.settings = Settings(
                model=str(model), engine_config=json.dumps(self._engine), database_url=url, redis_url=self.redis.url,
                home=self.folder, **self._settings,
            )  # fmt: skip
            self.service = Service(self.settings, self.folder)
            stack.callback(self.service.close)
            self._start_api(stack)
            self.worker = stack.enter_context(self.service.worker(environ=self._environ))
            self.service.ready(self.worker, timeout_s=120)
            self._exits = stack.pop_all()
        return self

    def _start_api(self, stack: contextlib.ExitStack) -> None:
        port = free_port()
        arguments = ["-m", "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
        self.api = stack.enter_context(HeadraceProcess(arguments, self.settings, self.folder / "api.log"))
        self.url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(self.url), timeout_s=60, what="the API answers", process=self.api)
        self.client = stack.enter_context(Client(self.url, max_retries=40, timeout=30))

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def engine(self) -> psutil.Process:
        """The engine's process at this moment."""
        [process] = [child for child in self.worker.children() if {"engine.rank", HARSH} & set(child.cmdline())]
        return process


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/healthz").status_code == 200
    return False
