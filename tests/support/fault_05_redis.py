"""Redis ends, dies, freezes, cuts its clients off, forgets everything, stalls, is full, and hands over to its replica."""

from __future__ import annotations

import time
from collections.abc import Callable

import redis
from fault_ground import Feed, Ground, Say, ground, rest
from proxy import Proxy
from servers import RedisServer, wait_until
from sqlalchemy import select
from worker_process import HeadraceProcess, wait_for

from headrace.store import ChunkState
from headrace.store.tables import chunks

TITLE = "Redis ends, dies, freezes, cuts off, forgets, stalls, is full, fails over"
RESUME_S = 10.0
SHORT_PAUSE_S, LONG_PAUSE_S = 0.3, 2.0


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:  # nothing here is left to chance
    """Do each harm (ten times) to the Redis of two workers; measure from its end to the next chunk that is taken up.

    The long form runs with the settings as they are by default, the short one with quick ones.
    """
    slow = {"lease_s": 30.0, "visibility_timeout_s": 60.0, "reconcile_interval_s": 5.0, "requeue_grace_s": 15.0}
    with (
        RedisServer() as first,
        RedisServer() as second,
        Proxy(first.port) as proxy,
        ground(redis_server=first, redis_proxy=proxy, chunk_size=8, dispatch_window=12, **(slow if long else {})) as field,
    ):
        pause_s = LONG_PAUSE_S if long else SHORT_PAUSE_S
        workers = [field.service.ready(field.worker(pause_s=pause_s, concurrency=2)) for _ in range(2)]
        scene = Scene(field, Feed(field, size=400 if long else 160), workers, [first, second], proxy, say)
        counts: dict[str, int | float] = {}
        for name, harm in HARMS.items() if long else [(name, HARMS[name]) for name in SHORT]:
            times = 10 if long else 1
            counts[name] = times
            counts[f"{name}_slowest_s"] = round(max(scene.suffer(name, harm) for _ in range(times)), 1)
        counts |= scene.feed.end(timeout_s=200)
        assert scene.ended() == [], "a worker ended of it"
        return counts


class Scene:
    """What a harm may touch."""

    def __init__(
        self, field: Ground, feed: Feed, workers: list[HeadraceProcess], servers: list[RedisServer], proxy: Proxy, say: Say
    ) -> None:
        self.field = field
        self.feed = feed
        self.proxy = proxy
        self.main, self.spare = servers
        self.say = say
        self._workers = workers

    def suffer(self, name: str, harm: Callable[[Scene], float | None]) -> float:
        """Let it happen at work; return how many seconds after its end work went on, or what the harm measured itself."""
        since = self.feed.claims()
        wait_for(
            lambda: self.feed.tick() or self.feed.claims() > since + 1, timeout_s=60, what="at work", process=self._workers[0]
        )
        healed_s = harm(self)
        before, ended_at = self.feed.claims(), time.monotonic()
        wait_for(lambda: self.feed.tick() or self.feed.claims() > before, timeout_s=60, what=f"work goes on after {name}")
        resumed_s = time.monotonic() - ended_at
        assert not self.ended(), f"{name} ended a worker\n{self.ended()[0].log_tail()}"
        assert resumed_s <= RESUME_S, f"{resumed_s:.1f} s after {name} work went on"
        self.say(f"{name}: {resumed_s:.1f} s" + ("" if healed_s is None else f", healed after {healed_s:.1f} s"))
        return resumed_s if healed_s is None else healed_s

    def ended(self) -> list[HeadraceProcess]:
        """Return the workers that are no more."""
        return [worker for worker in self._workers if worker.process is None or worker.process.poll() is not None]

    def link(self, server: RedisServer) -> redis.Redis:
        """Return a connection that goes straight to a server."""
        return redis.Redis.from_url(server.url, socket_timeout=20)

    def wait(self, seconds: float) -> None:
        """Let time pass, with work to do."""
        rest(seconds, self.feed.tick, every_s=0.3)


def sigterm(scene: Scene) -> None:
    scene.main.stop()
    scene.wait(2)
    scene.main.start()


def kill9(scene: Scene) -> None:
    scene.main.kill9()
    scene.wait(2)
    scene.main.start()


def sigstop_70s(scene: Scene) -> None:
    """Half-open: connections stay, nothing answers."""
    scene.main.pause()
    scene.wait(70)
    scene.main.resume()


def client_kill(scene: Scene) -> None:
    with scene.link(scene.main) as link:
        assert link.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes") > 0


def debug_sleep(scene: Scene) -> None:
    """Redis answers nobody for three seconds."""
    with scene.link(scene.main) as link:
        link.execute_command("DEBUG", "SLEEP", "3")


def full(scene: Scene) -> None:
    """Nothing that needs memory is taken: messages are refused, and deliveries can't be noted."""
    with scene.link(scene.main) as link:
        link.config_set("maxmemory-policy", "noeviction")
        link.config_set("maxmemory", "1")
        scene.wait(3)
        link.config_set("maxmemory", "0")


def flushall(scene: Scene) -> float:
    """Return how long it took until every message that was lost had been sent again or its chunk was at work."""
    query = select(chunks.c.id, chunks.c.sent_at).where(chunks.c.state == ChunkState.QUEUED, chunks.c.sent_at.is_not(None))

    def sent() -> dict[str, float]:
        rows = scene.field.service.store._database.read(lambda connection: connection.execute(query).all())
        return {row.id: row.sent_at for row in rows}

    lost, flushed_at = sent(), time.monotonic()
    scene.main.flush()
    grace_s, sweep_s = scene.field.settings.requeue_grace_s, scene.field.settings.reconcile_interval_s
    wait_for(
        lambda: scene.feed.tick() or not lost.items() & sent().items(),
        timeout_s=grace_s + sweep_s + 20,
        what="all is sent anew",
    )
    healed_s = time.monotonic() - flushed_at
    assert healed_s <= grace_s + sweep_s + 0.5, f"{len(lost)} lost messages were sent again after {healed_s:.1f} s only"
    return healed_s


def failover(scene: Scene) -> None:
    """The replica takes over; for a second clients still talk to the old one, which refuses their writes, then they are led over."""
    with scene.link(scene.main) as old, scene.link(scene.spare) as new:
        new.replicaof("127.0.0.1", scene.main.port)
        wait_until(lambda: new.info("replication")["master_link_status"] == "up")
        old.execute_command("FAILOVER")
        wait_until(lambda: new.info("replication")["role"] == "master")
        scene.wait(1)
        scene.proxy.lead_to(scene.spare.port)
    scene.main, scene.spare = scene.spare, scene.main
    scene.field.redis = scene.main


HARMS: dict[str, Callable[[Scene], float | None]] = {
    "sigterm": sigterm, "kill9": kill9, "client_kill": client_kill, "flushall": flushall, "debug_sleep": debug_sleep,
    "full": full, "failover": failover, "sigstop_70s": sigstop_70s,
}  # fmt: skip
SHORT = ("client_kill", "flushall", "full", "failover")
