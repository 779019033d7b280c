"""Launching a kernel that has been launched like this before, in a third of the time.

Triton looks up what a launch is compiled for anew each time: 50 us of the host for a kernel that takes 3 of the GPU. A step with
prompts makes six launches a layer, so a small model would wait for its host. Here what decides which binary serves is noted
beside the binary, and a launch of a known kind goes straight to it, by Triton's own door for compiled kernels.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction


def quick(kernel: Any) -> Any:
    """Decorate a kernel under `@triton.jit`. Its constants come last; they and options are passed by name, always the same in the same order."""
    # Under TRITON_INTERPRET=1 there is nothing to look up.
    return QuickKernel(kernel) if isinstance(kernel, JITFunction) else kernel


class QuickKernel:
    """A kernel, and the binaries that its launches have needed so far."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        """Note which arguments Triton specialises."""
        self.kernel = kernel
        self._params = tuple(
            (not param.do_not_specialize, not (param.do_not_specialize or param.do_not_specialize_on_alignment))
            for param in kernel.params
        )
        self._known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
        self._first: dict[tuple[Any, ...], threading.Lock] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """As with Triton's: `kernel[grid](*arguments, **constants_and_options)`."""
        return partial(self._launch, grid)

    def kind(self, args: tuple[Any, ...], meta: dict[str, Any]) -> tuple[Any, ...]:
        """Name all that Triton compiles for: launches of one kind share a binary. The first argument is a tensor.

        Types, whether an address or a whole number is divisible by 16, whether a number is 1 or needs 64 bits, constants, options
        and the device (https://github.com/triton-lang/triton, `native_specialize_impl`).
        """
        # Flat, and appended to by hand: this runs two hundred times in a step with prompts.
        facts: list[Any] = [args[0].get_device(), *meta.values()]
        add = facts.append
        for arg, (whole, aligned) in zip(args, self._params, strict=False):
            if isinstance(arg, Tensor):
                add(arg.dtype)
                if aligned:
                    add(arg.data_ptr() % 16 == 0)
            elif type(arg) is int:
                add(-0x80000000 <= arg < 0x80000000)
                if whole:
                    add(arg == 1)
                    add(arg % 16 == 0)
            else:
                add(type(arg))
        return tuple(facts)

    def _launch(self, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        kind = self.kind(args, meta)
        known = self._known.get(kind)
        if known is None:
            # Two threads with one kind would compile it twice, and one could find the binary that the other is still loading.
            with self._first.setdefault(kind, threading.Lock()):
                known = self._known.get(kind)
                if known is None:
                    self._look_up(kind, grid, args, meta)
                    return
        binary, constants = known
        binary[(*grid, 1, 1)[:3]](*args, *constants)

    def _look_up(self, kind: tuple[Any, ...], grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        """Let Triton launch it, and keep what it found."""
        binary = self.kernel[grid](*args, **meta)
        if binary is not None:
            # It takes the constants too, as it took them when it was compiled.
            self._known[kind] = (binary, tuple(meta[param.name] for param in self.kernel.params[len(args) :]))


def ceil_div(size: int, part: int) -> int:
    """Parts that cover `size`. Triton's own, which kernels may call too, takes microseconds on the host."""
    return -(-size // part)


def power_of_2(least: int) -> int:
    """The smallest power of 2 that isn't below `least` (at least 1)."""
    return 1 << max(0, least - 1).bit_length()
