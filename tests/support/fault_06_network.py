"""The network before Redis and PostgreSQL is slow, resets connections, swallows packets and closes late."""

from __future__ import annotations

import time
from collections.abc import Callable

from fault_ground import Feed, Ground, Say, ground, postgres_of_this_process, redis_of_this_process, rest
from proxy import Proxy
from worker_process import HeadraceProcess, wait_for

TITLE = "a network that is slow, resets, swallows and closes late"
DETECT_S = 26.0
RESUME_S = 15.0
NOTICED = {
    "redis": ("Connection to broker lost", "connection_dropped", "chunks_wait", "chore_postponed] visibility"),
    "postgres": ("store_retry", "store_outage"),
}
"""What a worker's log says when it has found out that its connection leads nowhere."""


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Ten minutes (seconds) of harm, on the way to one server after the other; no row may be lost, no worker may end."""
    slow = {"lease_s": 30.0, "visibility_timeout_s": 60.0, "reconcile_interval_s": 5.0, "requeue_grace_s": 15.0}
    with (
        Proxy(redis_of_this_process().port, seed=seed) as to_redis,
        Proxy(postgres_of_this_process().port, seed=seed) as to_postgres,
        ground(
            redis_proxy=to_redis, database_proxy=to_postgres, chunk_size=8, dispatch_window=12, **(slow if long else {})
        ) as field,
    ):
        workers = [field.service.ready(field.worker(pause_s=2.0 if long else 0.3, concurrency=2)) for _ in range(2)]
        weather = Weather(field, workers, say, size=400 if long else 160)
        counts: dict[str, int | float] = {}
        for name, proxy in (("redis", to_redis), ("postgres", to_postgres)):
            weather.slow(proxy, 40 if long else 2)
            weather.resets(proxy, 40 if long else 2)
            weather.late_closes(name, proxy, 30 if long else 1)
            for way in ("to_server", "both") if long else ():
                counts[f"{name}_{way}_noticed_s"] = weather.black_hole(name, proxy, 60, way=way)
            if long:
                counts[f"{name}_forgotten_noticed_s"] = max(weather.forgotten(name, proxy) for _ in range(3))
            counts[f"{name}_slowest_resume_s"] = weather.slowest_resume_s
            weather.slowest_resume_s = 0.0
        if long:
            # Behind a box that answers for a server which is gone, TCP notices nothing: who asks has to lose patience.
            counts["redis_silent_noticed_s"] = weather.black_hole("redis", to_redis, 60, way="to_client")
        resets = to_redis.counts["resets"] + to_postgres.counts["resets"]
        return {**weather.feed.end(timeout_s=200), **counts, "connections_reset": resets}


class Weather:
    """Lets it happen to one proxy, while there is work, and sees that work goes on afterwards."""

    def __init__(self, field: Ground, workers: list[HeadraceProcess], say: Say, *, size: int) -> None:
        self.feed = Feed(field, size=size)
        self._field = field
        self.slowest_resume_s = 0.0
        self._workers = workers
        self._say = say

    def slow(self, proxy: Proxy, seconds: float) -> None:
        """A round trip takes 100 ms."""
        proxy.latency_s = 0.05
        before = self.feed.claims()
        self._last("latency", proxy, seconds)
        assert self.feed.claims() > before, "nothing was done while the network was slow"

    def resets(self, proxy: Proxy, seconds: float) -> None:
        """Of the new connections 5 % are reset soon, and of those there are 5 % every second."""
        proxy.reset_share = 0.05
        last = [0.0]

        def cut() -> None:
            if time.monotonic() - last[0] > 1:
                last[0] = time.monotonic()
                proxy.cut(0.05)

        before = self.feed.claims()
        self._last("resets", proxy, seconds, cut)
        assert self.feed.claims() > before, "nothing was done while connections were reset"

    def late_closes(self, name: str, proxy: Proxy, seconds: float) -> None:
        """The server ends every connection again and again, and the workers hear of it late."""
        proxy.close_delay_s = min(10.0, seconds / 2)
        last = [0.0]

        def end_all() -> None:
            if time.monotonic() - last[0] > 1.5 * proxy.close_delay_s:
                last[0] = time.monotonic()
                self._end_connections(name)

        self._last("late closes", proxy, seconds, end_all)

    def _end_connections(self, name: str) -> None:
        if name == "redis":
            with self._field.link() as link:
                link.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            return
        assert self._field.postgres is not None
        self._field.postgres.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'headrace'"
        )

    def black_hole(self, name: str, proxy: Proxy, seconds: float, *, way: str) -> float:
        """Swallow what goes to the server, to the client, or both; return after how many seconds every worker had noticed."""
        marks = [len(worker.log.read_bytes()) for worker in self._workers]
        noticed: dict[int, float] = {}
        started = time.monotonic()

        def look() -> None:
            for place, worker in enumerate(self._workers):
                text = worker.log.read_bytes()[marks[place] :].decode(errors="replace")
                if any(mark in text for mark in NOTICED[name]):
                    noticed.setdefault(place, time.monotonic() - started)

        proxy.blackhole(to_server=way != "to_client", to_client=way != "to_server")
        self._last(f"black hole ({way}) before {name}", proxy, seconds, look)
        assert len(noticed) == len(self._workers), f"{name}, {way}: noticed by {len(noticed)} of {len(self._workers)} workers"
        slowest_s = max(noticed.values())
        assert slowest_s <= DETECT_S, f"{name}, {way}: noticed after {slowest_s:.1f} s"
        return round(slowest_s, 1)

    def forgotten(self, name: str, proxy: Proxy) -> float:
        """Let every connection there is lead nowhere; return after how many seconds work goes on, over new ones."""
        before, started = self.feed.claims(), time.monotonic()
        assert proxy.forget() > 0
        # More than were on their way already.
        wait_for(
            lambda: self.feed.tick() or self.feed.claims() >= before + 6, timeout_s=90, what="work goes on over new connections"
        )
        noticed_s = round(time.monotonic() - started, 1)
        self._say(f"connections to {name} forgotten: work goes on after {noticed_s} s")
        assert noticed_s <= DETECT_S, f"{name}: work went on after {noticed_s} s"
        return noticed_s

    def _last(self, what: str, proxy: Proxy, seconds: float, also: Callable[[], None] = lambda: None) -> None:
        """Let the harm last, end it, and wait until work goes on."""

        def tick() -> None:
            self.feed.tick()
            also()

        rest(seconds, tick, every_s=0.2)
        proxy.heal()
        before, healed_at = self.feed.claims(), time.monotonic()
        wait_for(lambda: self.feed.tick() or self.feed.claims() > before, timeout_s=90, what=f"work goes on after {what}")
        resume_s = round(time.monotonic() - healed_at, 1)
        self.slowest_resume_s = max(self.slowest_resume_s, resume_s)
        self._say(f"{what}: {seconds} s, {resume_s} s later work goes on, {self.feed.done()} rows")
        for worker in self._workers:
            assert worker.process is not None
            assert worker.process.poll() is None, f"{what} ended a worker\n{worker.log_tail()}"
        assert resume_s <= RESUME_S, f"{resume_s} s after {what} work went on"
