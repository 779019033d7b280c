"""The sizes and names that keep a room readable (shared rules: a file on a few screens, a function on one)."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("headrace", "engine", "kernels", "worker", "api", "migrations", "benchmarks", "examples")
MAX_FILE, MAX_FUNCTION, P95_FUNCTION = 400, 60, 40
NOBODYS_NAMES = re.compile(r"^(utils?|common|helpers?|misc|shared|stuff)$")


class Function(NamedTuple):
    where: str
    lines: int
    returns: bool
    private: bool
    documented: bool


def sources(*rooms: str) -> list[Path]:
    return [file for room in rooms or ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def functions(*rooms: str) -> list[Function]:
    found = []
    for file in sources(*rooms):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # A Triton kernel names each pointer, stride and constant on a line of its own: its body is what has to fit.
                first = node.body[0].lineno if file.is_relative_to(ROOT / "kernels/gpu") else node.lineno
                lines = (node.end_lineno or first) - first + 1
                where = f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
                found.append(
                    Function(
                        where, lines, node.returns is not None, node.name.startswith("_"), ast.get_docstring(node) is not None
                    )
                )
    return found


def test_there_is_something_to_measure() -> None:
    assert len(sources()) > 30
    assert len(functions()) > 200


def test_files_fit() -> None:
    long = {
        str(file.relative_to(ROOT)): n
        for file in sources()
        if (n := len(file.read_text(encoding="utf-8").splitlines())) > MAX_FILE
    }
    assert not long, f"files over {MAX_FILE} lines; split them by what they know: {long}"


def test_functions_fit() -> None:
    # A migration is a list of tables, and is never changed again.
    long = [
        f"{f.where} ({f.lines})" for f in functions(*(room for room in ROOMS if room != "migrations")) if f.lines > MAX_FUNCTION
    ]
    assert not long, f"functions over {MAX_FUNCTION} lines: {long}"


def test_nearly_all_functions_are_short() -> None:
    twentieths = statistics.quantiles([f.lines for f in functions()], n=20)
    assert twentieths[-1] <= P95_FUNCTION


def test_names_belong_to_somebody() -> None:
    bad = [
        str(file.relative_to(ROOT)) for file in [*sources(), *(ROOT / "tests").rglob("*.py")] if NOBODYS_NAMES.match(file.stem)
    ]
    assert not bad, f"a module is named after what it knows: {bad}"


def test_every_function_says_what_it_returns() -> None:
    untyped = [f.where for f in functions("headrace", "engine", "worker", "api") if not f.returns]
    assert not untyped


def test_batch_never_names_what_a_gpu_computes() -> None:
    """In the engine and the kernels the step's work is a plan; 'batch' is what a client submits (config fields excepted)."""
    allowed = {"max_batch_size", "batch_infer", "async_batch_infer"}  # words of the pipeline document
    bad = []
    for file in sources("engine", "kernels"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(node, "name", None) or getattr(node, "id", None) or getattr(node, "arg", None)
            if isinstance(name, str) and re.search(r"batch", name, re.IGNORECASE) and name not in allowed:
                bad.append(f"{file.relative_to(ROOT)}: {name}")
    assert not bad, sorted(set(bad))


@pytest.mark.parametrize("room", ["headrace", "engine", "kernels", "worker", "api"])
def test_every_module_introduces_itself(room: str) -> None:
    silent = [
        str(file.relative_to(ROOT))
        for file in sources(room)
        if ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) is None
    ]
    assert not silent, f"the module docstring says what it does and what it does not know: {silent}"


def test_tests_are_no_packages() -> None:
    """An __init__.py under tests would let tests/kernels shadow kernels."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
