"""The documents cannot lie: links lead somewhere, the README's Python runs, the contributor's method works."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/*.md")]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", document.read_text()):
        led = document.parent / target if target else document
        assert led.exists(), target
        assert not anchor or anchor in anchors(led), f"{target}#{anchor}"


def test_a_lost_marker_of_a_generated_part_is_named() -> None:
    replaced = runpy.run_path(str(ROOT / "docs" / "tables.py"))["replaced"]
    text = "a\n<!-- generated: layers -->\nold\n<!-- end layers -->\nb"
    assert replaced(text, "layers", "end layers", "new") == text.replace("old", "new")
    for lost in ("<!-- generated: layers -->", "<!-- end layers -->"):
        with pytest.raises(SystemExit, match="<!-- generated: layers --> … <!-- end layers -->"):
            replaced(
                text.replace(lost, "") + text[1:].replace("layers -->", "other -->", 1), "layers", "end layers", ""
            )


def anchors(document: Path) -> set[str]:
    """A heading's words in lower case, joined by hyphens, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run_python(code: str, folder: Path) -> str:
    (folder / "examples").symlink_to(ROOT / "examples")
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_readme_example_runs(tmp_path: Path) -> None:
    code = blocks("README.md", "python")[0]
    printed = run_python(code, tmp_path)
    assert (Path(printed.strip()) / "adapter_model.safetensors").exists()
    assert (tmp_path / "qa-both" / "adapter_config.json").exists()


@pytest.mark.long
def test_the_readme_commands_run(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [
        line.split("#")[0] for line in blocks("README.md", "bash")[1].splitlines() if line.startswith("lorashelf")
    ]
    assert [command.split()[1] for command in commands] == ["init", "add", "ls", "route", "generate"]
    for command in commands:
        program = command.replace("lorashelf", f"{sys.executable} -m lorashelf", 1)
        run = subprocess.run(program, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, (command, run.stderr)
    assert run.stdout == "She goes to school every day.\n"


def test_the_contributors_method_works(tmp_path: Path) -> None:
    (code,) = blocks("CONTRIBUTING.md", "python")
    use = """
import lorashelf as ls
x = ls.read_adapter("examples/zoo/qa-en")
y = ls.merge([x, x, x], method="median_svd")
assert abs(ls.norm(ls.combine([x, y], [1, -1])) / ls.norm(x)) < 1e-5
"""
    run_python(code + use, tmp_path)
