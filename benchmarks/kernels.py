"""Time the Triton kernels on a CUDA device, beside the copy and read bandwidth measured in the same run.

    python benchmarks/kernels.py [--out results.jsonl] [--commit ID] [--only decode …] [--sweep]

First every kernel is compared with its reference, at odd shapes and in every type, in memory full of NaN; an op whose check
fails is not timed and the run fails. Llama-3.1-8B shapes, bf16, blocks of 64, block tables in random order.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# This file's own folder must not stand first: it would be imported in place of the package that it measures.
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests/support"))

import torch
import triton
import triton.language as tl

from benchmarks.kernel_timing import Row, seconds
from benchmarks.sampling_kernels import bench_all_filters, bench_sampling
from kernels.gpu.decode_plan import DecodeShape, plan_decode

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 64
DECODE_SWEEP = {
    *(f"{rows} x {context}" for rows in (1, 8, 32, 64, 128) for context in (512, 1024)),
    *(f"{rows} x 512" for rows in (24, 40, 48, 512)),
    *(f"{rows} x 64..1984" for rows in (16, 32, 40, 64, 96, 128)),
    *(f"{rows}, one in 16 x 4096, others x 256" for rows in (16, 32, 40, 64, 96, 128)),
    "1 x 32768",
}
HIDDEN, INTERMEDIATE = 4096, 14336


def failed_ops(ops: list[str]) -> tuple[set[str], int]:
    """Run the checks of `ops`, a process for each op, type and few shapes (most of it is compilation); give the ops that failed."""
    script = ROOT / "tests/support/kernel_checks.py"
    tasks = [
        (op, dtype, group)
        for op in sorted(ops, key=lambda op: op not in ("decode", "prefill"))
        for dtype in ("float32", "bfloat16", "float16")
        for group in (("0 3 6", "1 4 7", "2 5 8") if op in ("decode", "prefill") else ("0",))
        if op not in ("sampling", "token_masks") or dtype == "float32"
    ]

    def check(task: tuple[str, str, str]) -> tuple[str, int]:
        op, dtype, shapes = task
        command = [
            sys.executable,
            str(script),
            "--device",
            "cuda",
            "--only",
            op,
            "--dtypes",
            dtype,
            "--shapes",
            *shapes.split(),
        ]
        process = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=ROOT)  # noqa: S603 - our own script
        lines = [json.loads(line) for line in process.stdout.splitlines()]
        for line in lines:
            if not line["passed"]:
                print("FAILED", json.dumps(line), flush=True)
        if process.returncode and all(line["passed"] for line in lines):
            print("FAILED", *task, process.stderr[-2000:], flush=True)
        return (task[0] if process.returncode or not lines else "", len(lines))

    with ThreadPoolExecutor(max(2, (os.cpu_count() or 4) - 2)) as pool:
        results = list(pool.map(check, tasks))
    return {op for op, _ in results if op}, sum(count for _, count in results)


@triton.jit
def _read_kernel(p_x, p_out, size, BLOCK: tl.constexpr, UNROLL: tl.constexpr):  # noqa: ANN001, ANN202 - Triton, not Python
    i = tl.program_id(0)
    b_sum = tl.zeros((BLOCK,), tl.int32)
    for start in range(i * BLOCK * UNROLL, size, tl.num_programs(0) * BLOCK * UNROLL):
        for u in tl.static_range(UNROLL):
            b_sum += tl.load(p_x + start + u * BLOCK + tl.arange(0, BLOCK))
    tl.store(p_out + i * BLOCK + tl.arange(0, BLOCK), b_sum)


def fastest_read(size: int) -> float:
    """Seconds of a kernel that does nothing but read `size` bytes that aren't in the cache: what a launch of this size can reach at best."""
    parts = torch.randint(-(2**31), 2**31 - 1, (max(2, (1 << 28) // size), size // 4), device="cuda", dtype=torch.int32)
    times = []
    for programs, block, unroll in ((264, 2048, 4), (528, 2048, 2), (1056, 2048, 1), (1056, 1024, 2), (2112, 1024, 1)):
        out = torch.empty(programs * block, device="cuda", dtype=torch.int32)
        whole = size // 4 // (block * unroll) * block * unroll
        runs = [partial(_read_kernel[(programs,)], part, out, whole, BLOCK=block, UNROLL=unroll, num_warps=8) for part in parts]
        times.append(seconds(*runs, repeats=7))
    return min(times)


def measure_bandwidth() -> Row:
    """Copy (read + written) and read rates in GB/s over 4 GiB of random bytes."""
    size = 1 << 30
    x = torch.randint(-(2**31), 2**31 - 1, (size,), device="cuda", dtype=torch.int32)
    y = torch.empty_like(x)
    # A kernel, not copy_: a captured copy_ becomes a memcpy node, which reaches two thirds of what kernels do.
    copy = 2 * 4 * size / seconds(partial(torch.bitwise_not, x, out=y))
    programs = 8 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * 2048, device="cuda", dtype=torch.int32)
    read = 4 * size / seconds(lambda: _read_kernel[(programs,)](x, out, size, BLOCK=2048, UNROLL=4, num_warps=8))
    return {"op": "bandwidth", "copy_gbs": round(copy / 1e9), "read_gbs": round(read / 1e9)}


def paged_inputs(lens: list[tuple[int, int]], *, int8: bool = False) -> tuple[Any, ...]:
    """Random queries, caches, metadata and scales (None unless `int8`) for rows of (query length, context length)."""
    from kernels.attention import AttentionMetadata, KVScales

    pages = [-(-context // BLOCK_SIZE) for _, context in lens]
    order = torch.randperm(sum(pages), device="cuda").int()
    tables = torch.zeros(len(lens), max(pages), dtype=torch.int32, device="cuda")
    for row, part in enumerate(order.split(pages)):
        tables[row, : len(part)] = part
    k_cache = torch.randn(sum(pages), KV_HEADS, BLOCK_SIZE, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    queries, contexts = [q for q, _ in lens], [c for _, c in lens]
    metadata = AttentionMetadata(
        tables,
        torch.tensor([0, *queries], device="cuda").cumsum(0).int(),
        torch.tensor(contexts, device="cuda", dtype=torch.int32),
        sum(q == 1 for q in queries),
        max(queries),
        max(contexts),
        host_context_lens=tuple(contexts),
    )
    q = torch.randn(sum(queries), HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    if not int8:
        return q, k_cache, torch.randn_like(k_cache), metadata, None
    integers = [torch.randint(-127, 128, k_cache.shape, device="cuda", dtype=torch.int8) for _ in range(2)]
    scales = KVScales(*(torch.rand(k_cache.shape[:3], device="cuda") / 50 for _ in range(2)))
    return q, integers[0], integers[1].unflatten(2, (-1, 4)).transpose(-1, -2).contiguous(), metadata, scales


def decode_loads() -> Iterator[tuple[str, list[int]]]:
    """Name and context lengths of every decode load."""
    for rows, context in itertools.product((1, 8, 32, 64, 128, 256, 512), (512, 1024, 2048)):
        yield f"{rows} x {context}", [context] * rows
    yield from ((f"{rows} x 512", [512] * rows) for rows in (24, 40, 48))
    for rows in (16, 32, 40, 64, 96, 128, 256, 512):
        yield f"{rows} x 64..1984", torch.randint(64, 1985, (rows,), generator=torch.Generator().manual_seed(rows)).tolist()
        yield f"{rows}, one in 16 x 4096, others x 256", [4096 if row % 16 == 5 else 256 for row in range(rows)]
    yield "1 x 32768", [32768]


def decode_shapes(*, int8: bool) -> Iterator[DecodeShape]:
    """Ways to cut a launch: tile, programs, least tiles of a part, warps, tiles in flight, most programs."""
    if int8:
        for tile, programs, warps, stages in itertools.product((32, 64), (264, 528, 1056), (1, 2), (2, 3, 4)):
            yield DecodeShape(tile, programs, 128 // tile, warps, stages)
        return
    for programs, warps, stages in itertools.product((132, 264, 396, 528), (2, 4), (2, 3, 4)):
        yield DecodeShape(64, programs, 2, warps, stages)
    for programs, warps, most in itertools.product((264, 396), (2, 4), (264, 396, 528, None)):
        yield DecodeShape(32, programs, 4, warps, 3, most)


def bench_decode(limit: Row, *, sweep: bool, int8: bool = False) -> Iterator[Row]:
    from kernels.gpu.attention import paged_attention, plan_attention

    for name, lens in decode_loads():
        q, k_cache, v_cache, metadata, scales = paged_inputs([(1, n) for n in lens], int8=int8)
        # As in a model: layer after layer, each with a cache of its own, together far larger than the L2 cache.
        layers = max(1, (1 << 28) // k_cache.nbytes)
        caches = [(k_cache, v_cache), *((k_cache.clone(), v_cache.clone()) for _ in range(layers - 1))]
        size = 2 * sum(lens) * KV_HEADS * (HEAD_DIM + 4 if int8 else HEAD_DIM * 2) + 2 * q.numel() * 2
        scale = HEAD_DIM**-0.5

        def row(time: float, load: str, size: int = size, **more: Any) -> Row:
            rate = size / time / 1e9
            share = round(rate / limit["read_gbs"], 3)
            return {
                "op": "decode_int8" if int8 else "decode",
                "load": load,
                "us": round(time * 1e6, 1),
                "gbs": round(rate),
                "of_read": share,
                **more,
            }

        # As in a model: the plan is made once a step, not once a layer; it's timed as a row of its own.
        planned = plan_attention(metadata, k_cache, (None,))
        time = seconds(*(partial(paged_attention, q, *cache, planned, scale, None, scales) for cache in caches))
        read = fastest_read(size)
        yield row(time, name, read_us=round(read * 1e6, 1), of_read_of_this_size=round(read / time, 3))
        if not sweep or name not in DECODE_SWEEP:
            continue
        for shape in decode_shapes(int8=int8):
            plan = plan_decode(metadata.context_lens_R, num_kv_heads=KV_HEADS, sliding_window=None, shape=shape)
            other = metadata._replace(plans=(plan,))
            time = seconds(*(partial(paged_attention, q, *cache, other, scale, None, scales) for cache in caches), repeats=5)
            yield row(time, name, shape=list(shape))


def prefill_loads() -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Name and (query length, context length) of every prefill load."""
    yield "16 x 512", [(512, 512)] * 16
    yield "8 x 1024", [(1024, 1024)] * 8
    yield "2 x 4096", [(4096, 4096)] * 2
    yield "1 x 16384", [(16384, 16384)]
    yield "4 x 1024 after 3072 cached", [(1024, 4096)] * 4
    yield (
        "uniform 64..960",
        [(n, n) for n in torch.randint(64, 961, (16,), generator=torch.Generator().manual_seed(0)).tolist()],
    )


def bench_prefill(_limit: Row, *, sweep: bool, int8: bool = False) -> Iterator[Row]:
    from kernels.gpu import prefill_attention as prefill
    from kernels.gpu.attention import paged_attention, plan_attention

    for name, lens in prefill_loads():
        q, k_cache, v_cache, metadata, scales = paged_inputs(lens, int8=int8)
        visible = sum(n * c - n * (n - 1) // 2 for n, c in lens)
        flops = 4 * HEADS * HEAD_DIM * visible
        scale = HEAD_DIM**-0.5

        def row(time: float, load: str, flops: int = flops, **more: Any) -> Row:
            return {
                "op": "prefill_int8" if int8 else "prefill",
                "load": load,
                "us": round(time * 1e6, 1),
                "tflops": round(flops / time / 1e12),
                **more,
            }

        planned = plan_attention(metadata, k_cache, (None,))
        yield row(seconds(partial(paged_attention, q, k_cache, v_cache, planned, scale, None, scales)), name)
        if int8:
            continue
        if len(set(lens)) == 1 and lens[0][0] == lens[0][1]:
            dense = torch.randn(len(lens), HEADS, lens[0][0], HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            attend = torch.nn.functional.scaled_dot_product_attention
            yield row(
                seconds(partial(attend, dense, dense, dense, is_causal=True)), name, engine="torch sdpa, dense, no groups"
            )
        if not sweep:
            continue
        out, results = torch.empty_like(q), []
        for shape in (
            (128, 64, 8, 2),
            (128, 64, 8, 3),
            (128, 64, 4, 2),
            (128, 32, 4, 3),
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (128, 32, 8, 3),
        ):
            options = {"first_row": 0, "num_rows": len(lens), "max_query_len": metadata.max_query_len, "scale": scale}
            arguments = (q, k_cache, v_cache, metadata.block_tables_RP, metadata.query_start_R1, metadata.context_lens_R, out)
            options |= {"sliding_window": None, "shape": prefill.PrefillShape(*shape)}
            results.append((seconds(partial(prefill.prefill_attention, *arguments, **options), repeats=5), shape))
        for time, shape in sorted(results)[:3]:
            yield row(time, name, shape=list(shape))


def bench_small(limit: Row, *, sweep: bool) -> Iterator[Row]:
    """Time the elementwise ops, by bytes that must move."""
    del sweep
    from kernels.gpu import rms_norm, rotary, silu_mul

    def row(op: str, tokens: int, size: int, run: Callable[[], object]) -> Row:
        time = seconds(run)
        rate = size / time / 1e9
        share = round(rate / limit["copy_gbs"], 3)
        return {"op": op, "load": f"{tokens} tokens", "us": round(time * 1e6, 1), "gbs": round(rate), "of_copy": share}

    for tokens in (1, 64, 512, 8192):
        x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        residual, weight = torch.randn_like(x), torch.randn(HIDDEN, device="cuda", dtype=torch.bfloat16)
        yield row("rms_norm", tokens, 4 * x.numel(), partial(rms_norm.rms_norm, x, weight, 1e-5))
        yield row("add_rms_norm", tokens, 8 * x.numel(), partial(rms_norm.add_rms_norm, x, residual, weight, 1e-5))
        gate_up = torch.randn(tokens, 2 * INTERMEDIATE, device="cuda", dtype=torch.bfloat16)
        yield row("silu_mul", tokens, 3 * gate_up.numel(), partial(silu_mul.silu_mul, gate_up))
        qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        cache = torch.empty(2, tokens // BLOCK_SIZE + 1, KV_HEADS, BLOCK_SIZE, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        angles, index = torch.rand(8192, HEAD_DIM, device="cuda"), torch.arange(tokens, device="cuda")
        yield row(
            "rotary",
            tokens,
            4 * qkv.numel(),
            partial(rotary.rotary_kv_write, q, k, v, angles, index, index, *cache, None, None, 0),
        )


def bench_planning(_limit: Row, *, sweep: bool) -> Iterator[Row]:
    """Time what a step pays once for all its layers."""
    del sweep
    from kernels.gpu.attention import plan_attention

    for rows in (1, 32, 128, 512, 1024):
        _, k_cache, _, metadata, _ = paged_inputs([(1, 1024)] * rows)
        time = seconds(partial(plan_attention, metadata, k_cache, (None,)))
        yield {"op": "decode_plan", "load": f"{rows} rows", "us": round(time * 1e6, 1)}


def bench_blocks(limit: Row, *, sweep: bool) -> Iterator[Row]:
    """Time the moves of KV blocks: inside the device's memory, and to and from pinned host memory beside a plain copy's rate."""
    del sweep
    from kernels.gpu import blocks

    shape = (512, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    host = torch.empty(shape, dtype=torch.bfloat16, pin_memory=True)
    order = torch.stack([torch.randperm(512), torch.randperm(512)], 1).cuda()
    half = torch.stack([torch.arange(256), torch.arange(256, 512)], 1).cuda()

    def row(op: str, size: int, time: float, **more: Any) -> Row:
        return {"op": op, "load": f"{size >> 20} MiB", "us": round(time * 1e6, 1), "gbs": round(size / time / 1e9, 1), **more}

    time = seconds(partial(blocks.copy_blocks, [cache], half))
    yield row("copy_blocks", cache.nbytes, time, of_copy=round(cache.nbytes / time / 1e9 / limit["copy_gbs"], 3))
    for name, source, destination in (("to the host", cache, host), ("to the device", host, cache)):
        plain = cache.nbytes / seconds(partial(destination.copy_, source, non_blocking=True), repeats=5)
        time = seconds(partial(blocks.swap_blocks, [source], [destination], order), repeats=5)
        yield row(f"swap_blocks {name}", cache.nbytes, time, of_plain_copy=round(cache.nbytes / time / plain, 3))


BENCHES: dict[str, tuple[Callable[..., Iterator[Row]], set[str]]] = {
    "decode": (bench_decode, {"decode", "decode_shares"}),
    "prefill": (bench_prefill, {"prefill"}),
    "decode_int8": (partial(bench_decode, int8=True), {"decode", "decode_shares"}),
    "prefill_int8": (partial(bench_prefill, int8=True), {"prefill"}),
    "small": (bench_small, {"rms_norm", "silu_mul", "rotary", "blocks"}),
    "sampling": (bench_sampling, {"sampling"}),
    "planning": (bench_planning, {"decode_shares"}),
    "blocks": (bench_blocks, {"blocks"}),
    "all_filters": (bench_all_filters, {"sampling", "token_masks"}),
}


def main() -> int:
    """Check, then time; the exit status says whether all checks passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/kernels.jsonl")
    parser.add_argument("--commit", default="unknown", help="the commit measured, for the record")
    parser.add_argument("--only", nargs="+", default=list(BENCHES), choices=list(BENCHES))
    parser.add_argument("--sweep", action="store_true", help="also time other launch shapes of both attention kernels")
    arguments = parser.parse_args()
    failed, count = failed_ops(sorted({op for name in arguments.only for op in BENCHES[name][1]}))
    print(f"{count} checks, failed: {sorted(failed) or 'none'}", flush=True)
    about = {
        "engine": "headrace",
        "gpu": torch.cuda.get_device_name(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "commit": arguments.commit,
        "command": " ".join(
            ["python benchmarks/kernels.py", "--only", *arguments.only, *(["--sweep"] if arguments.sweep else [])]
        ),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w") as out:

        def report(row: Row) -> None:
            print(json.dumps(row), flush=True)
            out.write(json.dumps({**about, **row}) + "\n")
            out.flush()

        limit = measure_bandwidth()
        report(limit)
        for name in arguments.only:
            bench, needs = BENCHES[name]
            if needs & failed:
                print(f"{name}: not timed, its check failed", flush=True)
                continue
            for row in bench(limit, sweep=arguments.sweep):
                report(row)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
