"""PEFT adapter folders in and out: `adapter_config.json` and `adapter_model.safetensors`, exactly or not at all."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import atomic
from .adapter import WIDTHS, Adapter, BaseId, Factors, Matrix, Modules, Shape, Stack, numpy_dtype
from .digest import Hasher, digest
from .errors import AdapterFormatError, UsageError
from .objects import CONFIG_FILE, TENSOR_FILE, length
from .parallel import following
from .peft_config import RESOLVED, config_faults, resolved_scales, stored_scale, unmatched, written_config
from .tensorfile import STORED, Lost, TensorFile, encode_header

LARGEST_VALUE = 1e9
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<half>[AB])\.weight")
_TORCH = {"f32": "F32", "f16": "F16", "bf16": "BF16"}

_FOREIGN_KEYS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"lora_magnitude_vector"), "a DoRA magnitude"),
    (re.compile(r"lora_embedding_[AB]"), "a factor of an embedding (v1 reads linear modules)"),
    (re.compile(r"lora_[AB]\.bias$"), "a bias of a factor"),
    (re.compile(r"modules_to_save"), "a module saved whole"),
    (re.compile(r"lora_(up|down)\.|^lora_(unet|te)"), "a key of kohya's style; convert it to PEFT's first"),
    (re.compile(r"lora_[ab]$"), "a key of MLX's or GGUF's style; convert it to PEFT's first"),
    (
        re.compile(r"lora_[AB]\.[^.]+\.weight$"),
        "a key with an adapter's name in it; save it with PEFT's save_pretrained",
    ),
    (re.compile(r"lora_[AB]\.weight$"), "lacks PEFT's prefix 'base_model.model.'"),
)


def read_adapter(path: str | Path, *, check_values: bool = True) -> Adapter:
    """Read a PEFT adapter folder; tensors stay in the file, held open, until they are used.

    Each module's Factors are a (r, din), b (dout, r) float32 and the resolved scale. With `check_values` every tensor
    is read once and refused if it holds NaN or infinity. Raises AdapterFormatError with all faults of config, header
    and values at once; the adapter's modules raise it if the file changes before they are read.
    """
    return _read(atomic.expanded(path), check_values, None)


def read_stored(folder: Path, lost: Lost) -> Adapter:
    """Read an object of a shelf, whose values were checked when it was stored; `lost` makes the error of a file that
    changes later. Raises AdapterFormatError.
    """
    return _read(folder, False, lost)


def _read(folder: Path, check_values: bool, lost: Lost | None) -> Adapter:
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        cure = "give a PEFT adapter's folder that this user can read"
        raise AdapterFormatError([f"cannot be read: {error.strerror}"], where=str(folder), cure=cure) from error
    faults: list[str] = []
    config = _read_config(folder, faults)
    tensors = _read_tensors(folder, faults, lost)
    halves = _pair(tensors, faults) if tensors is not None else {}
    shapes = _shapes(tensors, halves, faults) if tensors is not None else {}
    scales = resolved_scales(config, shapes, faults) if config is not None else {}
    if config is not None and tensors is not None:
        faults += unmatched(config, shapes)
    if tensors is not None and check_values:
        faults += _bad_values(tensors, halves)
    if config is not None and _read_config(folder, []) != config:
        faults.append(f"{CONFIG_FILE} changed while the adapter was read")
    if faults or config is None or tensors is None:
        raise AdapterFormatError(faults, where=str(folder), cure=_cure(faults, folder))
    stored = sorted({STORED[tensors[name].dtype] for pair in halves.values() for name in pair.values()})
    return Adapter(
        modules=_FileModules(tensors, halves, shapes, scales),
        base=BaseId(config.get("base_model_name_or_path") or "", config.get("revision")),
        dtype=stored[0] if len(stored) == 1 else "f32",
        config={key: value for key, value in config.items() if key not in RESOLVED},
    )


def write_adapter(adapter: Adapter, path: str | Path, *, extra_files: Mapping[str, bytes] | None = None) -> str:
    """Write an adapter as a PEFT folder that appears whole or not at all; returns its object digest.

    `extra_files` are further files, name → content, that appear with it; readers of adapters pass them over.
    The factors are rounded once, to `adapter.dtype`; scales go to `lora_alpha` and `alpha_pattern`, ranks to `r` and
    `rank_pattern`. Raises UsageError if the path exists, AdapterFormatError if a value overflows the dtype, DiskError.
    """
    folder = atomic.expanded(path)
    if folder.exists():
        raise UsageError("the output exists already", where=str(folder), cure="choose another folder or delete it")
    atomic.make_parents(folder)
    with atomic.staging(folder.parent) as staged:
        identity = write_files(adapter, staged)
        for name, content in (extra_files or {}).items():
            atomic.write_file(staged / name, [content])
        atomic.publish(staged, folder)
    return identity


def write_files(adapter: Adapter, folder: Path) -> str:
    """Write both files into an existing folder, synced; returns their `object_digest`."""
    encoded, identity = encode(adapter), Hasher()
    with following(identity.update) as hashed:  # the very bytes that are written; it takes as long as to write and sync
        hashed(encoded.head)
        atomic.write_file(folder / CONFIG_FILE, [encoded.config])
        atomic.write_file(folder / TENSOR_FILE, map(hashed, encoded.tensor_chunks()))
    return identity.digest()


@dataclass(frozen=True, slots=True)
class Encoded:
    """An adapter as it would stand on disk: the config's bytes, the tensor file's header, the size of both files."""

    adapter: Adapter
    config: bytes
    header: bytes
    size: int

    def digest(self) -> str:
        """The object digest: what `object_digest` of the written folder is."""
        return digest(chain([self.head], self.tensor_chunks()))

    @property
    def head(self) -> bytes:
        """What the digest covers before the tensor file's bytes."""
        return length(len(self.config)) + self.config + length(self.size - len(self.config))

    def tensor_chunks(self) -> Iterator[bytes | memoryview]:
        """The tensor file's bytes, one module in memory at a time."""
        yield self.header
        for path, factors in self.adapter.modules.items():
            for half, values in (("A", factors.a), ("B", factors.b)):
                yield _stored(values, self.adapter.dtype, f"{path}.lora_{half}").reshape(-1).view(np.uint8).data


