"""Where a decode step's time goes: GPU busy share, host time that the GPU waits for, and time by kind of kernel.

    python benchmarks/steps.py --model DIR [--rows 1,64,512,1024] [--context 512]

Fills the engine with `rows` requests of `context` tokens, lets it reach steady decode, times 200 steps by events, then profiles 16
for the kinds of kernels. `host_exposed_us`: what passes on the GPU between a step's last operation and the next one's first;
`gpu_busy`: the share of the time in which it doesn't wait so. `kernels_share`: of the profiled steps' time, with the gaps between their
kernels, which the profiler widens, what kernels run in. CUDA only. One JSON line for each row count, printed and
appended to benchmarks/results/steps.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ledger
import torch
from timeline import Timeline
from torch.profiler import ProfilerActivity, profile

from engine import garbage
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.options import resolve
from engine.request import TokenRequest
from headrace.config import GenerationConfig, PytorchEngineConfig

KINDS = (
    ("attention", ("_decode_kernel", "decode_int8_kernel", "_unpack_kernel", "_prefill")),
    ("gemm", ("gemm", "nvjet", "cutlass", "splitk", "cublas")),
    ("norm", ("norm",)),
    ("rotary", ("rotary",)),
    ("silu", ("silu",)),
    ("sampling", ("sample", "_threshold", "_draw", "topk", "sort", "argmax", "amax", "ArgMax", "reduce_kernel")),
    ("copy", ("copy", "Memcpy", "Memset", "memcpy")),
)
TIMED_STEPS = 200
PROFILED_STEPS = 16


def kind_of(name: str) -> str:
    """Name the kind of a kernel by its name."""
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other")


def fill(engine: Engine, *, rows: int, context: int, vocab: int, config: GenerationConfig) -> None:
    """Add the requests and step until all decode."""
    draw = random.Random(rows)
    for index in range(rows):
        engine.add(
            TokenRequest(
                request_id=f"{rows}-{index}",
                prompt_ids=tuple(draw.randrange(3, vocab) for _ in range(context)),
                config=config,
                seed=index,
                choice=0,
                max_new_tokens=config.max_new_tokens or 1,
                limit="max_new_tokens",
                eos_ids=(1,),
            )
        )
    while engine.stats().running < rows:
        engine.step()
    for _ in range(8):
        engine.step()


def measure(engine: Engine, timeline: Timeline) -> dict[str, Any]:
    """Time steady steps by events, then profile some for the kinds of kernels (a profiler makes every launch slower)."""
    torch.cuda.synchronize()
    timeline.take()
    started = time.perf_counter()
    for _ in range(TIMED_STEPS):
        engine.step()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - started) / TIMED_STEPS
    steady = timeline.take()["decode"]
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(PROFILED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    busy, end = 0.0, 0.0
    for start, stop, name in spans:
        kinds[kind_of(name)] += stop - start
        names[name[:60]] += stop - start
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {
        "step_ms": round(wall * 1e3, 3),
        "host_exposed_us": steady["between_us"],
        "host_launch_ms": steady["host_ms"],
        "gpu_step_ms": steady["gpu_ms"],
        "gpu_busy": round(1 - steady["between_us"] / (steady["between_us"] + 1e3 * steady["gpu_ms"]), 4),
        "kernels_share": round(busy / (end - spans[0][0]), 4),
        "kernels_per_step": round(len(spans) / PROFILED_STEPS, 1),
        "us_per_step": {kind: round(total / PROFILED_STEPS, 1) for kind, total in kinds.most_common()},
        "top_kernels_us": {name: round(total / PROFILED_STEPS, 1) for name, total in names.most_common(14)},
    }


def main() -> None:
    """Run the profile for each row count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=lambda text: [int(one) for one in text.split(",")], default=[1, 64, 512, 1024])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--variant", choices=["sample", "greedy"], default="sample")
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "steps.jsonl")
    arguments = parser.parse_args()
    options = resolve(
        Path(arguments.model),
        PytorchEngineConfig(device="cuda", max_batch_size=max(arguments.rows), session_len=4096, enable_prefix_caching=False),
    )
    executor = LocalExecutor(options)
    timeline = Timeline(executor)
    engine = Engine(timeline, options)
    garbage.freeze()  # as an engine's process does
    vocab = json.loads((Path(arguments.model) / "config.json").read_text())["vocab_size"]
    fields: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "top_k": 40} if arguments.variant == "sample" else {"top_k": 1}
    config = GenerationConfig(max_new_tokens=8 + 8 + TIMED_STEPS + PROFILED_STEPS + 64, ignore_eos=True, **fields)
    for rows in arguments.rows:
        fill(engine, rows=rows, context=arguments.context, vocab=vocab, config=config)
        line = {
            "benchmark": "steps",
            "rows": rows,
            "context": arguments.context,
            "variant": arguments.variant,
            **measure(engine, timeline),
        }
        line |= {"gpu": torch.cuda.get_device_name(), "command": "python benchmarks/steps.py " + " ".join(sys.argv[1:])}
        ledger.keep(arguments.out, line, at_commit=arguments.commit)
        for index in range(rows):
            engine.abort(f"{rows}-{index}")
        while engine.has_work:
            engine.step()
    executor.close()


if __name__ == "__main__":
    main()
