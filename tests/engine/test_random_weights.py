"""A model without weight files: the same model for every engine, and for the ranks of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plan_driver import generate, options_for, request
from tiny_models import save_tiny_model

from engine.executor import LocalExecutor
from engine.models.decoder import Decoder
from engine.models.loading import load_decoder
from engine.parallel import SingleRank
from engine.random_weights import MARK
from headrace.errors import ModelLoadError


class Rank(SingleRank):
    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    path = save_tiny_model(tmp_path / "model", "qwen2")
    (path / "model.safetensors").unlink()
    (path / MARK).write_text('{"seed": 3, "std": 0.05}')
    return path


def load(path: Path, group: SingleRank) -> Decoder:
    return load_decoder(path, dtype=torch.float64, device=torch.device("cpu"), group=group, max_positions=64)


def test_it_answers_and_alike_each_time(drawn: Path) -> None:
    first, second = (
        generate(LocalExecutor(options_for(drawn)), [request([5, 6, 7])], steps=6, block_size=64)[0] for _ in range(2)
    )
    assert first == second
    (drawn / MARK).write_text('{"seed": 4, "std": 0.05}')
    assert generate(LocalExecutor(options_for(drawn)), [request([5, 6, 7])], steps=6, block_size=64)[0] != first


def test_ranks_hold_parts_of_the_same_model(drawn: Path) -> None:
    whole, ranks = load(drawn, SingleRank()), [load(drawn, Rank(rank)) for rank in range(2)]
    for layer, *parts in zip(whole.layers, *(rank.layers for rank in ranks), strict=True):
        assert torch.equal(torch.cat([part.output.weight.plain for part in parts], dim=1), layer.output.weight.plain)
        gates = [part.gate_up.weight.plain.chunk(2)[0] for part in parts]
        assert torch.equal(torch.cat(gates), layer.gate_up.weight.plain.chunk(2)[0])
        assert layer.qkv.bias_O is not None
        assert not layer.qkv.bias_O.any()
        assert (layer.input_norm_D == 1).all()
    first, second = (layer.down.weight.plain for layer in whole.layers)
    assert not torch.equal(first, second)
    assert float(first.std()) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("text", ["", "{}", '{"seed": 0}', '{"seed": "x", "std": 1}'])
def test_a_broken_mark_is_named(drawn: Path, text: str) -> None:
    (drawn / MARK).write_text(text)
    with pytest.raises(ModelLoadError, match=MARK):
        load(drawn, SingleRank())
