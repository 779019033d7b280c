"""Engine processes that die, hang, refuse to start or lie: every prompt is answered once, whatever happens."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_engine
import psutil
import pytest

from engine.frontend import Frontend
from engine.rank_process import RankProcess
from engine.supervisor import EngineEvent, Limits
from headrace.completion import Completion
from headrace.config import GenerationConfig, PytorchEngineConfig
from headrace.errors import EngineError, ModelLoadError

COMMAND = (sys.executable, "-P", fake_engine.__file__)
TEXT = "the mill wheel turns"
PLAIN = GenerationConfig(max_new_tokens=4)


def doing(what: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=4, stop_token_ids=(what,))


class Mailbox:
    """Collects answers; waits for as many as a test expects."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Completion] = queue.SimpleQueue()

    def put(self, completion: Completion) -> None:
        self._queue.put(completion)

    def take(self, count: int, timeout: float = 30) -> dict[int, Completion]:
        got = {}
        for _ in range(count):
            completion = self._queue.get(timeout=timeout)
            assert completion.index not in got, "answered twice"
            got[completion.index] = completion
        with pytest.raises(queue.Empty):
            self._queue.get(timeout=0.05)
        return got


Make = Callable[..., Frontend]


@pytest.fixture
def make(tiny_model_dir: Path) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def build(**kwargs: Any) -> Frontend:
            config = PytorchEngineConfig(max_batch_size=kwargs.pop("max_batch_size", 32), device="cpu")
            frontend = Frontend(str(tiny_model_dir), backend_config=config, engine_command=COMMAND, **kwargs)
            stack.callback(frontend.close)
            return frontend

        yield build


def submit(frontend: Frontend, box: Mailbox, count: int, config: GenerationConfig = PLAIN, first: int = 0) -> None:
    for index in range(first, first + count):
        frontend.submit(TEXT, config, box.put, index=index, do_preprocess=False)


def test_every_prompt_is_answered_once(make: Make) -> None:
    frontend, box = make(), Mailbox()
    submit(frontend, box, 200)
    got = box.take(200)
    assert sorted(got) == list(range(200))
    assert {completion.choices[0].text for completion in got.values()} == {
        "the mill wheel turns"[: len(got[0].choices[0].text)]
    }
    assert {completion.attempts for completion in got.values()} == {1}


