"""The kernels of `kernels.gpu.automata` held to their references: `python tests/support/automata_checks.py [cpu|cuda]`.

On a CPU they are interpreted: TRITON_INTERPRET=1 must be set before the process starts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]

import torch
from torch import Tensor

from kernels import reference_automata
from kernels.automata import DEAD, FREE, Places, States, Vocabulary

STATES, SLOTS, LETTERS = 23, 9, 5


def states_at_random(vocab_words: int, device: torch.device) -> States:
    """States that a third of a few letters leads on from; every other one is final."""
    next_N256 = torch.full((STATES, 256), DEAD, dtype=torch.int32)
    letters = torch.randint(2, STATES, (STATES, LETTERS), dtype=torch.int32)
    next_N256[2:, :LETTERS] = torch.where(torch.rand(STATES, LETTERS) < 0.6, letters, DEAD)[2:]
    next_N256[7] = DEAD
    final_N = (torch.arange(STATES) % 2).to(torch.int32)
    goes_on_N = (next_N256 != DEAD).any(1).to(torch.int32)
    empty = torch.zeros((STATES, vocab_words), dtype=torch.int32)
    parts = (next_N256, final_N, goes_on_N, empty, torch.zeros(STATES, dtype=torch.int32))
    return States(*(part.to(device) for part in parts))


def vocabulary_at_random(vocab: int, device: torch.device) -> Vocabulary:
    lengths = torch.randint(0, 5, (vocab,))
    lengths[vocab // 2] = 17
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    return Vocabulary(starts.to(device), torch.randint(0, LETTERS, (int(starts[-1]),), dtype=torch.int32).to(device))


def places_at_random(vocab: int, device: torch.device) -> Places:
    states_S2 = torch.randint(FREE, STATES, (SLOTS, 2), dtype=torch.int32)
    states_S2[0], states_S2[1] = FREE, DEAD
    ends_SE = torch.stack([torch.randperm(vocab + 60)[:6] for _ in range(SLOTS)]).to(torch.int32)
    rules_S3 = torch.stack([torch.arange(SLOTS) % 7, torch.arange(SLOTS) % 7 // 2, torch.randint(0, 4, (SLOTS,))], dim=1).to(
        torch.int32
    )
    return Places(torch.cat([states_S2, rules_S3, ends_SE], dim=1).to(device))


def copies(parts: Any) -> Any:
    return type(parts)(*(part.clone() for part in parts))


def check_all(ours: Any, device: torch.device, vocab: int, dtype: torch.dtype) -> None:
    words = vocab // 32 + 2
    states, vocabulary, places = (
        states_at_random(words, device),
        vocabulary_at_random(vocab, device),
        places_at_random(vocab, device),
    )
    theirs = copies(states)
    rows_n = torch.randperm(STATES - 2, device=device)[: STATES - 4] + 2
    for _ in range(2):  # the second time over what the first one wrote
        ours.fill_masks(states, vocabulary, rows_n)
        reference_automata.fill_masks(theirs, vocabulary, rows_n)
        for one, other in zip(states, theirs, strict=True):
            assert torch.equal(one, other)
    assert 0 < int(states.counts_N.sum()) < STATES * vocab
    slots_Q = torch.randperm(SLOTS, device=device)
    indices_Q = torch.randint(0, 6, (SLOTS,), device=device)
    logits = torch.randn((SLOTS, vocab + 5), device=device).to(dtype)
    mine, other = logits.clone()[:, :vocab], logits.clone()[:, :vocab]
    ours.allow_by_state(mine, slots_Q, indices_Q, places, states)
    reference_automata.allow_by_state(other, slots_Q, indices_Q, places, theirs)
    assert torch.equal(mine, other)
    assert torch.isneginf(mine).any()
    check_advance(ours, places, states, vocabulary, slots_Q, indices_Q)


def check_advance(
    ours: Any, places: Places, states: States, vocabulary: Vocabulary, slots_Q: Tensor, indices_Q: Tensor
) -> None:
    vocab = len(vocabulary.starts_V1) - 1
    for _ in range(8):
        stored_2Q = torch.stack([torch.randint(0, vocab, (SLOTS,)), torch.rand(SLOTS).gt(0.2)]).to(slots_Q.device, torch.int32)
        mine, other = stored_2Q.clone(), stored_2Q.clone()
        place, other_place = copies(places), copies(places)
        ours.advance(mine, slots_Q, indices_Q, place, states, vocabulary)
        reference_automata.advance(other, slots_Q, indices_Q, other_place, states, vocabulary)
        assert torch.equal(mine, other)
        assert torch.equal(place.states_S2, other_place.states_S2)
        # The same again finds the same: a step may run a second time.
        again = stored_2Q.clone()
        ours.advance(again, slots_Q, indices_Q, place, states, vocabulary)
        assert torch.equal(again, mine)
        assert torch.equal(place.states_S2, other_place.states_S2)


def check_kernels(device: torch.device) -> None:
    """Raise AssertionError where a kernel and its reference differ."""
    from kernels.gpu import automata

    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float16) + ((torch.bfloat16,) if device.type == "cuda" else ())
    for dtype in dtypes:
        for vocab in (100, 2600) if device.type == "cpu" else (31, 100, 1200, 49152, 151936):
            check_all(automata, device, vocab, dtype)


def main() -> None:
    check_kernels(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
    print("passed")


if __name__ == "__main__":
    main()
