"""Who calls: the key of a request, and what it may see. Knows no route.

The door is open while the operator set no HEADRACE_API_KEY and made no key; from the first key on everything under /v1 needs one.
HEADRACE_API_KEY is the operator's own key: it sees every batch and file, as a key of the role 'admin' does. A key of the role
'user' sees its own, and of others' it learns nothing, not even that they exist.
"""

from __future__ import annotations

import hmac
import logging
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.services import Services, ServicesDep
from headrace.batch import no_such_batch
from headrace.errors import Unauthorized

log = logging.getLogger(__name__)

_bearer = HTTPBearer(
    auto_error=False,
    description="A key of `headrace keys create`, or the server's HEADRACE_API_KEY; not needed where there is none.",
)
MISSING = "You didn't provide an API key; send it in the header `Authorization: Bearer YOUR_KEY`."
WRONG = "Incorrect API key provided; it is unknown or was revoked. The operator of this server makes keys with `headrace keys create`."


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent the request."""

    owner: str | None
    """The id of its API key, which owns what it creates; None: the operator's own key, or no key where none is asked for."""
    sees_all: bool

    @property
    def scope(self) -> str | None:
        """The owner whose batches and files it may see; None: everybody's."""
        return None if self.sees_all else self.owner


OPERATOR = Caller(owner=None, sees_all=True)


def require_key(
    request: Request, services: ServicesDep, given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Caller:
    """Return the caller. Raises `Unauthorized` where a key is asked for and none that is known came. Runs before the body is read."""
    # Servers hand header bytes over as Latin-1.
    token = None if given is None else given.credentials.encode("latin-1")
    if token is not None and _is_operators(services, token):
        return OPERATOR
    if token is not None and services.asks_for_keys():
        key = services.store.keys.authenticate(token.decode("utf-8", "surrogateescape"))
        if key is not None:
            # Imported late with the store: importing the API opens nothing and loads no SQL.
            from headrace.store import Role

            return Caller(owner=key.id, sees_all=key.role is Role.ADMIN)
    elif not services.asks_for_keys():
        return OPERATOR
    log.info(
        "a request %s was refused",
        "with a wrong key" if token else "without a key",
        extra={"event": "key_refused", "path": request.url.path, "request_id": request.scope.get("headrace.request_id")},
    )
    raise Unauthorized(MISSING if token is None else WRONG)


def _is_operators(services: Services, token: bytes) -> bool:
    wanted = services.settings.api_key
    if not wanted:
        return False
    # Digests have one length, and compare_digest takes the same time wherever they differ: the key can't be guessed by the clock.
    return hmac.compare_digest(sha256(token).digest(), sha256(wanted.encode()).digest())


CallerDep = Annotated[Caller, Depends(require_key)]
"""Parameter type of a handler that needs to know who calls."""


def check_owner(services: Services, caller: Caller, batch_id: str) -> None:
    """Raise the `NotFound` of a batch that doesn't exist where it is another's: 403 would tell that the id is right."""
    if caller.scope is not None and services.store.owner_of(batch_id) != caller.scope:
        raise no_such_batch(batch_id)
