"""A GGUF file's weights as transformers loads them: float32 safetensors in the cache folder, keyed by file digest.

    CACHE/NAME-DIGEST/              weights, configuration and tokenizer; CONTENTS lists its files and their sizes
    CACHE/digests/…json             a source's digest, valid while its path, size, times and inode are unchanged

A folder gets its final name once everything in it is on disk. One without CONTENTS, or with other files, is rebuilt.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import atomic
from ..cache_folder import cache_folder
from ..digest import digest, is_digest
from ..errors import DiskError, MissingExtra
from ..locks import FileLock
from .loading import libraries, loading, no_gguf_bar, whole_model

CONTENTS = "lorashelf.json"
DIGESTS = "digests"


def dequantised(file: Path) -> Path:
    """Return the folder with a GGUF file's weights and tokenizer, built once by one process.

    Raises MissingExtra, ModelError for a file that cannot be read, DiskError.
    """
    folder = cached(file)
    if _is_whole(folder):
        return folder
    if find_spec("gguf") is None:
        raise MissingExtra("a GGUF file", "gguf", "llm")
    atomic.make_parents(folder)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    with atomic.refusals(lock.path):
        lock.acquire(math.inf)
    try:
        if not _is_whole(folder):  # no other process built it meanwhile
            _make(file, folder)
    finally:
        atomic.remove(lock.path)  # before the release: a waiting process creates a new one
        lock.release()
    return folder


def cached(file: Path) -> Path:
    """Return the cache folder of a GGUF file, keyed by its whole content: all that two fine-tunes may differ in."""
    return cache_folder() / f"{file.stem}-{source_digest(file).removeprefix('b2-')[:16]}"


def source_digest(file: Path) -> str:
    """Return the digest of a file's content, cached while the file is unchanged."""
    path = os.path.realpath(file)
    kept = cache_folder() / DIGESTS / f"{digest([os.fsencode(path)]).removeprefix('b2-')[:32]}.json"
    with open(atomic.open_file(file), "rb") as handle:
        state = _state(path, handle.fileno())
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            known = json.loads(atomic.read_file(kept))
            if known == {**state, "digest": known["digest"]} and is_digest(known["digest"]):
                return str(known["digest"])
        still = time.time_ns() - max(state["mtime_ns"], state["ctime_ns"]) > atomic.TICK
        found = digest(iter(lambda: handle.read(1 << 22), b""))
        if still and state == _state(path, handle.fileno()):  # else the same times may belong to other content
            with contextlib.suppress(DiskError):  # without a cache, the file is hashed again next time
                atomic.make_parents(kept)
                document = json.dumps({**state, "digest": found}).encode()
                atomic.replace_file(kept, document, kept.parent)
    return found


def _state(path: str, handle: int) -> dict[str, Any]:
    """Return the file's attributes that change with its content."""
    found = os.fstat(handle)
    state = {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
    return {"path": os.fsencode(path).hex(), **state, "inode": found.st_ino, "device": found.st_dev}


def _make(file: Path, folder: Path) -> None:
    """Write the folder under a temporary name, make it durable, and replace the one there."""
    atomic.sweep_staging(folder.parent)
    with atomic.staging(folder.parent) as staged:
        _convert(file, staged)
        sizes = {path.name: path.stat().st_size for path in sorted(staged.iterdir())}
        atomic.settle_files(staged)
        atomic.write_file(staged / CONTENTS, [json.dumps({"files": sizes}, indent=2).encode()])
        atomic.remove(folder)
        atomic.publish(staged, folder)


def _convert(file: Path, folder: Path) -> None:
    torch, transformers = libraries()
    with loading(file.name, file), no_gguf_bar():
        config = getattr(transformers, "GgufConfig", None)  # older versions always dequantise
        options = {"quantization_config": config(dequantize=True)} if config else {}
        model = whole_model(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _is_whole(folder: Path) -> bool:
    """Return whether a folder holds the files listed in CONTENTS, each of the recorded size."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sizes = json.loads(atomic.read_file(folder / CONTENTS))["files"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    return False
