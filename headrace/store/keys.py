"""API keys: made, shown once, recognised by their hash, revoked. What a key may do with a batch is said elsewhere.

A key is `hr_` and 43 characters of 256 random bits. Only its SHA-256 is stored: whoever reads the database can't call the API with
what is there, and because nobody can try 2^256 keys, one fast hash is as good as a slow one, which would cost every request
a tenth of a second. Equality is looked up by the hash, so the time that it takes tells nothing of a key.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final

from sqlalchemy import Connection, Row, or_, select, update
from sqlalchemy import text as sql

from headrace.errors import Conflict, HeadraceError, InvalidRequest, NotFound
from headrace.store.session import Database
from headrace.store.tables import api_keys, now

PREFIX: Final = "hr_"
SHOWN: Final = 9
"""Characters of a key that are stored and listed, so that its holder can tell it from others: 36 of its 256 bits."""
USED_EXACT_S: Final = 60.0
"""How exact `last_used_at` is: a write for each request would cost more than the request."""
MAX_NAME: Final = 64
MAX_WEIGHT: Final = 1000
MAX_LIMIT: Final = 2**31 - 1
MAX_PRIORITY: Final = 1000
"""As far as a batch's priority goes, up and down."""

_LOCK_KEY: Final = 0x6B657973_00000000  # "keys"


class Role(StrEnum):
    """Whose batches and files a key reaches."""

    USER = "user"
    """Its own; those of others are not found."""
    ADMIN = "admin"
    """Everybody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What is known of a key, the key itself apart. Times are Unix seconds of the database's clock."""

    id: str
    name: str
    prefix: str
    """The key's first characters."""
    role: Role
    created_at: float
    revoked_at: float | None
    last_used_at: float | None
    """To the minute."""
    max_active_prompts: int | None
    """None: no limit of its own."""
    max_active_batches: int | None
    max_priority: int | None
    """The highest priority that its batches may ask for; None: any."""
    weight: int
    """Its share of the workers beside other keys at the same priority."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key at its making: the only moment at which `text` is known."""

    text: str
    key: ApiKey


def digest(text: str) -> str:
    """Return what is stored of a key."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Keys:
    """The API keys of one store. Each call is a transaction."""

    def __init__(self, database: Database) -> None:
        """Keep `database`."""
        self._database = database

    def create(
        self,
        name: str,
        *,
        role: Role = Role.USER,
        max_active_prompts: int | None = None,
        max_active_batches: int | None = None,
        max_priority: int | None = None,
        weight: int = 1,
    ) -> NewKey:
        """Make a key. Raises `InvalidRequest` for a name or a number that can't be, and `Conflict` when a live key has the name."""
        _check(name, max_active_prompts=max_active_prompts, max_active_batches=max_active_batches, weight=weight)
        if max_priority is not None and not -MAX_PRIORITY <= max_priority <= MAX_PRIORITY:
            raise InvalidRequest(
                f"max_priority must be from {-MAX_PRIORITY} to {MAX_PRIORITY}, not {max_priority}", param="max_priority"
            )
        text = PREFIX + secrets.token_urlsafe(32)
        key_id = f"key_{secrets.token_hex(12)}"

        def work(connection: Connection) -> ApiKey:
            _keep_others_out(connection)
            alive = select(api_keys.c.id).where(api_keys.c.name == name, api_keys.c.revoked_at.is_(None))
            if connection.execute(alive).first() is not None:
                raise Conflict(f"there is a key named {name!r} already; revoke it first, or take another name")
            connection.execute(
                api_keys.insert().values(
                    id=key_id, name=name, prefix=text[:SHOWN], hash=digest(text), role=role.value, created_at=now(), weight=weight,
                    max_active_prompts=max_active_prompts, max_active_batches=max_active_batches, max_priority=max_priority,
                )
            )  # fmt: skip
            return _from_row(connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one())

        return NewKey(text, self._database.write(work, repeatable=False))

    def list(self) -> list[ApiKey]:
        """Return every key, those that were revoked too, oldest first."""
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        return self._database.read(lambda connection: [_from_row(row) for row in connection.execute(query)])

    def revoke(self, name: str) -> ApiKey:
        """Shut out the live key with this id or name, from the next request on. Its batches stay and go on. Raises `NotFound`."""

        def work(connection: Connection) -> ApiKey:
            named = or_(api_keys.c.id == name, api_keys.c.name == name)
            done = update(api_keys).where(named, api_keys.c.revoked_at.is_(None)).values(revoked_at=now()).returning(api_keys)
            row = connection.execute(done).first()
            if row is None:
                raise NotFound(
                    f"no key with the id or the name {name!r} is in use; `headrace keys list` shows them", param="key"
                )
            return _from_row(row)

        return self._database.write(work, repeatable=False)

    def authenticate(self, text: str) -> ApiKey | None:
        """Return the live key that `text` is, and note that it was used; None: there is none."""
        query = select(api_keys, (api_keys.c.last_used_at > now() - USED_EXACT_S).label("is_fresh")).where(
            api_keys.c.hash == digest(text), api_keys.c.revoked_at.is_(None)
        )
        row = self._database.read(lambda connection: connection.execute(query).first())
        if row is None:
            return None
        if not row.is_fresh:
            # A database that can't be written to now must not shut its readers out.
            with contextlib.suppress(HeadraceError):
                self._database.write(
                    lambda connection: connection.execute(
                        update(api_keys).where(api_keys.c.id == row.id).values(last_used_at=now())
                    )
                )
        return _from_row(row)

    def any(self) -> bool:
        """Whether a key was ever made: from then on the API asks for one."""
        return self._database.read(lambda connection: connection.execute(select(api_keys.c.id).limit(1)).first()) is not None


def _keep_others_out(connection: Connection) -> None:
    """Let nobody else make a key until the transaction ends: two at once would each find the name free."""
    if connection.dialect.name != "sqlite":  # whose write lock is held already
        # Not a unique index on the names of live keys: where two have one already, the migration that makes it would fail.
        connection.execute(sql("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})


def _from_row(row: Row[Any]) -> ApiKey:
    names = (
        "id", "name", "prefix", "created_at", "revoked_at", "last_used_at", "max_active_prompts", "max_active_batches",
        "max_priority", "weight",
    )  # fmt: skip
    return ApiKey(**{name: getattr(row, name) for name in names}, role=Role(row.role))


def _check(name: str, *, weight: int, **limits: int | None) -> None:
    if not (1 <= len(name) <= MAX_NAME and name.isprintable() and name == name.strip()):
        raise InvalidRequest(f"a key's name has 1 to {MAX_NAME} printable characters, and no space around it", param="name")
    if not 1 <= weight <= MAX_WEIGHT:
        raise InvalidRequest(f"weight must be from 1 to {MAX_WEIGHT}, not {weight}", param="weight")
    for what, limit in limits.items():
        if limit is not None and not 1 <= limit <= MAX_LIMIT:
            raise InvalidRequest(f"{what} must be from 1 to {MAX_LIMIT}, not {limit}", param=what)
