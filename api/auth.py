"""The optional API key: when the operator sets one, everything under /v1 needs it. Knows no route."""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import Annotated

from fastapi import Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.services import ServicesDep
from headrace.errors import Unauthorized

_bearer = HTTPBearer(auto_error=False, description="The server's HEADRACE_API_KEY; not needed where none is set.")


async def require_key(services: ServicesDep, given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]) -> None:
    """Raise `Unauthorized` unless the request carries the key. Runs before the body is read."""
    wanted = services.settings.api_key
    if not wanted:
        return
    token = "" if given is None else given.credentials
    # Digests have one length, and compare_digest takes the same time wherever they differ: the key can't be guessed by the clock.
    if not hmac.compare_digest(_digest(token), _digest(wanted)):
        raise Unauthorized


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogateescape")).digest()
