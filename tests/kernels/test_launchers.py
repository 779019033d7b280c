"""A kernel gets its own launcher, also where threads load many at once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from triton.runtime.build import compile_module_from_src
from triton.runtime.driver import DriverConfig

from kernels.gpu import launchers

NAME = "__triton_launcher"
SOURCE = """
#include <Python.h>
static PyObject *which(PyObject *self, PyObject *none) {{ return PyLong_FromLong({number}); }}
static PyMethodDef methods[] = {{{{"which", which, METH_NOARGS, NULL}}, {{NULL}}}};
static struct PyModuleDef module = {{PyModuleDef_HEAD_INIT, "__triton_launcher", NULL, -1, methods}};
PyMODINIT_FUNC PyInit___triton_launcher(void) {{ return PyModule_Create(&module); }}
"""
THREADS = 6


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads change places after every few instructions: what happens once in a hundred starts of an engine happens at once."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="Triton's launchers need a C compiler")
@pytest.mark.usefixtures("impatient")
def test_each_thread_gets_what_it_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton 3.6 does it: without the lock about one load in fifty gives another thread's module."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def load(number: int) -> int:
        found: int = compile_module_from_src(SOURCE.format(number=number), NAME).which()
        return found

    guarded = launchers.OneAtATime(load)
    for number in range(THREADS):
        assert guarded(number) == number  # built once, loaded often
    with ThreadPoolExecutor(THREADS) as pool:
        loaded = list(pool.map(lambda number: [guarded(number) for _ in range(500)], range(THREADS)))
    assert loaded == [[number] * 500 for number in range(THREADS)]


def test_the_driver_is_guarded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []
    mine = SimpleNamespace(launcher_cls=lambda source, metadata: made.append((source, metadata)))
    config = DriverConfig()
    config.set_active(mine)  # type: ignore[arg-type]  # a host without a GPU has no real one
    monkeypatch.setattr(launchers, "driver", config)
    launchers.load_one_at_a_time()
    guard: object = mine.launcher_cls
    launchers.load_one_at_a_time()
    assert mine.launcher_cls is guard
    assert isinstance(guard, launchers.OneAtATime)
    guard("source", "metadata")
    assert made == [("source", "metadata")]
