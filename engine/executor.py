"""Executors: one rank alone, or rank 0 of a tensor-parallel group with the loop that the other ranks run.

Makes a rank out of options: device, weights, KV pool, runner. Knows nothing of scheduling; `engine.engine` sees only
`engine.plan.Executor`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from engine import garbage, kv_cache
from engine.compile_ahead import CompileAhead
from engine.kv_cache import MemoryReport
from engine.models.decoder import Decoder, LayerCache
from engine.models.loading import head_rows, load_decoder
from engine.options import EngineOptions
from engine.parallel import (
    DistributedGroup,
    ParallelGroup,
    Rendezvous,
    SingleRank,
    join_store,
)
from engine.plan import RunningStep, StepPlan
from engine.plan_channel import PlanReceiver, PlanSender, lost_rank
from engine.profile import StepProfile, profile_steps
from engine.row_shares import RowShares
from engine.runner import Forward, Runner
from engine.sampler import Sampler
from engine.scorer import Scorer
from engine.state_table import StateTable, table_bytes
from engine.stopwatch import Stopwatch
from engine.token_automata import TokenAutomata
from engine.token_masks import TokenMasks
from headrace.errors import OutOfDeviceMemory

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class _Rank(NamedTuple):
    """One rank, ready to run plans."""

    runner: Runner
    memory: MemoryReport
    seconds: dict[str, float]
    """What getting ready took, part by part."""
    worthwhile_tokens: int
    """See `engine.plan.Executor`."""


def _make_rank(options: EngineOptions, group: ParallelGroup, device: torch.device) -> _Rank:
    """Load this rank's weights, settle the size of the KV pool with the other ranks, and put the runner together."""
    dtype: torch.dtype = getattr(torch, options.dtype)
    watch = Stopwatch()
    _connect(options, group, dtype=dtype, device=device)
    watch.lap("connect")
    whole = options.model_spec()
    spec = whole.shard(group.size)
    compiling = CompileAhead(spec, options, device=device)
    with torch.inference_mode():
        decoder = load_decoder(
            Path(options.model_path),
            dtype=dtype,
            device=device,
            group=group,
            max_positions=options.session_len + 1,
            whole=whole,
        )
        watch.lap("weights")
        compiling.wait()
        watch.lap("kernels")
        profile = profile_steps(decoder, options) if device.type == "cuda" else None
        memory = _budget(options, decoder, group, profile, dtype=dtype, device=device)
        watch.lap("profile")
        caches = kv_cache.allocate(
            decoder.spec,
            num_blocks=memory.num_blocks,
            block_size=options.block_size,
            dtype=dtype,
            device=device,
            int8=options.int8_kv,
        )
        watch.lap("kv_pool")
    table = StateTable(
        num_slots=options.max_batch_size,
        session_len=options.session_len,
        block_size=options.block_size,
        device=device,
        stretched=decoder.stretched is not None,
    )
    free = kv_cache.free_memory(device)
    forward, decode_ms = _forward(options, decoder, caches, table)
    if profile is not None:
        memory = replace(memory, graphs=max(0, free - kv_cache.free_memory(device)))
        profile.reserve(device)
    watch.lap("graphs")
    runner = _runner(options, decoder, caches, table, forward, device)
    log.info(
        "model loaded; the engine takes requests now",
        extra={
            "event": "model_loaded",
            "rank": group.rank,
            "tp": group.size,
            "ready_s": watch.seconds,
            **kv_cache.report(memory),
        },
    )
    return _Rank(runner, memory, watch.seconds, 1 if profile is None else profile.worthwhile_tokens(decode_ms))


def _runner(
    options: EngineOptions,
    decoder: Decoder,
    caches: Sequence[LayerCache],
    table: StateTable,
    forward: Forward,
    device: torch.device,
) -> Runner:
    """Put together what runs plans."""
    slots, vocab_size = options.max_batch_size, decoder.spec.vocab_size
    automata = TokenAutomata(model_path=options.model_path, num_slots=slots, vocab_size=vocab_size, device=device)
    return Runner(
        forward=forward,
        head=decoder.head,
        caches=caches,
        table=table,
        sampler=Sampler(num_slots=slots, vocab_size=vocab_size, device=device, automata=automata),
        scorer=Scorer(num_slots=slots, vocab_size=vocab_size),
        shares=RowShares(decoder.group, device=device),
    )


