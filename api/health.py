"""Liveness and readiness. `/healthz` says that this process answers; `/readyz` names what a batch needs and what of it is missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastapi import APIRouter, Response

from api import examples
from api.batches import json_response
from api.services import Services, ServicesDep
from headrace.errors import HeadraceError
from headrace.schemas import Check, Health

router = APIRouter(tags=["Health"])


@router.get("/healthz", response_model=Health, summary="Liveness", responses={200: examples.ALIVE})
async def healthz() -> Response:
    """Answer without touching anything: `async`, so that it answers even when every thread waits for a slow database."""
    return json_response(Health(status="ok"))


@router.get("/readyz", response_model=Health, summary="Readiness", responses={200: examples.READY, 503: examples.NOT_READY})
def readyz(services: ServicesDep) -> Response:
    """Check the store, Redis, and that each served model has a worker with a fresh heartbeat that takes chunks; 503 when one is missing."""
    models = services.settings.served_models
    checks = [
        _check("store", partial(_store, services)),
        _check("redis", partial(_redis, services)),
        *(_check(f"worker:{model}", partial(_worker, services, model)) for model in models),
    ]
    ready = all(check.ok for check in checks)
    return json_response(Health(status="ready" if ready else "not_ready", checks=checks), status_code=200 if ready else 503)


def _check(name: str, look: Callable[[], tuple[bool, str]]) -> Check:
    try:
        ok, detail = look()
    except HeadraceError as error:
        ok, detail = False, error.message
    return Check(name=name, ok=ok, detail=detail)


def _store(services: Services) -> tuple[bool, str]:
    services.store.ping()
    return True, "answers"


def _redis(services: Services) -> tuple[bool, str]:
    waiting = sum(services.broker.count_waiting(model) for model in services.settings.served_models)
    return True, f"answers; {waiting} chunks wait"


def _worker(services: Services, model: str) -> tuple[bool, str]:
    workers = [worker for worker in services.store.list_workers() if worker.model == model]
    # By the database's clock; a worker that could not renew its leases for so long has lost its chunks too.
    alive = [worker for worker in workers if worker.age_s < services.settings.lease_s]
    if not alive:
        lost = f"; {len(workers)} stopped reporting" if workers else ""
        return False, f"no worker with a fresh heartbeat{lost}. Start one: headrace worker --model {model}"
    from headrace.store.pulse import STALL_S  # loaded with the store, not with the API

    # A heartbeat comes from a thread of its own: it says nothing of whether the worker still takes chunks.
    pulse = services.store.pulses.read().get(model)
    # One that has just come has had no time to take any.
    has_had_time = any(worker.heartbeat_at + worker.age_s - worker.started_at > STALL_S for worker in alive)
    if pulse is not None and pulse.is_stalled and has_had_time:
        waits = f"{pulse.sent} chunks wait in Redis, the oldest for {pulse.oldest_sent_s:.0f} s"
        return False, f"{len(alive)} with a fresh heartbeat, but none takes chunks: {waits}. Restart them"
    return True, f"{len(alive)} with a fresh heartbeat: {', '.join(worker.id for worker in alive[:5])}"
