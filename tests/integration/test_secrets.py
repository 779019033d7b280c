"""No secret leaves its place: API, worker and Flower for real, with passwords everywhere, also while Redis and the database are away."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from pathlib import Path

import httpx
import redis
from servers import PostgresServer, RedisServer, free_port
from service import Service
from worker_process import QUICK, HeadraceProcess, wait_for

from headrace.settings import Settings
from headrace.stack import api_arguments, flower_arguments

OPERATOR_KEY = "operator-key-0f1e2d"
DB_PASSWORD = "db-password-7a6b5c"
REDIS_PASSWORD = "redis-password-4d3e2f"
FLOWER_PASSWORD = "flower-password-9c8d7e"
PROMPT = "what-nobody-else-shall-read"


def get(url: str, *, login: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url)
    if login is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def secured_redis(server: RedisServer) -> str:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("requirepass", REDIS_PASSWORD)
    return server.url.replace("redis://", f"redis://:{REDIS_PASSWORD}@")


def test_no_secret_is_told(postgres_server: PostgresServer, tmp_path: Path) -> None:
    with postgres_server.database() as url, RedisServer() as redis_server:
        head, at, tail = url.rpartition("@")
        settings = Settings(
            model="echo", engine_frontend="echo_frontend:EchoFrontend", database_url=f"{head.partition(':p')[0]}:{DB_PASSWORD}{at}{tail}",
            redis_url=secured_redis(redis_server), api_key=OPERATOR_KEY, home=tmp_path, log_level="DEBUG", chunk_size=4, **QUICK,
        )  # fmt: skip
        assert DB_PASSWORD in settings.database_url
        service = Service(settings, tmp_path)
        made = service.store.keys.create("user")
        secrets = (OPERATOR_KEY, DB_PASSWORD, REDIS_PASSWORD, FLOWER_PASSWORD, made.text, made.text[9:], PROMPT)
        api_port, flower_port = free_port(), free_port()
        api = HeadraceProcess(api_arguments(host="127.0.0.1", port=api_port), settings, tmp_path / "api.log")
        flower = HeadraceProcess(
            flower_arguments(port=flower_port), settings, tmp_path / "flower.log",
            environ={"FLOWER_BASIC_AUTH": f"me:{FLOWER_PASSWORD}"},
        )  # fmt: skip
        base = f"http://127.0.0.1:{flower_port}"
        told: list[str] = []
        with service.worker(concurrency=2) as worker, api, flower:
            service.ready(worker)
            wait_for(lambda: get(f"http://127.0.0.1:{api_port}/healthz")[0] == 200, timeout_s=30, what="the API", process=api)
            wait_for(lambda: get(f"{base}/healthcheck")[0] == 200, timeout_s=30, what="Flower", process=flower)
            with httpx.Client(
                base_url=f"http://127.0.0.1:{api_port}", headers={"authorization": f"Bearer {made.text}"}
            ) as http:
                body = {"prompts": [f"{PROMPT} {n}" for n in range(8)], "gen_config": {"stop_words": [PROMPT]}}
                sent = http.post("/v1/batches", json=body)
                assert sent.status_code == 202
                service.wait_over(sent.json()["id"], worker)
                redis_server.kill9()
                told.append(http.post("/v1/batches", json={"prompts": body["prompts"]}).text)
                told.append(http.get("/readyz").text)
                time.sleep(1)
                redis_server.start()
                secured_redis(redis_server)
                bad = ({"prompts": [PROMPT, 1]}, {"prompts": [PROMPT], "model": "no"}, {"prompts": [PROMPT], "nonsense": 1})
                told += [http.post("/v1/batches", json=wrong).text for wrong in bad]
                told.append(http.get("/v1/batches", headers={"authorization": f"Bearer {OPERATOR_KEY}x"}).text)
                told.append(http.get("/openapi.json").text)
            for page in ("/workers", "/tasks", "/broker", "/api/workers?refresh=1", "/api/tasks"):
                assert get(base + page)[0] == 401, page
                assert get(base + page, login="me:wrong")[0] == 401, page
                status, text = get(base + page, login=f"me:{FLOWER_PASSWORD}")
                assert status == 200, page
                told.append(text)
            workers = json.loads(get(f"{base}/api/workers?refresh=1", login=f"me:{FLOWER_PASSWORD}")[1])
            told += [get(f"{base}/worker/{name}", login=f"me:{FLOWER_PASSWORD}")[1] for name in workers]
            told.append(get(f"{base}/metrics")[1])
            postgres_server.kill9()
            with httpx.Client(base_url=f"http://127.0.0.1:{api_port}", timeout=60) as http:
                told.append(http.get("/v1/batches", headers={"authorization": f"Bearer {made.text}"}).text)
                told.append(http.get("/readyz").text)
            time.sleep(1)
            postgres_server.start()
            assert [DB_PASSWORD in " ".join(child.cmdline()) for child in worker.children()] == [False] * len(worker.children())
            logs = {process.log.name: process.log_tail(10**8) for process in (worker, api, flower)}
        service.close()
        assert all(len(text) > 100 for text in logs.values())
        for name, text in {**logs, **{f"answer {n}": text for n, text in enumerate(told)}}.items():
            for secret in secrets:
                lines = [line for line in text.splitlines() if secret in line]
                assert not lines, (name, secret, lines[:2])