def rounded(adapter: Adapter) -> Adapter:
    """The adapter as it comes back from a disk: factors rounded to its dtype, scales to what an alpha gives back. One
    that is there already is returned as it is, still read lazily. Raises AdapterFormatError on overflow.
    """
    shapes, resolved = adapter.shapes, adapter.modules.scales
    scales = {path: stored_scale(resolved[path], shape.rank) for path, shape in shapes.items()}
    there, modules = adapter.dtype == "f32" and scales == resolved, {}
    for path, f in adapter.modules.items():
        a, b = (
            _stored(values, adapter.dtype, f"{path}.lora_{half}").astype("<f4", copy=False)
            for half, values in (("A", f.a), ("B", f.b))
        )
        if not there:
            modules[path] = Factors(a, b, scales[path])
    return adapter if there else adapter.with_factors(modules)


def _stored(values: Matrix, dtype: str, name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype=numpy_dtype(dtype))
    if not np.isfinite(stored).all():
        largest = float(np.abs(values).max())
        raise AdapterFormatError(
            [f"{name}: {largest:.3g} is beyond what {dtype} can hold"], cure="store in bf16 or f32"
        )
    return stored


def encode(adapter: Adapter) -> Encoded:
    """What `write_files` would write, without writing: deterministic, so sizes are known before anything is stored."""
    dtype = _TORCH[adapter.dtype]
    described = []
    for path, (dout, rank, din) in adapter.shapes.items():
        described.append((f"base_model.model.{path}.lora_A.weight", dtype, (rank, din)))
        described.append((f"base_model.model.{path}.lora_B.weight", dtype, (dout, rank)))
    header = encode_header(described)
    config = (json.dumps(written_config(adapter), indent=2, ensure_ascii=False) + "\n").encode()
    values = adapter.parameters * WIDTHS[adapter.dtype]
    return Encoded(adapter, config, header, len(config) + len(header) + values)


class _FileModules(Modules):
    """Modules of an open file: read, and widened to float32, as a module is taken out."""

    def __init__(
        self,
        tensors: TensorFile,
        halves: Mapping[str, Mapping[str, str]],
        shapes: Mapping[str, Shape],
        scales: Mapping[str, float],
    ) -> None:
        self._tensors, self._halves, self._scales = tensors, halves, scales
        self._shapes = dict(sorted(shapes.items()))

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    @property
    def scales(self) -> Mapping[str, float]:
        return self._scales

    def stack(self, paths: Sequence[str]) -> Stack:
        a, b = (self._tensors.stack([self._halves[path][half] for path in paths]) for half in "AB")
        scales = np.array([self._scales[path] for path in paths])
        return Stack(a.astype("<f4", copy=False), b.astype("<f4", copy=False), scales)

    def __getitem__(self, path: str) -> Factors:
        a, b = (self._tensors.array(self._halves[path][half]) for half in "AB")
        return Factors(a.astype("<f4", copy=False), b.astype("<f4", copy=False), self._scales[path])

    def __contains__(self, path: object) -> bool:
        return path in self._shapes  # without reading a tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


