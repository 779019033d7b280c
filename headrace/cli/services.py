"""The single services (`worker`, `api`, `migrate`) and `bench`: each becomes the program it names, in the checkout's root."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from headrace.cli import console, options
from headrace.errors import NotFound
from headrace.stack import ROOT, api_arguments, worker_arguments

if TYPE_CHECKING:
    from headrace.settings import Settings


def add_commands(commands: Any) -> None:
    """Add the four commands."""
    worker = commands.add_parser("worker", help="run one worker in the foreground (settings: HEADRACE_*)")
    worker.add_argument("--model", help="a Hugging Face directory, a hub id or 'smollm2' (default: HEADRACE_MODEL)")
    worker.add_argument("celery", nargs="*", help="further options of `celery worker`, after --")
    worker.set_defaults(run=run_worker)

    api = commands.add_parser("api", help="run the API in the foreground (settings: HEADRACE_*)")
    api.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    api.add_argument("--port", type=options.port, default=8000, help="default: %(default)s")
    api.add_argument("uvicorn", nargs="*", help="further options of uvicorn, after --")
    api.set_defaults(run=run_api)

    migrate = commands.add_parser("migrate", help="bring the database's tables up to this release (HEADRACE_DATABASE_URL)")
    migrate.set_defaults(run=run_migrate)

    bench = commands.add_parser("bench", help="run a benchmark from benchmarks/, after the tests of what it measures")
    bench.add_argument("name", nargs="?", help="without a name: list them")
    bench.add_argument(
        "--untested", action="store_true", help="skip the tests (the figure then says nothing about correct code)"
    )
    bench.add_argument("arguments", nargs="*", help="arguments of the benchmark, after --")
    bench.set_defaults(run=run_bench)


def become(arguments: list[str], environ: dict[str, str]) -> NoReturn:
    """Replace this process by `python ARGUMENTS`, so that signals and exit codes are the service's own."""
    os.chdir(ROOT)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **environ})  # noqa: S606  # no shell is wanted


def environ_of(settings: Settings) -> dict[str, str]:
    """Return what the program needs of `settings` because it runs in the checkout's root: every path from here made absolute."""
    from headrace.store.session import absolute_url

    model = Path(settings.model)
    return {
        "HEADRACE_HOME": str(settings.home.absolute()),
        "HEADRACE_MODEL": str(model.resolve()) if model.is_dir() else settings.model,
        "HEADRACE_DATABASE_URL": absolute_url(settings.database_url),
        "HEADRACE_SPOOL_DIR": str(settings.spool_dir.absolute()),
    }


def run_worker(arguments: argparse.Namespace) -> NoReturn:
    """Become a Celery worker."""
    settings = options.settings_of(model=arguments.model)
    become([*worker_arguments(settings), *arguments.celery], environ_of(settings))


def run_api(arguments: argparse.Namespace) -> NoReturn:
    """Become the API's server."""
    environ = environ_of(options.settings_of())
    become([*api_arguments(host=arguments.host, port=arguments.port), *arguments.uvicorn], environ)


def run_migrate(_: argparse.Namespace) -> int:
    """Upgrade the schema."""
    from headrace.cli.up import hide_password
    from headrace.settings import get_settings
    from headrace.store import Store

    url = get_settings().database_url
    store = Store(url, create=True)
    store.migrate()
    store.close()
    console.say(f"{hide_password(url)} is up to date")
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    """Run a benchmark when the tests of its room are green: a fast wrong answer is worth nothing."""
    folder = ROOT / "benchmarks"
    # What several benchmarks share lies beside them and runs nothing by itself.
    names = sorted(file.stem for file in folder.glob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8"))
    if arguments.name is None:
        console.out("\n".join(names))
        return 0
    if arguments.name not in names:
        raise NotFound(f"there is no benchmark {arguments.name!r}; there are {', '.join(names) or 'none in this installation'}")
    room = ROOT / "tests" / arguments.name
    if room.is_dir() and not arguments.untested:
        console.say(f"first the tests in {room.relative_to(ROOT)}")
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", str(room)]
        if subprocess.run(tests, cwd=ROOT, check=False).returncode:  # noqa: S603  # our own command
            console.say("the tests fail, so there is nothing to measure")
            return 1
    command = [sys.executable, str(folder / f"{arguments.name}.py"), *arguments.arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode  # noqa: S603  # our own command
