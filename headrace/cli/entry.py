"""The command line: parsing, exit codes, and how an error is told.

Exit codes: 0 done, 1 failed (the message says what to do), 2 the command line or the input is wrong, 130 interrupted.
No module here loads torch: commands that need the engine start it in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from headrace import __version__
from headrace.cli import batches, demo, doctor, ending, job, keys, services, up
from headrace.errors import HeadraceError, InvalidRequest, Unauthorized


def parser() -> argparse.ArgumentParser:
    """Return the whole command line; every command's namespace carries its function as `run`."""
    root = argparse.ArgumentParser(
        prog="headrace",
        description="Asynchronous batch inference: prompts in, every answer out, exactly once.",
        epilog="Settings come from HEADRACE_* variables: docs/environment.md lists them.",
    )
    root.add_argument("--version", action="version", version=f"headrace {__version__}")
    root.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (demo, up, job, batches, ending, keys, services, doctor):
        module.add_commands(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never raises but for --help and a malformed command line (SystemExit)."""
    arguments = parser().parse_args(argv)
    name = f"headrace {arguments.command}"
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        _say(f"{name}: {getattr(arguments, 'interrupted', 'interrupted')}")
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; without this Python complains once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except HeadraceError as error:
        hint = " Here: HEADRACE_API_KEY, or --api-key." if isinstance(error, Unauthorized) else ""
        _say(f"{name}: {error.message}{hint}")
        return 2 if isinstance(error, InvalidRequest) else 1
    except OSError as error:
        _say(f"{name}: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return 1
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        _say(
            f"{name}: unexpected {type(error).__name__}: {error}. This is a bug in headrace; `headrace --debug ...` shows where"
        )
        return 1


def _say(text: str) -> None:
    print(text, file=sys.stderr)
