"""Replicas: workers with an engine each, on a GPU each, that share one queue, and whether they finish together.

    python benchmarks/replicas.py [--workers 2] [--prompts 5000] [--shape 8b]      # on a CPU: --device cpu --shape tiny

Starts a Redis, a database in SQLite and the workers, each of which sees one GPU, and submits batches of prompts of uneven lengths, each batch
with another length of answers. Every row is checked; `apart_s` is the time between the workers' last rows. The weights are drawn on the
device in the given shape, with a small vocabulary that has a tokenizer.

One JSON line, printed and appended to benchmarks/results/replicas.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import ledger
from random_model import save_drawn_llama
from servers import RedisServer
from service import Service
from sqlalchemy import create_engine, func, select
from tiny_models import save_tiny_model, save_tokenizer

from headrace.config import GenerationConfig
from headrace.settings import Settings
from headrace.store import tables

OUTPUTS = (8, 16, 32, 64, 128)
WORDS = ["the", "mill", "wheel", "turns", "while", "water", "runs", "down", "headrace"]


def save_model(folder: Path, shape: str) -> Path:
    """Save a model of a shape with a tokenizer."""
    if shape == "tiny":
        return save_tiny_model(folder)
    vocabulary = save_tokenizer(folder)
    return save_drawn_llama(folder, shape, vocabulary=vocabulary)


def prompts(count: int, seed: int) -> list[Any]:
    """Draw texts of one to two hundred words, most of them short."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=round(200 ** draw.random()))) for _ in range(count)]


def share(service: Service, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the workers, run the batches, and say who did what until when."""
    with contextlib.ExitStack() as stack:
        started = time.perf_counter()
        workers = []
        for number in range(arguments.workers):
            environ = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])}
            if arguments.device == "cuda":
                environ["CUDA_VISIBLE_DEVICES"] = str(number)
            workers.append(stack.enter_context(service.worker(environ=environ)))
        for worker in workers:
            service.ready(worker, timeout_s=180)
        ready = time.perf_counter()
        each = arguments.prompts // len(OUTPUTS)
        batches = [
            service.submit(prompts(each, seed), gen_config=GenerationConfig(max_new_tokens=length, ignore_eos=True, top_k=40))
            for seed, length in enumerate(OUTPUTS)
        ]
        for batch in batches:
            service.wait_over(batch, timeout_s=600)
        over = time.perf_counter()
        for batch, length in zip(batches, OUTPUTS, strict=True):
            rows = service.assert_exactly_once(batch, each)
            assert all(row.error is None and row.usage.completion_tokens == length for row in rows)
    last = func.max(tables.completions.c.recorded_at)
    with create_engine(service.settings.database_url).connect() as connection:
        query = select(tables.completions.c.worker, func.count(), last).group_by(tables.completions.c.worker)
        did = {str(worker): (int(rows), float(end)) for worker, rows, end in connection.execute(query)}
    ends = [end for _, end in did.values()]
    tokens = each * sum(OUTPUTS)
    return {
        "prompts": each * len(OUTPUTS),
        "rows_by_worker": [rows for rows, _ in did.values()],
        "apart_s": round(max(ends) - min(ends), 2),
        "wall_s": round(over - ready, 2),
        "output_tok_s": round(tokens / (over - ready), 1),
        "workers_ready_s": round(ready - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--shape", choices=["8b", "70b", "tiny"], default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "replicas.jsonl")
    parser.add_argument("--commit", help="where there is no git to ask")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, RedisServer() as redis:
        model = save_model(Path(folder) / "model", arguments.shape)
        engine = {"session_len": 1024, "max_batch_size": 512, "device": arguments.device, "enable_prefix_caching": False}
        settings = Settings(
            model=str(model),
            engine_config=json.dumps(engine),
            database_url=f"sqlite:///{folder}/headrace.db",
            redis_url=redis.url,
        )
        service = Service(settings, Path(folder))
        try:
            figures = share(service, arguments)
        except BaseException:
            for log in sorted(Path(folder).glob("gpu*.log")):
                print(log.name, log.read_text(errors="replace")[-2000:], file=sys.stderr)
            raise
        finally:
            service.close()
    line = {
        "benchmark": "replicas",
        "workers": arguments.workers,
        "shape": arguments.shape,
        "device": arguments.device,
        **figures,
    }
    ledger.keep(arguments.out, line, at_commit=arguments.commit)


if __name__ == "__main__":
    main()
