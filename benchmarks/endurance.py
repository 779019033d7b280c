"""Many prompts in one batch, and whether anything grows: host memory over the run, KV blocks left in use at its end.

    python benchmarks/endurance.py [--model smollm2] [--prompts 20000] [--device cuda]

Through `pipeline()`: the engine in its own process, text in and text out, answers taken as they come and dropped. The resident memory of
both processes is sampled; `rss_slope_kib` is what a thousand prompts add to it by a least-squares line over the second half of the
run (the first half fills caches and heaps). One JSON line, printed and appended to benchmarks/results/endurance.jsonl; an answer with
an error, a missing answer or a block in use ends the run without one.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil
from measuring import record

from headrace import GenerationConfig, PytorchEngineConfig, pipeline
from headrace.completion import Completion

WORDS = [
    "the",
    "mill",
    "wheel",
    "turns",
    "while",
    "water",
    "runs",
    "down",
    "from",
    "a",
    "high",
    "lake",
    "to",
    "grind",
    "corn",
    "for",
    "bread",
]
SAMPLES = 200


def draw_prompts(count: int) -> list[str]:
    """Draw texts of 3 to 40 words; a third of them begin alike, as the prompts of a batch do."""
    draw = random.Random(20000)
    texts = []
    for number in range(count):
        start = "Continue the story about the mill: " if number % 3 == 0 else f"{number}: "
        texts.append(start + " ".join(draw.choices(WORDS, k=draw.randint(3, 40))))
    return texts


def resident(pids: tuple[int, ...]) -> list[int]:
    """Resident bytes of this process and of the engine's."""
    return [psutil.Process(pid).memory_info().rss for pid in (os.getpid(), *pids)]


class Feed:
    """Keeps a few windows of prompts submitted, drops the answers and samples the memory after every so many."""

    def __init__(self, pipe: Any, config: GenerationConfig, total: int) -> None:
        self._frontend, self._config, self._total = pipe.frontend, config, total
        self._room = threading.Semaphore(4 * pipe.frontend.window)
        self._ended = threading.Event()
        self.counts: list[int] = []
        self.sizes: list[list[int]] = []
        self.errors: list[str] = []
        self._done = 0

    def run(self, texts: list[str]) -> None:
        """Submit all texts and wait for their answers."""
        for index, text in enumerate(texts):
            self._room.acquire()
            self._frontend.submit(text, self._config, self._take, index=index, do_preprocess=False)
        self._ended.wait()

    def _take(self, completion: Completion) -> None:
        if completion.error is not None:
            self.errors.append(f"prompt {completion.index}: {completion.error}")
        self._done += 1
        if self._done % max(1, self._total // SAMPLES) == 0:
            self.counts.append(self._done)
            self.sizes.append(resident(self._frontend.pids))
        self._room.release()
        if self._done == self._total:
            self._ended.set()


def slope_kib(counts: list[int], sizes: list[int]) -> float:
    """KiB that a thousand prompts add, by least squares over the second half."""
    half = len(counts) // 2
    return round(float(np.polyfit(counts[half:], sizes[half:], 1)[0]) * 1000 / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a directory or an id")
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=16, help="most tokens of an answer")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--num-blocks", type=int, default=0, help="0: as many as the memory holds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "endurance.jsonl")
    parser.add_argument("--commit", help="where there is no git to ask")
    arguments = parser.parse_args()
    texts = draw_prompts(arguments.prompts)
    options = PytorchEngineConfig(device=arguments.device, num_gpu_blocks=arguments.num_blocks, session_len=512)
    with pipeline(arguments.model, backend_config=options) as pipe:
        feed = Feed(pipe, GenerationConfig(max_new_tokens=arguments.tokens, top_k=40, temperature=1.0), len(texts))
        started = time.perf_counter()
        feed.run(texts)
        wall = time.perf_counter() - started
        stats = pipe.report()["stats"]
        arguments.device = pipe.report()["engine"]["device"]
    leaked = {name: stats[name] for name in ("blocks_used", "running", "waiting", "in_engine", "pending") if stats[name]}
    if feed.errors or leaked:
        raise SystemExit(f"{len(feed.errors)} errors ({feed.errors[:1]}), left behind {leaked}; no figure is reported")
    host, engine = ([sizes[place] for sizes in feed.sizes] for place in range(2))
    fields = {"benchmark": "endurance", "engine": "headrace", "workload": f"{len(texts)} prompts of 3 to 40 words"}
    fields |= {"model": Path(arguments.model).name, "prompts": len(texts), "prompts_per_s": round(len(texts) / wall, 1)}
    fields |= {
        "rss_mib": [sizes[-1] >> 20 for sizes in (host, engine)],
        "rss_mib_halfway": [sizes[len(sizes) // 2] >> 20 for sizes in (host, engine)],
    }
    fields |= {"rss_slope_kib": [slope_kib(feed.counts, sizes) for sizes in (host, engine)]}
    fields |= {name: stats[name] for name in ("finished", "preemptions", "steps_put_back", "blocks_used", "engine_deaths")}
    record(arguments, fields)


if __name__ == "__main__":
    main()
