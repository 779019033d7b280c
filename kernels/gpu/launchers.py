"""Triton's launchers are loaded one at a time.

Up to 3.6 Triton builds a C module for each list of argument types and loads it under one name for all. Where a file is loaded for a
second kernel, CPython fills and gives the module object that was loaded last under that name, whoever's it is. A thread that has
loaded its module and not yet read `launch` from it then gets another kernel's: the launch fails over the number of its arguments,
or, where that fits by chance, hands the kernel wrong ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from triton.runtime import driver

_lock = threading.Lock()


class OneAtATime:
    """Makes what `make` makes; no two threads are in it at once. It doesn't end before it has read what it loaded."""

    def __init__(self, make: Callable[..., Any]) -> None:
        """Take the class, or whatever makes launchers."""
        self._make = make
        self._making = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """Make one."""
        with self._making:
            return self._make(*args)


def load_one_at_a_time() -> None:
    """See to it, on this process's driver, before threads launch kernels for the first time. May be called again."""
    with _lock:
        make = driver.active.launcher_cls
        if not isinstance(make, OneAtATime):
            driver.active.launcher_cls = OneAtATime(make)
