"""What could run somebody else's code, or open somebody else's file, is not there: read from the sources, and seen at work."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from headrace.broker import make_celery
from headrace.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("headrace", "engine", "kernels", "worker", "api", "migrations", "examples")
RUNS_WHAT_IT_READS = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
OPENS = {
    "open",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "FileResponse",
    "StaticFiles",
    "mkstemp",
    "NamedTemporaryFile",
}


def trees(*rooms: str) -> Iterator[tuple[str, ast.AST]]:
    for room in rooms:
        for file in sorted((ROOT / room).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text(encoding="utf-8"))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield the last name of each called expression, and the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


def faults_in(where: str, tree: ast.AST) -> list[str]:
    """Return what in the source could run code that it reads."""
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{where}:{node.lineno} imports {name}" for name in names if name.partition(".")[0] in RUNS_WHAT_IT_READS]
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not is_false(node.value):
            found.append(f"{where}:{node.value.lineno} may run a model's own code")
    for name, call in calls(tree):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in ("eval", "exec") and isinstance(call.func, ast.Name):
            found.append(f"{where}:{call.lineno} calls {name}")
        owner = getattr(getattr(call.func, "value", None), "id", "")
        if (owner, name) == ("torch", "load") and not is_true(given.get("weights_only")):
            found.append(f"{where}:{call.lineno} loads pickles")
        if (owner, name) == ("yaml", "load"):
            found.append(f"{where}:{call.lineno} loads any YAML")
        # Left out, transformers asks on the terminal, and takes silence of a certain kind for a yes.
        if name == "from_pretrained" and owner.startswith("Auto") and "trust_remote_code" not in given:
            found.append(f"{where}:{call.lineno} leaves trust_remote_code out")
        if any(keyword == "shell" and is_true(value) for keyword, value in given.items()):
            found.append(f"{where}:{call.lineno} hands a line to a shell")
    return found


def is_false(value: ast.AST | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def is_true(value: ast.AST | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def test_nothing_runs_what_it_reads() -> None:
    assert [fault for where, tree in trees(*ROOMS) for fault in faults_in(where, tree)] == []


def test_the_search_finds_what_it_looks_for() -> None:
    bad = (
        "import pickle", "from joblib import load", "torch.load(p)", "torch.load(p, weights_only=False)", "yaml.load(x)", "eval('1')",
        "AutoTokenizer.from_pretrained(p)", "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "f(trust_remote_code=given)", "subprocess.run(line, shell=True)",
    )  # fmt: skip
    assert [len(faults_in("x", ast.parse(line))) for line in bad] == [1] * len(bad)
    good = ("torch.load(p, weights_only=True)", "AutoTokenizer.from_pretrained(p, trust_remote_code=False)", "model.eval()")
    assert [faults_in("x", ast.parse(line)) for line in good] == [[]] * len(good)


def test_workers_take_json_and_nothing_else() -> None:
    conf = make_celery(Settings()).conf
    assert list(conf.accept_content) == ["json"]
    assert {conf.task_serializer, conf.result_serializer, conf.event_serializer} == {"json"}
    assert conf.result_accept_content in (None, ["json"])


def test_the_api_opens_no_file_but_its_own_style_sheet() -> None:
    """A path that a request names is a text to it."""
    opened = {where for where, tree in trees("api") for name, _ in calls(tree) if name in OPENS}
    assert opened == {"api/docs.py"}
