"""What a row's `GenerationConfig` asks for, in numpy and float64, in the documented order; and whether draws follow it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.config import GenerationConfig

Floats = NDArray[np.float64]


def edited(
    logits_V: Floats, config: GenerationConfig, *, history: Sequence[int], prompt_len: int, ends: Sequence[int] = ()
) -> Floats:
    """Logits after bans, bias and penalties; the next token is number `len(history) - prompt_len` of the output."""
    x_V = np.array(logits_V, dtype=np.float64)
    output = history[prompt_len:]
    x_V[list(config.bad_token_ids)] = -np.inf
    for token, bias in config.logit_bias:
        x_V[token] += bias
    for token in set(history):
        x_V[token] = x_V[token] / config.repetition_penalty if x_V[token] > 0 else x_V[token] * config.repetition_penalty
    for token in set(output):
        x_V[token] -= config.presence_penalty + config.frequency_penalty * output.count(token)
    if config.ignore_eos or len(output) < config.min_new_tokens:
        x_V[list(ends)] = -np.inf
    return x_V


def kept(logits_V: Floats, config: GenerationConfig) -> Floats:
    """Probabilities that the draw is made with: temperature, top-k, top-p, min-p."""
    if config.is_greedy:
        return np.eye(len(logits_V))[np.argmax(logits_V)]
    weights_V = np.exp((logits_V - logits_V.max()) / config.temperature)
    order = np.argsort(-weights_V, kind="stable")
    if config.top_k:
        weights_V[order[config.top_k :]] = 0
    before = np.concatenate([[0.0], np.cumsum(weights_V[order] / weights_V.sum())[:-1]])
    weights_V[order[before > config.top_p]] = 0
    weights_V[weights_V < config.min_p * weights_V.max()] = 0
    return weights_V / weights_V.sum()


def chi_square(drawn: Sequence[int] | NDArray[np.int64], probabilities_V: Floats) -> float:
    """Pearson's statistic over its limit (1 in 30,000): above 1 the draws don't follow. A token of no probability gives infinity.

    Tokens that are expected less than ten times are counted as one.
    """
    tokens = np.asarray(drawn)
    counts_V = np.bincount(tokens, minlength=len(probabilities_V))
    if counts_V[probabilities_V == 0].any():
        return np.inf
    expected_V = probabilities_V * len(tokens)
    often = expected_V >= 10
    rare = expected_V[~often].sum()
    observed, expected = counts_V[often].astype(float), expected_V[often]
    if rare >= 10:
        observed, expected = np.append(observed, counts_V[~often].sum()), np.append(expected, rare)
    freedom = len(expected) - 1
    if not freedom:
        return 0.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return statistic / (freedom * (1 - spread + 4 * spread**0.5) ** 3)  # Wilson and Hilferty, four deviations
