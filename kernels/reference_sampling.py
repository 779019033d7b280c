"""Sampling in plain PyTorch: the truth that the Triton kernel is held to, quick enough to serve from a CPU.

`kernels.sampling` says what is computed. Here each row's threshold comes from its few largest values where they decide it (a
partial selection), and from a full sort where they do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.reference import wide

if TYPE_CHECKING:
    from kernels.sampling import PenaltyInputs, SamplingInputs

_WORD = 0xFFFFFFFF
# Enough that a nucleus rarely needs the full sort; selecting this many costs little more than selecting one.
_CANDIDATES = 512


def _mul_high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a · b, for 32-bit a and b held in int64 (whose product would overflow its sign)."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: Tensor, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): four 32-bit words, as int64, for each 64-bit key and 4 x 32-bit counter."""
    c0, c1, c2, c3 = (c.long() & _WORD for c in counters)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _mul_high_low(0xD2511F53, c0)
        high1, low1 = _mul_high_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniform(seed_R: Tensor, position_R: Tensor, choice_R: Tensor) -> Tensor:
    """float32 in [0, 1), a multiple of 2⁻²⁴: exact in float32, so that every device draws the same number."""
    zero_R = torch.zeros_like(seed_R)
    return (philox(seed_R, (position_R, choice_R, zero_R, zero_R))[0] >> 8).float() * 2.0**-24


def sample(
    logits_RV: Tensor, inputs: SamplingInputs, any_random: bool, any_top_k: bool, any_top_p: bool, any_min_p: bool
) -> Tensor:
    """See `kernels.sampling.sample`."""
    tokens_R = logits_RV.argmax(dim=-1)
    if not any_random:
        return tokens_R
    random_R = (~inputs.greedy_R).nonzero().squeeze(1)
    if not len(random_R):
        return tokens_R
    x_RV = wide(logits_RV[random_R]) / inputs.temperature_R[random_R, None]
    x_RV.nan_to_num_(nan=0.0)
    u_R = uniform(inputs.seed_R[random_R], inputs.position_R[random_R], inputs.choice_R[random_R])
    off_R = torch.zeros_like(u_R)
    top_k_R = inputs.top_k_R[random_R].long() if any_top_k else off_R.long()
    top_p_R = inputs.top_p_R[random_R] if any_top_p else off_R + 1
    min_p_R = inputs.min_p_R[random_R] if any_min_p else off_R
    filtered_R = (top_k_R > 0) | (top_p_R < 1) | (min_p_R > 0)
    drawn_R = torch.empty_like(random_R)
    everything = (~filtered_R).nonzero().squeeze(1)
    if len(everything):
        drawn_R[everything] = _draw(x_RV[everything], u_R[everything])
    filtered = filtered_R.nonzero().squeeze(1)
    if len(filtered):
        rows = (t[filtered] for t in (x_RV, top_k_R, top_p_R, min_p_R, u_R))
        drawn_R[filtered] = _draw_filtered(*rows)
    tokens_R[random_R] = drawn_R
    return tokens_R


def _draw_filtered(x_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor, u_R: Tensor) -> Tensor:
    """Draw among the largest values where they hold all that the filters keep; sort the rest of the rows in full."""
    vocab = x_RV.shape[1]
    all_limited = bool((top_k_R > 0).all())
    width = min(vocab, max(0 if all_limited else _CANDIDATES, int(top_k_R.max()) + 1))
    values_RC, ids_RC = torch.topk(x_RV, width, dim=-1)
    mass_R = None if all_limited else torch.exp(x_RV - values_RC[:, :1]).sum(-1)
    threshold_R = _threshold(values_RC, mass_R, top_k_R, top_p_R, min_p_R)
    # Ties with the k-th value may go on past the candidates, and would count in the mass that top-p is a share of.
    kth_R = values_RC.gather(1, (top_k_R.clamp(1, width) - 1)[:, None]).squeeze(1)
    decided_R = torch.where(top_k_R > 0, kth_R, threshold_R)
    enough_R = (values_RC[:, -1] < decided_R) | (width == vocab)
    # In vocabulary order, as the draw is defined.
    ids_RC, order_RC = ids_RC.sort(dim=-1)
    kept_RC = values_RC.gather(1, order_RC)
    kept_RC = kept_RC.masked_fill(kept_RC < threshold_R[:, None], float("-inf"))
    tokens_R = ids_RC.gather(1, _draw(kept_RC, u_R)[:, None]).squeeze(1)
    rest = (~enough_R).nonzero().squeeze(1)
    if len(rest):
        rest_RV = x_RV[rest]
        sorted_RV = rest_RV.sort(dim=-1, descending=True).values
        mass_R = torch.exp(rest_RV - sorted_RV[:, :1]).sum(-1)
        threshold_R = _threshold(sorted_RV, mass_R, top_k_R[rest], top_p_R[rest], min_p_R[rest])
        tokens_R[rest] = _draw(rest_RV.masked_fill_(rest_RV < threshold_R[:, None], float("-inf")), u_R[rest])
    return tokens_R


