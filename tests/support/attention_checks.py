"""Attention, and the rotation before it, held to their references: from caches of the queries' type and from caches of integers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from unittest import mock

import torch
from checking import TOLERANCE, Check, Scale, randn
from kernel_cases import (
    ATTENTION_TOLERANCE,
    AttentionCase,
    attention_case,
    by_word,
    naive_attention,
    relative_error,
)
from torch import Tensor

from kernels import reference
from kernels.attention import KVScales
from kernels.gpu import attention, decode_attention, int8_cache, rotary
from kernels.gpu.decode_plan import DecodePlan, DecodeShape, choose_shape, first_rows, plan_decode


def check_rotary(scale: Scale) -> Iterator[Check]:
    heads = [(1, 1, 64, 64), (9, 3, 96, 96), (4, 2, 128, 32)]
    if not scale.small:
        heads += [(32, 8, 128, 128), (16, 1, 256, 256), (14, 2, 64, 64)]
    tokens = 3 if scale.small else 100
    for dtype in scale.dtypes:
        yield from _check_what_is_no_number(scale, dtype)
    for dtype, shape, norm, int8 in itertools.product(scale.dtypes, heads, (False, True), (False, True)):
        num, kv, dim, rotary_dim = shape
        qkv = randn(scale, dtype, tokens, num + 2 * kv, dim)
        q, k, v = qkv.split([num, kv, kv], dim=1)
        v[0, 0] = 0
        angles = torch.rand(50, rotary_dim // 2, device=scale.device) * 6
        cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
        positions = torch.randint(0, 50, (tokens,), device=scale.device)
        slots = torch.randperm(tokens * 2, device=scale.device)[:tokens]
        slots[1] = -1
        norms = (randn(scale, dtype, dim), randn(scale, dtype, dim)) if norm else (None, None)
        got = torch.full((2, tokens // 8 * 2 + 2, kv, 8, dim), torch.nan, dtype=dtype, device=scale.device)
        want = got.double()
        scales = KVScales(*torch.full(got.shape[:-1], torch.nan, device=scale.device)) if int8 else None
        got = torch.full_like(got, 99, dtype=torch.int8) if int8 else got
        caches = (got[0], by_word(got[1]) if int8 else got[1])
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


def _check_what_is_no_number(scale: Scale, dtype: torch.dtype) -> Iterator[Check]:
    """A key with an infinity and a value with a NaN, quantised: what is read of them is no number either; their neighbours are."""
    k, v = randn(scale, dtype, 2, 1, 3, 64)
    k[0, 1, 5], v[0, 2, 63] = torch.inf, torch.nan
    turned = torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], 1).to(scale.device)
    place = torch.zeros(1, dtype=torch.int64, device=scale.device)
    caches = (torch.zeros(1, 3, 8, 64), torch.zeros(1, 3, 2, 64, 4))
    caches = [cache.to(scale.device, torch.int8) for cache in caches]
    scales = KVScales(*torch.zeros(2, 1, 3, 8, device=scale.device))
    rotary.rotary_kv_write(k, k, v, turned, place, place, *caches, None, None, 1e-6, scales)
    for name, cache, values, bad in (
        ("k", caches[0], scales.k_BKS, 1),
        ("v", reference.by_position(caches[1]), scales.v_BKS, 2),
    ):
        finite = reference.dequantise(cache, values, torch.float64)[0, :, 0].isfinite()
        wrong = int(finite[bad].sum()) + int((~finite).sum()) - 64
        yield Check("rotary kv", f"no number in {name} {dtype}", float(wrong), 0.0)


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


def _check_sinks(scale: Scale) -> Iterator[Check]:
    """Rows that are cut nowhere, in which one position outweighs each other one ten thousand times and all of them hardly."""
    shape = DecodeShape(tile=32, programs=1, least=1, num_warps=1, stages=3)
    for dtype, int8 in itertools.product(scale.dtypes, (False, True)):
        for context, sink in ((700, 8.0), (700, 9.5)) if scale.small else ((1024, 8.0), (4096, 10.0), (16384, 11.0)):
            case = attention_case([(1, context)] * 2, dtype=dtype, device=scale.device, int8=int8, block_size=64, sink=sink)
            plan = plan_decode(case.metadata.context_lens_R, num_kv_heads=2, sliding_window=None, shape=shape)
            error = relative_error(_attend(case, plan), naive_attention(case))
            name = f"sink of {sink} over {context} {dtype}{' int8' if int8 else ''}"
            yield Check("decode_attention", name, error, _attention_bound(dtype, int8=int8))


def _attend(case: AttentionCase, plan: DecodePlan) -> Tensor:
    """Attend by a plan, into memory full of NaN."""
    out = torch.full_like(case.q_TNH, torch.nan)
    arguments = (case.q_TNH, case.k_cache_BKSH, case.v_cache_BKSH, case.metadata.block_tables_RP, plan, out)
    decode_attention.decode_attention(*arguments, scale=case.scale, scales=case.scales)
    return out


def _decode_shapes(scale: Scale, dtype: torch.dtype) -> Iterator[DecodeShape]:
    """Every way to cut a launch that is ever chosen, and rows cut not at all, in a few parts, and as small as allowed, with little room."""
    kinds = {"num_kv_heads": 2, "num_sms": 8 if scale.small else 132}
    facts = {"head_dim": 64, "block_size": 64, "shared_memory": 1 << 18}
    sizes = (dtype.itemsize, torch.int8.itemsize)
    yield from {
        choose_shape(rows=rows, itemsize=size, **facts, **kinds)
        for size in sizes
        for rows in first_rows(itemsize=size, **kinds)
    }
    cuts = (
        ((1, 1, None), (6, 1, 8), (30, 4, None))
        if scale.small
        else itertools.product((1, 8, 40, 264, 2000), (1, 4), (None, 170))
    )
    for programs, least, most in cuts:
        yield DecodeShape(tile=64, programs=programs, least=least, num_warps=4, stages=3, most=most)


def check_decode_shares(scale: Scale) -> Iterator[Check]:
    """The same rows however they are cut."""
    yield from _check_sinks(scale)
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
    # Twice by one plan, as two layers of a step: the first must leave the plan as it found it.
    for _ in range(2):
        out = _attend(case, plan)
        name = f"{shape}, window={window} {dtype}{' int8' if int8 else ''}"
        yield Check("decode_attention", name, relative_error(out, expected), _attention_bound(dtype, int8=int8))


def check_prefill(scale: Scale) -> Iterator[Check]:
    lens = [(5, 5), (67, 90)] if scale.small else [(63, 63), (100, 100), (5, 1000), (2, 2), (300, 812), (1000, 1000)]
    lens += [(1, 33), (1, 1)]
    shapes = [(4, 2, 64, 16), (2, 2, 96, 64)] if scale.small else scale.shapes
    for dtype, (heads, kv_heads, head_dim, size) in itertools.product(scale.dtypes, shapes):
        for window, int8 in itertools.product((None, 40), (False, True)):
            options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": size, "dtype": dtype}
            error = _attention_error(scale, lens, sliding_window=window, int8=int8, **options)
            case = f"mixed rows, {heads}/{kv_heads} heads of {head_dim}, blocks of {size}, window={window} {dtype}{' int8' if int8 else ''}"
            yield Check("prefill_attention", case, error, _attention_bound(dtype, int8=int8))
        # Unpacked in parts: of several rows, and of one row that has more than a part is.
        with mock.patch.object(int8_cache, "UNPACKED_POSITIONS", 6 * size):
            error = _attention_error(scale, [*lens, (3, 5 * size), (2, 0), (9, 8 * size)], int8=True, **options)
        yield Check("prefill_attention", f"in parts, {case}", error, _attention_bound(dtype, int8=True))
