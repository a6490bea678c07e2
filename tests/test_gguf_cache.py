"""The cache of dequantised GGUF files: whole or made again, made once, and found without reading the file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorashelf import atomic, base_folder
from lorashelf.cache_folder import cache_folder, keep_latest
from lorashelf.models import gguf_cache
from lorashelf.models.gguf_cache import CONTENTS, DIGESTS, cached, dequantised, source_digest
from tiny_gguf import tiny_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORASHELF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file whose times are older than a file system's clock can tell apart."""
    path = tiny_gguf(tmp_path / "base.gguf")
    os.utime(path, (1e9, 1e9))
    time.sleep(2e-9 * atomic.TICK)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_configuration(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "the configuration alone": only_configuration,
    "the weights cut off": lambda folder: cut(folder / "model.safetensors"),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "as an earlier version left it": lambda folder: (folder / CONTENTS).unlink(),
    "a list that is cut off": lambda folder: cut(folder / CONTENTS),
    "a list of nothing": lambda folder: (folder / CONTENTS).write_text('{"files": {}}'),
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_is_not_whole_is_made_again(cache: Path, source: Path, damage: str) -> None:
    folder = dequantised(source)
    whole = contents(folder)
    DAMAGE[damage](folder)
    assert base_folder(source) == folder
    assert contents(folder) == whole
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, DIGESTS]


def test_a_whole_folder_is_taken_as_it_is(cache: Path, source: Path) -> None:
    folder = dequantised(source)
    before = {path: path.stat().st_ino for path in folder.iterdir()}
    assert dequantised(source) == folder
    assert {path: path.stat().st_ino for path in folder.iterdir()} == before


def test_what_a_folder_holds_is_on_the_disk_before_it_takes_its_name(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, rename, flushed, named = atomic._flush, os.rename, set(), []

    def watched_flush(handle: int) -> None:
        flush(handle)
        flushed.add(os.fstat(handle).st_ino)

    def watched_rename(staged: Path, final: Path) -> None:
        named.append((final, {path.stat().st_ino for path in Path(staged).iterdir()} - flushed))
        rename(staged, final)

    monkeypatch.setattr(atomic, "_flush", watched_flush)
    monkeypatch.setattr(os, "rename", watched_rename)
    folder = dequantised(source)
    assert named == [(folder, set())]


def test_two_processes_make_one_folder(cache: Path, source: Path) -> None:
    code = f"from lorashelf import base_folder; print(base_folder({str(source)!r}))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folder = cached(source)
    assert [process.communicate() for process in both] == [(f"{folder}\n", "")] * 2  # and no progress bar
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, DIGESTS]


# the digest -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is hashed."""
    plain, sizes = gguf_cache.digest, []

    def counting(chunks: object) -> str:
        whole = list(chunks)
        sizes.append(sum(map(len, whole)))
        return plain(whole)

    monkeypatch.setattr(gguf_cache, "digest", counting)
    return sizes


def test_a_file_is_hashed_once(cache: Path, source: Path, hashed: list[int]) -> None:
    size = source.stat().st_size
    assert source_digest(source) == source_digest(source) == gguf_cache.digest([source.read_bytes()])
    assert hashed.count(size) == 2  # one of them is this test's own


def touched(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def replaced(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[:-1] + b"x")
    other.replace(path)


@pytest.mark.parametrize("change", [touched, replaced])
@pytest.mark.parametrize("same_times", [True, False])
def test_a_file_that_changes_in_place_has_another_digest(
    cache: Path, source: Path, change: Callable[[Path], None], same_times: bool
) -> None:
    before = source_digest(source)
    change(source)
    if same_times:
        os.utime(source, (1e9, 1e9))
    assert source_digest(source) != before


def test_a_file_written_just_now_is_not_remembered(cache: Path, tmp_path: Path, hashed: list[int]) -> None:
    """Its next content may bear the same times."""
    (tmp_path / "new.gguf").write_bytes(bytes(1000))
    os.utime(tmp_path / "new.gguf", (4e9, 4e9))
    source_digest(tmp_path / "new.gguf")
    source_digest(tmp_path / "new.gguf")
    assert hashed.count(1000) == 2


@pytest.mark.parametrize("content", [b"", b"[]", b'{"digest": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_memory_is_passed_over(cache: Path, source: Path, content: bytes) -> None:
    found = source_digest(source)
    (memory,) = (cache / DIGESTS).iterdir()
    memory.write_bytes(content)
    assert source_digest(source) == found
    assert memory.read_bytes() != content


def test_a_cache_that_cannot_be_written_costs_the_memory_only(tmp_path: Path, source: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LORASHELF_CACHE", str(tmp_path / "cache"))
        assert source_digest(source) == gguf_cache.digest([source.read_bytes()])


def test_two_fine_tunes_of_one_size_are_kept_apart(cache: Path, tmp_path: Path) -> None:
    """Their names, sizes and headers, vocabulary included, are equal; a weight at the end is not."""
    for name, last in (("one", b"a"), ("two", b"b"), ("copy", b"a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "base.gguf").write_bytes(b"GGUF" + bytes(6_000_000) + last)
    one, two, copy = (cached(tmp_path / name / "base.gguf") for name in ("one", "two", "copy"))
    assert one == copy != two


# the cache folder -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the places of Linux")
def test_an_entry_that_another_process_deletes_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        (tmp_path / f"entry-{i}").write_text("x")
        os.utime(tmp_path / f"entry-{i}", (i, i))
    iterdir = Path.iterdir

    def listed(path: Path) -> Iterator[Path]:
        found = sorted(iterdir(path))
        found[3].unlink()
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", listed)
    keep_latest(tmp_path, 2)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry-1", "entry-2"]


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"LORASHELF_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/lorashelf"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "/home/ann/.cache/lorashelf"),  # to be passed over, says its standard
        ({}, "/home/ann/.cache/lorashelf"),
    ],
)
def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str) -> None:
    for name in ("LORASHELF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/ann", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)
