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
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]

import torch
from kernel_cases import ATTENTION_SHAPES, ATTENTION_TOLERANCE, attention_case, naive_attention, relative_error, sampling_inputs
from torch import Tensor

from kernels import reference, reference_all_reduce, reference_sampling
from kernels.all_reduce import Peers
from kernels.attention import KVScales
from kernels.gpu import (
    all_reduce,
    attention,
    blocks,
    decode_attention,
    decode_int8,
    rms_norm,
    rotary,
    sampling,
    silu_mul,
    token_masks,
)
from kernels.gpu.decode_plan import DecodeShape, choose_shape, first_rows, plan_decode
from kernels.sampling import SamplingInputs

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Check(NamedTuple):
    """One comparison: an error that is NaN or above its bound failed."""

    op: str
    case: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


class Scale(NamedTuple):
    """Where checks run and how large they may be (the interpreter needs 10 to 30 ms a program)."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    small: bool
    shapes: Sequence[tuple[int, int, int, int]]
    """Attention's query heads, kv heads, head dim and block size."""


def _randn(scale: Scale, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=scale.device).mul_(2).to(dtype)


def check_rms_norm(scale: Scale) -> Iterator[Check]:
    shapes = (
        [(1, 1), (3, 100), (63, 576)] if scale.small else [(1, 1), (63, 100), (100, 576), (257, 4096), (5, 8192), (7, 16384)]
    )
    for dtype, (tokens, dim) in itertools.product(scale.dtypes, shapes):
        wide = _randn(scale, dtype, tokens, dim + 8)
        x, weight, residual = wide[:, :dim], _randn(scale, dtype, dim), _randn(scale, dtype, tokens, dim)
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
        parts = tuple(_randn(scale, dtype, rows * dim + 8) for _ in range(size))
        before = [part.clone() for part in parts]
        weight, residual = _randn(scale, dtype, dim), _randn(scale, dtype, rows, dim)
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
    parts = _randn(scale, dtype, size, size * share, dim)
    weight, residual = _randn(scale, dtype, dim), _randn(scale, dtype, size * share, dim)
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
        x = _randn(scale, dtype, tokens, 2 * dim)
        error = relative_error(silu_mul.silu_mul(x), reference.silu_mul(x.double()))
        yield Check("silu_mul", f"{tokens}x{dim} {dtype}", error, TOLERANCE[dtype])


