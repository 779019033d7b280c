"""The logins of what a stack starts: Flower's, the operator's own or one that is made once and kept in a file, and Redis's password.

Flower shows what runs where, and with a login its buttons can stop workers; whoever writes to Redis can make workers compute: neither
is for everybody who has an account on this machine.
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
    """Return `user:password`: the operator's, else the one in the file, which is made if it isn't there."""
    if (own := given()) is not None:
        return own
    path = path_in(state_dir)
    if (found := kept(path)) is None:
        keep(path, found := f"{USER}:{secrets.token_urlsafe(18)}")
    return found


def kept(path: Path) -> str | None:
    """Return the secret in this file; None when there is none."""
    with contextlib.suppress(FileNotFoundError):
        # Before it is read: a copy of the folder may have been given wider permissions.
        path.chmod(0o600)
        return path.read_text(encoding="utf-8").strip() or None
    return None


def keep(path: Path, secret: str) -> None:
    """Write the secret to a new file that its owner alone can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(secret + "\n")
