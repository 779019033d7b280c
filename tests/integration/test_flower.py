"""What an operator sees in Flower: the worker, and chunks with a legible line instead of their prompts."""

from __future__ import annotations

import base64
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from servers import RedisServer, free_port
from worker_process import HeadraceProcess, wait_for

from headrace.config import GenerationConfig
from headrace.settings import Settings
from headrace.stack import flower_arguments

SECRET = "the-secret-in-a-prompt"


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return reply.read().decode()


def answers(url: str) -> bool:
    try:
        return get(url) is not None
    except OSError:
        return False


def test_flower_shows_the_worker_and_legible_chunks(echo_service, sqlite_url: str) -> None:
    service = echo_service(sqlite_url)
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    flower = HeadraceProcess(
        flower_arguments(port=port),
        service.settings,
        service.folder / "flower.log",
        environ={"FLOWER_UNAUTHENTICATED_API": "true"},
    )

    def tasks() -> list[dict]:
        return list(json.loads(get(f"{base}/api/tasks")).values())

    with service.worker(concurrency=2, environ={"ECHO_PAUSE_S": "3"}) as worker, flower:
        service.ready(worker)
        wait_for(lambda: answers(f"{base}/healthcheck"), timeout_s=30, what="flower answers", process=flower)
        wait_for(
            lambda: len(json.loads(get(f"{base}/api/workers?refresh=1"))) == 1,
            timeout_s=20,
            what="the worker is seen",
            process=flower,
        )
        [name] = json.loads(get(f"{base}/api/workers"))
        assert name.startswith("gpu1@")
        batch_id = service.submit(
            [f"{SECRET} {i}" for i in range(31)] + ["REFUSE"], gen_config=GenerationConfig(bad_words=(SECRET,))
        )
        wait_for(
            lambda: any(task["state"] == "PROGRESS" for task in tasks()), timeout_s=20, what="progress is seen", process=flower
        )
        running = next(task for task in tasks() if task["state"] == "PROGRESS")
        assert re.fullmatch(r"\d+/16 rows.*", running["result"])
        service.wait_over(batch_id, worker)
        done = wait_for(
            lambda: len(found := [task for task in tasks() if task["state"] == "SUCCESS"]) == 2 and found,
            timeout_s=20,
            what="both chunks are seen to end",
            process=flower,
        )
        assert {task["name"] for task in done} == {"headrace.generate"}
        assert sorted(task["args"] for task in done) == [
            f"{batch_id[:14]}… chunk 1/2 rows 0-15 · 16 prompts · echo",
            f"{batch_id[:14]}… chunk 2/2 rows 16-31 · 16 prompts · echo",
        ]
        assert sorted(re.sub(r"[\d.]+ tok/s", "N tok/s", task["result"]) for task in done) == [
            "'16/16 rows · 1 failed · 30 tok · N tok/s'",
            "'16/16 rows · 32 tok · N tok/s'",
        ]
        metrics = get(f"{base}/metrics")
        assert re.search(
            r'flower_events_total\{task="headrace.generate",type="task-succeeded",worker="gpu1@[^"]+"\} 2.0', metrics
        )
        seen = get(f"{base}/api/tasks") + get(f"{base}/api/workers") + metrics + get(f"{base}/task/{done[0]['uuid']}")
        assert SECRET not in seen
    assert SECRET not in worker.log_tail(10**6), "no prompt is logged"


@pytest.mark.parametrize("login", [None, ":", "", "headrace:"])
def test_an_empty_login_lets_nobody_in(closed_flower: str, login: str | None) -> None:
    """docker-compose.yml hands on an empty FLOWER_BASIC_AUTH where nobody set one."""
    headers = {} if login is None else {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}
    for page in ("/workers", "/tasks", "/api/workers", "/api/tasks"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(closed_flower + page, headers=headers), timeout=30)
        assert refused.value.code == 401
        refused.value.close()


@pytest.fixture(scope="module")
def closed_flower(redis_process: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Flower whose login is empty."""
    port = free_port()
    redis_process.resume()
    redis_process.start()
    folder = tmp_path_factory.mktemp("flower")
    settings = Settings(model="echo", redis_url=redis_process.url, database_url=f"sqlite:///{folder}/db")
    with HeadraceProcess(
        flower_arguments(port=port), settings, folder / "flower.log", environ={"FLOWER_BASIC_AUTH": ""}
    ) as flower:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{url}/healthcheck"), timeout_s=30, what="flower answers", process=flower)
        yield url
