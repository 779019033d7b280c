"""The `headrace` command. `headrace.cli:main` is its entry; what each command does stands in the module named after it."""

from headrace.cli.entry import main, parser

__all__ = ["main", "parser"]