def _connect(options: EngineOptions, group: ParallelGroup, *, dtype: torch.dtype, device: torch.device) -> None:
    """Let the ranks add up by reading each other's memory, where they are GPUs that can."""
    if device.type != "cuda" or not isinstance(group, DistributedGroup):
        return
    from engine.peer_sums import connect  # its kernels need Triton

    spec = options.model_spec()
    group.sums = connect(
        group,
        dim=spec.hidden_size,
        columns=head_rows(spec, group),
        max_tokens=max(options.max_prefill_token_num, options.max_batch_size),
        max_rows=options.max_batch_size,
        dtype=dtype,
        device=device,
    )


def _forward(
    options: EngineOptions, decoder: Decoder, caches: Sequence[LayerCache], table: StateTable
) -> tuple[Forward, float]:
    """Choose how steps run: the model as it is, or on a GPU captured graphs where a plan has only single tokens.

    Gives the milliseconds of the largest graph too; without graphs no step is launched faster than another, which infinity says.
    """
    if options.device == "cpu" or options.eager_mode:
        return decoder.hidden, math.inf
    from engine.graphs import GraphForward  # needed on a GPU alone

    graphs = GraphForward(decoder, caches, table.singles, session_len=options.session_len, stretch_S=table.stretch_S)
    graphs.capture()
    return graphs, graphs.largest_ms


