"""How fast the engine generates.

    python benchmarks/engine.py                               # static batches of transformers beside it (the default on a CPU)
    python benchmarks/engine.py --device cuda --work W1,W2,W3,L1,L,D [--model DIR] [--max-batch-size 1024] [--breakdown]
    python benchmarks/engine.py --peer vllm --work W1,W2 [--model DIR]

Against transformers: the same prompts with the same output lengths go through `Engine` and through `generate` in static batches of
8, 16, 32 and 64 (left padding; a batch runs to its longest answer), on the same threads in the same process. Tokens are compared
first; a difference that is no near-tie ends the run without a figure.

The workloads W1, W2, W3 and L1 are the ones that other engines were measured with (L and D are longer): all requests at once, exact output lengths, sampling
at temperature 1, top_p 0.95, top_k 40 (variant `sample`) or greedy, no prefix cache, no text. Their token ids are checked against
checksums. Without --model they run on random weights in the shape of Llama-3.1-8B.

Each run is one JSON line, printed and appended to benchmarks/results/engine.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

_STARTED = time.perf_counter()

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

# Threads that spin while they wait take the core from the ones that work, in both engines alike.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peers
import torch
from measuring import Took, record, timed
from random_model import save_random_llama_8b
from ranks import RanksExecutor
from timeline import Timeline
from torch import Tensor
from workloads import CHECKSUM_VOCABULARY, WORKLOADS, Job, draw_single, draw_uneven, draw_warm_up, draw_workload

from engine import garbage
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.model_info import locate_model
from engine.options import resolve
from engine.request import TokenRequest
from headrace.config import GenerationConfig, PytorchEngineConfig

IMPORTED_S = round(time.perf_counter() - _STARTED, 3)
NEAR_TIE = 1e-3
"""Logits closer than this may change places when sums run in another order (padding, batch size)."""


# --- headrace ----------------------------------------------------------------------------------------------------------------


def run_engine(engine: Engine, jobs: Sequence[Job], config: dict[str, Any], eos_ids: tuple[int, ...]) -> list[list[int]]:
    """Add all jobs, step until they are done, return their tokens in order."""
    for index, job in enumerate(jobs):
        engine.add(
            TokenRequest(
                request_id=str(index),
                prompt_ids=job.ids,
                config=GenerationConfig(max_new_tokens=job.length, **config),
                seed=index,
                choice=0,
                max_new_tokens=job.length,
                limit="max_new_tokens",
                eos_ids=eos_ids,
            )
        )
    answers: list[list[int]] = [[] for _ in jobs]
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise SystemExit(f"job {output.request_id} failed: {output.error}")
            answers[int(output.request_id)] += output.token_ids
    wrong = [index for index, job in enumerate(jobs) if len(answers[index]) != job.length]
    if wrong:
        raise SystemExit(f"{len(wrong)} jobs have another length than asked for; no figure is reported")
    return answers


# --- transformers ------------------------------------------------------------------------------------------------------------


def run_static(model: Any, jobs: Sequence[Job], size: int) -> list[list[int]]:
    """Generate in batches of `size` in the given order; each batch runs to its longest answer."""
    answers: list[list[int]] = []
    for first in range(0, len(jobs), size):
        batch = jobs[first : first + size]
        width = max(len(job.ids) for job in batch)
        ids_BL = torch.zeros(len(batch), width, dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for row, job in enumerate(batch):
            ids_BL[row, width - len(job.ids) :] = torch.tensor(job.ids)
            mask_BL[row, width - len(job.ids) :] = 1
        longest = max(job.length for job in batch)
        with torch.inference_mode():
            out_BL: Tensor = model.generate(
                ids_BL, attention_mask=mask_BL, max_new_tokens=longest, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        answers += [out_BL[row, width : width + job.length].tolist() for row, job in enumerate(batch)]
    return answers


def count_near_ties(model: Any, jobs: Sequence[Job], ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> int:
    """Return how many answers part at a near-tie; any other difference ends the run."""
    ties = 0
    for index, (job, mine, other) in enumerate(zip(jobs, ours, theirs, strict=True)):
        at = next((at for at, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]), None)
        if at is None:
            continue
        with torch.inference_mode():
            logits_V = model(torch.tensor([[*job.ids, *mine[:at]]])).logits[0, -1]
        gap = abs(float(logits_V[mine[at]] - logits_V[other[at]]))
        if gap > NEAR_TIE or float(logits_V.max() - logits_V[mine[at]]) > NEAR_TIE:
            raise SystemExit(
                f"job {index} differs from transformers at token {at} by {gap:.4f} in logits; no figure is reported"
            )
        ties += 1
    return ties


# --- measuring ---------------------------------------------------------------------------------------------------------------


def make_engine(
    arguments: argparse.Namespace, model: Path, **fields: Any
) -> tuple[Engine, LocalExecutor | RanksExecutor | Timeline]:
    given = {
        "device": arguments.device,
        "dtype": arguments.dtype,
        "max_batch_size": arguments.max_batch_size,
        "block_size": arguments.block_size,
        "max_prefill_token_num": arguments.max_prefill_token_num,
        "prefill_interval": arguments.prefill_interval,
        "num_gpu_blocks": arguments.num_blocks,
        "enable_prefix_caching": False,
        "eager_mode": arguments.eager,
        "quant_policy": arguments.quant_policy,
        "tp": arguments.tp,
    }
    options = resolve(model, PytorchEngineConfig(**{**given, **fields}))
    executor = LocalExecutor(options) if options.tp == 1 else RanksExecutor(options)
    timed_executor = Timeline(executor) if arguments.breakdown else executor
    engine = Engine(timed_executor, options)
    garbage.freeze()  # as an engine's process does
    return engine, timed_executor


# --- the two benchmarks ------------------------------------------------------------------------------------------------------


def against_transformers(arguments: argparse.Namespace) -> None:
    """Compare tokens, then times; the engine runs first and last, so that a machine that slows down favours nobody."""
    from transformers import AutoModelForCausalLM

    path = locate_model(arguments.model or "smollm2")
    arguments.dtype = "float32"
    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    jobs = draw_uneven(model.config.vocab_size, arguments.jobs, arguments.longest_prompt, arguments.longest_output)
    tokens = sum(job.length for job in jobs)
    longest = max(len(job.ids) + job.length for job in jobs)
    size = arguments.block_size
    pool = sum(-(-(len(job.ids) + job.length) // size) for job in jobs)
    engine, executor = make_engine(
        arguments, path, session_len=longest + 1, max_batch_size=min(arguments.max_batch_size, len(jobs)), num_gpu_blocks=pool
    )

    def ours() -> list[list[int]]:
        return run_engine(engine, jobs, {"top_k": 1}, ())

    run_engine(engine, jobs[:4], {"top_k": 1}, ())
    run_static(model, [Job(job.ids, 4) for job in jobs[:4]], 4)
    answers, first = timed(ours)
    static: dict[int, Took] = {}
    ties: dict[int, int] = {}
    for batch in arguments.static:
        theirs, static[batch] = timed(lambda batch=batch: run_static(model, jobs, batch))
        ties[batch] = count_near_ties(model, jobs, answers, theirs)
        print(f"transformers, static batches of {batch}: {tokens / static[batch].wall:.1f} tokens/s", flush=True)
    again, last = timed(ours)
    if again != answers:
        raise SystemExit("the engine's second run gave other tokens than its first; no figure is reported")
    executor.close()
    best = min(static, key=lambda batch: static[batch].wall)
    wall = statistics.mean((first.wall, last.wall))
    record(
        arguments,
        {
            "workload": "uneven",
            "against": "transformers",
            "model": path.name,
            "dtype": "float32",
            "jobs": len(jobs),
            "prompt_tokens": sum(len(job.ids) for job in jobs),
            "output_tokens": tokens,
            "output_tok_s": round(tokens / wall, 1),
            "wall_s": [round(took.wall, 2) for took in (first, last)],
            "cpu_s": [round(took.cpu, 2) for took in (first, last)],
            "static_tokens_per_s": {batch: round(tokens / took.wall, 1) for batch, took in static.items()},
            "static_cpu_s": {batch: round(took.cpu, 2) for batch, took in static.items()},
            "near_ties": ties,
            "best_static": best,
            "ratio": round(static[best].wall / wall, 2),
            "cpu_ratio": round(min(took.cpu for took in static.values()) / statistics.mean((first.cpu, last.cpu)), 2),
        },
    )


@contextmanager
def model_or_random(path: str | None) -> Iterator[Path]:
    """Give the directory at `path`, or for the time of the benchmark one with random weights in Llama-3.1-8B's shape."""
    if path is not None:
        yield locate_model(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama_8b(Path(folder))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield Path(folder)


def workloads(arguments: argparse.Namespace) -> None:
    """Run the workloads that other engines ran."""
    with model_or_random(arguments.model) as path:
        started = time.perf_counter()
        engine, executor = make_engine(arguments, path, session_len=arguments.session_len)
        first = draw_warm_up(CHECKSUM_VOCABULARY, 1, 1)[0]
        vocab = json.loads((path / "config.json").read_text())["vocab_size"]
        run_engine(engine, [Job(tuple(token % vocab for token in first.ids), 1)], {"top_k": 1}, ())
        ready = time.perf_counter() - started
        parts = {"import": IMPORTED_S, **executor.report()["ready_s"]}
        parts["first_token"] = round(ready - sum(executor.report()["ready_s"].values()), 3)
        eos_ids = resolve_eos(path)
        for count, seed in ((arguments.warm, 99), (max(1, arguments.warm // 2), 100)):
            # Of random weights one in some 100,000 tokens is an end of sequence.
            config = {"top_k": 40, "temperature": 1.0, "top_p": 0.95, "ignore_eos": True}
            run_engine(engine, draw_warm_up(vocab, count, seed), config, eos_ids)
        if isinstance(executor, Timeline):
            executor.take()
        common = {"model": path.name if arguments.model else "random-llama-8b", "dtype": arguments.dtype}
        common |= {
            "tp": arguments.tp,
            "quant_policy": arguments.quant_policy,
            "max_batch_size": arguments.max_batch_size,
            "ready_s": round(IMPORTED_S + ready, 1),
            "ready_parts_s": parts,
        }
        for name in arguments.work.split(","):
            for _ in range(arguments.repeat):
                fields = (
                    run_single(engine, vocab, eos_ids)
                    if name == "L1"
                    else run_workload(arguments, engine, name, vocab, eos_ids)
                )
                if isinstance(executor, Timeline):
                    fields["breakdown"] = executor.take()
                record(arguments, {"workload": name, **common, **fields})
        executor.close()


def peer_workloads(arguments: argparse.Namespace) -> None:
    """Run the workloads on another engine. One answer of another length than asked for: no figure."""
    peers.require(arguments.peer)
    with model_or_random(arguments.model) as path:
        shape = {"max_batch_size": arguments.max_batch_size, "session_len": arguments.session_len, "dtype": arguments.dtype}
        peer = peers.start(arguments.peer, path, **shape)
        vocab = json.loads((path / "config.json").read_text())["vocab_size"]
        sampled = arguments.variant == "sample"
        peer.run(draw_warm_up(vocab, arguments.warm, 99), sampled=sampled)
        for name in arguments.work.split(","):
            jobs = [draw_single(vocab)] if name == "L1" else draw_workload(name, vocab)
            jobs = jobs[: max(1, round(len(jobs) * arguments.scale))]
            answers, took = timed(lambda jobs=jobs: peer.run(jobs, sampled=sampled))
            if [len(answer) for answer in answers] != [job.length for job in jobs]:
                raise SystemExit(f"{arguments.peer} gave answers of other lengths than asked for; no figure is reported")
            tokens = sum(job.length for job in jobs)
            fields = {
                "engine": arguments.peer,
                "version": peer.version,
                "workload": name,
                "variant": arguments.variant,
                **shape,
            }
            fields |= {"model": path.name if arguments.model else "random-llama-8b", "ready_s": peer.ready_s, "jobs": len(jobs)}
            fields |= {"output_tokens": tokens, "wall_s": round(took.wall, 3), "output_tok_s": round(tokens / took.wall, 1)}
            record(arguments, fields | ({"ms_per_token": round(1e3 * took.wall / tokens, 4)} if name == "L1" else {}))


def resolve_eos(path: Path) -> tuple[int, ...]:
    from engine.model_info import ModelInfo

    return ModelInfo.read(path).eos_ids


def run_workload(
    arguments: argparse.Namespace, engine: Engine, name: str, vocab: int, eos_ids: tuple[int, ...]
) -> dict[str, Any]:
    jobs = draw_workload(name, vocab)
    jobs = jobs[: max(1, round(len(jobs) * arguments.scale))]
    config = {"top_k": 40, "temperature": 1.0, "top_p": 0.95} if arguments.variant == "sample" else {"top_k": 1}
    before = engine.stats()
    _, took = timed(lambda: run_engine(engine, jobs, {**config, "ignore_eos": True}, eos_ids))
    after = engine.stats()
    tokens = sum(job.length for job in jobs)
    return {
        "variant": arguments.variant,
        "jobs": len(jobs),
        "prompt_tokens": sum(len(job.ids) for job in jobs),
        "output_tokens": tokens,
        "wall_s": round(took.wall, 3),
        "output_tok_s": round(tokens / took.wall, 1),
        "steps": after.steps - before.steps,
        "preemptions": after.preemptions - before.preemptions,
        "blocks": after.blocks_total,
    }


def run_single(engine: Engine, vocab: int, eos_ids: tuple[int, ...]) -> dict[str, Any]:
    """Time one greedy request; the first token's time, taken apart, is left out of the time per token."""
    job = draw_single(vocab)
    config = {"top_k": 1, "ignore_eos": True}
    run_engine(engine, [job], config, eos_ids)
    times = {
        length: min(timed(lambda n=length: run_engine(engine, [Job(job.ids, n)], config, eos_ids))[1].wall for _ in range(2))
        for length in (1, job.length)
    }
    return {
        "variant": "greedy",
        "first_token_ms": round(1e3 * times[1], 2),
        "ms_per_token": round(1e3 * (times[job.length] - times[1]) / (job.length - 1), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--work", help="transformers, or some of W1,W2,W3,L1 (default: by device)")
    parser.add_argument("--peer", choices=peers.PEERS, help="run the work on this engine instead, where it is installed")
    parser.add_argument("--model", help="a directory or an id (default: smollm2 on a CPU, random weights on a GPU)")
    parser.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto")
    parser.add_argument("--variant", choices=["sample", "greedy"], default="sample")
    parser.add_argument("--max-batch-size", type=int, default=1024 if cuda else 64)
    parser.add_argument("--max-prefill-token-num", type=int, default=8192)
    parser.add_argument("--prefill-interval", type=int, default=16)
    parser.add_argument("--quant-policy", type=int, default=0, choices=(0, 8), help="8: KV cache of 8-bit integers")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--num-blocks", type=int, default=0, help="0: as many as the memory holds")
    parser.add_argument("--session-len", type=int, default=4096)
    parser.add_argument("--breakdown", action="store_true", help="time each step's kind by events (adds `breakdown` to a line)")
    parser.add_argument("--tp", type=int, default=1, help="ranks, each on a GPU of its own")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--scale", type=float, default=1.0, help="share of each workload's jobs to run")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--warm", type=int, default=256)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of both engines; 0: torch's default")
    parser.add_argument("--static", type=lambda text: [int(one) for one in text.split(",")], default=[8, 16, 32, 64])
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--longest-prompt", type=int, default=256)
    parser.add_argument("--longest-output", type=int, default=128)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engine.jsonl")
    parser.add_argument("--commit", help="where there is no git to ask")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work = arguments.work or ("W1,W2,W3,L1" if arguments.device == "cuda" else "transformers")
    if work == "transformers":
        against_transformers(arguments)
        return
    unknown = sorted(set(work.split(",")) - {*WORKLOADS, "L1"})
    if unknown:
        parser.error(f"unknown work: {', '.join(unknown)}")
    arguments.work = work
    (workloads if arguments.peer is None else peer_workloads)(arguments)


if __name__ == "__main__":
    main()
