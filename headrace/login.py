"""The login of the Flower that a stack starts: the operator's own, or one that is made once and kept in a file.

Flower shows what runs where, and with a login its buttons can stop workers: it is nobody's who merely has an account on this machine.
This module knows no process and no HTTP.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Final

VARIABLE: Final = "FLOWER_BASIC_AUTH"
"""Flower's own variable: `user:password`, several with commas between them."""
USER: Final = "headrace"


def path_in(state_dir: Path) -> Path:
    """Return where a made login is kept."""
    return state_dir / "flower-login"


def given() -> str | None:
    """Return the operator's own login."""
    return os.environ.get(VARIABLE) or None


def login_of(state_dir: Path) -> str:
    """Return `user:password`: the operator's, else the one in the file, which is made (readable by its owner alone) if it isn't there."""
    if (own := given()) is not None:
        return own
    path = path_in(state_dir)
    with contextlib.suppress(FileNotFoundError):
        # Before it is read: a copy of the folder may have been given wider permissions.
        path.chmod(0o600)
        if found := path.read_text(encoding="utf-8").strip():
            return found
        path.unlink()
    made = f"{USER}:{secrets.token_urlsafe(18)}"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(made + "\n")
    return made
