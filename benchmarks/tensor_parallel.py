"""Sums over ranks: ours over peer memory, PyTorch's symmetric memory's, and NCCL's, one process a GPU.

    python benchmarks/tensor_parallel.py [--ranks 2] [--dim 4096] [--sweep] [--check-only]

Checked first, on all ranks, eager and captured (`tests/support/rank_checks.py`); a failed check ends the run without a figure. Then each
way is timed in a captured graph of calls that use two regions in turn, as a decode step does: microseconds a call, the slowest rank's.
`sum`: the sum alone; `step`: with the residual and the norm behind it, which is what stands between two layers (by shares, the parts
are where the GEMM wrote them).

Each size is one JSON line, printed and appended to benchmarks/results/all_reduce.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import ledger
import torch
from crowded_ranks import crowd
from rank_checks import GATHER, failures

from engine.captured_time import captured_us
from engine.parallel import DistributedGroup, Rendezvous, join_store
from engine.peer_memory import PeerMemory, share_memory
from kernels import all_reduce
from kernels.gpu import all_reduce as gpu
from kernels.rms_norm import add_rms_norm

CALLS = 10
SIZES = [16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20, 64 << 20]
REGION = 64 << 20
DTYPE = torch.bfloat16


class Ways:
    """The calls that are timed, for one size."""

    def __init__(self, group: DistributedGroup, memory: PeerMemory, rows: int, dim: int) -> None:
        self.group, self.memory, self.rows, self.dim = group, memory, rows, dim
        self.parts = [memory.part(region, rows, dim, DTYPE) for region in (0, 1)]
        self.peers = [memory.peers(region, DTYPE) for region in (0, 1)]
        self.residual = torch.zeros_like(self.parts[0])
        self.own = torch.randn_like(self.residual)
        self.weight = torch.ones(dim, dtype=DTYPE, device=self.residual.device)
        world = torch.distributed.group.WORLD
        assert world is not None
        self.name = world.group_name

    def all(self) -> dict[str, Callable[[int], object]]:
        """Give each way by name; a call is told whose turn it is."""
        return {
            "sum nccl": lambda turn: self.group.all_reduce(self.parts[turn]),
            "sum torch one_shot": lambda turn: torch.ops.symm_mem.one_shot_all_reduce(self.parts[turn], "sum", self.name),
            "sum torch two_shot": lambda turn: torch.ops.symm_mem.two_shot_all_reduce_(self.parts[turn], "sum", self.name),
            "sum one_shot": lambda turn: all_reduce.one_shot(self.peers[turn], self.rows, self.dim),
            "sum two_shot": lambda turn: all_reduce.two_shot(self.peers[turn], self.rows, self.dim),
            "step nccl": lambda turn: self._normed(self.group.all_reduce(self.parts[turn])),
            "step one_shot": lambda turn: all_reduce.one_shot_add_rms_norm(self.peers[turn], self.residual, self.weight, 1e-5),
            "step shares": self._by_shares,
            "step two_shot": lambda turn: self._normed(all_reduce.two_shot(self.peers[turn], self.rows, self.dim)),
        }

    def _by_shares(self, _: int) -> object:
        """Do what is left of the sum where GEMMs have written the parts into the ranks' memory."""
        share = -(-self.rows // self.group.size)
        mine = slice(self.group.rank * share, min((self.group.rank + 1) * share, self.rows))
        own, inbox = self.own[mine], self.peers[0].parts[self.group.rank]
        return all_reduce.share_add_rms_norm(self.peers[1], own, inbox, self.residual[mine], self.weight, 1e-5, share=share)

    def _normed(self, x_TD: torch.Tensor) -> object:
        return add_rms_norm(x_TD, self.residual, self.weight, 1e-5)

    def time(self, call: Callable[[int], object]) -> float | None:
        """Microseconds of a call on the slowest rank; None where this build of PyTorch can't do it."""

        def run() -> None:
            for number in range(CALLS):
                call(number % 2)

        for part in self.parts:
            part.normal_()
        self.residual.zero_()
        try:
            call(0), call(1)
            good = 1
        except (RuntimeError, AttributeError) as error:
            print(f"rank {self.group.rank}: {str(error)[:200]}", file=sys.stderr)
            good = 0
        if self.group.smallest(good) == 0:
            return None
        spent = captured_us(run) / CALLS
        return -self.group.smallest(-round(spent * 1000)) / 1000


def gathers(group: DistributedGroup, memory: PeerMemory, rows: int, columns: int) -> dict[str, float]:
    """Time putting logits side by side: GPU time of eager calls, as a step makes them."""
    part = memory.part(GATHER, rows, columns, DTYPE).normal_()
    peers = memory.peers(GATHER, DTYPE)
    ways = {
        "gather nccl": lambda: group.all_gather_columns(part),
        "gather": lambda: all_reduce.gather_columns(peers, rows, columns),
    }
    return {name: -group.smallest(-round(captured_us(way) * 1000)) / 1000 for name, way in ways.items()}


def be_rank(arguments: argparse.Namespace, group: DistributedGroup, device: torch.device) -> int:
    memory = share_memory(group, device=device, sum_bytes=REGION, gather_bytes=160 << 20)
    if memory is None:
        return 1
    failed = failures(group, memory, device)
    if group.rank == 0:
        print(f"checks on {group.size} ranks: {failed or 'passed'}", flush=True)
    if failed or arguments.check_only:
        return 1 if failed else 0
    lines: list[dict[str, object]] = []
    for size in arguments.sizes:
        ways = Ways(group, memory, size // (arguments.dim * DTYPE.itemsize), arguments.dim)
        times = {name: ways.time(call) for name, call in ways.all().items()}
        lines.append(
            {"bytes": size, "rows": ways.rows, "us": {name: round(us, 2) for name, us in times.items() if us is not None}}
        )
        if group.rank == 0:
            print(json.dumps(lines[-1]), flush=True)
    lines += [{"rows": rows, "columns": 64128, "us": gathers(group, memory, rows, 64128)} for rows in (1, 64, 512)]
    if arguments.sweep:
        lines += sweep(group, memory, arguments.dim)
    if group.rank == 0:
        report(arguments, lines)
    return 0


def sweep(group: DistributedGroup, memory: PeerMemory, dim: int) -> list[dict[str, object]]:
    """Time other cuts of the one-shot kernel than the one that is shipped."""
    lines: list[dict[str, object]] = []
    shipped = gpu.MAX_PROGRAMS, gpu._num_warps  # noqa: SLF001  # what is tried
    for programs in (64, 128, 256):
        for warps in (4, 8, 16):
            gpu.MAX_PROGRAMS, gpu._num_warps = programs, lambda _, warps=warps: warps  # noqa: SLF001
            times = {}
            for size in (16 << 10, 512 << 10, 2 << 20, 4 << 20, 64 << 20):
                ways = Ways(group, memory, size // (dim * DTYPE.itemsize), dim)
                times[str(size)] = ways.time(ways.all()["step one_shot"])
            lines.append({"programs": programs, "warps": warps, "us": times})
    gpu.MAX_PROGRAMS, gpu._num_warps = shipped  # noqa: SLF001
    return lines


def report(arguments: argparse.Namespace, lines: list[dict[str, object]]) -> None:
    stamp = {"benchmark": "all_reduce", "ranks": arguments.ranks, "dim": arguments.dim, "gpu": torch.cuda.get_device_name()}
    stamp["torch"] = torch.__version__
    for line in lines:
        ledger.keep(arguments.out, stamp | line, at_commit=arguments.commit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--sizes", type=lambda text: [int(one) for one in text.split(",")], default=SIZES, help="bytes")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "all_reduce.jsonl")
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    others: list[subprocess.Popen[bytes]] = []
    if arguments.rank == 0:
        rendezvous = Rendezvous()
        store = rendezvous.store
        for rank in range(1, arguments.ranks):
            command = [sys.executable, __file__, *sys.argv[1:], "--rank", str(rank), "--address", rendezvous.address]
            others.append(subprocess.Popen(command))  # noqa: S603  # this file
    else:
        store = join_store(arguments.address)
    if arguments.check_only:
        crowd(arguments.ranks)
    device = torch.device("cuda", arguments.rank % torch.cuda.device_count())
    status = 1
    try:
        with torch.cuda.device(device), torch.inference_mode():
            status = be_rank(
                arguments, DistributedGroup(store, rank=arguments.rank, size=arguments.ranks, device=device), device
            )
    finally:
        for other in others:
            try:
                other.wait(timeout=10)
            except subprocess.TimeoutExpired:
                other.kill()
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # tearing NCCL down takes seconds
