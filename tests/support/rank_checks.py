"""The sums over ranks, held to torch.distributed on real ranks: called by each rank of a group on GPUs, all in the same order.

What one rank can check alone (the arithmetic, the addresses) is in `kernel_checks`; here it is who waits for whom: fresh data in
every call and no wait between calls, so that a region that is written too early shows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from engine.parallel import DistributedGroup
from engine.peer_memory import PeerMemory
from kernels import all_reduce, reference_all_reduce
from kernels.reference import add_rms_norm

_CALLS = 24
_REPLAYS = 3
GATHER = 2


def failures(group: DistributedGroup, memory: PeerMemory, device: torch.device) -> list[str]:
    """Name the checks that failed on any rank; the same list on every rank."""
    failed = []
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for rows, dim, dtype in ((1, 4096, bf16), (257, 4096, bf16), (3, 104, bf16), (300, 8192, fp16), (63, 576, fp32)):
        for name in ("one_shot", "fused", "two_shot", "shares", "gather", "gather_told"):
            for captured in (False, True):
                good = _check(group, memory, name, rows, dim, dtype, device, captured=captured)
                if group.smallest(int(good)) == 0:
                    failed.append(f"{name} {rows}x{dim} {dtype}{' captured' if captured else ''}")
    return failed


def _check(
    group: DistributedGroup, memory: PeerMemory, name: str, rows: int, dim: int, dtype: torch.dtype, device: torch.device, *, captured: bool
) -> bool:  # fmt: skip
    generator = torch.Generator(device).manual_seed(1 + group.rank)
    data_CTD = torch.empty((_CALLS, rows, dim), dtype=dtype, device=device)
    weight_D = torch.linspace(-1, 2, dim, device=device).to(dtype)
    start_TD = torch.linspace(-3, 3, rows * dim, device=device).to(dtype).view(rows, dim)
    residual_TD = start_TD.clone()
    outs: list[Tensor] = []

    def run() -> None:
        outs.clear()
        residual_TD.copy_(start_TD)
        outs.extend(_call(memory, name, data_CTD[number], number % 2, residual_TD, weight_D) for number in range(_CALLS))

    graph = torch.cuda.CUDAGraph()
    if captured:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        data_CTD.normal_(generator=generator)
        with torch.cuda.stream(side):
            run()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                run()
        torch.cuda.current_stream().wait_stream(side)
    for _ in range(_REPLAYS):
        data_CTD.normal_(generator=generator)
        graph.replay() if captured else run()
        if not _agree(group, name, data_CTD, outs, start_TD, weight_D):
            return False
    return True


def _call_by_shares(memory: PeerMemory, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor) -> Tensor:
    """Write each rank's rows where a GEMM would, and give the normed rows of all."""
    (rows, dim), size = x_TD.shape, len(memory.ranks)
    share = -(-rows // size)
    shares = [slice(min(rank * share, rows), min((rank + 1) * share, rows)) for rank in range(size)]
    inboxes = memory.peers(0, x_TD.dtype).parts
    for rank, mine in enumerate(shares):
        if rank != memory.rank:
            place = (memory.rank - (memory.rank > rank)) * share * dim
            inboxes[rank][place:][: (mine.stop - mine.start) * dim].copy_(x_TD[mine].reshape(-1))
    mine = shares[memory.rank]
    outbox, inbox = memory.peers(1, x_TD.dtype), inboxes[memory.rank]
    all_reduce.share_add_rms_norm(outbox, x_TD[mine], inbox, residual_TD[mine], weight_D, 1e-5, share=share)
    return memory.part(1, rows, dim, x_TD.dtype).clone()


def _gather_told(memory: PeerMemory, x_TD: Tensor) -> Tensor:
    """Gather this rank's rows alone, and tell them to the others: what one gather of all rows gives, through the same region twice."""
    (rows, dim), size = x_TD.shape, len(memory.ranks)
    share = -(-rows // size)
    mine = slice(min(memory.rank * share, rows), min((memory.rank + 1) * share, rows))
    memory.part(GATHER, rows, dim, x_TD.dtype).copy_(x_TD)
    told_sC = torch.zeros((share, size * dim), dtype=x_TD.dtype, device=x_TD.device)
    told_sC[: mine.stop - mine.start] = all_reduce.gather_columns(memory.peers(GATHER, x_TD.dtype), rows, dim, mine)
    words_sW = told_sC.view(torch.int32)
    memory.part(GATHER, *words_sW.shape, torch.int32).copy_(words_sW)
    all_sW = all_reduce.gather_columns(memory.peers(GATHER, torch.int32), *words_sW.shape)
    return all_sW.view(x_TD.dtype).view(share, size, size * dim).transpose(0, 1).reshape(-1, size * dim)[:rows]


def _call(memory: PeerMemory, name: str, x_TD: Tensor, turn: int, residual_TD: Tensor, weight_D: Tensor) -> Tensor:
    if name == "shares":
        return _call_by_shares(memory, x_TD, residual_TD, weight_D)
    if name == "gather_told":
        return _gather_told(memory, x_TD)
    region = GATHER if name == "gather" else turn
    memory.part(region, *x_TD.shape, x_TD.dtype).copy_(x_TD)
    peers = memory.peers(region, x_TD.dtype)
    if name == "fused":
        return all_reduce.one_shot_add_rms_norm(peers, residual_TD, weight_D, 1e-5)[0]
    if name == "gather":
        return all_reduce.gather_columns(peers, *x_TD.shape)
    if name == "two_shot":
        return all_reduce.two_shot(peers, *x_TD.shape).clone()
    return all_reduce.one_shot(peers, *x_TD.shape)


def _agree(
    group: DistributedGroup, name: str, data_CTD: Tensor, outs: list[Tensor], start_TD: Tensor, weight_D: Tensor
) -> bool:  # fmt: skip
    """Whether every call gave what all ranks' data give, to the bit for sums and copies."""
    parts = [torch.empty_like(data_CTD) for _ in range(group.size)]
    dist.all_gather(parts, data_CTD)
    residual_TD, good = start_TD, True
    for number, out in enumerate(outs):
        mine = [part[number].reshape(-1) for part in parts]
        if name in ("gather", "gather_told"):
            good &= torch.equal(out, reference_all_reduce.gather_columns(mine, *data_CTD.shape[1:]))
        elif name in ("fused", "shares"):
            x_TD, residual_TD = add_rms_norm(reference_all_reduce.one_shot(mine, *start_TD.shape), residual_TD, weight_D, 1e-5)
            good &= bool((out.float() - x_TD.float()).norm() <= 1e-2 * x_TD.float().norm())
        else:
            good &= torch.equal(out, reference_all_reduce.one_shot(mine, *start_TD.shape))
        everybodys = [torch.empty_like(out) for _ in range(group.size)]
        dist.all_gather(everybodys, out.contiguous())
        good &= all(torch.equal(other, out) for other in everybodys)
    return good
