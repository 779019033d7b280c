"""Runs requests through an engine of one or more ranks on GPUs, and gives their tokens.

A group of ranks gets new processes each time, rank 0 too: PyTorch's symmetric memory knows groups by a name that is the same for
each first group of a process, so that a second one would wait at the first one's meeting point.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from crowded_ranks import crowd
from engine_driver import run

from engine.engine import Engine
from engine.executor import LocalExecutor, make_executor, serve_rank
from engine.options import EngineOptions
from engine.parallel import Rendezvous
from engine.request import TokenRequest

Tokens = dict[str, tuple[int, ...]]

ROOT = Path(__file__).parents[2]


def tokens(options: EngineOptions, jobs: Sequence[TokenRequest], *, timeout_s: float = 200) -> Tokens:
    """Run the jobs; nothing of a group that hangs is left."""
    if options.tp == 1:
        executor = LocalExecutor(options)
        try:
            return _run(Engine(executor, options), jobs)
        finally:
            executor.close()
    with tempfile.NamedTemporaryFile(suffix=".pickle") as given:
        given.write(pickle.dumps((options.to_dict(), list(jobs))))
        given.flush()
        command = [sys.executable, __file__, given.name]
        path = f"{ROOT}:{ROOT / 'tests' / 'support'}:{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, "PYTHONPATH": path, "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
        group = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True)
        try:
            said, _ = group.communicate(timeout=timeout_s)
        finally:
            if group.poll() is None:
                os.killpg(group.pid, signal.SIGKILL)
                group.wait()
    assert group.returncode == 0, said
    return {name: tuple(ids) for name, ids in json.loads(said.splitlines()[-1]).items()}


def _run(engine: Engine, jobs: Sequence[TokenRequest]) -> Tokens:
    answers = run(engine, jobs)
    engine.check_integrity()
    assert all(answer.error is None for answer in answers.values()), answers
    return {name: tuple(answer.token_ids) for name, answer in answers.items()}


def _rank_zero(given: Path) -> None:
    fields, jobs = pickle.loads(given.read_bytes())
    options = EngineOptions.from_dict(fields)
    crowd(options.tp)
    rendezvous = Rendezvous()
    others = [
        subprocess.Popen([sys.executable, __file__, json.dumps(fields), str(rank), rendezvous.address])
        for rank in range(1, options.tp)
    ]
    executor = make_executor(options, rendezvous)
    found = _run(Engine(executor, options), jobs)
    executor.close()
    assert [rank.wait(timeout=60) for rank in others] == [0] * len(others)
    print(json.dumps(found))


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    if len(sys.argv) == 2:
        _rank_zero(Path(sys.argv[1]))
    else:
        options = EngineOptions.from_dict(json.loads(sys.argv[1]))
        crowd(options.tp)
        serve_rank(options, int(sys.argv[2]), options.tp, sys.argv[3])
