"""Random cases for the kernels and the slow, obvious mathematics they are compared with, in float64.

The tests of the references, of the Triton kernels (interpreted or on a GPU) and the kernel benchmark all draw from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import AttentionMetadata, KVScales
from kernels.reference import by_position, dequantise, quantise
from kernels.sampling import SamplingInputs

# Query heads, kv heads, head dim, block size: every value of each, not every combination (each is a compilation).
ATTENTION_SHAPES = [
    (9, 3, 64, 16),
    (32, 8, 64, 64),
    (4, 4, 96, 32),
    (16, 1, 96, 64),
    (32, 8, 128, 64),
    (32, 8, 128, 128),
    (40, 8, 128, 16),
    (4, 4, 256, 64),
    (16, 1, 256, 16),
]

ATTENTION_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖; a NaN anywhere gives NaN, which no bound admits."""
    out, expected = out.double().cpu(), expected.double().cpu()
    if not expected.numel():
        return 0.0
    norm = expected.norm().item()
    difference = (out - expected).norm().item()
    return difference / norm if norm else difference


def by_word(v: Tensor) -> Tensor:
    """Lay values [..., S, H] out as an int8 cache has them: [..., S / 4, H, 4], a copy."""
    return v.unflatten(-2, (-1, 4)).transpose(-1, -2).contiguous()


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Queries and a paged cache in which everything that may not be read is NaN."""

    q_TNH: Tensor
    k_cache_BKSH: Tensor
    v_cache_BKSH: Tensor
    metadata: AttentionMetadata
    scale: float
    sliding_window: int | None
    scales: KVScales | None = None


def attention_case(
    lens: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    sliding_window: int | None = None,
    seed: int = 0,
    host_lens: bool = True,
    int8: bool = False,
    sink: float | None = None,
) -> AttentionCase:
    """One row for each (query length, context length), the single-token rows first, blocks in random order.

    `sink`: every query sees its row's first position so many nats above all others, and values are small: what the others weigh is little each.
    """
    g = torch.Generator().manual_seed(seed)
    lens = sorted(lens, key=lambda pair: pair[0] != 1)
    num_single = sum(1 for query, _ in lens if query == 1)
    pages = [-(-context // block_size) for _, context in lens]
    width = max([*pages, 1]) + 2
    num_blocks = sum(pages) + 3
    order = torch.randperm(num_blocks - 1, generator=g) + 1  # block 0 stays NaN: nobody owns it
    # Past a row's last block stands the number of a block that is all NaN.
    tables_RP = torch.zeros(len(lens), width, dtype=torch.int32)
    k_cache = torch.full((num_blocks, kv_heads, block_size, head_dim), math.nan)
    v_cache = k_cache.clone()
    used = 0
    for row, (_, context) in enumerate(lens):
        tables_RP[row, : pages[row]] = order[used : used + pages[row]]
        used += pages[row]
        for start in range(0, context, block_size):
            block, count = int(tables_RP[row, start // block_size]), min(block_size, context - start)
            k_cache[block, :, :count] = torch.randn(kv_heads, count, head_dim, generator=g)
            v_cache[block, :, :count] = torch.randn(kv_heads, count, head_dim, generator=g)
    queries = [query for query, _ in lens]
    starts = torch.tensor([0, *queries]).cumsum(0)
    contexts = [context for _, context in lens]
    metadata = AttentionMetadata(
        tables_RP.to(device),
        starts.int().to(device),
        torch.tensor(contexts, dtype=torch.int32).to(device),
        num_single,
        max(queries),
        max(contexts),
        tuple(queries) if host_lens else None,
        tuple(contexts) if host_lens else None,
    )
    q = torch.randn(sum(queries), heads, head_dim, generator=g) * 2
    if sink is not None:
        direction_H = torch.nn.functional.normalize(torch.randn(head_dim, generator=g), dim=0)
        # The others' values are alike, so that they add up.
        k_cache, v_cache = k_cache / 10, (v_cache / 3 + 1) / 300
        first_R = tables_RP[:, 0].long()
        k_cache[first_R, :, 0], v_cache[first_R, :, 0] = direction_H * head_dim**0.5, torch.randn(head_dim, generator=g) / 300
        q = (direction_H * sink).expand_as(q)
    scales = None
    if int8:
        # What may not be read: any integers, times NaN.
        (k_cache, k_scales), (v_cache, v_scales) = (_in_integers(cache, g, spread=sink is None) for cache in (k_cache, v_cache))
        v_cache, scales = by_word(v_cache), KVScales(k_scales.to(device), v_scales.to(device))
    return AttentionCase(
        q_TNH=q.to(device, dtype),
        k_cache_BKSH=k_cache.to(device, torch.int8 if int8 else dtype),
        v_cache_BKSH=v_cache.to(device, torch.int8 if int8 else dtype),
        metadata=metadata,
        scale=head_dim**-0.5,
        sliding_window=sliding_window,
        scales=scales,
    )


def _in_integers(cache_BKSH: Tensor, g: torch.Generator, *, spread: bool) -> tuple[Tensor, Tensor]:
    """Quantise a cache; `spread`: scales differ by orders of magnitude from position to position."""
    unwritten_BKS = cache_BKSH.isnan().any(-1)
    factors_BKS = 10 ** (2 * torch.rand(unwritten_BKS.shape, generator=g) - 1) if spread else torch.ones(unwritten_BKS.shape)
    integers, scales = quantise(cache_BKSH * factors_BKS[..., None])
    anything = torch.randint(-128, 128, integers.shape, generator=g, dtype=torch.int8)
    return torch.where(unwritten_BKS[..., None], anything, integers), scales.masked_fill(unwritten_BKS, math.nan)


def naive_attention(case: AttentionCase) -> Tensor:
    """Position by position, in float64."""
    q_TNH, metadata = case.q_TNH.double(), case.metadata
    k_cache, v_cache = case.k_cache_BKSH.double(), case.v_cache_BKSH.double()
    if case.scales is not None:
        k_cache = dequantise(k_cache, case.scales.k_BKS, torch.float64)
        v_cache = dequantise(by_position(v_cache), case.scales.v_BKS, torch.float64)
    num_heads, (_, kv_heads, size, _) = q_TNH.shape[1], k_cache.shape
    out = torch.zeros_like(q_TNH)
    starts, contexts = metadata.query_start_R1.tolist(), metadata.context_lens_R.tolist()
    for row, context in enumerate(contexts):
        if not context:
            continue
        position = torch.arange(context, device=q_TNH.device)
        block = metadata.block_tables_RP[row].long()[position // size]
        k_CKH, v_CKH = k_cache[block, :, position % size], v_cache[block, :, position % size]
        k_CNH = k_CKH.repeat_interleave(num_heads // kv_heads, dim=1)
        v_CNH = v_CKH.repeat_interleave(num_heads // kv_heads, dim=1)
        length = starts[row + 1] - starts[row]
        scores_QNC = torch.einsum("qnh,cnh->qnc", q_TNH[starts[row] : starts[row + 1]], k_CNH) * case.scale
        query_Q11 = torch.arange(context - length, context, device=q_TNH.device)[:, None, None]
        visible = position <= query_Q11
        if case.sliding_window is not None:
            visible &= position > query_Q11 - case.sliding_window
        weights = scores_QNC.masked_fill(~visible, -math.inf).softmax(-1)
        out[starts[row] : starts[row + 1]] = torch.einsum("qnc,cnh->qnh", weights, v_CNH)
    return out


def sampling_inputs(
    rows: int,
    *,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    greedy: bool | list[bool] = False,
    seed: int = 1,
    device: str = "cpu",
) -> SamplingInputs:
    """Inputs for `rows` rows with seeds of their own; a number stands for every row."""

    def column(value: object, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype, device=device)

    g = torch.Generator().manual_seed(seed)
    return SamplingInputs(
        temperature_R=column(temperature, torch.float32),
        top_k_R=column(top_k, torch.int32),
        top_p_R=column(top_p, torch.float32),
        min_p_R=column(min_p, torch.float32),
        seed_R=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g).to(device),
        position_R=torch.randint(0, 5000, (rows,), generator=g).to(device),
        choice_R=torch.randint(0, 4, (rows,), generator=g, dtype=torch.int32).to(device),
        greedy_R=column(greedy, torch.bool),
    )


def naive_kept(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Float64 [V]: the probabilities that the filters keep, not normalised. By definition, with no sort."""
    x = logits_V.double().cpu() / temperature
    p = torch.softmax(x, -1)
    if top_k:
        greater = (x[None, :] > x[:, None]).sum(1)
        p = torch.where(greater < top_k, p, 0.0)
    p = p / p.sum()
    if top_p < 1:
        above = torch.where(p[None, :] > p[:, None], p[None, :], 0.0).sum(1)
        p = torch.where(above <= top_p, p, 0.0)
    return torch.where(p >= min_p * p.max(), p, 0.0)
