"""How rank 0 tells the other ranks what a step computes: frames in shared memory, announced over a local socket.

Each frame is written once, whatever the number of ranks, and read where it lies. The socket carries 9 bytes a frame: it wakes a
rank that sleeps between two batches, which polling would keep a core busy for, and its end tells at once that the other side is
gone. A collective could do neither: it times out in an idle engine.

Memory and socket live in a folder that only this user may enter, and that is gone as soon as all ranks are there: nothing
is left behind, however the ranks end. Of ranks that are killed before, names are left, and no memory, until a channel is opened
a day later. Knows nothing of plans: frames are bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import struct
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, though torch's stub doesn't say so

from headrace.errors import RankLost

_PREFIX = "headrace-plans-"
_KEY = "plans"  # the store's key under which rank 0 says where the channel is
_NOTICE = struct.Struct("<QB")  # length of a frame; where it is
_SHARED, _INLINE = 0, 1
_SLOTS = 4
_SLOT_BYTES = 4 << 20
_READ = b"\x01"
_JOIN_TIMEOUT = timedelta(minutes=10)  # loading a large model from a slow disk, rank by rank
_ABANDONED_S = 86400.0  # nobody joins for so long


def lost_rank(error: object) -> RankLost:
    """Make the error for a rank that is gone, noticed by `error`."""
    return RankLost(f"a tensor-parallel rank is gone ({error}); the engine has to be started again")


def _memory() -> Path:
    """Give the place for folders: in memory where the system has such one."""
    memory = Path("/dev/shm")  # noqa: S108  # the folder made in it is this user's alone
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def _folder() -> Path:
    """Make a private folder, and remove those of ranks that were killed while they joined."""
    memory, oldest = _memory(), time.time() - _ABANDONED_S
    for left in memory.glob(f"{_PREFIX}*/"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if left.stat().st_mtime < oldest:
                shutil.rmtree(left, ignore_errors=True)  # or another user's
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=memory))


def _accept(server: socket.socket) -> socket.socket:
    """Wait for a rank, and until it has the memory open."""
    peer, _ = server.accept()
    peer.settimeout(_JOIN_TIMEOUT.total_seconds())
    if peer.recv(1) != _READ:
        peer.close()
        raise lost_rank("it went away while it joined")
    peer.settimeout(None)
    return peer


class PlanSender:
    """Rank 0's end: every frame goes to every other rank."""

    def __init__(self, store: TCPStore, *, size: int) -> None:
        """Open the channel, tell the others where, and wait for all of them."""
        self._peers: list[socket.socket] = []
        self._sent = 0
        # How many frames each rank has said that it has read.
        self._read: dict[socket.socket, int] = {}
        self._memory: mmap.mmap | None = None
        folder = _folder()
        try:
            with (folder / "plans").open("x+b") as file:
                file.truncate(_SLOTS * _SLOT_BYTES)  # zero pages take no memory until they are written
                self._memory = mmap.mmap(file.fileno(), 0)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(folder / "socket"))
                server.listen(size)
                server.settimeout(_JOIN_TIMEOUT.total_seconds())
                store.set(_KEY, str(folder))
                self._peers += [_accept(server) for _ in range(size - 1)]
        except BaseException:
            self.close()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def send(self, frame: bytes) -> None:
        """Send one frame. Raise `RankLost` where a rank is gone."""
        place = _SHARED if len(frame) <= _SLOT_BYTES else _INLINE
        notice = _NOTICE.pack(len(frame), place)
        try:
            if place == _SHARED:
                # The slot's last frame must have been read: with four slots it has been long ago.
                for peer in self._peers:
                    self._wait_for(peer, self._sent - _SLOTS + 1)
                assert self._memory is not None, "the channel is closed"
                start = self._sent % _SLOTS * _SLOT_BYTES
                self._memory[start : start + len(frame)] = frame
            for peer in self._peers:
                peer.sendall(notice if place == _SHARED else notice + frame)
        except OSError as error:
            raise lost_rank(error) from None
        self._sent += 1

    def _wait_for(self, peer: socket.socket, count: int) -> None:
        """Wait until a rank has read `count` frames."""
        while self._read.setdefault(peer, 0) < count:
            answers = peer.recv(4096)
            if not answers:
                raise ConnectionResetError("it closed the channel of plans")
            self._read[peer] += len(answers)

    @property
    def is_broken(self) -> bool:
        """Whether a rank has closed its end, which a living one never does."""
        return any(self._is_closed(peer) for peer in self._peers)

    def _is_closed(self, peer: socket.socket) -> bool:
        try:
            # Answers lie before the end of the stream: unless they are taken out, the end is never seen.
            while answers := peer.recv(4096, socket.MSG_DONTWAIT):
                self._read[peer] = self._read.get(peer, 0) + len(answers)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Close the channel, at which the other ranks end; what they haven't read is dropped. May be called twice."""
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.close()
        self._peers.clear()
        if self._memory is not None:
            self._memory.close()
            self._memory = None


class PlanReceiver:
    """Another rank's end."""

    def __init__(self, store: TCPStore) -> None:
        """Connect to rank 0."""
        folder = Path(store.get(_KEY).decode())
        with (folder / "plans").open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(folder / "socket"))
        self._socket.sendall(_READ)
        self._received = 0

    def receive(self) -> bytes | None:
        """Wait for the next frame; None when rank 0 closed the channel or is gone. An engine may idle for days between two."""
        head = self._take(_NOTICE.size)
        if head is None:
            return None
        length, place = _NOTICE.unpack(head)
        if place == _SHARED:
            start = self._received % _SLOTS * _SLOT_BYTES
            frame: bytes | None = self._memory[start : start + length]
        else:
            frame = self._take(length)
        self._received += 1
        with contextlib.suppress(OSError):  # rank 0 closed the channel behind this frame: the next call says so
            self._socket.sendall(_READ)
        return frame

    def _take(self, count: int) -> bytes | None:
        parts: list[bytes] = []
        while count:
            try:
                part = self._socket.recv(min(count, 1 << 20))
            except OSError:
                return None
            if not part:
                return None
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close the channel."""
        self._socket.close()
        self._memory.close()
