"""A test that skips without being named in tests/skips.toml fails the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    "side_by_side", [(), pytest.param(("-n", "2"), marks=pytest.mark.long)], ids=["one process", "two workers"]
)
def test_an_unnamed_skip_fails_the_run(side_by_side: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("conftest.py", "shapes.py"):
        (tmp_path / name).write_text((TESTS / name).read_text())
    (tmp_path / "skips.toml").write_text('[skips]\n"test_it.py::test_named" = "only for this test"\n')
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_runs(): pass\n"
        "def test_named(): pytest.skip('known')\n"
        "def test_unnamed(): pytest.skip('because')\n"
    )
    (tmp_path / "test_file.py").write_text("import pytest\npytest.skip('of all', allow_module_level=True)\n")
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    run = [*pytest_, *side_by_side, str(tmp_path)]
    unnamed = subprocess.run(run, capture_output=True, text=True)
    without = ["--deselect", "test_it.py::test_unnamed", "--ignore", str(tmp_path / "test_file.py")]
    named = subprocess.run([*run, *without], capture_output=True, text=True)
    assert unnamed.returncode == 1
    complaints = unnamed.stdout.split("skipped without being named in tests/skips.toml: ")[1:]
    assert [complaint.splitlines()[0] for complaint in complaints] == [
        "test_file.py: Skipped: of all",
        "test_it.py::test_unnamed: Skipped: because",
    ]
    assert named.returncode == 0
