"""Automata on the device: the kernels against their references, and the references against plain walks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from automata_checks import DEAD, LETTERS, SLOTS, STATES, places_at_random, states_at_random, vocabulary_at_random

from kernels.automata import FREE, Places, States, Vocabulary, advance, allow_by_state, fill_masks

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def made() -> tuple[States, Vocabulary]:
    torch.manual_seed(3)
    states, vocabulary = states_at_random(5, CPU), vocabulary_at_random(140, CPU)
    fill_masks(states, vocabulary, torch.arange(2, STATES))
    return states, vocabulary


def places_of(states: list[int], rules: list[int], ends: list[int]) -> Places:
    """One slot."""
    return Places(torch.tensor([states + rules + ends], dtype=torch.int32))


def spelled(vocabulary: Vocabulary, token: int) -> list[int]:
    return vocabulary.bytes_B[vocabulary.starts_V1[token] : vocabulary.starts_V1[token + 1]].tolist()


def walk(states: States, state: int, data: list[int]) -> int:
    for byte in data:
        state = int(states.next_N256[state, byte])
    return state


def test_a_mask_holds_the_tokens_that_lead_on(made) -> None:
    states, vocabulary = made
    for state in range(2, STATES):
        bits = {t for t in range(160) if states.masks_NW[state, t >> 5] >> (t & 31) & 1}
        spell = {t: spelled(vocabulary, t) for t in range(140)}
        assert bits == {t for t, data in spell.items() if data and walk(states, state, data) != DEAD}
        assert len(bits) == int(states.counts_N[state])


def test_rows_without_an_automaton_are_not_touched_and_dead_ones_get_nothing(made) -> None:
    states, _ = made
    places = places_of([FREE, FREE], [0, 0, 0], [0])
    places = Places(torch.cat([places.table_SX, places_of([DEAD, DEAD], [0, 0, 0], [0]).table_SX]))
    logits = torch.randn(2, 140)
    before = logits.clone()
    allow_by_state(logits, torch.tensor([0, 1]), torch.tensor([4, 5]), places, states)
    assert torch.equal(logits[0], before[0])
    assert torch.isneginf(logits[1]).all()


@pytest.mark.parametrize(("final", "until", "first", "own"), [(1, 0, True, True), (0, 0, False, False), (1, 9, False, False)])
def test_ends_come_where_a_text_may_end(made, final, until, first, own) -> None:
    states, _ = made
    state = next(s for s in range(2, STATES) if int(states.final_N[s]) == final and int(states.counts_N[s]) > 3)
    banned = [t for t in range(140) if not states.masks_NW[state, t >> 5] >> (t & 31) & 1]
    places = places_of([state, FREE], [2, 1, until], banned[:2])
    logits = torch.zeros(1, 140)
    allow_by_state(logits, torch.tensor([0]), torch.tensor([4]), places, states)
    assert (not torch.isneginf(logits[0, banned[0]]), not torch.isneginf(logits[0, banned[1]])) == (first, own)
    assert torch.isneginf(logits[0, banned[2]])


def test_an_end_that_is_a_word_as_well_comes_as_a_word_only_where_it_is_the_callers(made) -> None:
    states, _ = made
    state = next(s for s in range(2, STATES) if not int(states.final_N[s]) and int(states.counts_N[s]) > 3)
    words = [t for t in range(140) if states.masks_NW[state, t >> 5] >> (t & 31) & 1]
    places = places_of([state, FREE], [2, 1, 0], words[:2])
    logits = torch.zeros(1, 140)
    allow_by_state(logits, torch.tensor([0]), torch.tensor([0]), places, states)
    assert torch.isneginf(logits[0, words[0]])
    assert not torch.isneginf(logits[0, words[1]])


def test_an_end_is_not_held_back_where_nothing_else_may_come(made) -> None:
    states, _ = made
    states.masks_NW[9], states.counts_N[9], states.final_N[9] = 0, 0, 1
    places = places_of([9, FREE], [1, 1, 50], [8])
    logits = torch.zeros(1, 140)
    allow_by_state(logits, torch.tensor([0]), torch.tensor([0]), places, states)
    assert torch.isfinite(logits[0]).nonzero().tolist() == [[8]]


def test_a_token_moves_its_row_on_and_says_where_a_text_is_complete(made) -> None:
    states, vocabulary = made
    states.next_N256[2, 0], states.final_N[7] = 7, 1  # nothing leads out of 7
    (token,) = [t for t in range(140) if spelled(vocabulary, t) == [0]][:1]
    places = places_at_random(140, CPU)
    places.states_S2[3] = torch.tensor([2, 5])
    stored = torch.tensor([[token], [1]], dtype=torch.int32)
    advance(stored, torch.tensor([3]), torch.tensor([6]), places, states, vocabulary)
    assert stored.tolist() == [[token], [2]]
    assert places.states_S2[3].tolist() == [2, 7]


def test_interpreted() -> None:
    """In a process of its own: TRITON_INTERPRET must be set before Triton is imported."""
    pytest.importorskip("triton")
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/automata_checks.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert process.stdout == "passed\n", process.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has replaced the compiler")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_for_devices_that_are_not_here(arch: int) -> None:
    pytest.importorskip("triton")
    from kernel_launches import compile_for, recorded

    from kernels.gpu import automata

    states, vocabulary, places = states_at_random(5, CPU), vocabulary_at_random(140, CPU), places_at_random(140, CPU)
    index = torch.zeros(SLOTS, dtype=torch.int64)
    with recorded() as launches:
        automata.fill_masks(states, vocabulary, torch.arange(2, LETTERS))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            automata.allow_by_state(torch.zeros(SLOTS, 140, dtype=dtype), index, index, places, states)
        automata.advance(torch.zeros(2, SLOTS, dtype=torch.int32), index, index, places, states, vocabulary)
    assert len(launches) == 5
    for launch in launches:
        compile_for(launch, arch)
