"""The proxy does to a connection what it says, and no more."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest
from proxy import Proxy


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while piece := self.request.recv(65536):
            self.request.sendall(piece)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with Proxy(server.server_address[1]) as proxy:
            yield proxy
        server.shutdown()


def connect(proxy: Proxy, timeout_s: float = 2) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=timeout_s)


def ask(link: socket.socket, text: bytes) -> bytes:
    link.sendall(text)
    got = b""
    while len(got) < len(text):
        piece = link.recv(65536)
        if not piece:
            break
        got += piece
    return got


def test_without_harm_it_passes_everything_and_ends_with_its_client(proxy: Proxy) -> None:
    load = bytes(range(256)) * 4000
    with connect(proxy) as link:
        sender = threading.Thread(target=link.sendall, args=(load,))
        sender.start()
        got = b""
        while len(got) < len(load):
            got += link.recv(65536)
        sender.join()
        assert got == load
        assert proxy.connections == 1
        link.shutdown(socket.SHUT_WR)
        assert link.recv(1) == b""
    deadline = time.monotonic() + 2
    while proxy.connections and time.monotonic() < deadline:
        time.sleep(0.01)
    assert proxy.connections == 0
    assert proxy.counts == {"links": 1}


def test_latency_counts_each_way(proxy: Proxy) -> None:
    with connect(proxy) as link:
        ask(link, b"warm")
        proxy.latency_s = 0.1
        started = time.monotonic()
        assert ask(link, b"slow") == b"slow"
        assert 0.2 <= time.monotonic() - started < 2


def test_a_cut_and_a_share_of_resets(proxy: Proxy) -> None:
    with connect(proxy) as link:
        ask(link, b"here")
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            link.recv(1)
    proxy.reset_share, proxy.reset_within_s = 1.0, 0.05
    with connect(proxy) as link, pytest.raises(ConnectionResetError):
        link.recv(1)
    proxy.heal()
    with connect(proxy) as link:
        assert ask(link, b"well") == b"well"


@pytest.mark.parametrize("way", ["to_server", "to_client", "both"])
def test_a_black_hole_swallows_and_gives_back(proxy: Proxy, way: str) -> None:
    with connect(proxy, 0.3) as link:
        ask(link, b"warm")
        proxy.blackhole(to_server=way != "to_client", to_client=way != "to_server")
        link.sendall(b"lost?")
        with pytest.raises(TimeoutError):
            link.recv(5)
        proxy.heal()
        link.settimeout(5)
        assert link.recv(5) == b"lost?"


def test_a_black_hole_is_one_of_packets(proxy: Proxy) -> None:
    """What is sent isn't acknowledged, so a user timeout fires; and a connect hangs."""
    with connect(proxy) as link:
        ask(link, b"warm")
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 500)
        proxy.blackhole(to_client=False)
        link.settimeout(10)
        link.sendall(b"lost")
        with pytest.raises(TimeoutError, match="Connection timed out"):
            link.recv(4)
    with pytest.raises(TimeoutError):
        connect(proxy, 0.2)
    proxy.heal()


def test_forgotten_connections_are_dead_and_new_ones_are_well(proxy: Proxy) -> None:
    with connect(proxy, 0.3) as link, connect(proxy) as other:
        ask(link, b"warm")
        ask(other, b"warm")
        assert proxy.forget() == 2
        link.sendall(b"lost")
        with pytest.raises(TimeoutError):
            link.recv(4)
        with connect(proxy) as fresh:
            assert ask(fresh, b"well") == b"well"


def test_a_close_that_comes_late(proxy: Proxy) -> None:
    proxy.close_delay_s = 0.3
    with connect(proxy) as link:
        ask(link, b"bye")
        link.shutdown(socket.SHUT_WR)
        started = time.monotonic()
        assert link.recv(1) == b""
        assert time.monotonic() - started >= 0.3


def test_a_reply_that_is_lost_was_answered(proxy: Proxy) -> None:
    proxy.lose_reply(b"POST /v1")
    with connect(proxy) as link:
        assert ask(link, b"GET /v1") == b"GET /v1"
        link.sendall(b"POST ")
        assert link.recv(5) == b"POST "
        link.sendall(b"/v1")
        with pytest.raises(ConnectionResetError):
            link.recv(3)
    assert proxy.counts["replies_lost"] == 1
    with connect(proxy) as link:
        assert ask(link, b"POST /v1") == b"POST /v1"


def test_where_nobody_listens_the_client_is_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    # The reset may come while the client still connects.
    with Proxy(port) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as link:
        link.recv(1)
