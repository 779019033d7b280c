"""Every Triton kernel held to its reference: the same checks interpreted on a CPU, run on a GPU, and before a benchmark.

`python tests/support/kernel_checks.py [--device cpu|cuda] [--only OP …] [--dtypes float32 …]` prints a JSON line a check and fails if one failed. Interpreting
wants TRITON_INTERPRET=1 set before the process starts, and cannot do bfloat16: the interpreter computes it silently wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]

import torch
from attention_checks import check_decode, check_decode_shares, check_prefill, check_rotary
from checking import TOLERANCE, Check, Scale, randn
from kernel_cases import ATTENTION_SHAPES, relative_error, sampling_inputs
from torch import Tensor

from kernels import reference, reference_all_reduce, reference_sampling
from kernels.all_reduce import Peers
from kernels.gpu import (
    all_reduce,
    blocks,
    rms_norm,
    sampling,
    silu_mul,
    token_masks,
)
from kernels.sampling import SamplingInputs


def check_rms_norm(scale: Scale) -> Iterator[Check]:
    shapes = (
        [(1, 1), (3, 100), (63, 576)] if scale.small else [(1, 1), (63, 100), (100, 576), (257, 4096), (5, 8192), (7, 16384)]
    )
    for dtype, (tokens, dim) in itertools.product(scale.dtypes, shapes):
        wide = randn(scale, dtype, tokens, dim + 8)
        x, weight, residual = wide[:, :dim], randn(scale, dtype, dim), randn(scale, dtype, tokens, dim)
        case, bound = f"{tokens}x{dim} {dtype}", TOLERANCE[dtype]
        expected = reference.rms_norm(x.double(), weight, 1e-5)
        yield Check("rms_norm", case, relative_error(rms_norm.rms_norm(x, weight, 1e-5), expected), bound)
        total = (x.double() + residual.double()).to(dtype)
        out, new_residual = rms_norm.add_rms_norm(x, residual, weight, 1e-5)
        yield Check("add_rms_norm", case + " sum", relative_error(new_residual, total), 0.0)
        yield Check("add_rms_norm", case, relative_error(out, reference.rms_norm(total.double(), weight, 1e-5)), bound)


def check_all_reduce(scale: Scale) -> Iterator[Check]:
    """The arithmetic and the addresses, all parts in one memory and nobody waited for. Real peers: tests/gpu/test_tensor_parallel.py."""
    shapes = [(1, 64), (3, 100)] if scale.small else [(1, 64), (63, 100), (257, 4096), (300, 8192)]
    for dtype, size, (rows, dim) in itertools.product(scale.dtypes, (2, 4), shapes):
        case, bound = f"{size} ranks {rows}x{dim} {dtype}", TOLERANCE[dtype]
        parts = tuple(randn(scale, dtype, rows * dim + 8) for _ in range(size))
        before = [part.clone() for part in parts]
        weight, residual = randn(scale, dtype, dim), randn(scale, dtype, rows, dim)
        total = reference_all_reduce.one_shot(parts, rows, dim)
        sums, gathered = all_reduce.one_shot(Peers(0, parts), rows, dim), reference_all_reduce.gather_columns(parts, rows, dim)
        yield Check("one_shot", case, relative_error(sums, total), 0.0)
        added = (total.double() + residual.double()).to(dtype)
        out, new_residual = all_reduce.one_shot_add_rms_norm(Peers(1, parts), residual, weight, 1e-5)
        yield Check("one_shot_add_rms_norm", case + " sum", relative_error(new_residual, added), 0.0)
        yield Check("one_shot_add_rms_norm", case, relative_error(out, reference.rms_norm(added.double(), weight, 1e-5)), bound)
        yield Check(
            "gather_columns", case, relative_error(all_reduce.gather_columns(Peers(1, parts), rows, dim), gathered), 0.0
        )
        share = -(-rows // size)
        for rank in range(size):
            mine = slice(min(rank * share, rows), min((rank + 1) * share, rows))
            got = all_reduce.gather_columns(Peers(rank, parts), rows, dim, mine)
            error = relative_error(got, gathered[mine]) if len(got) else float(got.shape != gathered[mine].shape)
            yield Check("gather_columns", f"{case} rows {mine.start}-{mine.stop}", error, 0.0)
        words = tuple(
            torch.randint(-(2**31), 2**31 - 1, (2 * dim,), dtype=torch.int32, device=scale.device) for _ in range(size)
        )
        got, wanted = all_reduce.gather_columns(Peers(0, words), 2, dim), reference_all_reduce.gather_columns(words, 2, dim)
        yield Check("gather_columns", f"{size} ranks, words", float(not torch.equal(got, wanted)), 0.0)
        yield from _shares(scale, size, rows, dim, dtype)
        for rank in range(size):
            sums = all_reduce.two_shot(Peers(rank, parts), rows, dim)
        yield Check(
            "two_shot", case, max(relative_error(part[: rows * dim], total.view(-1)) for part in (sums.view(-1), *parts)), 0.0
        )
        kept = max(relative_error(part[-8:], old[-8:]) for part, old in zip(parts, before, strict=True))
        yield Check("two_shot", case + " behind it", kept, 0.0)


def _shares(scale: Scale, size: int, rows: int, dim: int, dtype: torch.dtype) -> Iterator[Check]:
    share = -(-rows // size)
    parts = randn(scale, dtype, size, size * share, dim)
    weight, residual = randn(scale, dtype, dim), randn(scale, dtype, size * share, dim)
    got = [torch.full((rows * dim + 8,), torch.nan, dtype=dtype, device=scale.device) for _ in range(size)]
    total, want = residual[:rows].clone(), [part.clone() for part in got]
    for rank in range(size):
        mine = slice(rank * share, max(rank * share, min((rank + 1) * share, rows)))
        inbox = torch.cat(
            [parts[other, rank * share : (rank + 1) * share].reshape(-1) for other in range(size) if other != rank]
        )
        arguments = (parts[rank, mine], inbox)
        for op, outs, kept in ((all_reduce, got, residual), (reference_all_reduce, want, total)):
            if op is all_reduce:
                op.share_add_rms_norm(Peers(rank, tuple(outs)), *arguments, kept[mine], weight, 1e-5, share=share)
            else:
                op.share_add_rms_norm(outs, rank, *arguments, kept[mine], weight, 1e-5, share=share)
    case = f"{size} ranks {rows}x{dim} {dtype}"
    yield Check("share_add_rms_norm", case + " sum", relative_error(residual[:rows], total), 0.0)
    for one, other in zip(got, want, strict=True):
        yield Check("share_add_rms_norm", case, relative_error(one[: rows * dim], other[: rows * dim]), TOLERANCE[dtype])
        yield Check("share_add_rms_norm", case + " behind it", float(not one[rows * dim :].isnan().all()), 0.0)


def check_silu_mul(scale: Scale) -> Iterator[Check]:
    shapes = [(1, 1), (3, 100), (2, 1536)] if scale.small else [(1, 1), (63, 100), (100, 1536), (257, 14336)]
    for dtype, (tokens, dim) in itertools.product(scale.dtypes, shapes):
        x = randn(scale, dtype, tokens, 2 * dim)
        error = relative_error(silu_mul.silu_mul(x), reference.silu_mul(x.double()))
        yield Check("silu_mul", f"{tokens}x{dim} {dtype}", error, TOLERANCE[dtype])


def check_blocks(scale: Scale) -> Iterator[Check]:
    for dtype in scale.dtypes:
        caches = [randn(scale, dtype, 9, 3, 16, 24), randn(scale, dtype, 9, 2, 64, 128)]
        before = [cache.clone() for cache in caches]
        blocks.copy_blocks(caches, torch.tensor([(1, 5), (1, 6), (8, 0)], device=scale.device))
        order = [8, 1, 2, 3, 4, 1, 1, 7, 8]
        error = max(relative_error(cache, old[order]) for cache, old in zip(caches, before, strict=True))
        yield Check("copy_blocks", str(dtype), error, 0.0)
        pairs = torch.tensor([(0, 4), (3, 0), (3, 2)], device=scale.device)
        host = [torch.randn(5, *cache.shape[1:]).to(dtype) for cache in caches]
        if scale.device != "cpu":
            host = [cache.pin_memory() for cache in host]
        for name, sources, destinations in (("to the host", caches, host), ("to the device", host, caches)):
            expected = [
                (source[[0, 3, 3]].cpu(), kept[[1, 3]].cpu()) for source, kept in zip(sources, destinations, strict=True)
            ]
            blocks.swap_blocks(sources, destinations, pairs)
            if scale.device != "cpu":
                torch.cuda.synchronize()
            error = max(
                relative_error(cache[order].cpu(), want)
                for cache, wants in zip(destinations, expected, strict=True)
                for order, want in zip(([4, 0, 2], [1, 3]), wants, strict=True)
            )
            yield Check("swap_blocks", f"{name} {dtype}", error, 0.0)


def draw_distance(logits_RV: Tensor, tokens_R: Tensor, inputs: SamplingInputs) -> float:
    """How far the worst row's uniform number lies outside its token's share of the kept probabilities; 1 if it was not kept.

    Where top-p's bound falls within rounding of a cumulative sum, either side of it is right.
    """
    u_R = reference_sampling.uniform(inputs.seed_R, inputs.position_R, inputs.choice_R).double()
    worst = 0.0
    for row, token in enumerate(tokens_R.tolist()):
        if inputs.greedy_R[row]:
            worst = max(worst, float(token != int(logits_RV[row].argmax())))
            continue
        x_V = (logits_RV[row] / inputs.temperature_R[row]).double()
        k, p, min_p = int(inputs.top_k_R[row]), float(inputs.top_p_R[row]), float(inputs.min_p_R[row])
        distances = []
        for share in {p, p * (1 - 1e-5), min(1.0, p * (1 + 1e-5))} if p < 1 else {p}:
            sorted_V = x_V.sort(descending=True).values
            floor = sorted_V[min(k, len(x_V)) - 1] if k else sorted_V[-1]
            weight_V = torch.where(sorted_V >= floor, (sorted_V - sorted_V[0]).exp(), 0.0)
            if share < 1:
                above_V = weight_V.cumsum(0) - weight_V
                floor = torch.maximum(floor, sorted_V[above_V <= share * weight_V.sum()][-1])
            if min_p:
                floor = torch.maximum(floor, sorted_V[0] + torch.tensor(min_p).log() - 1e-6)
            kept_V = torch.where(x_V >= floor, (x_V - sorted_V[0]).exp(), 0.0)
            upper = kept_V[: token + 1].sum() / kept_V.sum()
            lower = upper - kept_V[token] / kept_V.sum()
            outside = max(0.0, float(lower - u_R[row]), float(u_R[row] - upper))
            distances.append(outside if kept_V[token] > 0 else 1.0)
        worst = max(worst, min(distances))
    return worst


_WISHES: tuple[dict[str, float], ...] = (
    {},
    {"greedy": True},
    {"top_k": 1},
    {"top_k": 40, "top_p": 0.95},
    {"top_p": 0.9},
    {"temperature": 0.5, "min_p": 0.1},
    {"top_k": 7, "min_p": 0.2},
    {"top_p": 0.999999},
    {"top_k": 3000},
    {"temperature": 2.0, "top_k": 900, "top_p": 0.7, "min_p": 0.001},
)
_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth": lambda x: x * 3,
    "tied": lambda x: (x * 4).round() / 2,
    "flat": lambda x: x * 0.01,
    "banned": lambda x: torch.where(x < 0, -torch.inf, x),
    "flat and high": lambda x: x * 0.3 + 15,
    "few": lambda x: torch.where(x < x.amax(-1, keepdim=True) - 1.5, -torch.inf, x),
}


def broken_rows(logits_RV: Tensor, inputs: SamplingInputs) -> float:
    """Count where the best logit doesn't say what it must of rows with a NaN, an infinity or nothing at all, and ids outside the vocabulary."""
    vocab, wrong = logits_RV.shape[1], 0
    for flags in ((True,) * 4, (True, False, True, False), (True, False, False, False), (False,) * 4):
        broken = logits_RV.clone()
        broken[0, vocab - 1], broken[1, 0], broken[2], broken[3, vocab // 2] = torch.nan, torch.nan, -torch.inf, torch.inf
        tokens, best = sampling.sample(broken, inputs, *flags)
        wrong += int(((best != broken.amax(-1)) & ~(best.isnan() & broken.isnan().any(-1))).sum())
        wrong += int(((tokens < 0) | (tokens >= vocab)).sum())
    return float(wrong)


def check_sampling(scale: Scale) -> Iterator[Check]:
    vocabs = (63, 5000) if scale.small else (63, 1000, 49152, 128256)
    for vocab, (kind, shape_of) in itertools.product(vocabs, _KINDS.items()):
        if scale.small and kind in (("tied", "banned") if vocab > 1000 else ("few", "flat and high")):
            continue
        rows = len(_WISHES) * (1 if scale.small else 4)
        logits = shape_of(torch.randn(rows, vocab)).to(scale.device)
        columns = {
            name: [wish.get(name, default) for wish in _WISHES] * (rows // len(_WISHES))
            for name, default in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("greedy", False))
        }
        inputs = sampling_inputs(rows, seed=vocab, device=scale.device, **columns)
        flags = (True, True, True, True)
        tokens, best = sampling.sample(logits, inputs, *flags)
        yield Check("sample", f"{kind}, vocabulary {vocab}, best logit", float((best != logits.amax(-1)).sum()), 0.0)
        yield Check("sample", f"{kind}, vocabulary {vocab}", draw_distance(logits, tokens, inputs), 2e-5)
        for dtype in (torch.float16,) if scale.small else (torch.float16, torch.bfloat16):
            narrow = logits.to(dtype)
            tokens, best = sampling.sample(narrow, inputs, *flags)
            yield Check(
                "sample", f"{kind}, vocabulary {vocab}, {dtype}, best logit", float((best != narrow.amax(-1)).sum()), 0.0
            )
            # Not against the tokens of the same values in float32: wider loads add up in another order, and a number drawn within
            # rounding of the border between two tokens (5e-9 in a row of these) then falls on the other side.
            yield Check("sample", f"{kind}, vocabulary {vocab}, {dtype}", draw_distance(narrow.float(), tokens, inputs), 2e-5)
        first, best = sampling.sample(logits, inputs, False, False, False, False)
        wrong = float((first != logits.argmax(-1)).sum() + (best != logits.amax(-1)).sum())
        yield Check("sample", f"{kind}, vocabulary {vocab}, greedy", wrong, 0.0)
        off = SamplingInputs(*inputs)._replace(
            top_k_R=torch.zeros_like(inputs.top_k_R),
            top_p_R=torch.ones_like(inputs.top_p_R),
            min_p_R=torch.zeros_like(inputs.min_p_R),
        )
        plain, _ = sampling.sample(logits, inputs, True, False, False, False)
        yield Check("sample", f"{kind}, vocabulary {vocab}, no filter", draw_distance(logits, plain, off), 2e-5)
        yield Check("sample", f"{kind}, vocabulary {vocab}, rows without a token", broken_rows(logits, inputs), 0.0)


def check_token_masks(scale: Scale) -> Iterator[Check]:
    # (rows, masked rows, vocabulary, words): words for fewer and for more tokens than there are.
    for rows, masked, vocab, words in [(1, 1, 1, 2), (5, 2, 100, 4), (3, 3, 4096, 130), (9, 4, 6001, 100), (2, 0, 50, 2)]:
        logits = torch.randn(rows, vocab + 3, device=scale.device)[:, :vocab]
        picked = torch.randperm(rows, device=scale.device)[:masked]
        bits = torch.randint(-(2**31), 2**31, (masked, words), device=scale.device).to(torch.int32)
        expected = logits.clone()
        reference_sampling.allow_only(expected, picked, bits)
        token_masks.allow_only(logits, picked, bits)
        yield Check("token_masks", f"{masked} of {rows} x {vocab}, {words} words", float((logits != expected).sum()), 0.0)


CHECKS: dict[str, Callable[[Scale], Iterator[Check]]] = {
    "rms_norm": check_rms_norm,
    "all_reduce": check_all_reduce,
    "silu_mul": check_silu_mul,
    "rotary": check_rotary,
    "blocks": check_blocks,
    "decode": check_decode,
    "decode_shares": check_decode_shares,
    "prefill": check_prefill,
    "sampling": check_sampling,
    "token_masks": check_token_masks,
}


def run_checks(
    names: Sequence[str],
    dtypes: Sequence[str],
    device: str,
    shapes: Sequence[tuple[int, int, int, int]] = tuple(ATTENTION_SHAPES),
) -> Iterator[Check]:
    """Run the named checks on a device, in memory where everything uninitialised is NaN."""
    torch.manual_seed(0)
    scale = Scale(device, tuple(getattr(torch, dtype) for dtype in dtypes), small=device == "cpu", shapes=shapes)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for name in names:
            yield from CHECKS[name](scale)
    finally:
        torch.use_deterministic_algorithms(False)


def main() -> int:
    """Print a line a check; the exit status says whether all passed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"])
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(ATTENTION_SHAPES)), help="attention's, by number")
    arguments = parser.parse_args()
    failed = 0
    shapes = [ATTENTION_SHAPES[number] for number in arguments.shapes]
    for check in run_checks(arguments.only, arguments.dtypes, arguments.device, shapes):
        print(json.dumps({**check._asdict(), "passed": check.passed}), flush=True)
        failed += not check.passed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
