"""From logits to tokens: penalties, bans, temperature, top-k, top-p, min-p, one keyed random number a row.

Knows nothing of requests, text or why a row asks for what it asks.

The draw is the same mathematics on every device. A row's uniform number is the first word of Philox4x32-10 under key = seed and
counter = (position, choice, 0, 0), so a token depends on its row's own numbers and not on what else the step computes. The
filters after temperature are all one threshold, by value, so equal logits are kept or dropped together:

- top-k keeps the values not below the k-th largest;
- top-p keeps, of those, a value when the probability of all greater ones (among those top-k kept) is at most p;
- min-p keeps, of those, a value whose probability is at least min-p times the largest.

The token is the first, in vocabulary order, whose cumulative kept probability exceeds uniform · total.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference_sampling


class SamplingInputs(NamedTuple):
    """What each of R sampling rows asks for, as tensors on the logits' device."""

    temperature_R: Tensor
    """float32, > 0 where the row is not greedy."""
    top_k_R: Tensor
    """int32; 0 = off."""
    top_p_R: Tensor
    """float32 in (0, 1]; 1 = off."""
    min_p_R: Tensor
    """float32 in [0, 1]; 0 = off."""
    seed_R: Tensor
    """int64, read as 64 bits."""
    position_R: Tensor
    """int64: how many tokens the row has generated; its low 32 bits key the draw."""
    choice_R: Tensor
    """int32: which of a prompt's choices the row is."""
    greedy_R: Tensor
    """bool: take the largest logit and ignore the rest."""


class PenaltyInputs(NamedTuple):
    """History and penalties of the Q rows that ask for any, as tensors on the logits' device. L is the padded history."""

    token_ids_QL: Tensor
    """int32 or int64: prompt, then output; what stands past a row's total length is ignored (it must be a valid id or any
    number: it is never used as an index)."""
    prompt_lens_Q: Tensor
    total_lens_Q: Tensor
    """Prompt and output; at least 1."""
    repetition_Q: Tensor
    """float32; 1 = off. A token of the prompt or the output: logit / r where positive, logit · r where negative (CTRL)."""
    presence_Q: Tensor
    """float32; 0 = off. Subtracted once from every token of the output."""
    frequency_Q: Tensor
    """float32; 0 = off. Subtracted from a token of the output for each time it stands there."""
    rows_Q: Tensor | None = None
    """int64: the logits row of each entry, none twice; None = entry i is row i."""


class Drawn(NamedTuple):
    """What R rows drew."""

    tokens_R: Tensor
    """int64."""
    best_R: Tensor
    """float32: the row's largest logit, NaN if it holds one. Where this isn't finite (a NaN, an overflow, nothing but minus infinity)
    nothing could be drawn: the token is a valid id that means nothing."""


class TokenLogprobs(NamedTuple):
    """Log probabilities under the logits as given."""

    logprob_R: Tensor
    """float32: of the chosen token."""
    top_ids_Rk: Tensor
    """int64: the k likeliest tokens, best first."""
    top_logprobs_Rk: Tensor
    """float32."""


def sample(
    logits_RV: Tensor,
    inputs: SamplingInputs,
    *,
    any_random: bool = True,
    any_top_k: bool = True,
    any_top_p: bool = True,
    any_min_p: bool = True,
) -> Drawn:
    """Choose one token a row. `logits_RV` has a contiguous last dimension and is not changed.

    Logits may be float32, bfloat16 or float16: each is read as the float32 that it stands for, so the tokens are those of
    a float32 copy, which costs more than the reading.
    The flags say whether any row of the step is not greedy, or uses a filter: what is false is not computed (and a row
    that used it all the same would be computed without it). Ties for the largest logit go to the lowest id.
    """
    flags = (any_random, any_top_k, any_top_p, any_min_p)
    if logits_RV.is_cuda:
        from kernels.gpu import sampling as gpu

        return Drawn(*gpu.sample(logits_RV, inputs, *flags))
    return Drawn(reference_sampling.sample(logits_RV, inputs, *flags), logits_RV.amax(dim=-1).float())


def apply_penalties(logits_RV: Tensor, inputs: PenaltyInputs) -> None:
    """Apply repetition, then frequency, then presence penalties to `logits_RV`, in place.

    Float32 only (TypeError otherwise): a narrower type would round the sums one after the other.
    Costs a gather and a scatter of the rows' histories, not a pass over the vocabulary; waits for no device.
    """
    _require_float32(logits_RV, "penalties")
    reference_sampling.apply_penalties(logits_RV, inputs)


def add_bias(logits_RV: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
    """logits[rows[i], tokens[i]] += values[i], in place. Pairs must not repeat (the order of repeated sums is not fixed).

    Float32 only, as penalties.
    """
    _require_float32(logits_RV, "bias")
    logits_RV.index_put_((rows, tokens), values.to(logits_RV.dtype), accumulate=True)


def _require_float32(logits_RV: Tensor, edit: str) -> None:
    if logits_RV.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{edit} needs float32 logits, not {logits_RV.dtype}: make a float32 copy first")


def ban(logits_RV: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """logits[rows[i], tokens[i]] = -inf, in place. Any float type."""
    # A tensor on the device: assigning a Python number copies it there, and that copy waits for all the device's work.
    logits_RV.index_put_((rows, tokens), logits_RV.new_full((), float("-inf")))


def allow_only(logits_RV: Tensor, rows_Q: Tensor, words_QW: Tensor) -> None:
    """logits[rows[q], t] = -inf, in place, wherever bit t % 32 of words[q, t // 32] (int32) is 0 or there is no such word.

    `logits_RV` of any float type with a contiguous last dimension; `rows_Q` int64, none twice. The other rows are not touched.
    """
    if logits_RV.is_cuda:
        from kernels.gpu import token_masks as gpu

        gpu.allow_only(logits_RV, rows_Q, words_QW)
    else:
        reference_sampling.allow_only(logits_RV, rows_Q, words_QW)


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor, k: int) -> TokenLogprobs:
    """Log probabilities of the chosen tokens and of the k likeliest, under softmax(logits) as given, in float32. k may be 0."""
    logits_RV = logits_RV.float()
    total_R1 = torch.logsumexp(logits_RV, dim=-1, keepdim=True)
    chosen_R1 = logits_RV.gather(1, tokens_R[:, None].long())
    top_Rk, ids_Rk = torch.topk(logits_RV, k, dim=-1)
    return TokenLogprobs((chosen_R1 - total_R1).squeeze(1), ids_Rk, top_Rk - total_R1)