def _budget(
    options: EngineOptions,
    decoder: Decoder,
    group: ParallelGroup,
    profile: StepProfile | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> MemoryReport:
    one_block = kv_cache.block_bytes(decoder.spec, block_size=options.block_size, dtype=dtype, int8=options.int8_kv)
    activations = 0 if profile is None else profile.peak_bytes
    free = max(0, kv_cache.free_memory(device) - activations)
    if device.type == "cpu":
        free //= group.size  # the ranks share the host's memory
    requests = table_bytes(num_slots=options.max_batch_size, session_len=options.session_len, block_size=options.block_size)
    free = kv_cache.left_by_requests(options, requests=requests, free=free)
    # Every rank must hold the same number of blocks: the plan of one scheduler names blocks for all of them.
    num_blocks = group.smallest(kv_cache.choose_num_blocks(options, one_block=one_block, free=free))
    return MemoryReport(
        weights=decoder.weight_bytes,
        activations=activations,
        requests=requests,
        kv_pool=num_blocks * one_block,
        kv_block=one_block,
        num_blocks=num_blocks,
        free_before_pool=free,
    )


def _device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` the current one: Triton launches on the current device, whatever its tensors' is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _device_of(options: EngineOptions, rank: int) -> torch.device:
    return torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")


def _within_memory(device: torch.device, run: Callable[[], _T]) -> _T:
    """Run something on a device; where its memory doesn't suffice, free what is only cached and say so."""
    try:
        with _device_guard(device):
            return run()
    except RuntimeError as error:  # torch's own, cuBLAS's workspace and the driver's loading of a kernel all are
        shortage = str(error)
        if not any(words in shortage for words in _NO_MEMORY):
            raise
    # Behind the except clause: the traceback kept the tensors of the step alive.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise OutOfDeviceMemory(f"{(OutOfDeviceMemory.__doc__ or '').strip()} ({shortage[:300]})")


def _report(memory: MemoryReport, seconds: dict[str, float], worthwhile_tokens: int) -> dict[str, Any]:
    return {**kv_cache.report(memory), "ready_s": dict(seconds), "worthwhile_tokens": worthwhile_tokens}


class LocalExecutor:
    """The whole model on one device, in this process."""

    def __init__(self, options: EngineOptions) -> None:
        """Load the model and allocate the KV pool. Raise `ModelLoadError`, `InvalidRequest` or `KVCapacity`."""
        self._device = _device_of(options, 0)
        with _device_guard(self._device):
            self._rank: _Rank | None = _make_rank(options, SingleRank(), self._device)
        self._memory, self._seconds = self._rank.memory, self._rank.seconds
        self._worthwhile_tokens = self._rank.worthwhile_tokens

    @property
    def num_blocks(self) -> int:
        """KV blocks in the pool."""
        return self._memory.num_blocks

    @property
    def worthwhile_tokens(self) -> int:
        """See `engine.plan.Executor`."""
        return self._worthwhile_tokens

    def launch(self, plan: StepPlan) -> RunningStep:
        """Start a step; on a CPU it is done on return. Raise `OutOfDeviceMemory` where it didn't run."""
        assert self._rank is not None, "the executor is closed"
        return _within_memory(self._device, partial(self._rank.runner.launch, plan))

    def choose(self, masks: TokenMasks) -> None:
        """Sample the step launched last, which waits for its masks. Raise `OutOfDeviceMemory` where that didn't run."""
        assert self._rank is not None, "the executor is closed"
        _within_memory(self._device, partial(self._rank.runner.choose, masks))

    def report(self) -> dict[str, Any]:
        """Say where the memory goes, in bytes, what getting ready took, in seconds, and which prompts are worth a step."""
        return _report(self._memory, self._seconds, self._worthwhile_tokens)

    def close(self) -> None:
        """Free the weights and the KV pool."""
        self._rank = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class TensorParallelExecutor:
    """Rank 0 of a tensor-parallel group: runs its share and sends every plan to the other ranks first."""

    def __init__(self, options: EngineOptions, rendezvous: Rendezvous) -> None:
        """Meet the other ranks (`serve_rank` at `rendezvous.address`), then load as `LocalExecutor` does."""
        self._device = _device_of(options, 0)
        self._rank: _Rank | None = None
        with _device_guard(self._device), contextlib.ExitStack() as undo:
            self._sender = PlanSender(rendezvous.store, size=options.tp)
            undo.callback(self._sender.close)
            self._group = DistributedGroup(rendezvous.store, rank=0, size=options.tp, device=self._device)
            undo.callback(self._group.close)
            self._rank = _make_rank(options, self._group, self._device)
            undo.pop_all()  # nothing failed: the channel and the group stay
        self._memory, self._seconds = self._rank.memory, self._rank.seconds
        self._worthwhile_tokens = self._rank.worthwhile_tokens

    @property
    def num_blocks(self) -> int:
        """KV blocks in the pool of every rank."""
        return self._memory.num_blocks

    @property
    def worthwhile_tokens(self) -> int:
        """See `engine.plan.Executor`."""
        return self._worthwhile_tokens

    def launch(self, plan: StepPlan) -> RunningStep:
        """Start a step on every rank. Raise `RankLost` where one is gone.

        A rank without memory for the step ends, and the group with it: the others wait in the middle of a sum. The supervisor
        starts the group again, and what was unfinished is computed anew.
        """
        assert self._rank is not None, "the executor is closed"
        self._sender.send(plan.to_bytes())
        try:
            with _device_guard(self._device):
                return self._rank.runner.launch(plan)
        except RuntimeError as error:
            # gloo says it with a RuntimeError of its own, before the closed socket is noticed by a write.
            if self._sender.is_broken:
                raise lost_rank(error) from error
            raise

    def choose(self, masks: TokenMasks) -> None:
        """Sample the step launched last, which waits for its masks on every rank. Raise `RankLost` where one is gone."""
        assert self._rank is not None, "the executor is closed"
        self._sender.send(masks.to_bytes())
        with _device_guard(self._device):
            self._rank.runner.choose(masks)

    def report(self) -> dict[str, Any]:
        """Say of rank 0 what `LocalExecutor` says; the other ranks' memory goes the same way."""
        return _report(self._memory, self._seconds, self._worthwhile_tokens)

    def close(self) -> None:
        """End the other ranks and free this one's memory."""
        self._sender.close()
        self._group.close()
        self._rank = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def make_executor(options: EngineOptions, rendezvous: Rendezvous | None = None) -> LocalExecutor | TensorParallelExecutor:
    """Make the executor that `options.tp` asks for; more than one rank needs the rendezvous they were given."""
    if options.tp == 1:
        return LocalExecutor(options)
    assert rendezvous is not None, "tensor parallelism needs a rendezvous"
    return TensorParallelExecutor(options, rendezvous)


def serve_rank(options: EngineOptions, rank: int, size: int, rendezvous: str) -> None:
    """Be rank `rank` of `size`: load its share and run the plans that rank 0 sends, until it closes the channel or dies."""
    device = _device_of(options, rank)
    with _device_guard(device):
        store = join_store(rendezvous)
        receiver = PlanReceiver(store)
        group = DistributedGroup(store, rank=rank, size=size, device=device)
        runner = _make_rank(options, group, device).runner
        garbage.freeze()  # a rank that pauses holds up all of them
        while (frame := receiver.receive()) is not None:
            runner.launch(StepPlan.from_bytes(frame))
            if runner.waits_for_masks:
                # The other half of the same step; without it rank 0 is gone, which the next receive() says as well.
                if (frame := receiver.receive()) is None:
                    break
                runner.choose(TokenMasks.from_bytes(frame))
        receiver.close()
        group.close()