# reading ------------------------------------------------------------------------------------------------------------


def _read_config(folder: Path, faults: list[str]) -> dict[str, Any] | None:
    try:
        config = json.loads(atomic.read_file(folder / CONFIG_FILE))
    except FileNotFoundError:
        faults.append(f"{CONFIG_FILE} is missing")
        return None
    except OSError as error:
        faults.append(f"{CONFIG_FILE} cannot be read: {error.strerror}")
        return None
    except (ValueError, RecursionError) as error:
        faults.append(f"{CONFIG_FILE} cannot be read: {error}")
        return None
    if not isinstance(config, dict):
        faults.append(f"{CONFIG_FILE} is not a JSON object")
        return None
    if not _encodable(config):
        faults.append(f"{CONFIG_FILE} holds text that is not Unicode (a lone surrogate)")
        return None
    faults += config_faults(config)
    return config


def _encodable(document: Any) -> bool:
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_tensors(folder: Path, faults: list[str], lost: Lost | None) -> TensorFile | None:
    path = folder / TENSOR_FILE
    if not os.path.lexists(path):
        pickles = sorted(item.name for item in folder.glob("*.bin"))
        if pickles:
            faults.append(f"{pickles[0]} is a pickle, which can run code when loaded: refused, never opened")
        else:
            faults.append(f"{TENSOR_FILE} is missing")
        return None
    try:
        return TensorFile(path, lost)
    except AdapterFormatError as error:
        faults += [f"{TENSOR_FILE}: {fault}" for fault in error.faults]
        return None


def _pair(tensors: TensorFile, faults: list[str]) -> dict[str, dict[str, str]]:
    halves: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = _KEY.fullmatch(name)
        if not name.isprintable():
            faults.append(f"{name!r}: not a printable name")
        elif match:
            halves.setdefault(match["path"], {})[match["half"]] = name
        else:
            faults.append(f"{name}: {_foreign(name)}")
    for path, pair in halves.items():
        for half in "AB":
            if half not in pair:
                faults.append(f"{path}: lora_{half} is missing")
    if not halves and not faults:
        faults.append("no LoRA factors in the file")
    return {path: pair for path, pair in halves.items() if len(pair) == 2}


def _foreign(name: str) -> str:
    for pattern, meaning in _FOREIGN_KEYS:
        if pattern.search(name):
            return meaning
    return "unknown tensor"


def _shapes(tensors: TensorFile, halves: Mapping[str, Mapping[str, str]], faults: list[str]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for path, pair in halves.items():
        entries = [tensors[pair[half]] for half in "AB"]
        odd = [
            f"{path}.lora_{half}: dtype {entry.dtype} (supported: {', '.join(STORED)})"
            for half, entry in zip("AB", entries, strict=True)
            if entry.dtype not in STORED
        ]
        odd += [
            f"{path}.lora_{half}: shape {entry.shape} is not that of a linear module's factor"
            for half, entry in zip("AB", entries, strict=True)
            if len(entry.shape) != 2 or 0 in entry.shape
        ]
        if not odd and entries[0].shape[0] != entries[1].shape[1]:
            odd = [f"{path}: lora_A has rank {entries[0].shape[0]}, lora_B has rank {entries[1].shape[1]}"]
        faults += odd
        if not odd:
            shapes[path] = Shape(entries[1].shape[0], entries[0].shape[0], entries[0].shape[1])
    return shapes


def _bad_values(tensors: TensorFile, halves: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    for pair in halves.values():
        for name in pair.values():
            if tensors[name].dtype in STORED and 0 not in tensors[name].shape:
                values = tensors.array(name)
                with np.errstate(invalid="ignore"):
                    low, high = float(values.min()), float(values.max())  # NaN if any value is
                if not math.isfinite(low - high):
                    kind = "NaN" if np.isnan(values).any() else "infinity"
                    bad = values.size - int(np.isfinite(values).sum())
                    yield f"{name}: {bad} of {values.size} values are {kind}"
                elif (largest := max(-low, high)) > LARGEST_VALUE:
                    yield f"{name}: holds {largest:.0e}; no trained factor does"


def _cure(faults: Sequence[str], folder: Path) -> str:
    if next(folder.glob(f"*/{CONFIG_FILE}"), None):
        return f"this folder holds adapters: give them one by one, {folder}/*/"
    if any("pickle" in fault for fault in faults):
        return "load it where you trust it and save it again with safe_serialization=True"
    if any("is set:" in fault or "init_lora_weights" in fault for fault in faults):
        return "train or convert it to a plain LoRA (PEFT documents the conversion), then add that"
    return "save the adapter again with PEFT's save_pretrained"
