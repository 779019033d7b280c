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
    # Servers hand header bytes over as Latin-1. Digests have one length, and compare_digest takes the same time wherever they differ:
    # the key can't be guessed by the clock.
    token = b"" if given is None else given.credentials.encode("latin-1")
    if not hmac.compare_digest(sha256(token).digest(), sha256(wanted.encode()).digest()):
        raise Unauthorized
