"""Who may import whom, and what may not be loaded where. Each check runs in a process of its own: imports can't be undone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "triton")
FOREIGN = (
    "celery",
    "kombu",
    "redis",
    "sqlalchemy",
    "alembic",
    "pydantic",
    "fastapi",
    "starlette",
    "uvicorn",
    "httpx",
    "rich",
    "flower",
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_import_contracts_hold() -> None:
    lint = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr


@pytest.mark.parametrize(
    "module", ["headrace", "headrace.cli", "headrace.client", "headrace.store", "headrace.job", "headrace.stack", "api.app"]
)
def test_loads_no_torch(module: str) -> None:
    run = python(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]", f"importing {module} loaded {run.stdout}"


def engine_modules() -> list[str]:
    files = sorted((ROOT / "engine").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


def test_engine_and_kernels_import_on_a_host_without_the_service() -> None:
    """A GPU host has torch and transformers; it need not have Celery, SQL, pydantic or an HTTP library."""
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        # transformers and huggingface_hub bring HTTP libraries of their own; what is asked is what *we* import.
        if name.partition(".")[0] in {FOREIGN}:
            caller = sys._getframe(1)
            while caller and caller.f_globals.get("__name__", "").startswith(("importlib", "_frozen_importlib")):
                caller = caller.f_back
            if caller and caller.f_globals["__name__"].partition(".")[0] in ("engine", "kernels", "headrace"):
                raise ModuleNotFoundError(f"{{name}} is absent here (imported by {{caller.f_globals['__name__']}})")
        return None
sys.meta_path.insert(0, Absent())
for module in {[m for m in engine_modules() if m != "engine.rank"]}:
    importlib.import_module(module)
"""
    run = python(code)
    assert run.returncode == 0, run.stderr


def test_the_import_block_above_can_fail() -> None:
    """The same hook does stop a module of ours that imports the service (headrace.schemas imports pydantic)."""
    run = python("""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pydantic":
            raise ModuleNotFoundError(name)
        return None
sys.meta_path.insert(0, Absent())
import headrace.schemas
""")
    assert run.returncode != 0
    assert "ModuleNotFoundError" in run.stderr


def test_transformers_does_not_take_our_kernels_for_hugging_faces() -> None:
    run = python(
        "import kernels; from transformers.utils import is_kernels_available; print(is_kernels_available(), kernels.__file__)"
    )
    assert run.returncode == 0, run.stderr
    available, file = run.stdout.split()
    assert available == "False"
    assert Path(file).parent == ROOT / "kernels"


def test_kernels_says_nothing_of_itself() -> None:
    """`__version__` would make it look like Hugging Face's package of the same name."""
    run = python("import sys, kernels; print(hasattr(kernels, '__version__'), 'torch' in sys.modules)")
    assert run.stdout.split() == ["False", "False"], run.stderr
