"""`/metrics` for Prometheus: what is open and waits, by model, and what each worker last said of itself.

Everything comes from the database and Redis, so one API process is enough to ask. Names no prompt, no batch and no key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from api import examples
from api.services import Services, ServicesDep
from headrace.errors import QueueUnavailable

if TYPE_CHECKING:
    from headrace.store.pulse import Pulse
    from headrace.store.values import WorkerInfo

router = APIRouter(tags=["Health"])

# By name: the field of `Pulse`, and what it means.
_OF_MODEL: Final = {
    "headrace_open_prompts": ("open_prompts", "Prompts of open batches that have no answer."),
    "headrace_oldest_sent_chunk_seconds": ("oldest_sent_s", "For how long a chunk has waited in Redis."),
    "headrace_next_deadline_seconds": ("deadline_s", "Until the first completion window is over."),
}
_SHOWN_S: Final = 3600.0
"""A worker that was silent for longer is no news."""
_CHUNKS: Final = ("unsent", "sent", "held", "lapsed")
_OF_WORKER: Final = {
    "chunks_in_flight": "Chunks that the worker holds.",
    "prompts_in_engine": "Prompts that its engine has and hasn't answered.",
    "rows_waiting": "Answers that wait for their transaction.",
    "spool_bytes": "Answers that wait on its disk for the database.",
}
_OF_ENGINE: Final = {
    "running": "Sequences that the engine computes.",
    "waiting": "Sequences that wait in the engine.",
    "blocks_used": "KV blocks in use.",
    "blocks_total": "KV blocks in the pool.",
}
_COUNTED: Final = {
    "rows_recorded": "Answers written by the worker since its start.",
    "chunks_done": "Chunks done by the worker since its start.",
}
_COUNTED_BY_ENGINE: Final = {
    "prompt_tokens": "Prompt tokens that the engine took in.",
    "cached_tokens": "Those of them that the prefix cache had.",
    "generated_tokens": "Tokens that the engine made.",
    "preemptions": "Sequences that gave up their KV blocks for others.",
    "engine_deaths": "Engine processes that died.",
}


@router.get(
    "/metrics",
    summary="Metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        503: examples.problems(503)[503],
    },
)
def metrics(services: ServicesDep) -> Response:
    """Return gauges and counters for Prometheus: open batches, prompts and chunks of each model, and each worker's own figures."""
    registry = CollectorRegistry()
    registry.register(_Collected(_collect(services)))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _collect(services: Services) -> Iterator[Metric]:
    pulses = services.store.pulses.read()
    yield from _of_models(pulses)
    try:
        waiting = GaugeMetricFamily(
            "headrace_redis_messages", "Chunk messages in the model's queue in Redis.", labels=["model"]
        )
        for model in services.settings.served_models:
            waiting.add_metric([model], services.broker.count_waiting(model))
        yield waiting
    except QueueUnavailable:
        pass  # what the database knows is worth having while Redis is away; the missing figure says the rest
    workers = [worker for worker in services.store.list_workers() if worker.age_s < _SHOWN_S]
    yield from _of_workers(workers, lease_s=services.settings.lease_s)


def _of_models(pulses: Mapping[str, Pulse]) -> Iterator[Metric]:
    batches = GaugeMetricFamily("headrace_open_batches", "Batches that are not over.", labels=["model", "status"])
    chunks = GaugeMetricFamily(
        "headrace_chunks",
        "Open chunks: unsent, sent (they wait in Redis), held by a worker, lapsed (their lease ran out).",
        labels=["model", "state"],
    )
    for model, pulse in pulses.items():
        for status, count in pulse.batches.items():
            batches.add_metric([model, status], count)
        for state in _CHUNKS:
            chunks.add_metric([model, state], getattr(pulse, state))
    yield batches
    yield chunks
    for name, (figure, meaning) in _OF_MODEL.items():
        family = GaugeMetricFamily(name, meaning, labels=["model"])
        for model, pulse in pulses.items():
            family.add_metric([model], getattr(pulse, figure))
        yield family


def _of_workers(workers: list[WorkerInfo], *, lease_s: float) -> Iterator[Metric]:
    """Give each worker's age, and the figures of those that live: a worker that was killed keeps its row, and its last figures are nobody's."""
    age = GaugeMetricFamily(
        "headrace_worker_heartbeat_age_seconds", "Since the worker (one process) was heard of.", labels=["worker", "model"]
    )
    for worker in workers:
        age.add_metric([worker.id, worker.model], worker.age_s)
    yield age
    for prefix, names, kind, of_engine in (
        ("headrace_worker", _OF_WORKER, GaugeMetricFamily, False),
        ("headrace_engine", _OF_ENGINE, GaugeMetricFamily, True),
        ("headrace_worker", _COUNTED, CounterMetricFamily, False),
        ("headrace_engine", _COUNTED_BY_ENGINE, CounterMetricFamily, True),
    ):
        for name, meaning in names.items():
            family = kind(f"{prefix}_{name.removeprefix('engine_')}", meaning, labels=["worker", "model"])
            for worker in workers:
                if worker.age_s >= lease_s:
                    continue
                figures: Mapping[str, Any] = worker.stats.get("engine") or {} if of_engine else worker.stats
                if isinstance(value := figures.get(name), int | float):
                    family.add_metric([worker.id, worker.model], value)
            yield family
