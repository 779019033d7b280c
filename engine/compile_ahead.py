"""Compiling what a step launches while the weights are read: one kernel after the other, each when it is first needed, takes ten seconds.

Every op of a step is called once, on tensors of a few rows, by threads of their own. A kernel is compiled for types, strides and the
model's sizes, not for a step's, so what these calls compile serves every step. Knows which ops a step is made of; an op that is missing
here is compiled when a step first asks for it. Triton keeps what it compiled on disk: the next engine on the host only loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from engine import kv_cache
from engine.models.decoder import LayerCache
from engine.models.spec import ModelSpec
from engine.options import EngineOptions
from kernels.attention import AttentionMetadata, paged_attention, plan_attention
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import rotary_kv_write
from kernels.sampling import SamplingInputs, sample
from kernels.silu_mul import silu_mul
from kernels.state import SingleRows, hold_back, lay_out_singles, store_tokens

_THREADS = 8
_FLAGS = ((False, False, False, False), (True, True, True, False))
"""Greedy, and what a request gets that says nothing; other filters are compiled for the first request that asks for them."""


class CompileAhead:
    """Compilations under way."""

    def __init__(self, spec: ModelSpec, options: EngineOptions, *, device: torch.device) -> None:
        """Start them; `spec` is this rank's share. On a CPU there are none."""
        self._futures: list[Future[None]] = []
        if device.type != "cuda":
            return
        from kernels.gpu.launchers import load_one_at_a_time  # a host without a GPU needs no Triton

        load_one_at_a_time()
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="compile-ahead")
        self._futures += [pool.submit(_on_device, device, call) for call in _calls(spec, options, device)]
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Return when all is compiled; raise what a compilation raised."""
        for future in self._futures:
            future.result()
        self._futures.clear()


def _on_device(device: torch.device, call: Callable[[], object]) -> None:
    with torch.cuda.device(device), torch.inference_mode():
        call()


def _calls(spec: ModelSpec, options: EngineOptions, device: torch.device) -> Iterable[Callable[[], object]]:
    """Give the calls, those that take longest first."""
    from kernels.gpu.attention import single_row_counts  # a host without a GPU needs no Triton

    dtype: torch.dtype = getattr(torch, options.dtype)

    def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=of, device=device)

    for window in sorted(set(spec.windows), key=str):
        for rows in single_row_counts(device, spec.num_kv_heads, 1 if options.int8_kv else dtype.itemsize):
            yield partial(_attend, spec, options, zeros, rows, 1, window)
        yield partial(_attend, spec, options, zeros, 1, 3, window)
    for flags in reversed(_FLAGS):
        yield partial(_sample, spec, options, zeros, flags)
    yield partial(_rotate, spec, options, zeros)
    yield partial(_lay_out, options, zeros)
    yield partial(_norm, spec, zeros)
    yield lambda: silu_mul(zeros(2, 2 * spec.intermediate_size))


def _cache(spec: ModelSpec, options: EngineOptions, device: torch.device) -> LayerCache:
    (cache,) = kv_cache.allocate(
        spec,
        num_blocks=1,
        block_size=options.block_size,
        dtype=getattr(torch, options.dtype),
        device=device,
        num_layers=1,
        int8=options.int8_kv,
    )
    return cache


def _attend(
    spec: ModelSpec, options: EngineOptions, zeros: Callable[..., Tensor], rows: int, query_len: int, window: int | None
) -> None:
    """Attend `rows` rows of `query_len` tokens each."""
    starts = zeros(rows + 1, of=torch.int32)
    k_BKSH, v_BKSH, scales = _cache(spec, options, starts.device)
    starts += torch.arange(rows + 1, dtype=torch.int32, device=starts.device) * query_len
    metadata = AttentionMetadata(
        block_tables_RP=zeros(rows, 1, of=torch.int32),
        query_start_R1=starts,
        context_lens_R=zeros(rows, of=torch.int32) + query_len,
        num_single=rows if query_len == 1 else 0,
        max_query_len=query_len,
        max_context_len=query_len,
    )
    metadata = plan_attention(metadata, k_BKSH, windows=(window,))
    q_TNH = zeros(rows * query_len, spec.num_heads, spec.head_dim)
    paged_attention(q_TNH, k_BKSH, v_BKSH, metadata, scale=spec.head_dim**-0.5, sliding_window=window, scales=scales)


def _rotate(spec: ModelSpec, options: EngineOptions, zeros: Callable[..., Tensor]) -> None:
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    qkv_TLH = zeros(2, heads + 2 * kv_heads, spec.head_dim)
    k_BKSH, v_BKSH, scales = _cache(spec, options, qkv_TLH.device)
    norm_H = zeros(spec.head_dim) if spec.qk_norm else None
    places_T = zeros(2, of=torch.int64)
    angles_MH = zeros(2, spec.head_dim, of=torch.float32)
    q_TNH, k_TKH, v_TKH = qkv_TLH.split([heads, kv_heads, kv_heads], dim=1)
    rotary_kv_write(q_TNH, k_TKH, v_TKH, angles_MH, places_T, places_T, k_BKSH, v_BKSH, norm_H, norm_H, spec.norm_eps, scales)


def _norm(spec: ModelSpec, zeros: Callable[..., Tensor]) -> None:
    x_TD = zeros(2, spec.hidden_size)
    rms_norm(x_TD, x_TD[0], spec.norm_eps)
    add_rms_norm(x_TD.clone(), x_TD, x_TD[0].clone(), spec.norm_eps)


def _lay_out(options: EngineOptions, zeros: Callable[..., Tensor]) -> None:
    blocks = options.max_blocks_per_sequence
    rows_R4 = zeros(1, 4, of=torch.int32) - 1
    ids_SL, tables_SP = zeros(1, options.session_len + 1, of=torch.int32), zeros(1, blocks, of=torch.int32)
    lay_out_singles(rows_R4, ids_SL, tables_SP, options.block_size, SingleRows.allocate(1, blocks, rows_R4.device))


def _sample(
    spec: ModelSpec, options: EngineOptions, zeros: Callable[..., Tensor], flags: tuple[bool, bool, bool, bool]
) -> None:
    """Hold ends back, draw a token and store it."""
    logits_RV, slots_R = zeros(1, spec.vocab_size), zeros(1, of=torch.int64)
    one_R, none_R = zeros(1, of=torch.float32) + 1, zeros(1, of=torch.int32)
    greedy_R = zeros(1, of=torch.bool)
    inputs = SamplingInputs(one_R, none_R + 1, one_R, one_R, slots_R, slots_R, none_R, greedy_R)
    random, top_k, top_p, min_p = flags
    drawn = sample(logits_RV, inputs, any_random=random, any_top_k=top_k, any_top_p=top_p, any_min_p=min_p)
    if not random:
        hold_back(logits_RV, slots_R, slots_R, none_R, zeros(1, 8, of=torch.int32) - 1)
        store_tokens(*drawn, slots_R, slots_R, zeros(1, options.session_len + 1, of=torch.int32))
