"""The offline job: order, resumption after every kind of end, and what it refuses. The last tests use the real engine."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import wait_until

from headrace.completion import Choice, Completion, CompletionError, TokenUsage
from headrace.config import GenerationConfig, Prompt, PytorchEngineConfig, TurbomindEngineConfig
from headrace.errors import Conflict, EngineError, InvalidRequest
from headrace.job import TEXT_FIELDS, Failures, JobEngine, JobProgress, JobResult, JobSpec, run_job
from headrace.store import Store

ROOT = Path(__file__).resolve().parents[2]


class EchoEngine:
    """Answers with the prompt in capitals, on another thread, newest first; `dies_after` answers it is gone."""

    def __init__(self, *, dies_after: int | None = None) -> None:
        self.seen: list[int] = []
        self.closed = False
        self.most_waiting = 0
        self._dies_after = dies_after
        self._waiting: list[tuple[int, Prompt, GenerationConfig, Callable[[Completion], None]]] = []
        self._lock = threading.Condition()
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Prompt,
        gen_config: GenerationConfig,
        on_done: Callable[[Completion], None],
        *,
        index: int = 0,
        seed_key: str | None = None,
    ) -> int:
        assert seed_key
        assert seed_key.endswith(f":{index}")
        with self._lock:
            self.seen.append(index)
            self._waiting.append((index, prompt, gen_config, on_done))
            self.most_waiting = max(self.most_waiting, len(self._waiting))
            self._lock.notify()
        return index

    def _answer(self) -> None:
        answered = 0
        while not self.closed:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting or self.closed)
                if self.closed:
                    return
                index, prompt, gen_config, on_done = self._waiting.pop()
            if self._dies_after is not None and answered >= self._dies_after:
                on_done(Completion(index=index, error=CompletionError(code="rank_lost", message="rank 0 ended")))
                continue
            answered += 1
            text = str(prompt).upper()
            choices = tuple(Choice(index=n, text=text, token_ids=(1, 2), finish_reason="stop") for n in range(gen_config.n))
            on_done(
                Completion(index=index, choices=choices, usage=TokenUsage(prompt_tokens=3, completion_tokens=2 * gen_config.n))
            )

    def close(self) -> None:
        with self._lock:
            self.closed = True
            self._lock.notify()
        self._thread.join()


def write(path: Path, count: int, *, bad: tuple[int, ...] = ()) -> Path:
    lines = ["{broken" if n in bad else json.dumps({"prompt": f"row {n}", "custom_id": f"id-{n}"}) for n in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def spec_of(tmp_path: Path, count: int = 600, **changes: Any) -> JobSpec:
    source = tmp_path / "in.jsonl"
    if not source.exists():
        write(source, count, bad=(5,))
    return JobSpec(**{"input": source, "output": tmp_path / "out.jsonl", "model": "echo", **changes})


def run(spec: JobSpec, engine: EchoEngine | None = None, **more: Any) -> tuple[JobResult, EchoEngine]:
    engine = engine or EchoEngine()
    try:
        return run_job(spec, lambda: engine, **more), engine
    finally:
        engine.close()


def rows_of(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): random text holds U+0085 now and then, which JSON leaves as it is and Python takes for an end of line.
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def never() -> JobEngine:
    raise AssertionError("the engine was started although nothing is missing")


def test_every_row_in_order_once(tmp_path: Path) -> None:
    moments: list[JobProgress] = []
    result, engine = run(spec_of(tmp_path), report=moments.append)
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["index"] for row in rows] == list(range(600))
    assert rows[7] == {
        "index": 7,
        "custom_id": "id-7",
        "text": "ROW 7",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": 2,
    }
    assert rows[5]["error"]["code"] == "invalid_request"
    assert sorted(engine.seen) == [n for n in range(600) if n != 5]
    assert (result.batch.counts.completed, result.batch.counts.failed) == (599, 1)
    assert result.failures == {"invalid_request": Failures(1, 6, rows[5]["error"]["message"])}
    # Before the model is loaded, a bar knows how far it goes.
    assert (moments[0].done, moments[0].total) == (1, 600)
    assert moments[-1].done == 600
    assert result.progress.usage.completion_tokens == 599 * 2


def test_a_finished_job_starts_no_engine(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    run(spec)
    before = spec.output.read_bytes()
    spec.output.unlink()
    result = run_job(spec, never)
    assert spec.output.read_bytes() == before
    assert result.progress.resumed == 600


def test_an_engine_that_ends_costs_only_what_was_not_committed(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    first = EchoEngine(dies_after=200)
    with pytest.raises(EngineError, match="goes on where it stopped"):
        run(spec, first)
    assert not spec.output.exists()
    with Store(f"sqlite:///{spec.journal_dir}/journal.db") as store:
        (batch,) = store.list_batches()
        kept = {completion.index for completion in store.results(batch.id)}
    assert len(kept) > 100
    _, second = run(spec)
    assert sorted(second.seen) == sorted(set(range(600)) - kept)
    assert [row["index"] for row in rows_of(spec.output)] == list(range(600))


def test_the_engine_is_never_given_more_than_its_window(tmp_path: Path) -> None:
    from headrace.job import WINDOW_ROWS

    write(tmp_path / "in.jsonl", 3 * WINDOW_ROWS)
    _, engine = run(spec_of(tmp_path))
    assert len(engine.seen) == 3 * WINDOW_ROWS
    assert 0 < engine.most_waiting <= WINDOW_ROWS


def test_feeding_slower_than_a_lease_computes_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.job.LEASE_S", 2.0)

    class SlowToTake(EchoEngine):
        def submit(self, *args: Any, **kwargs: Any) -> int:
            time.sleep(0.008)  # tokenising a long prompt
            return super().submit(*args, **kwargs)

    _, engine = run(spec_of(tmp_path), SlowToTake())
    assert len(set(engine.seen)) == len(engine.seen)


def test_several_choices_are_all_there(tmp_path: Path) -> None:
    run(spec_of(tmp_path, 3, gen_config=GenerationConfig(n=2, top_k=0)))
    row = rows_of(tmp_path / "out.jsonl")[0]
    assert [choice["text"] for choice in row["choices"]] == ["ROW 0", "ROW 0"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "other"}, "model"),
        ({"gen_config": GenerationConfig(max_new_tokens=7)}, "gen_config"),
        ({"engine_config": PytorchEngineConfig(session_len=99)}, "engine_config"),
        ({"engine_config": PytorchEngineConfig(quant_policy=8)}, "engine_config"),
        ({"engine_config": PytorchEngineConfig(rope_scaling_factor=2.0)}, "engine_config"),
    ],
)
def test_another_job_for_the_same_output_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    run(spec_of(tmp_path, 10))
    with pytest.raises(Conflict, match=f"different: {named} ") as caught:
        run_job(spec_of(tmp_path, **changes), never)
    assert "--restart" in caught.value.message


def test_a_changed_input_is_refused_unless_restarted(tmp_path: Path) -> None:
    run(spec_of(tmp_path, 10))
    write(tmp_path / "in.jsonl", 11)
    with pytest.raises(Conflict, match="different: input "):
        run_job(spec_of(tmp_path), never)
    run(spec_of(tmp_path, restart=True))
    assert len(rows_of(tmp_path / "out.jsonl")) == 11


def test_what_cannot_change_an_answer_may_change(tmp_path: Path) -> None:
    run(spec_of(tmp_path, 10))
    run_job(spec_of(tmp_path, engine_config=PytorchEngineConfig(max_batch_size=4)), never)


def test_every_field_of_an_engine_is_known_to_change_answers_or_not() -> None:
    """A new one that nobody thought of here would let a job be resumed with other answers."""
    harmless = {"tp", "max_batch_size", "eviction_type", "prefill_interval", "block_size", "num_cpu_blocks", "num_gpu_blocks"}
    harmless |= {
        "max_prefill_token_num",
        "cache_max_entry_count",
        "enable_prefix_caching",
        "device",
        "eager_mode",
        "model_format",
    }
    for kind in (PytorchEngineConfig, TurbomindEngineConfig):
        assert {field.name for field in dataclasses.fields(kind)} <= harmless | set(TEXT_FIELDS)
    assert not harmless & set(TEXT_FIELDS)


def test_two_processes_do_not_share_an_output(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, 10)
    inside = threading.Event()
    go_on = threading.Event()

    def slow_start() -> JobEngine:
        inside.set()
        go_on.wait(30)
        return EchoEngine()

    thread = threading.Thread(target=run_job, args=(spec, slow_start))
    thread.start()
    try:
        assert inside.wait(30)
        with pytest.raises(Conflict, match="another process"):
            run_job(spec, never)
    finally:
        go_on.set()
        thread.join()
    assert len(rows_of(spec.output)) == 10


def test_a_job_killed_while_it_copied_the_rows_starts_over(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, 10)

    def killed() -> Any:
        yield "row 0"
        raise KeyboardInterrupt

    spec.journal_dir.mkdir()
    with Store(f"sqlite:///{spec.journal_dir}/journal.db", create=True) as store, pytest.raises(KeyboardInterrupt):
        store.create_batch(killed(), spec.gen_config, model="echo", endpoint="job")
    run(spec)
    assert len(rows_of(spec.output)) == 10


def test_only_bad_rows_need_no_engine(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", 3, bad=(0, 1, 2))
    result = run_job(spec_of(tmp_path), never)
    assert result.batch.counts.failed == 3
    (failures,) = result.failures.values()
    assert (failures.rows, failures.line) == (3, 1)
    assert all("error" in row for row in rows_of(tmp_path / "out.jsonl"))


def test_an_empty_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n\n")
    with pytest.raises(InvalidRequest, match="no rows"):
        run_job(spec_of(tmp_path), never)


def start_cli(*arguments: str | Path, new_group: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "headrace.cli", "run", *map(str, arguments)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=new_group
    )


@pytest.mark.slow
def test_kill_9_and_start_again_computes_only_what_is_missing(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The real command with the real engine: killed without warning in the middle, its answers are neither lost nor repeated."""
    source, output = write(tmp_path / "in.jsonl", 1500), tmp_path / "out.jsonl"
    config = json.dumps({"max_new_tokens": 32, "ignore_eos": True, "top_k": 0, "temperature": 1.0})
    command = (source, "-o", output, "--model", tiny_model_dir, "--gen-config", config, "--json")
    journal = Store(f"sqlite:///{tmp_path}/out.jsonl.headrace/journal.db")

    def done() -> int:
        try:
            return sum(batch.counts.done for batch in journal.list_batches())
        except Exception:
            return 0  # not made yet

    first = start_cli(*command)
    try:
        wait_until(lambda: done() >= 64 or first.poll() is not None, timeout_s=120)
        children = psutil.Process(first.pid).children(recursive=True)
    finally:
        first.send_signal(signal.SIGKILL)
        _, error = first.communicate(timeout=30)
    assert children, f"no engine process was running: {error}"
    (batch,) = journal.list_batches()
    kept = {row.index: row for row in journal.stream_results(batch.id)}
    assert 64 <= len(kept) < 1500, error
    assert not output.exists()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive, "the engine outlived the job that started it"

    second = start_cli(*command)
    text, error = second.communicate(timeout=180)
    assert second.returncode == 0, error
    report = json.loads(text)
    assert report["computed"] == 1500 - len(kept)
    final = {row.index: row for row in journal.stream_results(batch.id)}
    assert sorted(final) == list(range(1500))
    assert all(final[index] == row for index, row in kept.items()), "a row that was there was computed again"
    rows = rows_of(output)
    assert [row["custom_id"] for row in rows] == [f"id-{n}" for n in range(1500)]
    assert sum(row["completion_tokens"] for row in rows) == report["completion_tokens"] == 1500 * 32
    journal.close()


@pytest.mark.slow
def test_ctrl_c_ends_it_quickly_and_says_how_to_go_on(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The whole foreground group gets the signal, as from a terminal."""
    source = write(tmp_path / "in.jsonl", 5000)
    job = start_cli(source, "-o", tmp_path / "out.jsonl", "--model", tiny_model_dir, new_group=True)
    journal = tmp_path / "out.jsonl.headrace"
    wait_until(lambda: (journal / "journal.db-wal").exists() and bool(psutil.Process(job.pid).children()), timeout_s=60)
    children = psutil.Process(job.pid).children(recursive=True)
    os.killpg(job.pid, signal.SIGINT)
    _, error = job.communicate(timeout=30)
    assert job.returncode == 130, error
    assert error.splitlines()[-1].endswith("the same command goes on where this one stopped")
    assert "Traceback" not in error
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 2)
    job = start_cli(source, "-o", tmp_path / "out.jsonl", "--model", tmp_path / "no-model")
    _, error = job.communicate(timeout=120)
    assert job.returncode in (1, 2)
    assert "Traceback" not in error
    assert "no-model" in error.splitlines()[-1]
