"""Paged attention on the GPU: a launch for the rows of one token and a launch for the others."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.runtime import driver

from kernels.gpu import decode_attention, int8_cache, prefill_attention
from kernels.gpu.decode_plan import DecodePlan, choose_shape, first_rows, plan_decode

if TYPE_CHECKING:
    from kernels.attention import AttentionMetadata, KVScales


@cache
def _num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; a small one's where kernels are interpreted on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have, as Triton will hold it to; a small device's where kernels are interpreted."""
    if device.type != "cuda":
        return 1 << 16
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def single_row_counts(device: torch.device, num_kv_heads: int, itemsize: int) -> tuple[int, ...]:
    """Give a count of single-token rows for each way in which their launch is cut: what compiles these compiles them all.

    `itemsize`: bytes of a number in the cache.
    """
    return first_rows(num_kv_heads=num_kv_heads, num_sms=_num_sms(device), itemsize=itemsize)


def plan_attention(metadata: AttentionMetadata, k_cache_BKSH: Tensor, windows: Iterable[int | None]) -> AttentionMetadata:
    """See `kernels.attention.plan_attention`."""
    lens_R = metadata.context_lens_R[: metadata.num_single]
    plans = tuple(_plan(lens_R, k_cache_BKSH, window) for window in set(windows)) if metadata.num_single else ()
    int8 = k_cache_BKSH.dtype == torch.int8
    unpacking = tuple(int8_cache.plan_unpacking(metadata, k_cache_BKSH.shape[2])) if int8 else ()
    return metadata._replace(plans=plans, unpacking=unpacking)


def _plan(context_lens_R: Tensor, cache_BKSH: Tensor, sliding_window: int | None) -> DecodePlan:
    _, num_kv_heads, size, head_dim = cache_BKSH.shape
    shape = choose_shape(
        rows=len(context_lens_R),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=size,
        itemsize=cache_BKSH.element_size(),
        num_sms=_num_sms(cache_BKSH.device),
        shared_memory=_shared_memory(cache_BKSH.device),
    )
    return plan_decode(context_lens_R, num_kv_heads=num_kv_heads, sliding_window=sliding_window, shape=shape)


def _attend_singles(
    q_RNH: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    metadata: AttentionMetadata,
    out_TNH: Tensor,
    scale: float,
    sliding_window: int | None,
    scales: KVScales | None,
) -> None:
    """Attend the rows of one token by the step's plan, or by one of this call's own where the step has none."""
    plan = next((plan for plan in metadata.plans if plan.sliding_window == sliding_window), None)
    if plan is None:
        plan = _plan(metadata.context_lens_R[: metadata.num_single], k_cache_BKSH, sliding_window)
    caches = (k_cache_BKSH, v_cache_BKSH)
    decode_attention.decode_attention(q_RNH, *caches, metadata.block_tables_RP, plan, out_TNH, scale=scale, scales=scales)


def _attend_prompts(
    q_TNH: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    metadata: AttentionMetadata,
    out_TNH: Tensor,
    scale: float,
    sliding_window: int | None,
    rows: range,
) -> None:
    """Attend rows of many tokens, from a cache of the queries' type."""
    size, head_dim = k_cache_BKSH.shape[2:]
    prefill_attention.prefill_attention(
        q_TNH,
        k_cache_BKSH,
        v_cache_BKSH,
        metadata.block_tables_RP,
        metadata.query_start_R1,
        metadata.context_lens_R,
        out_TNH,
        first_row=rows.start,
        num_rows=len(rows),
        max_query_len=metadata.max_query_len,
        scale=scale,
        sliding_window=sliding_window,
        shape=prefill_attention.choose_shape(head_dim=head_dim, block_size=size, itemsize=k_cache_BKSH.element_size()),
    )


def paged_attention(
    q_TNH: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    scales: KVScales | None = None,
) -> Tensor:
    """See `kernels.attention.paged_attention`."""
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    num_rows, num_single = len(metadata.context_lens_R), metadata.num_single
    if num_single:
        _attend_singles(q_TNH[:num_single], k_cache_BKSH, v_cache_BKSH, metadata, out_TNH, scale, sliding_window, scales)
    if scales is None:
        if num_rows > num_single:
            prompts = range(num_single, num_rows)
            _attend_prompts(q_TNH, k_cache_BKSH, v_cache_BKSH, metadata, out_TNH, scale, sliding_window, prompts)
    else:
        for part in metadata.unpacking or int8_cache.plan_unpacking(metadata, k_cache_BKSH.shape[2]):
            # Nothing here may hold a part's keys and values while the next one's are made: there is room for one.
            unpacked = int8_cache.unpack(k_cache_BKSH, v_cache_BKSH, scales, part.pages, q_TNH.dtype)
            theirs = metadata._replace(block_tables_RP=part.tables_RP)
            _attend_prompts(q_TNH, *unpacked, theirs, out_TNH, scale, sliding_window, part.rows)
            del unpacked
    return out_TNH
