"""How a worker process comes up and goes down, as steps of Celery's worker.

up      open the store (waiting for it) → record what a killed worker left → load the model → register → consume.
        No message is fetched before.
down    SIGTERM → fetch nothing more → chunks in flight may end → the rest is handed back → rows written → engine closed
over    the model can't be loaded, or the engine is lost: exit status 1 and a message that says what to do
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import partial
from typing import Any

from celery import Celery, bootsteps, signals
from celery.worker import state as celery_state

from headrace.broker import Broker
from headrace.crash import arm
from headrace.errors import HeadraceError
from headrace.settings import Settings
from headrace.store import Store
from worker.host import EngineHost, load_frontend
from worker.outage import Outage
from worker.runtime import Chore, Runtime
from worker.salvage import salvage
from worker.visibility import VisibilityRenewer

log = logging.getLogger(__name__)

EXIT_FAILURE = 1


def runtime_of(app: Celery) -> Runtime:
    """Return what the worker process of `app` holds."""
    runtime = getattr(app, "headrace_runtime", None)
    assert isinstance(runtime, Runtime), "a task ran outside a headrace worker"
    return runtime


def install(app: Celery, settings: Settings) -> None:
    """Add the steps to `app`, for a worker with `settings`."""
    app.headrace_settings = settings
    app.headrace_runtime = None
    app.conf.worker_consumer = "worker.consumer:SteadyConsumer"
    app.steps["worker"].add(EngineStep)
    app.steps["consumer"].add(VisibilityStep)


class EngineStep(bootsteps.StartStopStep):
    """Starts the engine before the consumer, which Celery starts last, and ends it when the consumer has stopped fetching."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        """Take note of signals; Celery calls this when it builds the worker."""
        super().__init__(worker, **options)
        self._loading = False
        signals.worker_shutting_down.connect(self._on_signal, weak=False)

    def start(self, worker: Any) -> None:
        """Come up; end the process with status 1 where that is impossible."""
        self._check_pool(worker)
        self._loading = True
        try:
            runtime = bring_up(worker.app.headrace_settings, worker.app, name=worker.hostname)
        except HeadraceError as error:
            log.critical(
                "this worker can't start: %s",
                error.message,
                extra={"event": "worker_failed", "code": error.code, "param": error.param},
            )
            raise SystemExit(EXIT_FAILURE) from error
        finally:
            self._loading = False
        runtime.on_trouble = lambda _: setattr(celery_state, "should_stop", EXIT_FAILURE)
        worker.app.headrace_runtime = runtime

    def stop(self, worker: Any) -> None:
        """Drain and close."""
        runtime = runtime_of(worker.app)
        runtime.drain(runtime.settings.drain_timeout_s)
        runtime.close()

    def terminate(self, worker: Any) -> None:
        """Hand everything back at once: a second signal, or SIGQUIT."""
        runtime = runtime_of(worker.app)
        runtime.drain(0)
        runtime.close()

    def _on_signal(self, **_: Any) -> None:
        # Loading a model takes minutes, during which Celery's loop does not look whether it is to end.
        if self._loading:
            log.warning("asked to end while the model is loading", extra={"event": "worker_interrupted"})
            raise SystemExit(0)

    @staticmethod
    def _check_pool(worker: Any) -> None:
        pool = worker.pool_cls.__module__
        if pool != "celery.concurrency.thread":
            log.critical(
                "this worker can't start: its pool is %s, and chunks can share one engine in threads only; start it with -P threads", pool,
                extra={"event": "worker_failed", "pool": pool},
            )  # fmt: skip
            raise SystemExit(EXIT_FAILURE)


def bring_up(settings: Settings, app: Celery, *, name: str) -> Runtime:
    """Open the store, load the model and start the threads. Raise the `HeadraceError` that makes it impossible."""
    arm(settings.crash_at)
    # Many threads that mostly wait: with a connection for each, four workers would take all hundred that PostgreSQL gives.
    store = Store(settings.database_url, pool_size=10)
    outage = Outage()
    outage.ride_out(store.check_schema, what="the start of this worker")
    salvage(store, settings.spool_dir, outage)
    log.info("loading %s", settings.model, extra={"event": "model_loading", "model": settings.model})
    host = EngineHost(partial(load_frontend, settings), stall_s=settings.engine_stall_s)
    try:
        runtime = Runtime(settings, store=store, broker=Broker(app), host=host, name=name)
        outage.ride_out(runtime.start, what="the registration of this worker")
    except BaseException:
        host.close()
        raise
    runtime.refill()
    log.info("%s is up", runtime.worker_id, extra={"event": "worker_started", "model": settings.model})
    return runtime


class Doorbell:
    """Lets any thread wake Celery's event loop, which else looks up every second or two, and has a full engine run dry meanwhile."""

    def __init__(self) -> None:
        """Make the pipe that the loop will listen to."""
        self._inside, self._outside = os.pipe()
        os.set_blocking(self._inside, False)
        os.set_blocking(self._outside, False)

    def hang_up(self, hub: Any) -> None:
        """Have a loop listen, which then looks by itself whether it takes another message. Each new connection forgets who it listened to."""
        if hub is not None:  # Celery has no event loop on Windows
            hub.add_reader(self._inside, self._answer)

    def ring(self) -> None:
        """Wake the loop."""
        with suppress(BlockingIOError):  # nobody has answered the rings so far
            os.write(self._outside, b".")

    def _answer(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._inside, 4096)


class VisibilityStep(bootsteps.StartStopStep):
    """Starts the renewal of delivery times with each connection to Redis, and keeps it through the drain."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        """Prepare the renewal; Celery calls this once for each consumer."""
        super().__init__(consumer, **options)
        settings: Settings = consumer.app.headrace_settings
        self._app = consumer.app
        self._renewer = VisibilityRenewer(settings.redis_url)
        self._chore = Chore("visibility", self._renew, every_s=settings.visibility_timeout_s / 3)
        self._doorbell = Doorbell()
        self._started = False

    def start(self, consumer: Any) -> None:
        """Follow the channel of a connection that has just been made."""
        self._renewer.follow(consumer.task_consumer.channel)
        self._close_gate(consumer.task_consumer.channel.qos)
        self._doorbell.hang_up(consumer.hub)
        runtime_of(self._app).host.on_room = self._doorbell.ring
        if not self._started:
            self._started = True
            self._chore.start()

    def _close_gate(self, qos: Any) -> None:
        """Let no message in while a chunk could not be worked on: other workers may be able to."""
        has_room = qos.can_consume
        qos.can_consume = lambda: has_room() and runtime_of(self._app).takes_chunk(held=len(celery_state.reserved_requests))

    def stop(self, consumer: Any) -> None:
        """Go on: chunks in flight keep their messages until they are acknowledged, while the worker drains."""

    def shutdown(self, consumer: Any) -> None:  # noqa: ARG002  # Celery's signature
        """End with the consumer's connection."""
        self._chore.stop()
        self._renewer.close()

    def _renew(self) -> None:
        if not runtime_of(self._app).has_lost_engine:
            self._renewer.renew()
