"""A TCP proxy that does to a connection what networks do: delay, reset, swallow packets, close late, lose a reply.

    client ──▶ Proxy.port ──▶ upstream port            with Proxy(server.port) as proxy: … proxy.url(server.url) …

It runs in a thread of its own; every method and knob may be used from any thread and takes effect on open connections too.
A black hole is one of TCP: a socket filter lets the kernel drop the packets that arrive, so nothing is acknowledged, the sender
retransmits, a connect hangs, and after `heal` all goes on where it was. (A proxy that merely reads no more still answers keepalives.)
Knows nothing of Redis, PostgreSQL or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Self, TypeVar

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP_ALL = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: return 0, "keep no byte of the packet"
_PIECE = 64 * 1024
T = TypeVar("T")


@dataclass(eq=False)
class _Link:
    """One connection of a client and the one made for it."""

    client: socket.socket
    server: socket.socket
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    # The end of what the client sent, as far as a request to look for may begin in it.
    asked: bytes = b""
    loses_reply: bool = False


class Proxy:
    """Used as a context manager. `counts` has the numbers of links made, reset, and replies dropped."""

    def __init__(self, upstream_port: int, *, seed: int = 0) -> None:
        """Stand before `upstream_port` of 127.0.0.1 (`lead_to` changes it); `port` is known at once, nothing runs before the block."""
        self.latency_s = 0.0
        """How long each piece takes, each way."""
        self.reset_share = 0.0
        """This share of the connections made from now on is reset within `reset_within_s`."""
        self.reset_within_s = 2.0
        self.close_delay_s = 0.0
        """How much later than one side closes does the other hear of it."""
        self.counts: Counter[str] = Counter()
        self._upstream_port = upstream_port
        self._draw = random.Random(seed)
        self._links: set[_Link] = set()
        self._drops_to_server = self._drops_to_client = False
        self._lost: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end)
        self._thread.join(5)

    def url(self, url: str) -> str:
        """Return a server's URL with this proxy's port."""
        return re.sub(rf":{self._upstream_port}\b", f":{self.port}", url)

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._links)

    def blackhole(self, *, to_server: bool = True, to_client: bool = True) -> None:
        """Let packets of these directions vanish, those of connects too, until `heal`."""
        self._do(lambda: self._swallow(to_server=to_server, to_client=to_client))

    def forget(self) -> int:
        """Let the packets of the connections there are vanish for ever, as a gateway does that lost its table; return how many.

        New connections are well.
        """

        def swallow() -> int:
            for link in self._links:
                _filter(link.client, drops=True)
                _filter(link.server, drops=True)
            return len(self._links)

        return self._do(swallow)

    def heal(self) -> None:
        """End every harm: packets arrive again, with what was sent meanwhile."""
        self.latency_s = self.reset_share = self.close_delay_s = 0.0
        self._lost.clear()
        self._do(lambda: self._swallow(to_server=False, to_client=False))

    def lead_to(self, upstream_port: int) -> None:
        """Lead connections to another server from now on, and reset those there are."""
        self._upstream_port = upstream_port
        self.cut()

    def cut(self, share: float = 1.0) -> int:
        """Reset this share of the connections now; return how many."""
        return self._do(lambda: sum(self._reset(link) for link in list(self._links) if self._draw.random() < share))

    def lose_reply(self, request: bytes, *, times: int = 1) -> None:
        """Let the next requests that hold these bytes through and reset the connection when their reply comes."""
        self._lost += [request] * times

    def _do(self, call: Callable[[], T]) -> T:
        """Run `call` in the proxy's thread and return what it returned."""

        async def run() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.create_task(self._accept())
        self._loop.run_forever()
        self._loop.run_until_complete(asyncio.sleep(0.01))  # lets what was cancelled end
        self._loop.close()

    def _end(self) -> None:
        for link in list(self._links):
            self._reset(link)
        for task in asyncio.all_tasks(self._loop):
            if task is not asyncio.current_task(self._loop):
                task.cancel()
        self._listener.close()
        self._loop.call_soon(self._loop.stop)

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            client.setblocking(False)
            self._loop.create_task(self._connect(client))

    async def _connect(self, client: socket.socket) -> None:
        server = socket.socket()
        server.setblocking(False)
        _filter(server, self._drops_to_client)
        try:
            await self._loop.sock_connect(server, ("127.0.0.1", self._upstream_port))
        except OSError:  # the server is down: as a host does where nobody listens
            _close(client, hard=True)
            _close(server, hard=True)
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(client, server)
        self._links.add(link)
        self.counts["links"] += 1
        link.tasks = [
            self._loop.create_task(self._pump(link, client, server)),
            self._loop.create_task(self._pump(link, server, client)),
        ]
        if self._draw.random() < self.reset_share:
            self._loop.call_later(self._draw.uniform(0, self.reset_within_s), self._reset, link)

    async def _pump(self, link: _Link, source: socket.socket, target: socket.socket) -> None:
        """Carry one direction until it ends; the link ends with its second direction."""
        try:
            while piece := await self._loop.sock_recv(source, _PIECE):
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                if source is link.client:
                    self._look_for_request(link, piece)
                elif link.loses_reply:
                    self.counts["replies_lost"] += 1
                    self._reset(link)
                    return
                await self._loop.sock_sendall(target, piece)
            if self.close_delay_s:
                await asyncio.sleep(self.close_delay_s)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            await asyncio.sleep(self.close_delay_s)
            self._reset(link)
            return
        if all(task.done() or task is asyncio.current_task() for task in link.tasks):
            self._close(link, hard=False)

    def _look_for_request(self, link: _Link, piece: bytes) -> None:
        for request in self._lost:
            if request in link.asked + piece:
                self._lost.remove(request)
                link.loses_reply = True
                break
        link.asked = (link.asked + piece)[-256:]

    def _reset(self, link: _Link) -> bool:
        if link not in self._links:
            return False
        self.counts["resets"] += 1
        self._close(link, hard=True)
        return True

    def _close(self, link: _Link, *, hard: bool) -> None:
        self._links.discard(link)
        for task in link.tasks:
            if task is not asyncio.current_task(self._loop):
                task.cancel()
        for end in (link.client, link.server):
            # After what the cancelling scheduled: it forgets a number that a new socket could have by then.
            self._loop.call_soon(partial(_close, end, hard=hard))

    def _swallow(self, *, to_server: bool, to_client: bool) -> None:
        self._drops_to_server, self._drops_to_client = to_server, to_client
        _filter(self._listener, to_server)  # accepted sockets inherit it, too
        for link in self._links:
            _filter(link.client, to_server)
            _filter(link.server, to_client)


def _filter(end: socket.socket, drops: bool) -> None:
    """Let the kernel drop whatever arrives for this socket, acknowledgements included; or no more."""
    if drops:
        end.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(_DROP_ALL)))
        return
    with contextlib.suppress(FileNotFoundError):
        end.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _close(end: socket.socket, *, hard: bool) -> None:
    """Close with FIN, or with RST."""
    if hard:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
