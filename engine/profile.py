"""What the largest step takes: device memory beside weights and KV pool, the host's time and the device's. Measured by running it."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from engine import kv_cache
from engine.models.decoder import Decoder, StepInputs
from engine.options import EngineOptions
from engine.scorer import LEAST_AT_ONCE
from kernels.attention import AttentionMetadata


class StepProfile(NamedTuple):
    """A step of `max_prefill_token_num` tokens on a GPU, launched kernel by kernel."""

    peak_bytes: int
    """What it allocates."""
    host_ms: float
    """Launching it, which takes as long for one prompt as for many."""
    token_us: float
    """The device's time for a token of a prompt."""

    def worthwhile_tokens(self, decode_ms: float) -> int:
        """How many tokens of prompts keep the device at work as long as the host launches their step.

        `decode_ms`: the device's time for what such a step computes beside them, a token of each running request.
        """
        return max(1, math.ceil(1e3 * (self.host_ms - decode_ms) / self.token_us))


def profile_largest_step(decoder: Decoder, options: EngineOptions) -> StepProfile:
    """Run the step that takes most, twice: the first one loads what is needed. CUDA only; on all ranks of a group alike."""
    device = decoder.cos_sin_MH.device
    dtype = decoder.embedding.weight_VD.dtype
    blocks = options.max_blocks_per_sequence
    longest = min(options.session_len, options.max_prefill_token_num)
    # One layer's cache of one session serves all layers and all rows: what it holds doesn't matter.
    (cache, *_) = kv_cache.allocate(
        decoder.spec, num_blocks=blocks, block_size=options.block_size, dtype=dtype, device=device, num_layers=1
    )
    caches = [cache] * decoder.spec.num_layers
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.inference_mode():
        inputs = _largest_step(options, longest=longest, device=device)
        logits_RV = decoder.forward(inputs, caches)
        # What the sampler may hold at once beside the logits: their scaled copy, weights, sums and an order (float64, int64).
        scratch = torch.empty((logits_RV.numel() * 7,), dtype=torch.float32, device=device)
        torch.cuda.synchronize(device)
        peak: int = torch.cuda.max_memory_allocated(device) - before
        del logits_RV, scratch
        started = time.perf_counter()
        begin.record()
        decoder.hidden(inputs, caches)
        end.record()
        host_ms = 1e3 * (time.perf_counter() - started)
    end.synchronize()
    del inputs, cache, caches
    torch.cuda.empty_cache()
    return StepProfile(peak, host_ms, 1e3 * begin.elapsed_time(end) / options.max_prefill_token_num)


def _largest_step(options: EngineOptions, *, longest: int, device: torch.device) -> StepInputs:
    """Lay out rows of `longest` tokens until the budget is spent; as many tokens reach the head as a batch may have."""
    budget = options.max_prefill_token_num
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
    )