def _threshold(sorted_RC: Tensor, mass_R: Tensor | None, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor) -> Tensor:
    """Find the smallest value that all filters keep, from a row's largest values in descending order.

    `mass_R`: sum of exp(x - max) over the whole row, needed by rows without top-k. The result is no greater than the last
    value given when those values may not decide it.
    """
    count = sorted_RC.shape[1]
    best_R1, last_R1 = sorted_RC[:, :1], sorted_RC[:, -1:]
    limited_R1 = (top_k_R > 0)[:, None]
    kth_R1 = sorted_RC.gather(1, (top_k_R.clamp(1, count) - 1)[:, None])
    floor_R1 = torch.where(limited_R1, kth_R1, -torch.inf)
    weight_RC = torch.exp((sorted_RC - best_R1).double()).masked_fill_(sorted_RC < floor_R1, 0.0)
    inclusive_RC = weight_RC.cumsum(-1)
    total_R1 = inclusive_RC[:, -1:]
    if mass_R is not None:
        total_R1 = torch.where(limited_R1, total_R1, mass_R[:, None].double())
    above_RC = inclusive_RC - weight_RC
    bound_R1 = top_p_R[:, None].double() * total_R1
    # Positions of a run of equal values past its first may exceed the bound: the run stands or falls by its first.
    num_kept_R1 = ((above_RC <= bound_R1) & (weight_RC > 0)).sum(-1, keepdim=True).clamp_(min=1)
    nucleus_R1 = sorted_RC.gather(1, num_kept_R1 - 1)
    floor_R1 = torch.where(top_p_R[:, None] < 1, nucleus_R1, torch.where(limited_R1, floor_R1, last_R1))
    return torch.maximum(floor_R1, best_R1 + min_p_R[:, None].log()).squeeze(1)


def _draw(x_RV: Tensor, u_R: Tensor) -> Tensor:
    """Index of the first entry whose cumulative exp(x) exceeds u · total."""
    cumulative_RV = torch.exp(x_RV - x_RV.amax(-1, keepdim=True)).cumsum(-1, dtype=torch.float64)
    target_R1 = u_R[:, None].double() * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, target_R1, right=True).clamp_(max=x_RV.shape[1] - 1).squeeze(1)


def _masked_tokens(ids_QL: Tensor, mask_QL: Tensor) -> Tensor:
    """`ids_QL` with the entries outside the mask replaced by one inside it (by the row's first id where there is none).

    Those entries then store what that one stores: a scatter whose duplicates disagree would keep either.
    """
    anchor_Q1 = ids_QL.gather(1, mask_QL.int().argmax(1, keepdim=True))
    return torch.where(mask_QL, ids_QL, anchor_Q1)


def apply_penalties(logits_RV: Tensor, inputs: PenaltyInputs) -> None:
    """See `kernels.sampling.apply_penalties`."""
    ids_QL = inputs.token_ids_QL.long()
    rows_Q = inputs.rows_Q if inputs.rows_Q is not None else torch.arange(len(ids_QL), device=ids_QL.device)
    rows_QL = rows_Q[:, None].expand_as(ids_QL)
    position_L = torch.arange(ids_QL.shape[1], device=ids_QL.device)
    known_QL = position_L < inputs.total_lens_Q[:, None]
    output_QL = known_QL & (position_L >= inputs.prompt_lens_Q[:, None])

    tokens_QL = _masked_tokens(ids_QL, known_QL)
    x_QL = logits_RV[rows_QL, tokens_QL]
    factor_Q1 = inputs.repetition_Q[:, None]
    logits_RV[rows_QL, tokens_QL] = torch.where(x_QL > 0, x_QL / factor_Q1, x_QL * factor_Q1)

    tokens_QL = _masked_tokens(ids_QL, output_QL)
    frequency_QL = torch.where(output_QL, -inputs.frequency_Q[:, None], 0.0)
    logits_RV.index_put_((rows_QL, tokens_QL), frequency_QL, accumulate=True)
    presence_Q1 = torch.where(output_QL.any(1), inputs.presence_Q, 0.0)[:, None]
    logits_RV[rows_QL, tokens_QL] = logits_RV[rows_QL, tokens_QL] - presence_Q1


def allow_only(logits_RV: Tensor, rows_Q: Tensor, words_QW: Tensor) -> None:
    """See `kernels.sampling.allow_only`."""
    # Eight bits at a time: a table of 32 columns for each word would be as large as the logits in int32.
    bits_8 = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=words_QW.device)
    allowed_QN = (words_QW.contiguous().view(torch.uint8)[:, :, None] & bits_8).ne(0).flatten(1)
    vocab, known = logits_RV.shape[1], min(logits_RV.shape[1], allowed_QN.shape[1])
    banned_QV = torch.ones((len(rows_Q), vocab), dtype=torch.bool, device=logits_RV.device)
    torch.logical_not(allowed_QN[:, :known], out=banned_QV[:, :known])
    logits_RV.index_copy_(0, rows_Q, logits_RV.index_select(0, rows_Q).masked_fill_(banned_QV, float("-inf")))
