"""How much device memory a step takes beside weights and KV pool: measured by running the largest step there can be."""

from __future__ import annotations

import torch

from engine import kv_cache
from engine.models.decoder import Decoder, StepInputs
from engine.options import EngineOptions
from engine.scorer import LEAST_AT_ONCE
from kernels.attention import AttentionMetadata


def activation_bytes(decoder: Decoder, options: EngineOptions) -> int:
    """Run one step of `max_prefill_token_num` tokens and give the peak of what it allocated, in bytes. CUDA only."""
    device = decoder.cos_sin_MH.device
    dtype = decoder.embedding.weight_VD.dtype
    blocks = options.max_blocks_per_sequence
    longest = min(options.session_len, options.max_prefill_token_num)
    # One layer's cache of one session serves all layers and all rows: what it holds doesn't matter.
    (cache, *_) = kv_cache.allocate(
        decoder.spec, num_blocks=blocks, block_size=options.block_size, dtype=dtype, device=device, num_layers=1
    )
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        inputs = _largest_step(options, longest=longest, device=device)
        logits_RV = decoder.forward(inputs, [cache] * decoder.spec.num_layers)
        # What the sampler may hold at once beside the logits: their scaled copy, weights, sums and an order (float64, int64).
        scratch = torch.empty((logits_RV.numel() * 7,), dtype=torch.float32, device=device)
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.max_memory_allocated(device) - before
    del inputs, logits_RV, scratch, cache
    torch.cuda.empty_cache()
    return peak


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
