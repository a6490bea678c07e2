"""A test that skips without being named in tests/skips.toml fails the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_an_unnamed_skip_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "skips.toml").write_text('[skips]\n"test_it.py::test_named" = "only for this test"\n')
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_runs(): pass\n"
        "def test_named(): pytest.skip('known')\n"
        "def test_unnamed(): pytest.skip('because')\n"
    )
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    unnamed = subprocess.run(run, capture_output=True, text=True)
    named = subprocess.run([*run, "--deselect", "test_it.py::test_unnamed"], capture_output=True, text=True)
    assert unnamed.returncode == 1
    assert "test_unnamed: Skipped: because" in unnamed.stdout
    assert "test_named" not in unnamed.stdout.split("skipped without")[1]
    assert named.returncode == 0
