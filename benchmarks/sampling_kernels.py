"""Time sampling on the GPU: the single filters, and a step of 512 rows with everything on. Run by `benchmarks/kernels.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from kernel_cases import sampling_inputs

from benchmarks.kernel_timing import Row, seconds

VOCAB = 128256
SAMPLE_SWEEP = (
    (2048, 8, 3, 2048),
    (2048, 8, 3, 4096),
    (2048, 8, 3, 8192),
    (2048, 16, 3, 8192),
    (4096, 16, 3, 4096),
    (4096, 16, 3, 16384),
    (4096, 32, 1, 4096),
)


def bench_sampling(limit: Row, *, sweep: bool) -> Iterator[Row]:
    """Time sampling over an 8B model's vocabulary, by reads of the logits that the time would pay for."""
    from kernels.gpu import sampling

    wishes: dict[str, dict[str, float]] = {
        "greedy": {"greedy": True},
        "temperature": {},
        "top_k 40, top_p 0.95": {"top_k": 40, "top_p": 0.95},
        "top_p 0.95": {"top_p": 0.95},
        "min_p 0.05": {"min_p": 0.05},
    }
    for kind, rows in itertools.product(("peaked", "flat"), (1, 64, 512, 1024)):
        logits = torch.randn(rows, VOCAB, device="cuda")
        if kind == "peaked":
            # A language model's: a few hundred tokens far above a floor that holds next to nothing.
            logits.scatter_add_(
                1, torch.randint(0, VOCAB, (rows, 300), device="cuda"), 10 + 3 * torch.randn(rows, 300, device="cuda")
            )
        for name, wish in wishes.items():
            inputs = sampling_inputs(rows, device="cuda", **wish)
            flags = (name != "greedy", "top_k" in wish, "top_p" in wish, "min_p" in wish)
            shapes = SAMPLE_SWEEP if sweep and kind == "peaked" and name in ("greedy", "top_k 40, top_p 0.95") else ()
            for shape in (None, *shapes):
                chosen = sampling.SampleShape(*shape) if shape else None
                time = seconds(partial(sampling.sample, logits, inputs, *flags, shape=chosen), repeats=5)
                reads = round(time * limit["read_gbs"] * 1e9 / logits.numel() / 4, 1)
                load = f"{rows} rows, {kind}, {name}"
                row = {"op": "sampling", "load": load, "us": round(time * 1e6, 1), "row_reads": reads}
                yield row | ({"shape": shape} if shape else {})


def bench_all_filters(limit: Row, *, sweep: bool) -> Iterator[Row]:
    """Time what a step of 512 rows pays for sampling with everything on, over a vocabulary of 151,936."""
    del limit, sweep
    from kernels import sampling

    rows, vocab, length = 512, 151936, 1024
    logits = torch.randn(rows, vocab, device="cuda")
    logits.scatter_add_(1, torch.randint(0, vocab, (rows, 300), device="cuda"), 10 + 3 * torch.randn(rows, 300, device="cuda"))
    logits = logits.bfloat16()
    inputs = sampling_inputs(rows, device="cuda", temperature=0.8, top_k=50, top_p=0.95, min_p=0.02)
    one = torch.ones(rows, device="cuda")
    penalties = sampling.PenaltyInputs(
        torch.randint(0, vocab, (rows, length), device="cuda", dtype=torch.int32),
        (one * 200).long(),
        (one * length).long(),
        one * 1.1,
        one * 0.2,
        one * 0.1,
    )
    places = (torch.arange(rows, device="cuda").repeat_interleave(8), torch.arange(8 * rows, device="cuda") * 31 % vocab)
    words = torch.randint(-(2**31), 2**31, (rows, vocab // 32 + 1), device="cuda").to(torch.int32)

    def edit_and_draw(*, masks: bool) -> None:
        x = logits.float()
        if masks:
            sampling.allow_only(x, places[0][::8], words)
        sampling.add_bias(x, *places, one.repeat(8))
        sampling.apply_penalties(x, penalties)
        sampling.ban(x, *places)
        sampling.sample(x, inputs)

    runs: dict[str, Callable[[], None]] = {
        "temperature, top-k, top-p, min-p": partial(sampling.sample, logits, inputs),
        "the same, penalties over 1,024 tokens, 8 biases and 8 bans a row": partial(edit_and_draw, masks=False),
        "all that and a token mask for each row": partial(edit_and_draw, masks=True),
    }
    for name, run in runs.items():
        time = seconds(run, repeats=5)
        load = f"512 rows of {vocab} bfloat16 logits: {name}"
        yield {"op": "all_filters", "load": load, "us": round(time * 1e6, 1), "of_22_ms": round(time / 22e-3, 4)}