def test_no_more_than_the_window_is_in_the_engine(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DELAY_S", "30")
    frontend, box = make(max_batch_size=2), Mailbox()
    submit(frontend, box, 50)
    time.sleep(0.3)
    assert frontend.stats()["seen"] == frontend.window == 4
    assert frontend.stats()["pending"] == 46


def test_killed_engine_is_noticed_and_its_work_done_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DELAY_S", "0.3")
    events: list[tuple[float, EngineEvent]] = []
    frontend, box = make(on_event=lambda event: events.append((time.monotonic(), event))), Mailbox()
    submit(frontend, box, 100)
    time.sleep(0.1)
    (pid,) = frontend.pids
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    got = box.take(100)
    assert all(completion.error is None for completion in got.values())
    assert max(completion.attempts for completion in got.values()) == 2
    died = [at for at, event in events if event.kind == "engine_died"]
    assert len(died) == 1
    assert died[0] - killed < 1
    assert frontend.pids != (pid,)
    assert frontend.stats()["engine_deaths"] == 1


@pytest.mark.parametrize("position", [0, 17, 63])
def test_one_poison_prompt_takes_nobody_with_it(make: Make, position: int) -> None:
    frontend, box = make(), Mailbox()
    submit(frontend, box, position)
    submit(frontend, box, 1, doing(fake_engine.POISON), first=position)
    submit(frontend, box, 100 - position - 1, first=position + 1)
    got = box.take(100)
    errors = {index: completion.error.code for index, completion in got.items() if completion.error}
    assert errors == {position: "poison_prompt"}
    assert frontend.stats()["engine_deaths"] == 3
    submit(frontend, box, 3)  # the quarantine is over
    assert all(completion.error is None for completion in box.take(3).values())


def test_two_poison_prompts_side_by_side(make: Make) -> None:
    frontend, box = make(), Mailbox()
    submit(frontend, box, 10)
    submit(frontend, box, 2, doing(fake_engine.POISON), first=10)
    submit(frontend, box, 20, first=12)
    errors = {index for index, completion in box.take(32).items() if completion.error}
    assert errors == {10, 11}


def test_thirty_poison_prompts_side_by_side_give_no_engine_up(make: Make) -> None:
    frontend, box = make(), Mailbox()
    submit(frontend, box, 10)
    submit(frontend, box, 30, doing(fake_engine.POISON), first=10)
    submit(frontend, box, 10, first=40)
    got = box.take(50, timeout=60)
    assert {index for index, completion in got.items() if completion.error} == set(range(10, 40))
    assert {completion.error.code for completion in got.values() if completion.error} == {"poison_prompt"}
    assert {completion.attempts for completion in got.values() if completion.error} == {4}, "three engines, and no fourth"
    assert frontend.stats()["engine_deaths"] == 1 + 2 * 30


def test_a_prompt_that_kills_after_its_first_token_is_found_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DELAY_S", "0.05")
    frontend, box = make(), Mailbox()
    submit(frontend, box, 7)
    submit(frontend, box, 1, doing(fake_engine.LATE), first=7)
    submit(frontend, box, 24, first=8)
    got = box.take(32, timeout=60)
    assert {index for index, completion in got.items() if completion.error} == {7}
    assert frontend.stats()["engine_deaths"] <= 2 + math.log2(32) + 2


def test_who_is_tried_behind_one_that_kills_at_its_second_token_is_not_blamed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token acquits; the step that follows is launched by then, and kills the engine in which the next one is already."""
    monkeypatch.setenv("FAKE_DELAY_S", "0.5")
    frontend, box = make(), Mailbox()
    monkeypatch.setenv("FAKE_DELAY_S", "0")  # of the engines that come
    for index, what in enumerate((doing(fake_engine.LATE), PLAIN, doing(fake_engine.LATE))):
        submit(frontend, box, 1, what, first=index)
    errors = {index: completion.error.code for index, completion in box.take(3).items() if completion.error}
    assert errors == {0: "poison_prompt", 2: "poison_prompt"}


def test_an_engine_that_dies_of_everything_convicts_nobody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend, box = make(limits=Limits(max_deaths=8)), Mailbox()
    monkeypatch.setenv("FAKE_BROKEN", "1")
    os.kill(frontend.pids[0], signal.SIGKILL)
    submit(frontend, box, 5)
    got = box.take(5, timeout=60)
    assert {completion.error.code for completion in got.values() if completion.error} == {"engine_error"}
    assert frontend.stats()["poison_prompts"] == 0


def test_operator_who_kills_engines_makes_no_poison(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DELAY_S", "0.4")
    frontend, box = make(), Mailbox()
    submit(frontend, box, 20)
    for _ in range(4):
        deadline = time.monotonic() + 10
        while not (frontend.is_alive and frontend.stats()["in_engine"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(frontend.pids[0], signal.SIGKILL)
        time.sleep(0.05)
    assert all(completion.error is None for completion in box.take(20).values())


def test_hanging_engine_is_killed_by_the_watchdog(make: Make) -> None:
    frontend, box = make(limits=Limits(watchdog_s=0.5, poll_s=0.1)), Mailbox()
    submit(frontend, box, 3)
    box.take(3)
    submit(frontend, box, 1, doing(fake_engine.HANG))
    submit(frontend, box, 5, first=1)
    got = box.take(6)
    assert {index for index, completion in got.items() if completion.error} == {0}
    assert "no step for 0.5 s" in got[0].error.message  # type: ignore[union-attr]


def test_idle_engine_is_not_taken_for_hanging(make: Make) -> None:
    frontend, box = make(limits=Limits(watchdog_s=1.0, poll_s=0.05)), Mailbox()
    time.sleep(2)
    submit(frontend, box, 3)
    assert {completion.attempts for completion in box.take(3).values()} == {1}


def test_failure_that_the_engine_reports_is_in_the_verdict(make: Make) -> None:
    frontend, box = make(), Mailbox()
    submit(frontend, box, 1, doing(fake_engine.RAISE))
    error = box.take(1)[0].error
    assert error is not None
    assert error.code == "poison_prompt"
    assert "the device said no" in error.message


def test_refused_start_raises_the_same_class(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_START", "refuse")
    with pytest.raises(ModelLoadError, match="no weights here") as caught:
        make()
    assert caught.value.param == "model_path"


def test_crash_at_start_raises_with_the_last_words(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_START", "crash")
    with pytest.raises(EngineError, match=r"(?s)exited with status 7.*the driver is broken"):
        make()


def test_engine_that_never_comes_back_is_given_up(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    monkeypatch.setenv("FAKE_STARTS", str(starts))
    monkeypatch.setenv("FAKE_START", "crash_again")
    monkeypatch.setenv("FAKE_DELAY_S", "30")
    frontend, box = make(limits=Limits(backoff_s=0.01)), Mailbox()
    submit(frontend, box, 5)
    time.sleep(0.1)
    os.kill(frontend.pids[0], signal.SIGKILL)
    got = box.take(5)
    assert {completion.error.code for completion in got.values() if completion.error} == {"engine_error"}
    assert "the driver is broken" in got[0].error.message  # type: ignore[union-attr]
    assert len(starts.read_text().split()) == 1 + Limits().max_start_failures
    submit(frontend, box, 1, first=9)
    assert box.take(1)[9].error is not None


def test_abort_answers_once_and_frees_the_place(make: Make) -> None:
    frontend, box = make(max_batch_size=1), Mailbox()
    slow = [
        frontend.submit(TEXT, doing(fake_engine.SLOW), box.put, index=index, do_preprocess=False)
        for index in range(frontend.window)
    ]
    waiting = frontend.submit(TEXT, PLAIN, box.put, index=7, do_preprocess=False)
    submit(frontend, box, 1, first=8)
    for handle in (*slow, waiting, slow[0], 12345):
        frontend.abort(handle)
    got = box.take(len(slow) + 2, timeout=5)
    assert {index: c.error.code for index, c in got.items() if c.error} == dict.fromkeys((*range(len(slow)), 7), "aborted")
    assert got[8].error is None


def test_close_answers_everything_and_leaves_no_process(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DELAY_S", "30")
    frontend, box = make(), Mailbox()
    submit(frontend, box, 100)
    (pid,) = frontend.pids
    frontend.close()
    frontend.close()
    assert {c.error.code for c in box.take(100).values() if c.error} == {"aborted"}
    assert not psutil.pid_exists(pid)
    assert frontend.pids == ()
    with pytest.raises(EngineError, match="closed"):
        submit(frontend, box, 1)


def test_callback_that_raises_hurts_nobody_else(make: Make) -> None:
    frontend, box = make(), Mailbox()

    def fail(_: Completion) -> None:
        raise RuntimeError("a bug of the caller's")

    frontend.submit(TEXT, PLAIN, fail, do_preprocess=False)
    submit(frontend, box, 5)
    assert len(box.take(5)) == 5


def test_callback_may_submit_and_close(make: Make) -> None:
    frontend, box = make(), Mailbox()
    frontend.submit(TEXT, PLAIN, lambda _: submit(frontend, box, 1, first=1), do_preprocess=False)
    assert box.take(1)[1].error is None
    frontend.submit(TEXT, PLAIN, lambda _: frontend.close(), do_preprocess=False)
    deadline = time.monotonic() + 5
    while frontend.pids and time.monotonic() < deadline:
        time.sleep(0.02)
    assert frontend.pids == ()


def test_engine_dies_with_its_parent(tiny_model_dir: Path) -> None:
    script = (
        "import sys, os, time; from engine.frontend import Frontend; from headrace.config import PytorchEngineConfig\n"
        f"f = Frontend({str(tiny_model_dir)!r}, backend_config=PytorchEngineConfig(device='cpu'), engine_command={COMMAND!r})\n"
        "print(f.pids[0], flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
        parent.wait()
        gone = ends(pid, within_s=10)
    assert gone


def ends(pid: int, *, within_s: float) -> bool:
    """Wait for the end of a process that is nobody's child here; who adopted it may not ask how it ended."""
    deadline = time.monotonic() + within_s
    while alive := psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return not alive


def test_engine_dies_with_its_parent_though_a_fork_of_the_parent_lives_on() -> None:
    """What `multiprocessing` forks holds the pipe of commands open: its end of file never comes."""
    script = (
        "import os, time; from engine.rank_process import RankProcess\n"
        f"process = RankProcess(0, {COMMAND!r})\n"
        "child = os.fork()\n"
        "print(process.pid, child, flush=True) if child else None; time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, fork = map(int, parent.stdout.readline().split())
        try:
            time.sleep(1)  # it knows its parent
            parent.kill()
            parent.wait()
            assert ends(pid, within_s=5)
            assert psutil.pid_exists(fork)
        finally:
            os.kill(fork, signal.SIGKILL)


def test_an_engine_is_closed_in_a_process_with_many_files(make: Make) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1300:
        pytest.skip("this host allows no process 1300 files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1300), hard))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            frontend, box = make(), Mailbox()
            submit(frontend, box, 3)
            assert all(completion.error is None for completion in box.take(3).values())
            [pid] = frontend.pids
            frontend.close()
        assert not psutil.pid_exists(pid)
        with pytest.raises(EngineError, match="closed"):
            submit(frontend, box, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_rank_that_cannot_read_its_commands_ends() -> None:
    command = [sys.executable, "-P", "-m", "engine.rank"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"\xff" * 8)
        process.stdin.flush()  # and it stays open: it isn't the end of the file that ends the process
        assert process.wait(timeout=30) == 1


def test_a_rank_that_writes_no_line_ends_fills_no_memory() -> None:
    script = "import sys\nfor _ in range(400): sys.stderr.write('.' * 10_000)\nsys.stderr.write('the last words')"
    process = RankProcess(0, [sys.executable, "-c", script])
    try:
        while process.read_stderr():
            assert len(process._line) <= 1 << 14
            time.sleep(0.001)
        assert len(process.stderr_tail) < 40 << 18
        assert process.stderr_tail.endswith("the last words")
    finally:
        process.kill()
