"""The launches of packed steps of a few sizes, made on CPU tensors: for tests that look at launches and compute nothing."""

from __future__ import annotations

import torch
from automata_checks import states_at_random, vocabulary_at_random
from kernel_cases import attention_case

from kernels.automata import Places
from kernels.gpu import attention, automata, rotary, sampling, state
from kernels.sampling import SamplingInputs

STEPS = [(1, 1, 7), (2, 1, 700), (5, 3, 64), (16, 2, 90), (17, 16, 33), (48, 1, 1100)]
"""Rows of one token, rows of many, the longest context."""


def launches_of_a_step(singles: int, longer: int, context: int) -> None:
    """Make the launches of a packed step, with its inputs where the state table puts them: one behind the other in one buffer."""
    case = attention_case([(1, context)] * singles + [(5, context + 5)] * longer, block_size=16)
    attention.paged_attention(case.q_TNH, case.k_cache_BKSH, case.v_cache_BKSH, case.metadata, case.scale, None)
    tokens, rows = len(case.q_TNH), singles + longer
    packed = torch.zeros(4 * tokens + 8 * rows, dtype=torch.int64)
    positions, slots, *rest = packed.split([tokens, tokens, 2 * tokens + rows, rows, rows, rows, rows, 3 * rows])
    heads = torch.zeros(tokens, 4, 64)
    cache = case.k_cache_BKSH[:, :1, :, :64]
    rotary.rotary_kv_write(heads, heads, heads, torch.zeros(9, 64), positions, slots, cache, cache, None, None, 1e-6)
    bits = torch.zeros(6, rows, dtype=torch.int32)
    temperature, top_p, min_p = bits[:3].view(torch.float32)
    inputs = SamplingInputs(
        temperature, bits[3], top_p, min_p, torch.zeros(rows, dtype=torch.int64), rest[1], bits[4], bits[5].bool()
    )
    logits = torch.zeros(rows, 5000)
    drawn = sampling.sample(logits, inputs, any_random=True, any_top_k=True, any_top_p=True, any_min_p=False)
    state.hold_back(logits, rest[2], rest[3], torch.zeros(9, dtype=torch.int32), torch.zeros(9, 8, dtype=torch.int32))
    stored = state.store_tokens(*drawn, rest[2], rest[4], torch.zeros(9, 2000, dtype=torch.int32))
    forms, vocabulary = states_at_random(157, torch.device("cpu")), vocabulary_at_random(5000, torch.device("cpu"))
    places = Places.allocate(9, 8, torch.device("cpu"))
    automata.fill_masks(forms, vocabulary, torch.arange(2, 3 + rows % 8))
    automata.allow_by_state(logits, rest[2], rest[3], places, forms)
    automata.advance(stored, rest[2], rest[3], places, forms, vocabulary)
