"""The kernels of `kernels.gpu.state` held to their references: `python tests/support/state_checks.py [cpu|cuda]`.

On a CPU they are interpreted: TRITON_INTERPRET=1 must be set before the process starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]

import torch

from kernels import reference_state
from kernels.gpu import state
from kernels.state import SingleRows

SLOTS, POSITIONS, SIZE = 9, 800, 4


def check_lay_out(device: torch.device) -> None:
    pages = POSITIONS // SIZE
    tokens_SL = torch.randint(0, 500, (SLOTS, POSITIONS + 1), dtype=torch.int32, device=device)
    tables_SP = torch.randint(0, 99, (SLOTS, pages), dtype=torch.int32, device=device)
    #                     slot, position, output index, new block
    rows = [(3, 0, 5, -1), (0, POSITIONS - 1, 9, -1), (8, 7, 0, -1), (5, 16, 3, 77), (1, 0, 0, 0), (2, 515, 1, -1)]
    rows_R4 = torch.tensor(rows + [(-1, -1, -1, -1)] * 3, dtype=torch.int32, device=device)
    outcomes = []
    for lay_out in (state.lay_out_singles, reference_state.lay_out_singles):
        out, tables = SingleRows.allocate(len(rows_R4), pages, device), tables_SP.clone()
        for tensor in out:
            tensor.fill_(-7)
        lay_out(rows_R4, tokens_SL, tables, SIZE, out)
        outcomes.append((out, tables))
    (ours, our_tables), (theirs, their_tables) = outcomes
    assert torch.equal(our_tables, their_tables)
    assert int(our_tables[5, 4]) == 77
    for name, one, other in zip(SingleRows._fields, ours, theirs, strict=True):
        if name == "block_tables_RP":
            for row, (_, position, *_) in enumerate(rows):
                assert torch.equal(one[row, : position // SIZE + 1], other[row, : position // SIZE + 1]), row
        else:
            assert torch.equal(one, other), name
    assert ours.cache_slots_R[len(rows) :].tolist() == [-1] * 3
    assert ours.context_lens_R[len(rows) :].tolist() == [0] * 3


def check_hold_back(device: torch.device, dtype: torch.dtype) -> None:
    logits_QV = torch.randn((6, 101), device=device).to(dtype)[:, :100]
    slots_Q = torch.tensor([4, 0, 2, 8, 1, 3], device=device)
    indices_Q = torch.tensor([0, 3, 4, 5, 9, 0], device=device)
    until_S = torch.tensor([4, 2**31 - 1, 4, 0, 0, 0, 0, 0, 6], dtype=torch.int32, device=device)
    tokens_SE = torch.randint(-1, 100, (SLOTS, 5), dtype=torch.int32, device=device)
    ours, theirs = logits_QV.clone(), logits_QV.clone()
    state.hold_back(ours, slots_Q, indices_Q, until_S, tokens_SE)
    reference_state.hold_back(theirs, slots_Q, indices_Q, until_S, tokens_SE)
    assert torch.equal(ours, theirs)
    held = (ours == float("-inf")).any(dim=1).tolist()
    assert held[0] is held[2] is held[5] is False


def check_store(device: torch.device, dtype: torch.dtype) -> None:
    for count in (1, 7, 300):
        tokens_Q = torch.randint(0, 500, (count,), device=device)
        best_Q = torch.randn(count, device=device).to(dtype)
        for number, value in enumerate((float("nan"), float("inf"), float("-inf"))):
            best_Q[number % count] = value
        slots_Q = torch.randperm(count, device=device)
        lengths_Q = torch.randint(0, 40, (count,), device=device)
        tables = [torch.full((count, 41), -3, dtype=torch.int32, device=device) for _ in range(2)]
        ours = state.store_tokens(tokens_Q, best_Q, slots_Q, lengths_Q, tables[0])
        theirs = reference_state.store_tokens(tokens_Q, best_Q, slots_Q, lengths_Q, tables[1])
        assert torch.equal(ours, theirs)
        assert torch.equal(*tables)
        assert int(ours[1].sum()) == max(0, count - 3)


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    torch.manual_seed(0)
    check_lay_out(device)
    for dtype in (torch.float32, torch.float16) + ((torch.bfloat16,) if device.type == "cuda" else ()):
        check_hold_back(device, dtype)
        check_store(device, dtype)
    print("passed")


if __name__ == "__main__":
    main()
