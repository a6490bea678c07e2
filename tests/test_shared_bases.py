"""Folders of vlora and lorashare, written by them: refused with the command that makes PEFT folders of them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from factory import BASE, assert_same_delta, make_adapter, write_peft
from lorashelf import Adapter, read_adapter
from lorashelf.errors import AdapterFormatError

ALPHA = 12.0
needs = pytest.mark.skipif(
    find_spec("vlora") is None or find_spec("lorashare") is None, reason="vlora and lorashare are not installed"
)


def run(program: str, *words: object) -> None:
    code = {"vlora": "from vlora.cli import cli as main", "lorashare": "from lorashare.cli import main"}[program]
    command = [sys.executable, "-c", f"import sys; {code}; sys.argv[0] = {program!r}; main()", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Adapter]:
    """Three adapters of one rank and one scale, the only ones that both packages take, as folders in `originals`."""
    found = {name: make_adapter(i, scale=ALPHA / 4) for i, name in enumerate(("one", "two", "three"))}
    for name, adapter in found.items():
        write_peft(tmp_path / "originals" / name, adapter)
    return found


def refused(folder: Path) -> AdapterFormatError:
    with pytest.raises(AdapterFormatError) as error:
        read_adapter(folder)
    return error.value


def words_after(program: str, error: AdapterFormatError) -> Iterator[str]:
    """The command in a cure, without the program."""
    return iter(shlex.split((error.cure or "").rpartition(f": {program} ")[2]))


@needs
def test_the_cure_for_vlora_gives_the_adapters(tmp_path: Path, adapters: dict[str, Adapter]) -> None:
    run("vlora", "compress", *(tmp_path / "originals" / name for name in adapters), "-o", tmp_path / "basis", "-k", 3)
    error = refused(tmp_path / "basis")
    assert error.faults == ("a subspace of vlora, in which several adapters share a basis",)
    for name, adapter in adapters.items():
        given = {"TASK": name, "ALPHA": str(ALPHA), "BASE": BASE}
        words = [given.get(word, word) for word in words_after("vlora", error)]
        words[words.index("-o") + 1] = str(tmp_path / name)
        run("vlora", *words)
        found = read_adapter(tmp_path / name)
        assert_same_delta(adapter, found, tolerance=1e-5)
        assert found.base == adapter.base
    words = [word for word in words if word not in ("--alpha", str(ALPHA))]
    words[words.index("-o") + 1] = str(tmp_path / "without")
    run("vlora", *words)
    with pytest.raises(AssertionError):  # as the cure states, vlora does not store alpha
        assert_same_delta(adapter, read_adapter(tmp_path / "without"), tolerance=0.2)


@needs
def test_the_cure_for_lorashare_gives_the_adapters(tmp_path: Path, adapters: dict[str, Adapter]) -> None:
    run(
        "lorashare",
        "compress",
        *(tmp_path / "originals" / name for name in adapters),
        "-o",
        tmp_path / "basis",
        "-k",
        12,
    )
    inside = refused(tmp_path / "basis" / "adapters" / "one")
    error = refused(tmp_path / "basis")
    assert inside.faults == error.faults == ("a checkpoint of lorashare, in which several adapters share a basis",)
    assert inside.cure == error.cure
    words = list(words_after("lorashare", error))
    words[words.index("-o") + 1] = str(tmp_path / "adapters")
    run("lorashare", *words)
    for name, adapter in adapters.items():
        found = read_adapter(tmp_path / "adapters" / name)
        assert (found.base, found.modules.scales) == (adapter.base, adapter.modules.scales)
        assert_same_delta(adapter, found, tolerance=0.25)  # lossy even with every component


@pytest.mark.parametrize("name", ["subspace_meta.json", "share_config.json"])
def test_they_are_known_by_their_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    error = refused(tmp_path)
    assert "several adapters share a basis" in error.what
    assert str(tmp_path) in (error.cure or "")
