"""TCP ports of this machine: which are free. Knows nothing of who will listen on them."""

from __future__ import annotations

import socket
import time

from headrace.errors import Conflict


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that nobody listens on at this moment."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def port_or_free(port: int, host: str = "127.0.0.1") -> int:
    """Return `port` when it is free, otherwise one that is."""
    return port if _trouble(port, host) is None else free_port(host)


def check_free(service: str, port: int, host: str = "127.0.0.1") -> None:
    """Raise `Conflict` when `service` could not listen on `port`, not within two seconds: a process just killed lets go late."""
    deadline = time.monotonic() + 2.0
    while (trouble := _trouble(port, host)) is not None:
        if time.monotonic() > deadline:
            raise Conflict(
                f"{service} can't listen on {host}, port {port}: {trouble}; stop what listens there, or name another"
            )
        time.sleep(0.05)


def _trouble(port: int, host: str) -> str | None:
    """Return why a server could not listen on the port at this moment."""
    with socket.socket(_family(host)) as probe:
        # As servers do: a port whose last connections are only fading away is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
        return None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
