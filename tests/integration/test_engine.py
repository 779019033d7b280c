"""The whole road with the real engine on a tiny random model: HTTP → SQL → Redis → worker → engine processes → SQL → HTTP."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from servers import PostgresServer, RedisServer, free_port
from service import Service
from worker_process import QUICK, HeadraceProcess, wait_for

from headrace.batch import BatchStatus
from headrace.config import GenerationConfig
from headrace.settings import Settings

SESSION_LEN = 256
ENGINE = {"session_len": SESSION_LEN, "num_gpu_blocks": 512, "block_size": 16, "max_batch_size": 64, "tp": 1}
SHORT = GenerationConfig(max_new_tokens=6, ignore_eos=True)
LONG = GenerationConfig(max_new_tokens=120, ignore_eos=True)


def uneven(total: int, *, seed: int = 0) -> list:
    draw = random.Random(seed)
    words = ["the", "mill", "wheel", "turns", "while", "the", "water", "runs", "down", "the", "headrace"]
    texts = [" ".join(draw.choices(words, k=draw.choice([1, 2, 3, 5, 8, 20, 60]))) for _ in range(total)]
    return [[{"role": "user", "content": text}] if index % 5 == 0 else text for index, text in enumerate(texts)]


class Live:
    """A service on PostgreSQL whose worker has the real engine; the worker is started anew where a test killed it."""

    def __init__(self, service, folder: Path) -> None:
        self.service = service
        self.store = service.store
        self._folder = folder
        self._worker: HeadraceProcess | None = None

    def worker(self) -> HeadraceProcess:
        if self._worker is None or self._worker.process is None or self._worker.process.poll() is not None:
            self._worker = self.service.ready(self.service.worker().start(), timeout_s=120)
        return self._worker

    def engine_process(self) -> psutil.Process:
        [process] = [child for child in self.worker().children() if "engine.rank" in " ".join(child.cmdline())]
        return process

    def close(self) -> None:
        if self._worker is not None:
            self._worker.__exit__()
        self.service.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, postgres_process: PostgresServer) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    postgres_process.start()
    with RedisServer() as redis, postgres_process.database() as url:
        settings = Settings(
            model=str(tiny_model_dir),
            engine_config=json.dumps(ENGINE),
            database_url=url,
            redis_url=redis.url,
            home=folder,
            **QUICK,
        )
        live = Live(Service(settings, folder), folder)
        yield live
        live.close()


def test_two_thousand_uneven_prompts_over_http(live: Live, tmp_path: Path) -> None:
    worker = live.worker()
    prompts = uneven(2000)
    prompts[700] = ""
    prompts[1000] = "word " * 400
    prompts[1500] = [{"role": "wizard", "content": "abracadabra"}]
    bad = {700: "invalid_request", 1000: "context_length_exceeded", 1500: "invalid_request"}
    port = free_port()
    api = HeadraceProcess(
        ["-m", "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"],
        live.service.settings,
        tmp_path / "api.log",
    )
    with api, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        wait_for(lambda: answers(client), timeout_s=30, what="the API answers", process=api)
        reply = client.post("/v1/batches", json={"prompts": prompts, "gen_config": SHORT.to_dict()})
        assert reply.status_code == 202, reply.text
        batch_id = reply.json()["id"]
        live.service.wait_over(batch_id, worker, timeout_s=120)
        shown = client.get(f"/v1/batches/{batch_id}").json()
        lines = [json.loads(line) for line in client.get(f"/v1/batches/{batch_id}/results.jsonl").text.splitlines()]
    assert [line["index"] for line in lines] == list(range(2000))
    assert shown["status"] == "completed"
    assert shown["request_counts"] == {"total": 2000, "completed": 1997, "failed": 3}
    assert {line["index"]: line["error"]["code"] for line in lines if line["error"]} == bad
    assert "abracadabra" not in lines[1500]["error"]["message"]
    assert shown["usage"]["output_tokens"] == 6 * 1997
    assert shown["usage"]["input_tokens"] == sum(line["usage"]["prompt_tokens"] for line in lines)
    rows = live.service.assert_exactly_once(batch_id, 2000)
    assert all(len(row.choices[0].token_ids) == 6 for row in rows if row.error is None)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_memory_does_not_grow_with_the_work_done(live: Live) -> None:
    worker = live.worker()
    sizes = []
    for seed in range(4):
        batch_id = live.service.submit(uneven(500, seed=seed), gen_config=GenerationConfig(max_new_tokens=4, ignore_eos=True))
        live.service.wait_over(batch_id, worker, timeout_s=60)
        sizes.append(worker.rss_mib())
    assert sizes[-1] - sizes[0] < 15, f"MiB after each 500 prompts: {sizes}"


def test_a_killed_engine_is_restarted_and_every_prompt_is_answered_once(live: Live) -> None:
    worker = live.worker()
    engine = live.engine_process()
    prompts = uneven(300, seed=3)
    batch_id = live.service.submit(prompts, gen_config=LONG)
    wait_for(lambda: live.service.done(batch_id) >= 40, timeout_s=60, what="under way", process=worker)
    os.kill(engine.pid, signal.SIGKILL)
    assert live.service.done(batch_id) < 300
    batch = live.service.wait_over(batch_id, worker, timeout_s=120)
    assert batch.status is BatchStatus.COMPLETED
    rows = live.service.assert_exactly_once(batch_id, 300)
    assert batch.counts.failed == 0
    assert max(row.attempts for row in rows) == 2, "prompts that were in the engine when it died say so"
    assert live.engine_process().pid != engine.pid
    assert worker.process is not None
    assert worker.process.poll() is None


def test_a_killed_worker_takes_its_engine_along_and_the_next_one_resumes(live: Live) -> None:
    worker = live.worker()
    engine = live.engine_process()
    batch_id = live.service.submit(uneven(300, seed=4), gen_config=LONG)
    wait_for(lambda: live.service.done(batch_id) >= 40, timeout_s=60, what="under way", process=worker)
    worker.kill9()
    wait_for(
        lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, timeout_s=5, what="the engine ends too"
    )
    before = {row.index: row for row in live.store.stream_results(batch_id)}
    assert 40 <= len(before) < 300
    live.service.wait_over(batch_id, live.worker(), timeout_s=120)
    rows = live.service.assert_exactly_once(batch_id, 300)
    assert all(row.error is None for row in rows)
    assert all(rows[index] == row for index, row in before.items())


def test_a_worker_without_its_model_says_so(live: Live, tmp_path: Path) -> None:
    with live.service.worker(model=str(tmp_path / "nothing-here")) as worker:
        assert worker.wait(60) == 1
        assert "this worker can't start" in worker.log_tail()
        assert "nothing-here" in worker.log_tail()
