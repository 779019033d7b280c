"""The other ranks of a tensor-parallel engine that a benchmark runs in its own process; each is this file, started by exec."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # This folder's `engine.py` would be found for the room of that name.
    sys.path[0] = str(ROOT)

from engine.executor import TensorParallelExecutor, serve_rank
from engine.options import EngineOptions
from engine.parallel import Rendezvous


class RanksExecutor(TensorParallelExecutor):
    """Rank 0, with the processes of the others."""

    def __init__(self, options: EngineOptions) -> None:
        """Start the other ranks and meet them."""
        rendezvous = Rendezvous()
        told = json.dumps(options.to_dict())
        environment = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", **os.environ}
        self._processes = [
            subprocess.Popen(  # noqa: S603  # this file
                [sys.executable, __file__, told, str(rank), rendezvous.address], env=environment
            )
            for rank in range(1, options.tp)
        ]
        super().__init__(options, rendezvous)

    def close(self) -> None:
        """End the other ranks too."""
        super().close()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    options = EngineOptions.from_dict(json.loads(sys.argv[1]))
    serve_rank(options, int(sys.argv[2]), options.tp, sys.argv[3])
    os._exit(0)  # tearing torch down takes seconds
