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


def load_one_at_a_time() -> None:
    """See to it, on this process's driver, before threads launch kernels for the first time. May be called again."""
    with _lock:
        make = driver.active.launcher_cls
        if not getattr(make, "one_at_a_time", False):
            driver.active.launcher_cls = one_at_a_time(make)


def one_at_a_time(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return `make`, which no two threads are in at once. It doesn't end before it has read what it loaded."""
    making = threading.Lock()

    def made(*args: Any) -> Any:
        with making:
            return make(*args)

    made.one_at_a_time = True  # type: ignore[attr-defined]
    return made
