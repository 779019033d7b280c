"""What the pages say is what the code does: states, settings, commands, links and examples are compared or run."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.batch import ARROWS, BatchStatus
from headrace.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_drawn_arrows_are_the_allowed_ones() -> None:
    (drawing,) = fenced(ROOT / "docs/lifecycle.md", "mermaid")
    drawn = set(re.findall(r"(\S+) --> (\S+)", drawing))
    allowed = {(str(source), str(target)) for source, targets in ARROWS.items() for target in targets}
    ends = {(str(state), "[*]") for state in BatchStatus if state.is_terminal}
    assert drawn == allowed | ends | {("[*]", "validating")}


def test_every_state_is_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/lifecycle.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(BatchStatus)


def test_the_settings_page_is_the_settings() -> None:
    rows = re.findall(
        r"^\| `HEADRACE_(\w+)` \| (.+?) \|", (ROOT / "docs/environment.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    written = {name.lower(): default.strip("`") for name, default in rows}
    real = {spec.name: "(empty)" if spec.default == "" else str(spec.default) for spec in dataclasses.fields(Settings)}
    assert written == real


def test_the_events_page_lists_the_events() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/events.md").read_text(encoding="utf-8"), re.MULTILINE)
    sources = [
        file.read_text(encoding="utf-8")
        for room in ("headrace", "engine", "worker", "api")
        for file in (ROOT / room).rglob("*.py")
    ]
    logged = {event for source in sources for event in re.findall(r"""["']event["']: ["'](\w+)["']""", source)}
    # The engine's supervisor hands its events to its owner as well, through one function.
    logged |= {event for source in sources for event in re.findall(r"""emit\(\s*logging\.[A-Z]+,\s*["'](\w+)["']""", source)}
    assert rows == sorted(logged)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_headrace_commands_in_the_pages_parse(page: Path) -> None:
    from headrace.cli import parser

    for block in fenced(page, "(?:sh|console|bash)"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and "=" in words[0]:
                words.pop(0)
            if words[:2] == ["./dev", "run"]:
                words = ["headrace", *words[2:]]
            if words and words[0].endswith("headrace"):
                parser().parse_args([word for word in words[1:] if word != "&"])


def test_dev_commands_in_the_readme_exist() -> None:
    script = (ROOT / "dev").read_text(encoding="utf-8")
    named = set(re.findall(r"\./dev (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"demo", "test"} <= named
    for command in named:
        assert re.search(rf"^    {command}\)", script, re.MULTILINE), command


def test_the_first_screen_has_the_two_commands() -> None:
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    assert "./dev demo" in screen
    assert "./dev test" in screen


def test_python_in_the_readme_compiles() -> None:
    blocks = fenced(ROOT / "README.md", "python")
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


@pytest.mark.slow
def test_the_pipeline_in_the_readme_and_the_example_run(tiny_model_dir: Path) -> None:
    (block,) = [block for block in fenced(ROOT / "README.md", "python") if "pipeline(" in block]
    for command in (
        ["-c", block.replace('"smollm2"', repr(str(tiny_model_dir)))],
        ["examples/pipeline.py", str(tiny_model_dir)],
    ):
        run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)
        assert run.returncode == 0, run.stderr
        assert len(run.stdout.splitlines()) >= 2


def test_decisions_are_numbered_and_dated() -> None:
    files = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [file.name[:4] for file in files] == [f"{n:04d}" for n in range(1, len(files) + 1)]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert re.match(rf"# {file.name[:4]} ", text)
        assert all(f"## {part}" in text for part in ("Context", "Decision", "Consequences")), file.name


def test_the_development_script_is_posix_shell() -> None:
    for script, shell in (("dev", "sh"), (".ci/run", "bash")):
        path = ROOT / script
        assert path.stat().st_mode & 0o111
        subprocess.run([shell, "-n", str(path)], check=True, timeout=20)
    help_text = subprocess.run([str(ROOT / "dev"), "help"], capture_output=True, text=True, check=True, timeout=20).stdout
    assert all(command in help_text for command in ("demo", "test", "check", "gpu", "bench"))


def test_every_example_says_what_it_is_for() -> None:
    for file in sorted((ROOT / "examples").glob("*.py")):
        run = subprocess.run(
            [sys.executable, "-m", "py_compile", str(file)], capture_output=True, text=True, check=False, timeout=60
        )
        assert run.returncode == 0, run.stderr
        assert file.read_text(encoding="utf-8").startswith('"""')
