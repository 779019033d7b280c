"""What the service takes from an engine: the same prompts through `pipeline()`, then through SQL, Redis and a Celery worker.

    python benchmarks/overhead.py --model DIR [--workload W1] [--scale 1] [--device cuda]
    python benchmarks/overhead.py --tokenizer DIR             # Llama-3.1-8B's shape with weights drawn on the device, this tokenizer

Both with what a worker has where nothing is said of it. As many prompts as the workload has, each about as long as its prompt there and
with exactly its output length; texts, because that is what a client sends, so tokenising and detokenising are in both figures. A real
Redis, a PostgreSQL with fsync and one worker process share the machine with the client. An answer of another length than asked for, or a row that isn't there exactly once, ends the run without a
figure. One JSON line, printed and appended to benchmarks/results/overhead.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from endurance import WORDS
from measuring import record
from random_model import save_drawn_llama
from servers import PostgresServer, RedisServer
from service import Service
from workloads import CHECKSUM_VOCABULARY, WORKLOADS, draw_workload

from engine.model_info import locate_model
from headrace import GenerationConfig, PytorchEngineConfig, pipeline
from headrace.batch import Item
from headrace.completion import Completion
from headrace.settings import Settings

WARM = 64
"""Prompts ahead of those that are timed."""


def draw_items(workload: str, scale: float) -> list[Item]:
    """Draw as many words as a prompt has tokens: of most vocabularies a word is one."""
    jobs = draw_workload(workload, CHECKSUM_VOCABULARY)
    draw = random.Random(1024)
    items = []
    for number, job in enumerate(itertools.islice(itertools.cycle(jobs), max(1, round(len(jobs) * scale)))):
        config = GenerationConfig(
            max_new_tokens=job.length, ignore_eos=True, temperature=1.0, top_p=0.95, top_k=40, random_seed=number
        )
        items.append(Item(f"{number}: " + " ".join(draw.choices(WORDS, k=len(job.ids))), gen_config=config))
    return items


def save_model(folder: Path, tokenizer: Path) -> Path:
    """Save the shape of an 8B with a tokenizer's vocabulary and no weights: the engine draws them."""
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*vocabulary["model"]["vocab"].values(), *(token["id"] for token in vocabulary["added_tokens"])]
    save_drawn_llama(folder, "8b", vocabulary=max(ids) + 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


def check(counts: list[int], items: list[Item]) -> int:
    """Return the tokens of all answers."""
    wanted = [item.gen_config.max_new_tokens for item in items if item.gen_config is not None]
    if counts != wanted:
        raise SystemExit("answers have other lengths than asked for; no figure is reported")
    return sum(counts)


def in_process(model: Path, fields: dict[str, Any], items: list[Item]) -> float:
    """Seconds through `pipeline()`, all submitted at once."""

    def run(some: list[Item]) -> tuple[float, list[int]]:
        ended, counts = threading.Semaphore(0), [-1] * len(some)

        def done(completion: Completion) -> None:
            counts[completion.index] = completion.usage.completion_tokens if completion.error is None else -1
            ended.release()

        started = time.perf_counter()
        for index, item in enumerate(some):
            assert item.gen_config is not None
            pipe.frontend.submit(item.prompt, item.gen_config, done, index=index)
        for _ in some:
            ended.acquire()
        return time.perf_counter() - started, counts

    with pipeline(str(model), backend_config=PytorchEngineConfig.for_batches(fields)) as pipe:
        run(items[:WARM])
        seconds, counts = run(items)
    check(counts, items)
    return seconds


def through_the_service(model: Path, fields: dict[str, Any], items: list[Item], *, chunk_size: int) -> float:
    """Seconds from the client's call until the batch is over."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis, postgres = stack.enter_context(RedisServer()), stack.enter_context(PostgresServer(durable=True))
        settings = Settings(
            model=str(model),
            engine_config=json.dumps(fields),
            chunk_size=chunk_size,
            redis_url=redis.url,
            database_url=stack.enter_context(postgres.database()),
            home=Path(os.environ.get("HEADRACE_HOME") or Settings().home),
            spool_dir=folder / "spool",
        )
        service = Service(settings, folder)
        stack.callback(service.close)
        worker = stack.enter_context(service.worker(concurrency=settings.worker_concurrency))
        service.ready(worker, timeout_s=300)
        service.wait_over(service.submit(items[:WARM]), worker, timeout_s=300)
        started = time.perf_counter()
        batch = service.submit(items)
        service.wait_over(batch, worker, timeout_s=900)
        seconds = time.perf_counter() - started
        rows = service.assert_exactly_once(batch, len(items))
    check([row.usage.completion_tokens for row in rows], items)
    return seconds


def main() -> None:
    """Measure both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a directory or an id")
    which.add_argument("--tokenizer", type=Path, help="a directory with tokenizer.json")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="W1")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the workload's prompts to run; above 1 some of them again"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--max-batch-size", type=int, help="default: by device")
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "overhead.jsonl")
    parser.add_argument("--commit", help="where there is no git to ask")
    arguments = parser.parse_args()
    items = draw_items(arguments.workload, arguments.scale)
    fields = {"device": arguments.device, "session_len": 2048, "enable_prefix_caching": False}
    if arguments.max_batch_size:
        fields["max_batch_size"] = arguments.max_batch_size
    with tempfile.TemporaryDirectory() as name:
        model = save_model(Path(name), arguments.tokenizer) if arguments.tokenizer else locate_model(arguments.model)
        alone = in_process(model, fields, items)
        served = through_the_service(model, fields, items, chunk_size=arguments.chunk_size)
    tokens = sum(item.gen_config.max_new_tokens or 0 for item in items if item.gen_config is not None)
    line: dict[str, Any] = {"benchmark": "overhead", "engine": "headrace", "workload": arguments.workload, "jobs": len(items)}
    line |= {
        "model": "drawn-8b" if arguments.tokenizer else model.name,
        "output_tokens": tokens,
        "chunk_size": arguments.chunk_size,
    }
    line |= {"pipeline_tok_s": round(tokens / alone, 1), "output_tok_s": round(tokens / served, 1)}
    line |= {"pipeline_s": round(alone, 3), "served_s": round(served, 3), "overhead": round(served / alone - 1, 4)}
    record(arguments, line)


if __name__ == "__main__":
    main()
