"""Fault 17: the reply to POST /v1/batches is lost, and the openai client, which sends no key, sends the request again: one batch.

The API is a process of its own behind a proxy that lets the request through and resets the connection when the reply comes. Each round
also makes a second batch of the same file, on purpose, a moment later: that one must be another.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import openai
from fault_ground import ground
from proxy import Proxy
from servers import free_port
from worker_process import HeadraceProcess, wait_for

TITLE = "the reply to POST /v1/batches is lost and the client sends it again: exactly one batch"
CHAT = "/v1/chat/completions"


def run(*, long: bool, seed: int, say: Callable[[str], None]) -> dict[str, int | float]:
    """Run `long` 50 rounds, else 6; raise AssertionError with the counts unless each call made one batch and all are answered once."""
    rounds, draw = (50 if long else 6), random.Random(seed)
    counts: dict[str, int | float] = {"rounds": rounds, "replies_lost": 0, "sent": 0, "batches": 0, "rows": 0}
    with ground() as field:
        port = free_port()
        arguments = ["-m", "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
        settings, log = field.service.settings, field.folder / "api.log"
        with (
            HeadraceProcess(arguments, settings, log) as api,
            field.service.worker() as worker,
            Proxy(port, seed=seed) as proxy,
        ):
            wait_for(lambda: "Uvicorn running" in api.log_tail(10**6), timeout_s=60, what="the API is up", process=api)
            field.service.ready(worker)
            made = [pair for number in range(rounds) for pair in _round(proxy, draw, number, counts)]
            say(f"{len(made)} calls, {counts['replies_lost']} replies lost, {counts['sent']} requests sent")
            _judge(field.service, made, counts)
    assert counts["replies_lost"] >= rounds, counts
    return counts


def _round(proxy: Proxy, draw: random.Random, number: int, counts: dict[str, int | float]) -> list[tuple[str, int]]:
    """Make two batches of one file; the reply to the first is lost once or twice, and now and then the second's too. Return (id, lines)."""
    lines, sent = draw.randrange(1, 20), []
    hooks: dict[str, list[Callable[[Any], None]]] = {"request": [lambda request: sent.append(request.method)]}
    counted = httpx.Client(event_hooks=hooks)
    with counted, openai.OpenAI(base_url=f"http://127.0.0.1:{proxy.port}/v1", api_key="any", http_client=counted) as client:
        file = client.files.create(file=("a.jsonl", _content(number, lines)), purpose="batch")
        sent.clear()
        made = []
        for losses in (draw.choice([1, 1, 2]), draw.choice([0, 0, 1])):
            before = proxy.counts["replies_lost"]
            proxy.lose_reply(b"POST /v1/batches ", times=losses)
            batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            assert proxy.counts["replies_lost"] - before == losses, dict(proxy.counts)
            counts["replies_lost"] += losses
            made.append((batch.id, lines))
        counts["sent"] += len(sent)
    return made


def _content(number: int, lines: int) -> bytes:
    rows = [
        {
            "custom_id": f"{number}-{index}", "method": "POST", "url": CHAT,
            "body": {"model": "echo", "messages": [{"role": "user", "content": f"question {index} of {number}"}]},
        }
        for index in range(lines)
    ]  # fmt: skip
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _judge(service: Any, made: list[tuple[str, int]], counts: dict[str, int | float]) -> None:
    """Hold what is stored against what was called for."""
    ids = {batch_id for batch_id, _ in made}
    stored = {batch.id for batch in service.store.list_batches(limit=1000)}
    counts["batches"] = len(stored)
    assert len(ids) == len(made), f"two calls got one batch: {counts}"
    assert stored == ids, f"{len(stored)} batches are stored for {len(made)} calls: {counts}"
    for batch_id, lines in made:
        service.wait_over(batch_id, timeout_s=60)
        counts["rows"] += len(service.assert_exactly_once(batch_id, lines))
