"""The document's tensor-parallel program inside a task of somebody else's Celery worker: a daemonic process that was forked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from celery import Celery
from document import IMPORTS, SNIPPETS
from servers import RedisServer
from tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
THEIRS = """
from celery import Celery

app = Celery("theirs", broker={redis!r}, backend={redis!r})


@app.task(name="theirs.ask")
def ask():
{program}
    return [[one.text, one.error_code, len(one.token_ids)] for one in response]
"""


@pytest.mark.slow
def test_two_ranks_in_a_forked_task(tmp_path: Path, redis_server: RedisServer) -> None:
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=128)  # short answers
    program = (IMPORTS + SNIPPETS["tp"]).replace("internlm/internlm-chat-7b", str(model))
    text = THEIRS.format(redis=redis_server.url, program="".join(f"    {line}\n" for line in program.splitlines()))
    (tmp_path / "theirs.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["OMP_NUM_THREADS"] = "1"
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "theirs",
        "worker",
        "-P",
        "prefork",
        "-c",
        "1",
        "--without-gossip",
        "--without-mingle",
    ]
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        with Celery("theirs", broker=redis_server.url, backend=redis_server.url) as app:
            began = time.monotonic()
            answers = app.send_task("theirs.ask").get(timeout=120)
        assert [error for _, error, _ in answers] == [None, None], answers
        assert all(count > 0 for _, _, count in answers)
        assert time.monotonic() - began < 120
    finally:
        worker.terminate()
        worker.wait(timeout=60)
    assert worker.returncode == 0, (tmp_path / "log").read_text()
