"""Hub ids of adapters and bases, found in a cache as huggingface_hub lays it out: blobs, and links to them."""

from __future__ import annotations

import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from command import Command
from factory import assert_same_delta, make_adapter, write_peft
from lorashelf import read_adapter
from lorashelf.errors import AdapterFormatError, MissingExtra, ModelError
from lorashelf.models.base_model import gguf_file, located, open_base
from tiny_gguf import tiny_gguf

MAIN, OLD = "0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(hub: Path, name: str, files: Path, commit: str = MAIN, ref: str = "main") -> None:
    """Move the files of a folder into the cache, as a download does."""
    repository = hub / "--".join(["models", *name.split("/")])
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    for path in files.iterdir():
        blob = repository / "blobs" / f"{commit[:8]}-{path.name}"
        path.rename(blob)
        (repository / "snapshots" / commit / path.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs" / ref).write_text(commit)


def test_an_adapter_is_read_by_its_hub_id_and_revision(hub: Path, tmp_path: Path) -> None:
    new, old = make_adapter(1), make_adapter(2)
    cached(hub, "acme/mail-lora", write_peft(tmp_path / "new", new))
    cached(hub, "acme/mail-lora", write_peft(tmp_path / "old", old), OLD, "v1")
    assert_same_delta(read_adapter("acme/mail-lora"), new)
    for revision in ("v1", OLD):
        assert_same_delta(read_adapter(f"acme/mail-lora@{revision}"), old)
    with pytest.raises(AdapterFormatError, match="'acme/mail-lora@v2' is not a folder or a hub id in the cache"):
        read_adapter("acme/mail-lora@v2")


def test_an_existing_folder_wins(hub: Path, tmp_path: Path) -> None:
    cached(hub, "acme/mail-lora", write_peft(tmp_path / "new", make_adapter(1)))
    write_peft(tmp_path / "acme" / "mail-lora", make_adapter(3))
    assert_same_delta(read_adapter("acme/mail-lora"), make_adapter(3))


def test_a_task_is_named_without_the_revision(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached(hub, "acme/mail-lora", write_peft(tmp_path / "old", make_adapter(2)), OLD, "v1")
    run = Command(capsys)
    assert run("init", tmp_path / "a.shelf", "--slots", 1)[0] == 0
    code, document = run("add", tmp_path / "a.shelf", "acme/mail-lora@v1")
    assert (code, document["added"][0]["task"]) == (0, "mail-lora")


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match="there is no folder 'acme/mail-lora'"):
        read_adapter("acme/mail-lora")


def test_a_base_is_a_gguf_file_of_a_repository(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASHELF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    tiny_gguf(tmp_path / "files" / "tiny.F16.gguf")
    cached(hub, "acme/tiny-GGUF", tmp_path / "files")
    name = "acme/tiny-GGUF/tiny.F16.gguf"
    there = hub / "models--acme--tiny-GGUF" / "snapshots" / MAIN / "tiny.F16.gguf"
    assert located(name) == there
    assert gguf_file(name) == (there, name)
    assert open_base(name, device="cpu").name == name
    with pytest.raises(ModelError, match="no hub file in the local cache") as refused:
        open_base("acme/tiny-GGUF/tiny.Q8_0.gguf")
    assert "hf download acme/tiny-GGUF tiny.Q8_0.gguf" in str(refused.value)
