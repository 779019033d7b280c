"""What wakes Celery's event loop when there is room in the engine again."""

from __future__ import annotations

import threading
import time

from kombu.asynchronous import Hub

from worker.lifecycle import Doorbell


def test_a_ring_wakes_a_loop_that_has_nothing_else_to_do() -> None:
    hub, bell, ticks = Hub(), Doorbell(), []
    hub.on_tick.add(lambda: ticks.append(time.monotonic()))
    bell.hang_up(hub)
    bell.hang_up(hub)  # as after each new connection

    def ring() -> None:
        time.sleep(0.3)
        for _ in range(100_000):  # more than a pipe holds
            bell.ring()

    threading.Thread(target=ring).start()
    started, loop = time.monotonic(), hub.create_loop()
    while not any(0.25 < tick - started < 0.9 for tick in ticks):
        next(loop)
        assert time.monotonic() - started < 20, "without a ring the loop looks up once a second"
    hub.close()
