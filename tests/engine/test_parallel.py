"""Tensor parallelism with real processes over gloo: two or four ranks give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import psutil
import pytest
from engine_driver import run
from plan_driver import generate, options_for, request
from tiny_models import save_tiny_model

from engine.async_engine import AsyncEngine
from engine.engine import Engine
from engine.executor import LocalExecutor, make_executor
from engine.options import EngineOptions
from engine.parallel import Rendezvous
from engine.plan import Admission, PlanRow, StepPlan
from engine.rank_process import RankProcess
from engine.row_shares import LEAST_ROWS, RowShares
from headrace import GenerationConfig, PytorchEngineConfig
from headrace.errors import RankLost

ROOT = Path(__file__).parents[2]
PROMPTS = [list(range(5, 75)), [9, 3, 4, 250, 7], [40] * 33]
RANK = """
import json, sys
from engine.executor import serve_rank
from engine.options import EngineOptions
serve_rank(EngineOptions.from_dict(json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
"""


@contextmanager
def other_ranks(options: EngineOptions, rendezvous: Rendezvous) -> Iterator[list[subprocess.Popen[bytes]]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(options.to_dict()), str(rank), str(options.tp), rendezvous.address],
            env=environment,
        )
        for rank in range(1, options.tp)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()


@pytest.mark.enable_socket
@pytest.mark.parametrize(("architecture", "tp"), [("qwen2", 2), ("llama", 2), ("qwen3", 4)])
def test_ranks_together_give_the_tokens_of_one(tmp_path: Path, architecture: str, tp: int) -> None:
    # 401 tokens: the vocabulary divides by neither 2 nor 4; 4 ranks share 2 KV heads.
    path = save_tiny_model(tmp_path, architecture, vocab_size=401, tie_word_embeddings=architecture == "llama")
    requests = [request(prompt) for prompt in PROMPTS]
    requests[2] = request(PROMPTS[2], top_k=0, temperature=1.0, seed=5)
    expected, _ = generate(LocalExecutor(options_for(path)), requests, steps=10, block_size=64)
    options = options_for(path, tp=tp)
    rendezvous = Rendezvous()
    with other_ranks(options, rendezvous) as ranks:
        executor = make_executor(options, rendezvous)
        assert executor.num_blocks == 64
        got, _ = generate(executor, requests, steps=10, block_size=64, chunk=16)
        executor.close()
        executor.close()
        assert got == expected
        assert [rank.wait(timeout=30) for rank in ranks] == [0] * (tp - 1)


@pytest.mark.enable_socket
def test_forks_and_prompt_logprobs_on_two_ranks(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, vocab_size=401)
    fields = {"top_k": 0, "temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True, "prompt_logprobs": 4}
    choices = [request(PROMPTS[0], seed=9, choice=choice, request_id=str(choice), **fields) for choice in range(3)]
    choices = [replace(one, family="f") for one in choices]
    single = options_for(path, block_size=16, max_prefill_token_num=50)
    expected = run(Engine(LocalExecutor(single), single), choices)
    options, rendezvous = replace(single, tp=2), Rendezvous()
    with other_ranks(options, rendezvous) as ranks:
        executor = make_executor(options, rendezvous)
        engine = Engine(executor, options)
        got = run(engine, choices)
        executor.close()
        assert ranks[0].wait(timeout=30) == 0
    assert {name: one.token_ids for name, one in got.items()} == {name: one.token_ids for name, one in expected.items()}
    assert engine.stats().computed_tokens == len(PROMPTS[0]) + 2 + 3 * 11
    ours, theirs = got["0"].prompt_logprobs, expected["0"].prompt_logprobs
    assert ours
    assert theirs
    assert [row.token_id for row in ours] == PROMPTS[0][1:]
    assert [row.logprob for row in ours] == pytest.approx([row.logprob for row in theirs], abs=1e-4)
    assert [[token for token, _ in row.top] for row in ours] == [[token for token, _ in row.top] for row in theirs]


@pytest.mark.enable_socket
def test_many_rows_are_sampled_by_both_ranks_each_its_share(tmp_path: Path) -> None:
    """An odd count, rows of every kind, and a step in which one row wants log-probabilities, which both ranks then sample whole."""
    path = save_tiny_model(tmp_path, vocab_size=401)
    kinds = ({"top_k": 1}, {"top_k": 0, "temperature": 1.0}, {"top_k": 7, "repetition_penalty": 1.3, "min_new_tokens": 4})
    count = LEAST_ROWS + 9
    jobs = [
        request(
            [5 + number % 90, 7, number % 300],
            request_id=str(number),
            seed=number,
            max_new_tokens=6 + number % 3,
            **kinds[number % 3],
        )
        for number in range(count)
    ]
    jobs += [request([5, 6], request_id="told", logprobs=2, max_new_tokens=2)]
    fields = {"block_size": 16, "max_batch_size": count + 1, "num_gpu_blocks": 2 * count + 2}
    single = options_for(path, **fields)
    expected = run(Engine(LocalExecutor(single), single), jobs)
    options, rendezvous = replace(single, tp=2), Rendezvous()
    shared = []
    with (
        other_ranks(options, rendezvous) as ranks,
        mock.patch.object(RowShares, "tell", autospec=True, side_effect=RowShares.tell) as tell,
    ):
        executor = make_executor(options, rendezvous)
        tell.reset_mock()
        got = run(Engine(executor, options), jobs)
        shared = [call.kwargs["rows"] for call in tell.call_args_list]
        executor.close()
        assert ranks[0].wait(timeout=30) == 0
    assert {name: one.token_ids for name, one in got.items()} == {name: one.token_ids for name, one in expected.items()}
    assert all(one.error is None for one in got.values())
    assert len(shared) >= 3, shared
    assert min(shared) >= LEAST_ROWS
    assert count in shared, "an odd number of rows"


@pytest.mark.enable_socket
def test_a_lost_rank_is_an_error_at_once(tmp_path: Path) -> None:
    options = options_for(save_tiny_model(tmp_path), tp=2)
    rendezvous = Rendezvous()
    with other_ranks(options, rendezvous) as ranks:
        executor = make_executor(options, rendezvous)
        generate(executor, [request([5, 6, 7])], steps=2, block_size=64)
        ranks[0].kill()
        ranks[0].wait()
        began = time.monotonic()
        with pytest.raises(RankLost, match="start"):
            executor.launch(StepPlan(step=9, admitted=(), rows=(PlanRow(0, 3, 1, True, 2, ()),)))
        assert time.monotonic() - began < 5
        executor.close()


@pytest.mark.enable_socket
def test_ranks_meet_where_no_other_machine_comes() -> None:
    """The store asks for no password: whoever reaches it could tell the ranks whose plans to run."""
    rendezvous = Rendezvous()
    port = int(rendezvous.address.rpartition(":")[2])
    listening = [one.laddr for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert [place.ip for place in listening if place.port == port] == ["127.0.0.1"]


def test_a_plan_survives_the_wire() -> None:
    one = request(
        [5, 6],
        seed=2**64 - 1,
        eos_ids=(2,),
        stop_ids=(7,),
        bad_sequences=((1, 2), (3,)),
        temperature=0.5,
        logit_bias={4: -1.5},
        logprobs=3,
    )
    plan = StepPlan(
        step=3,
        admitted=(Admission(1, one, (5, 6), (9, 8)),),
        rows=(PlanRow(1, 0, 2, True, 0, (), 1), PlanRow(0, 4, 1, False, 3, (5,))),
        copies=((3, 4), (3, 7)),
    )
    assert StepPlan.from_bytes(plan.to_bytes()) == plan
    assert StepPlan.from_bytes(StepPlan(step=0, admitted=(), rows=()).to_bytes()) == StepPlan(step=0, admitted=(), rows=())


@pytest.mark.enable_socket
def test_ranks_listen_on_the_loopback_interface_only(tiny_model_dir: Path) -> None:
    config = PytorchEngineConfig(device="cpu", tp=2, num_gpu_blocks=64, max_batch_size=4)
    with AsyncEngine(str(tiny_model_dir), backend_config=config) as pipe:
        assert pipe("water", GenerationConfig(max_new_tokens=3)).error_code is None
        open_ = [one for pid in pipe.frontend.pids for one in psutil.Process(pid).net_connections("inet")]
        listening = [one.laddr.ip for one in open_ if one.status == psutil.CONN_LISTEN]
        assert len(listening) >= 3, "the meeting point, and a socket of each rank's"
        assert set(listening) == {"127.0.0.1"}


def test_ranks_are_told_which_interface_unless_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a host's name points to its network card, gloo would listen there; and NCCL on the card, wherever it points to."""
    script = "import os, sys; sys.stderr.write(' '.join(os.environ[f'{one}_SOCKET_IFNAME'] for one in ('GLOO', 'NCCL')))"
    for users, told in (({}, "lo =lo"), ({"GLOO": "eth1", "NCCL": "eth2"}, "eth1 eth2")):
        for library in ("GLOO", "NCCL"):
            monkeypatch.delenv(f"{library}_SOCKET_IFNAME", raising=False)
            if library in users:
                monkeypatch.setenv(f"{library}_SOCKET_IFNAME", users[library])
        process = RankProcess(0, [sys.executable, "-c", script])
        try:
            while process.read_stderr():
                time.sleep(0.001)
            assert process.stderr_tail == told
        finally:
            process.kill()
