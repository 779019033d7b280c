"""Sums over peer memory, two ranks in lock step in one process: the mathematics of one rank, regions in turn, ways by a table.

Real ranks on real GPUs: tests/gpu/test_tensor_parallel.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from torch import Tensor

from engine import kv_cache, measured_table, peer_sums
from engine.models.decoder import Decoder, LayerCache, StepInputs
from engine.models.loading import load_decoder
from engine.models.residual import ManyRows, RankRows, SharedRows
from engine.parallel import SingleRank
from engine.peer_memory import PeerMemory
from engine.peer_sums import PeerSums, sum_rows
from engine.row_shares import RowShares
from kernels.attention import AttentionMetadata

SIZE = 2
REGION = 1 << 14


class Rank(SingleRank):
    """One rank of a group whose members take turns in one process."""

    size = SIZE

    def __init__(self, rank: int) -> None:
        self.rank = rank


def memories() -> list[PeerMemory]:
    ranks = tuple(torch.full((4 * REGION,), 255, dtype=torch.uint8) for _ in range(SIZE))
    starts, ends = (REGION, 2 * REGION, 3 * REGION), (2 * REGION, 3 * REGION, 4 * REGION)
    return [PeerMemory(rank, ranks, None, starts, ends, None) for rank in range(SIZE)]


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), request.param, attention_bias=True)


def load(path: Path, group: SingleRank) -> Decoder:
    # Not float32: on a CPU its weights are repacked.
    return load_decoder(path, dtype=torch.float64, device=torch.device("cpu"), group=group, max_positions=64)


def sums(*ways: tuple[int, str]) -> list[PeerSums]:
    made = [PeerSums(Rank(rank), one, dim=64, dtype=torch.float64) for rank, one in enumerate(memories())]
    for one in made:
        one._ways = ways
    return made


@pytest.mark.parametrize("few", [False, True])
def test_ranks_give_what_one_gives(model: Path, few: bool) -> None:
    whole = load(model, SingleRank())
    decoders = [load(model, Rank(rank)) for rank in range(SIZE)]
    x = torch.randn(3, whole.spec.hidden_size, dtype=torch.float64)
    alone = ManyRows(x.clone(), whole.spec.norm_eps)
    streams = [RankRows(x.clone(), whole.spec.norm_eps, one, few=few) for one in sums((8, "one_shot"))]
    for index, layer in enumerate(whole.layers):
        mine = [decoder.layers[index] for decoder in decoders]
        heads = [stream.read(part.qkv, part.input_norm_D) for stream, part in zip(streams, mine, strict=True)]
        out = alone.read(layer.qkv, layer.input_norm_D)[:, : layer.output.weight.plain.shape[1]]
        torch.testing.assert_close(torch.cat([one[:, : out.shape[1] // SIZE] for one in heads], dim=1), out)
        if index == whole.spec.num_layers - 1:
            rows = torch.tensor([2, 0])
            out = alone.keep(rows, out)
            heads = [stream.keep(rows, one) for stream, one in zip(streams, heads, strict=True)]
        alone.add(layer.output, out)
        for stream, part, one in zip(streams, mine, heads, strict=True):
            stream.add(part.output, one[:, : out.shape[1] // SIZE])
        gated = [stream.read(part.gate_up, part.mlp_norm_D, gated=True) for stream, part in zip(streams, mine, strict=True)]
        alone.add(layer.down, alone.read(layer.gate_up, layer.mlp_norm_D, gated=True))
        for stream, part, one in zip(streams, mine, gated, strict=True):
            stream.add(part.down, one)
    ends = [stream.normed(whole.norm_D) for stream in streams]
    assert torch.equal(*ends)  # the same bits on every rank
    torch.testing.assert_close(ends[0], alone.normed(whole.norm_D))


class Together(Rank):
    """A rank in a thread of its own; all threads come to each call before any goes on."""

    def __init__(self, rank: int, barrier: threading.Barrier, table: list[Tensor]) -> None:
        super().__init__(rank)
        self._barrier, self._table = barrier, table
        self.told: list[int] = []

    def meet(self) -> None:
        self._barrier.wait(20)

    def all_reduce(self, x: Tensor) -> Tensor:
        self._table[self.rank] = x
        self.meet()
        total = torch.stack(self._table).sum(0)
        self.meet()
        return total

    def all_gather_words(self, words_RC: Tensor) -> Tensor:
        assert self.sums is not None
        self.told.append(words_RC.shape[1])
        return self.sums.gather_words(words_RC)

    def all_gather_columns(self, x_RC: Tensor) -> Tensor:
        self._table[self.rank] = x_RC
        self.meet()
        whole = torch.cat(self._table, dim=1)
        self.meet()
        return whole


class Meeting(PeerSums):
    """On a CPU an op waits for nobody, so the threads wait around it, as the kernels do."""

    def add_rms_norm(self, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._met(partial(super().add_rms_norm, residual_TD, weight_D, eps))

    def share_add_rms_norm(self, own_SD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return self._met(partial(super().share_add_rms_norm, own_SD, residual_TD, weight_D, eps))

    def gather_columns(self, rows: int, columns: int, mine: slice | None = None) -> Tensor:
        return self._met(partial(super().gather_columns, rows, columns, mine))

    def gather_words(self, words_RC: Tensor) -> Tensor:
        self._memory.part(2, *words_RC.shape, torch.int32).copy_(words_RC)
        return self._met(partial(super().gather_words, words_RC))

    def _met(self, run: Any) -> Any:
        self._group.meet()  # type: ignore[attr-defined]
        done = run()
        self._group.meet()  # type: ignore[attr-defined]
        return done


def prompt(decoder: Decoder, count: int, sampled: Sequence[int]) -> tuple[StepInputs, tuple[LayerCache, ...]]:
    positions = torch.arange(count)
    attention = AttentionMetadata(
        block_tables_RP=torch.arange(8, dtype=torch.int32)[None],
        query_start_R1=torch.tensor([0, count], dtype=torch.int32),
        context_lens_R=torch.tensor([count], dtype=torch.int32),
        num_single=0, max_query_len=count, max_context_len=count, query_lens=(count,), host_context_lens=(count,),
    )  # fmt: skip
    ids = (positions * 7 + 5).int()
    inputs = StepInputs(ids, positions, positions, attention, torch.tensor(sampled, dtype=torch.int64))
    device = torch.device("cpu")
    return inputs, kv_cache.allocate(decoder.spec, num_blocks=8, block_size=16, dtype=torch.float64, device=device)


# 17 rows: the second rank's share is smaller. Whole steps, with the rows that reach the head left behind the last attention.
@pytest.mark.parametrize(("rows", "sampled"), [(2, [1]), (17, [16, 0, 9]), (17, list(range(17))), (17, [])])
def test_steps_by_shares_and_in_turn(model: Path, monkeypatch: pytest.MonkeyPatch, rows: int, sampled: list[int]) -> None:
    monkeypatch.setattr(peer_sums, "SHARES_FROM", 5)
    whole = load(model, SingleRank())
    expected = whole.forward(*prompt(whole, rows, sampled))
    barrier, table = threading.Barrier(SIZE), [torch.empty(0)] * SIZE
    groups = [Together(rank, barrier, table) for rank in range(SIZE)]
    for group, memory in zip(groups, memories(), strict=True):
        group.sums = Meeting(group, memory, dim=64, dtype=torch.float64)  # type: ignore[arg-type]
        group.sums._ways = ((64, "one_shot"),)

    def steps(group: Together) -> list[Tensor]:
        decoder = load(model, group)
        assert isinstance(decoder.residual(torch.zeros(rows, 64)), SharedRows if rows >= 5 else RankRows)
        # Again and again: what a step leaves in a region must not come out in the next one.
        logits = [
            decoder.forward(*prompt(decoder, count, sampled if count == rows else [0])) for count in (rows, 1, rows, 3, rows)
        ]
        return [logits[0], logits[2], logits[4]]

    with torch.inference_mode(), ThreadPoolExecutor(SIZE) as pool:
        for answers in pool.map(steps, groups):
            for logits in answers:
                torch.testing.assert_close(logits, expected)


def test_the_head_is_gathered_where_it_fits(model: Path) -> None:
    whole = load(model, SingleRank())
    decoders = [load(model, Rank(rank)) for rank in range(SIZE)]
    x = torch.randn(3, whole.spec.hidden_size, dtype=torch.float64)
    made = sums()
    columns = decoders[0].head.weight.plain.shape[0]
    for one, decoder in zip(made, decoders, strict=True):
        part = one.columns(3, columns)
        assert part is not None
        decoder.head.weight.into(part, x)
    torch.testing.assert_close(made[1].gather_columns(3, columns)[:, : whole.spec.vocab_size], whole.head(x))
    share = made[1].gather_columns(3, columns, slice(2, 3))
    torch.testing.assert_close(share[:, : whole.spec.vocab_size], whole.head(x)[2:])
    assert made[0].columns(REGION, columns) is None


def test_ranks_tell_each_other_what_they_drew() -> None:
    """Odd counts, and all that a largest logit can be; always by one width and from addresses that divide by 16, so that one kernel serves."""
    barrier, table = threading.Barrier(SIZE), [torch.empty(0)] * SIZE
    groups = [Together(rank, barrier, table) for rank in range(SIZE)]
    for group, memory in zip(groups, memories(), strict=True):
        group.sums = Meeting(group, memory, dim=64, dtype=torch.float64)  # type: ignore[arg-type]  # a group of threads

    def rank(group: Together) -> None:
        shares = RowShares(group, device=torch.device("cpu"))
        for rows in (128, 129, 160, 161, 128):
            tokens_Q = (torch.arange(rows) * 7919 + rows) % 128_256
            best_Q = torch.linspace(-30, 30, rows)
            best_Q[[0, 70, rows - 1]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
            mine = shares.mine(rows)
            assert mine is not None
            told_Q, told_best_Q = shares.tell(tokens_Q[mine], best_Q[mine], rows=rows)
            assert torch.equal(told_Q, tokens_Q)
            torch.testing.assert_close(told_best_Q, best_Q, equal_nan=True, rtol=0, atol=0)
            assert told_Q.data_ptr() % 16 == told_best_Q.data_ptr() % 16 == 0

    with ThreadPoolExecutor(SIZE) as pool:
        list(pool.map(rank, groups))
    assert {width % 16 for group in groups for width in group.told} == {0}


def test_regions_are_used_in_turn_and_end_where_they_began() -> None:
    (first, second) = sums((8, "one_shot"))
    residual, weight = torch.zeros(1, 64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    places = []
    for _ in range(4):
        part: Tensor = first.part(1)
        places.append(part.data_ptr())
        part.fill_(1.0)
        second.part(1).fill_(2.0)
        first.add_rms_norm(residual, weight, 1e-5)
        _, total = second.add_rms_norm(residual.clone(), weight, 1e-5)
        assert total.tolist() == [[3.0] * 64]
    assert places[0] == places[2] != places[1] == places[3]


def test_a_size_goes_the_way_of_the_next_one_that_was_timed() -> None:
    (one, _) = sums((4, "one_shot"), (16, "two_shot"))
    assert [one.way(rows) for rows in (1, 4, 5, 16, 17)] == ["one_shot", "one_shot", "two_shot", "two_shot", "nccl"]
    assert one.most_rows == REGION // (64 * 8)
    assert sum_rows(1) == (1,)
    assert sum_rows(100) == (1, 4, 16, 64, 100)


def test_ways_are_timed_once_and_are_rank_zeros(tmp_path: Path) -> None:
    path, calls = tmp_path / "table.json", []

    def measure() -> dict[str, dict[str, float]]:
        calls.append(1)
        return {"1": {"a": 1.0, "b": 2.25}, "4": {"a": 3.0, "b": 4.0}}

    def ask(group: SingleRank, rows: Sequence[str] = ("1", "4")) -> measured_table.Rows:
        return measured_table.read_or_measure(group, path, "key", rows, ("a", "b"), measure)

    assert ask(SingleRank()) == ask(SingleRank()) == {"1": {"a": 1.0, "b": 2.25}, "4": {"a": 3.0, "b": 4.0}}
    assert len(calls) == 1
    assert ask(SingleRank(), ("1", "16"))["16"] == {"a": 0.0, "b": 0.0}
    assert len(calls) == 2

    class Told(Rank):
        def agreed(self, values: Sequence[float]) -> list[float]:
            return [7.0] * len(values)

    # Rank 1 reads no file: rank 0 has said that it knows (7 is true) and what.
    assert ask(Told(1)) == {"1": {"a": 7.0, "b": 7.0}, "4": {"a": 7.0, "b": 7.0}}
    assert len(calls) == 2