def check_rotary(scale: Scale) -> Iterator[Check]:
    heads = [(1, 1, 64, 64), (9, 3, 96, 96), (4, 2, 128, 32)]
    if not scale.small:
        heads += [(32, 8, 128, 128), (16, 1, 256, 256), (14, 2, 64, 64)]
    tokens = 3 if scale.small else 100
    for dtype, shape, norm, int8 in itertools.product(scale.dtypes, heads, (False, True), (False, True)):
        num, kv, dim, rotary_dim = shape
        qkv = _randn(scale, dtype, tokens, num + 2 * kv, dim)
        q, k, v = qkv.split([num, kv, kv], dim=1)
        v[0, 0] = 0
        angles = torch.rand(50, rotary_dim // 2, device=scale.device) * 6
        cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
        positions = torch.randint(0, 50, (tokens,), device=scale.device)
        slots = torch.randperm(tokens * 2, device=scale.device)[:tokens]
        slots[1] = -1
        norms = (_randn(scale, dtype, dim), _randn(scale, dtype, dim)) if norm else (None, None)
        got = torch.full((2, tokens // 8 * 2 + 2, kv, 8, dim), torch.nan, dtype=dtype, device=scale.device)
        want = got.double()
        scales = KVScales(*torch.full(got.shape[:-1], torch.nan, device=scale.device)) if int8 else None
        got = torch.full_like(got, 99, dtype=torch.int8) if int8 else got
        caches = (got[0], reference.by_word(got[1]) if int8 else got[1])
        out = rotary.rotary_kv_write(q, k, v, cos_sin, positions, slots, *caches, *norms, 1e-6, scales)
        expected = reference.rotary_kv_write(q.double(), k.double(), v.double(), cos_sin, positions, slots, *want, *norms, 1e-6)
        case = f"{num}/{kv} heads of {dim}, {rotary_dim} rotated, norm={norm} {dtype}{' int8' if int8 else ''}"
        yield Check("rotary q", case, relative_error(out, expected), TOLERANCE[dtype])
        bound = TOLERANCE[dtype]
        if scales is not None:
            got = torch.stack([caches[0], reference.by_position(caches[1])])
            untouched = torch.stack(scales).isnan()[..., None].expand_as(got)
            yield Check("rotary kv", case + " elsewhere", float((got[untouched] != 99).any()), 0.0)
            largest = want.abs().amax(-1) / 127
            yield Check(
                "rotary kv", case + " scales", relative_error(torch.stack(scales).nan_to_num(0), largest.nan_to_num(0)), bound
            )
            # Half a step of the largest, and what computing in float32 may shift.
            steps = ((reference.dequantise(got, torch.stack(scales), torch.float64) - want) / largest[..., None]).nan_to_num(0)
            yield Check("rotary kv", case + " steps", float(steps.abs().max()), 0.5 + 127 * bound)
            got = reference.dequantise(got, torch.stack(scales), torch.float64)
        untouched = float((got.isnan() != want.isnan()).any())
        error = relative_error(got.nan_to_num(0), want.nan_to_num(0)) + untouched
        yield Check("rotary kv", case, error, 2e-2 if int8 else bound)


def check_blocks(scale: Scale) -> Iterator[Check]:
    for dtype in scale.dtypes:
        caches = [_randn(scale, dtype, 9, 3, 16, 24), _randn(scale, dtype, 9, 2, 64, 128)]
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


def _attention_error(scale: Scale, lens: list[tuple[int, int]], **options: object) -> float:
    case = attention_case(lens, device=scale.device, **options)
    arguments = (case.q_TNH, case.k_cache_BKSH, case.v_cache_BKSH, case.metadata, case.scale, case.sliding_window, case.scales)
    return relative_error(attention.paged_attention(*arguments), naive_attention(case))


def _attention_bound(dtype: torch.dtype, *, int8: bool) -> float:
    """Products with integers are made in float16."""
    return max(ATTENTION_TOLERANCE[dtype], ATTENTION_TOLERANCE[torch.float16]) if int8 else ATTENTION_TOLERANCE[dtype]


def check_decode(scale: Scale) -> Iterator[Check]:
    lens = [(1, n) for n in ((0, 1, 63, 100, 64) if scale.small else (0, 1, 63, 64, 65, 100, 777, 2048, 1500, 16))]
    shapes = [(4, 4, 64, 16), (6, 2, 96, 64)] if scale.small else scale.shapes
    for dtype, (heads, kv_heads, head_dim, size) in itertools.product(scale.dtypes, shapes):
        for window in (None, 50) if head_dim != 96 or not scale.small else (None,):
            options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": size, "dtype": dtype}
            # Many rows without a window and few with one.
            more = [(1, 1 + 7 * n % 200) for n in range(300)] if window is None and not scale.small else []
            for int8 in (False, True):
                error = _attention_error(scale, lens + more, sliding_window=window, int8=int8, **options)
                case = f"{heads}/{kv_heads} heads of {head_dim}, blocks of {size}, window={window} {dtype}{' int8' if int8 else ''}"
                yield Check("decode_attention", case, error, _attention_bound(dtype, int8=int8))


def _decode_shapes(scale: Scale, dtype: torch.dtype) -> Iterator[DecodeShape]:
    """Every way to cut a launch that is ever chosen, and rows cut not at all, in a few parts, and as small as allowed, with little room."""
    kinds = {"num_kv_heads": 2, "num_sms": 8 if scale.small else 132}
    facts = {"head_dim": 64, "block_size": 64, "shared_memory": 1 << 18}
    sizes = (dtype.itemsize, torch.int8.itemsize)
    yield from {choose_shape(rows=rows, itemsize=size, **facts, **kinds) for rows in first_rows(**kinds) for size in sizes}
    cuts = (
        ((1, 1, None), (6, 1, 8), (30, 4, None))
        if scale.small
        else itertools.product((1, 8, 40, 264, 2000), (1, 4), (None, 170))
    )
    for programs, least, most in cuts:
        yield DecodeShape(tile=64, programs=programs, least=least, num_warps=4, stages=3, most=most)


def check_decode_shares(scale: Scale) -> Iterator[Check]:
    """The same rows however they are cut."""
    for dtype in scale.dtypes:
        windows = (300,) if scale.small else (None, 300)
        for shape, window in itertools.product(list(_decode_shapes(scale, dtype)), windows):
            yield from _check_shape(scale, dtype, shape, window)
            # Many ways to cut one kind of cache are enough: those of integers differ in nothing but the tiles that are chosen.
            if shape.tile == 32 or shape.programs == 40 or scale.small:
                yield from _check_shape(scale, dtype, shape, window, int8=True)


def _check_shape(
    scale: Scale, dtype: torch.dtype, shape: DecodeShape, window: int | None, *, int8: bool = False
) -> Iterator[Check]:
    lens = [(1, n) for n in ((0, 257, 0, 600) if scale.small else (0, 5, 256, 0, 257, 600, 1100, 5000, 0, *range(1, 70)))]
    sizes = {"heads": 6, "kv_heads": 2, "block_size": 64, "sliding_window": window}
    case = attention_case(lens, dtype=dtype, device=scale.device, int8=int8, **sizes)
    plan = plan_decode(case.metadata.context_lens_R, num_kv_heads=2, sliding_window=window, shape=shape)
    expected = naive_attention(case)
    attend = decode_attention.decode_attention
    if case.scales is not None:
        attend = partial(decode_int8.decode_int8, scales=case.scales)
    # Twice by one plan, as two layers of a step: the first must leave the plan as it found it.
    for _ in range(2):
        out = torch.full_like(case.q_TNH, torch.nan)
        caches = (case.k_cache_BKSH, case.v_cache_BKSH)
        attend(case.q_TNH, *caches, case.metadata.block_tables_RP, plan, out, scale=case.scale)
        name = f"{shape}, window={window} {dtype}{' int8' if int8 else ''}"
        yield Check("decode_attention", name, relative_error(out, expected), _attention_bound(dtype, int8=int8))


def check_prefill(scale: Scale) -> Iterator[Check]:
    lens = [(5, 5), (67, 90)] if scale.small else [(63, 63), (100, 100), (5, 1000), (2, 2), (300, 812), (1000, 1000)]
    lens += [(1, 33), (1, 1)]
    shapes = [(4, 2, 64, 16), (2, 2, 96, 64)] if scale.small else scale.shapes
    for dtype, (heads, kv_heads, head_dim, size) in itertools.product(scale.dtypes, shapes):
        for window in (None, 40):
            options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": size, "dtype": dtype}
            for int8 in (False, True):
                error = _attention_error(scale, lens, sliding_window=window, int8=int8, **options)
                case = f"mixed rows, {heads}/{kv_heads} heads of {head_dim}, blocks of {size}, window={window} {dtype}{' int8' if int8 else ''}"
                yield Check("prefill_attention", case, error, _attention_bound(dtype, int8=int8))


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
