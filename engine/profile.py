"""What steps with prompts take: device memory beside weights and KV pool, the host's time and the device's. Measured by running some."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from engine import kv_cache
from engine.models.decoder import Decoder, LayerCache, StepInputs, Stretches
from engine.options import EngineOptions
from engine.scorer import LEAST_AT_ONCE
from kernels.attention import AttentionMetadata

_TIMES = 4
_FEW_TOKENS = 256
"""Tokens of the step whose launch is timed: the device is done with them before the driver's queue is full and the host waits for it."""


class StepProfile(NamedTuple):
    """What steps with prompts take on a GPU, which are launched kernel by kernel."""

    peak_bytes: int
    """What one of `max_prefill_token_num` tokens allocates, and the most that its prompts' contexts take of an int8 pool unpacked."""
    host_ms: float
    """Launching one, which takes as long for one prompt as for many."""
    token_us: float
    """The device's time for a token of a prompt."""

    def worthwhile_tokens(self, decode_ms: float) -> int:
        """How many tokens of prompts keep the device at work as long as the host launches their step.

        `decode_ms`: the device's time for what such a step computes beside them, a token of each running request. A power of 2: what
        was timed differs a little at each start, and the schedule should not.
        """
        tokens = 1e3 * (self.host_ms - decode_ms) / self.token_us
        return 1 if tokens <= 1 else 1 << math.ceil(math.log2(tokens))

    def reserve(self, device: torch.device) -> None:
        """Let PyTorch's allocator hold the largest step's memory in one piece, which smaller ones are cut from.

        A step with more rows than any before would otherwise ask the driver for larger pieces, which waits for the step that runs: every
        step with prompts while a batch comes up, 0.3 ms of idle device each (`between_us` of mixed steps, engine.jsonl, f2e27cb and de8d5e5). After an `OutOfDeviceMemory` the piece is gone for good.
        """
        with contextlib.suppress(torch.cuda.OutOfMemoryError):  # a step that doesn't fit is made smaller, when there is one
            torch.empty(self.peak_bytes, dtype=torch.uint8, device=device)


def profile_steps(decoder: Decoder, options: EngineOptions) -> StepProfile:
    """Run the step that takes most and one of few tokens. CUDA only; all ranks of a group call it, and compute the same."""
    device = decoder.cos_sin_MH.device
    dtype = decoder.embedding.weight_VD.dtype
    # One layer's cache of one session serves all layers and all rows: what it holds doesn't matter.
    (cache, *_) = kv_cache.allocate(
        decoder.spec,
        num_blocks=options.max_blocks_per_sequence,
        block_size=options.block_size,
        dtype=dtype,
        device=device,
        num_layers=1,
        int8=options.int8_kv,
    )
    caches = [cache] * decoder.spec.num_layers
    budget = options.max_prefill_token_num
    with torch.inference_mode():
        largest, small = (_step_of(tokens, options, device=device) for tokens in (budget, min(budget, _FEW_TOKENS)))
        peak = _peak_bytes(decoder, largest, caches)
        _, gpu_ms = _timed(decoder, largest, caches)
        # The least of a few: a pause of the host's isn't the step's.
        host_ms = min(_timed(decoder, small, caches)[0] for _ in range(_TIMES))
    del largest, small, cache, caches
    torch.cuda.empty_cache()
    peak += kv_cache.unpacked_bytes(decoder.spec, options, dtype=dtype)
    return StepProfile(peak, host_ms, 1e3 * gpu_ms / budget)


def _peak_bytes(decoder: Decoder, inputs: StepInputs, caches: Sequence[LayerCache]) -> int:
    device = decoder.cos_sin_MH.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    logits_RV = decoder.forward(inputs, caches)
    # What the sampler may hold at once beside the logits: their scaled copy, weights, sums and an order (float64, int64).
    torch.empty((logits_RV.numel() * 7,), dtype=torch.float32, device=device)
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.max_memory_allocated(device) - before
    return peak


def _timed(decoder: Decoder, inputs: StepInputs, caches: Sequence[LayerCache]) -> tuple[float, float]:
    """Run a step up to what the head reads: milliseconds of the host and of the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started = time.perf_counter()
    begin.record()
    decoder.hidden(inputs, caches)
    end.record()
    host_ms = 1e3 * (time.perf_counter() - started)
    end.synchronize()
    return host_ms, begin.elapsed_time(end)


def _step_of(budget: int, options: EngineOptions, *, device: torch.device) -> StepInputs:
    """Lay out rows as long as a session until the budget is spent; as many tokens reach the head as a batch may have."""
    longest = min(options.session_len, budget)
    counts = [longest] * (budget // longest) + ([budget % longest] if budget % longest else [])
    ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    blocks = -(-longest // options.block_size)
    positions_T = torch.cat([torch.arange(count) for count in counts])
    attention = AttentionMetadata(
        block_tables_RP=torch.arange(blocks, dtype=torch.int32, device=device).repeat(len(counts), 1),
        query_start_R1=ends.to(device),
        context_lens_R=torch.tensor(counts, dtype=torch.int32, device=device),
        num_single=0,
        max_query_len=longest,
        max_context_len=longest,
        query_lens=tuple(counts),
        host_context_lens=tuple(counts),
    )
    return StepInputs(
        tokens_T=torch.zeros(budget, dtype=torch.int32, device=device),
        positions_T=positions_T.to(device),
        slots_T=positions_T.to(device),
        attention=attention,
        sampled_R=torch.arange(min(budget, max(options.max_batch_size, LEAST_AT_ONCE)), device=device),
        stretches=Stretches(torch.ones(1, device=device), torch.zeros(budget, dtype=torch.int64, device=device)),
    )
