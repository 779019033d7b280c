"""A spool on disk: answers that SQL could not take yet, for the case that their worker dies before it can.

One file for each worker process, made when it is first needed and gone when SQL has its rows. What is in it:

    HEADRACE-SPOOL {"format": 1, "store": "…", "worker": "…"}       the store and the schema that the rows belong to
    <crc32, 8 hex digits> <length> {"claim": {…}, "completions": [{…}, …]}          rows of one claim; as many lines as there are

A line is good when its length and its checksum are: a record that a crash has torn is passed over, and so is one that a disk has
damaged. Lines are appended in one write and synced before anybody relies on them; what a full disk has cut short is cut off again.
The owner holds a lock on its file. A file without an owner is a dead worker's, and the next worker that starts on the host takes it up
(`orphans`); one of another store, schema or format is left alone.

This module knows no SQL, no Celery and no engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, Final

from headrace.completion import Completion
from headrace.errors import InvalidRequest
from headrace.store import Claim

log = logging.getLogger(__name__)

FORMAT: Final = 1
SUFFIX: Final = ".spool"
_MAGIC: Final = b"HEADRACE-SPOOL "
_LINE: Final = re.compile(rb"([0-9a-f]{8}) ([0-9]{1,12}) (.*)", re.DOTALL)

Entry = tuple[Claim, Sequence[Completion]]


class SpoolFull(Exception):
    """The rows could not be put on disk; the message says why. None of them is there."""


class Spool:
    """The file of one worker process. Thread-safe; nothing is written before the first `append`."""

    def __init__(self, folder: Path, *, store: str, worker: str, max_bytes: int) -> None:
        """Make `folder` (mode 0700); `store` is `Store.mark`. Raise `InvalidRequest` when the folder can't be used."""
        self.path = prepare(folder) / (re.sub(r"[^A-Za-z0-9.-]+", "_", worker) + SUFFIX)
        self._header = _MAGIC + json.dumps({"format": FORMAT, "store": store, "worker": worker}).encode() + b"\n"
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # Set while the file is there.
        self._file: int | None = None
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes in the file; 0: there is none."""
        return self._size

    def append(self, entries: Iterable[Entry]) -> None:
        """Put rows on disk, and return when they are there. Raise `SpoolFull` when there is no room."""
        lines = b"".join(_line(claim, completions) for claim, completions in entries)
        with self._lock:
            new = lines if self._file is not None else self._header + lines
            if self._size + len(new) > self._max_bytes:
                raise SpoolFull(f"{self._size + len(new)} bytes are more than HEADRACE_SPOOL_BYTES={self._max_bytes}")
            try:
                self._write(new)
            except OSError as error:
                raise SpoolFull(f"{self.path}: {error.strerror}") from error

    def _write(self, data: bytes) -> None:
        is_new = self._file is None
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            _write_all(self._file, data)
            os.fsync(self._file)
            if is_new:
                _sync_folder(self.path.parent)
        except OSError:
            # Half a line would swallow the next one.
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            if is_new:
                self._remove()
            raise
        self._size += len(data)

    def clear(self) -> None:
        """Remove the file: SQL has its rows. No-op when there is none."""
        with self._lock:
            if self._file is not None:
                self._remove()

    def close(self) -> None:
        """Let go of the file and leave it to the next worker. No-op when there is none."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file, self._size = None, 0

    def _remove(self) -> None:
        assert self._file is not None
        # Before the lock is given up: whoever gets it finds that the name is gone. A file that can't be removed is read once more
        # by the next worker, which changes nothing.
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._file)
        self._file, self._size = None, 0


class Orphan:
    """A spool whose worker is dead, locked while it is looked at."""

    def __init__(self, path: Path, file: int, *, worker: str) -> None:
        """`file` is open at `path` and locked."""
        self.path = path
        self.worker = worker
        self.damaged = 0
        """Lines that were torn or damaged, as far as `entries` has come; the rows in them are computed again."""
        self._file = file

    def entries(self) -> Iterator[Entry]:
        """Yield what is in it, with one line in memory."""
        self.damaged = 0
        with _reader(self._file) as lines:
            lines.readline()  # the header
            for line in lines:
                entry = _parse(line.removesuffix(b"\n"))
                if entry is None:
                    self.damaged += 1
                else:
                    yield entry


def prepare(folder: Path) -> Path:
    """Make the folder, for its owner's eyes only, and return it. Raise `InvalidRequest` when that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o077:
            # Answers are as private as the database. Not ours to change: it may be /tmp.
            trouble: str | None = "it is open to other users; name one that isn't there yet, or `chmod 700` it"
        else:
            trouble = None if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else "it can't be written"
    except OSError as error:
        trouble = error.strerror or "it is not reachable"
    if trouble is not None:
        raise InvalidRequest(f"HEADRACE_SPOOL_DIR={folder} can't be used: {trouble}", param="HEADRACE_SPOOL_DIR")
    return folder


@contextlib.contextmanager
def orphans(folder: Path, *, store: str) -> Iterator[list[Orphan]]:
    """Yield the spools of dead workers of `store` (its `mark`), which nobody else takes up meanwhile.

    The caller removes those whose rows it has written.
    """
    held: list[int] = []
    found: list[Orphan] = []
    try:
        for path in sorted(folder.glob("*" + SUFFIX)):
            file = _lock_orphan(path)
            if file is None:
                continue
            held.append(file)
            orphan = _look_at(path, file, store)
            if orphan is not None:
                found.append(orphan)
        yield found
    finally:
        for file in held:
            os.close(file)


def _lock_orphan(path: Path) -> int | None:
    """Return the open file; None when it is a living worker's, or has just been removed by one."""
    with contextlib.suppress(OSError):  # also another user's file, and a file system without locks
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            return None
        if os.fstat(file).st_nlink:
            return file
        os.close(file)
    return None


def _look_at(path: Path, file: int, store: str) -> Orphan | None:
    with _reader(file) as lines:
        header = lines.readline()
    if not header.endswith(b"\n"):
        # Its worker died over the first line: nothing was promised of such a file.
        return Orphan(path, file, worker="")
    try:
        about = json.loads(header.removeprefix(_MAGIC)) if header.startswith(_MAGIC) else {}
    except ValueError:
        about = {}
    if isinstance(about, dict) and about.get("format") == FORMAT and about.get("store") == store:
        return Orphan(path, file, worker=str(about.get("worker")))
    log.warning(
        "the answers in %s are of another database or release: they are left there for a worker of it, and computed again elsewhere", path,
        extra={"event": "spool_foreign", "path": str(path)},
    )  # fmt: skip
    return None


def _reader(file: int) -> BinaryIO:
    """Return a reader from the start that leaves `file` open, and with it the lock."""
    reader = os.fdopen(os.dup(file), "rb")
    reader.seek(0)
    return reader


def _line(claim: Claim, completions: Sequence[Completion]) -> bytes:
    data = {"claim": asdict(claim), "completions": [completion.to_dict() for completion in completions]}
    body = json.dumps(data, separators=(",", ":")).encode()
    return b"%08x %d %s\n" % (zlib.crc32(body), len(body), body)


def _parse(line: bytes) -> Entry | None:
    match = _LINE.fullmatch(line)
    if match is None or int(match[2]) != len(match[3]) or int(match[1], 16) != zlib.crc32(match[3]):
        return None
    try:
        data = json.loads(match[3])
        return Claim(**data["claim"]), [Completion.from_dict(item) for item in data["completions"]]
    except (
        ValueError,
        KeyError,
        TypeError,
    ):  # of a release that forgot to raise FORMAT: a worker must not fail to start for it
        return None


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
