"""Reading and writing PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from zlib import crc32

import numpy as np

from .. import atomic
from ..digest import Hasher
from ..errors import AdapterFormatError, Fault
from ..execution import following
from ..faults import Faults
from ..lora.adapter import WIDTHS, Adapter, BaseId, Factors, Modules, Shape, Stack
from .codec import Codec
from .objects import CONFIG_FILE, TENSOR_FILE, Stored, StoredFile, length, object_digest
from .peft_config import carried, config_faults, encodable, resolved_scales, training_only, unmatched
from .peft_folder import adapter_folder, not_a_folder, not_the_file, prompt_notices, something_else, trained_beside
from .peft_tensors import factor_shapes, paired, value_faults
from .safetensors import SPELLED, STORED, Guard, Lost, TensorFile, encode_header, stored_values
from .written_config import stored_scale, written_config


def read_adapter(path: str | Path, *, check_values: bool = True) -> Adapter:
    """Read a PEFT adapter folder, or a hub id in the local cache (owner/name, owner/name@revision); tensors stay in the
    file, held open, until they are used.

    Each module's Factors are a (r, din), b (dout, r) float32 and the resolved scale. With `check_values` every tensor
    is read once and refused if it contains NaN or infinity. Module names are cleaned of what training tools add.
    Raises AdapterFormatError with all faults of config, header and values at once; the adapter's modules raise it if
    the file changes before they are read; MissingExtra for a hub id without huggingface_hub.
    """
    return _read(adapter_folder(path), check_values, None)


def _read(folder: Path, check_values: bool, guard: Guard | None) -> Adapter:
    try:
        names = {file.name for file in folder.iterdir()}
        found = something_else(folder, names)
    except OSError as error:
        raise AdapterFormatError([not_a_folder(folder, error)], where=str(folder)) from error
    if found is not None:
        raise AdapterFormatError([found], where=str(folder))
    faults = Faults()
    config = _read_config(folder, faults, stored=guard is not None)
    tensors = _read_tensors(folder, faults, guard)
    faults.extend(trained_beside(names))
    in_training = training_only(config or {})
    halves = paired(tensors, tuple(in_training.values()), faults, given=guard is None) if tensors is not None else {}
    shapes = factor_shapes(tensors, halves, faults) if tensors is not None else {}
    scales = resolved_scales(config, shapes, faults) if config is not None else {}
    if config is not None and tensors is not None:
        unmatched(config, shapes, faults)
    if tensors is not None and check_values:
        value_faults(tensors, halves, faults)
    if config is not None and guard is None and _read_config(folder, Faults()) != config:
        cure = "wait until the program that writes the file is done, then run the command again"
        faults.append(f"{CONFIG_FILE} changed while the adapter was being read", cure)
    if config is not None and tensors is not None and guard is not None:
        guard.check(0, tensors.header, _config_sum(folder))
    if faults or config is None or tensors is None:
        raise AdapterFormatError(faults.listed(), where=str(folder))
    stored = sorted({STORED[tensors[name].dtype] for pair in halves.values() for name in pair.values()})
    base = BaseId(config.get("base_model_name_or_path") or "", config.get("revision"))
    return Adapter(
        modules=_FileModules(tensors, halves, shapes, scales),
        base=base,
        dtype=stored[0] if len(stored) == 1 else "f32",
        config=carried(config),
        notices=(
            *(f"{name} affects training only: it and its tensors are not kept" for name in in_training),
            *prompt_notices(folder, names, base.name),
        ),
    )


def write_adapter(adapter: Adapter, path: str | Path, *, extra_files: Mapping[str, bytes] | None = None) -> str:
    """Write an adapter as a PEFT folder that appears whole or not at all; returns its object digest.

    `extra_files` are further files, name → content, written with it; readers of adapters ignore them.
    The factors are rounded once, to `adapter.dtype`; scales go to `lora_alpha` and `alpha_pattern`, ranks to `r` and
    `rank_pattern`. Raises UsageError if the path exists, AdapterFormatError if a value overflows the dtype, DiskError.
    """
    with atomic.appearing(atomic.expanded(path)) as staged:
        identity, _ = encode(adapter).write(staged)
        for name, content in (extra_files or {}).items():
            atomic.write_file(staged / name, [content])
    return identity


@dataclass(frozen=True, slots=True)
class PeftFiles:
    """An adapter's files before they are written: the config, the tensor file's header, the size of both files."""

    adapter: Adapter
    config: bytes
    header: bytes
    size: int

    def stored(self) -> Stored:
        """Return what `write` would return, without writing."""
        identity, sums = Hasher(), []
        identity.update(self.head)
        for chunk in self.tensor_chunks():
            identity.update(chunk)
            sums.append(crc32(chunk))
        return self._stored(identity, sums)

    def write(self, folder: Path) -> Stored:
        """Write both files into an existing folder, synced; the id and sums are those of the bytes written."""
        identity, sums = Hasher(), []

        def note(chunk: bytes | memoryview) -> None:
            identity.update(chunk)
            sums.append(crc32(chunk))

        with following(note) as noted:  # hashing takes as long as writing and syncing
            identity.update(self.head)
            atomic.write_file(folder / CONFIG_FILE, [self.config])
            atomic.write_file(folder / TENSOR_FILE, map(noted, self.tensor_chunks()))
        return self._stored(identity, sums)

    def _stored(self, identity: Hasher, sums: Sequence[int]) -> Stored:
        """Return the record, given the CRC-32 of every chunk, of which the header is the first."""
        return Stored(identity.digest(), (crc32(self.header, crc32(self.config)), *sums[1:]))

    files: ClassVar[Sequence[StoredFile]] = ()

    def publish(self, objects: Path, staging: Path) -> Stored:
        """Write the folder named by the id unless it is there and whole. Raises DiskError."""
        with atomic.staging(staging) as staged:
            stored = self.write(staged)
            final = objects / stored.identity
            if is_whole(final, final.name):
                atomic.remove(staged)
            else:
                if final.exists():
                    atomic.remove(final)
                atomic.publish(staged, final)
        return stored

    @property
    def parts(self) -> int:
        """The number of sums: one for config and header together, and one per tensor."""
        return 1 + 2 * len(self.adapter.modules)

    @property
    def head(self) -> bytes:
        """The digest's input before the tensor file's bytes."""
        return length(len(self.config)) + self.config + length(self.size - len(self.config))

    def tensor_chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the tensor file's bytes, with one module in memory at a time."""
        yield self.header
        for path, factors in self.adapter.modules.items():
            for half, values in (("A", factors.a), ("B", factors.b)):
                yield stored_values(values, self.adapter.dtype, f"{path}.lora_{half}").reshape(-1).view(np.uint8).data


def rounded(adapter: Adapter) -> Adapter:
    """Return the adapter as read back from disk: factors rounded to its dtype, scales to alpha / rank. An adapter that
    needs no rounding is returned unchanged, still read lazily. Raises AdapterFormatError on overflow.
    """
    shapes, resolved = adapter.shapes, adapter.modules.scales
    scales = {path: stored_scale(resolved[path], shape.rank) for path, shape in shapes.items()}
    there, modules = adapter.dtype == "f32" and scales == resolved, {}
    for path, f in adapter.modules.items():
        a, b = (
            stored_values(values, adapter.dtype, f"{path}.lora_{half}").astype("<f4", copy=False)
            for half, values in (("A", f.a), ("B", f.b))
        )
        if not there:
            modules[path] = Factors(a, b, scales[path])
    return adapter if there else adapter.with_factors(modules)


def encode(adapter: Adapter) -> PeftFiles:
    """Return the PEFT folder of an adapter before it is written: deterministic, so the size is known in advance."""
    dtype = SPELLED[adapter.dtype]
    described = []
    for path, (dout, rank, din) in adapter.shapes.items():
        described.append((f"base_model.model.{path}.lora_A.weight", dtype, (rank, din)))
        described.append((f"base_model.model.{path}.lora_B.weight", dtype, (dout, rank)))
    header = encode_header(described)
    config = (json.dumps(written_config(adapter), indent=2, ensure_ascii=False) + "\n").encode()
    values = adapter.parameters * WIDTHS[adapter.dtype]
    return PeftFiles(adapter, config, header, len(config) + len(header) + values)


def size_alone(parameters: int, dtype: str, like: Adapter | None) -> int:
    """Return the bytes of a PEFT folder with a number of parameters: the values, plus the overhead of `like`."""
    beside = encode(like).size - like.parameters * WIDTHS[like.dtype] if like else 0
    return parameters * WIDTHS[dtype] + beside


class Peft(Codec):
    """A plain PEFT folder, in the adapter's dtype."""

    name = "peft"
    loadable = True
    invertible = True

    def encode(self, adapter: Adapter) -> PeftFiles:
        """Return both files of the folder. Iterating over the chunks raises AdapterFormatError if a value overflows."""
        return encode(adapter)

    def round_trip(self, adapter: Adapter, quality: float = 1.0) -> tuple[Adapter, float]:
        """Return the factors rounded to the dtype. Raises AdapterFormatError on overflow."""
        return rounded(adapter), 0.0

    def open(self, paths: Sequence[Path], sums: Sequence[int], lost: Lost, member: str | None = None) -> Adapter:
        """Open the adapter of a folder whose names and values were checked when stored. Raises AdapterFormatError."""
        return _read(paths[0].parent, False, Guard(sums, lost))

    def paths(self, objects: Path, names: Sequence[str]) -> Sequence[Path]:
        """Return the config, then the tensors, of the object's folder."""
        return peft_files(objects / names[0])


def peft_files(folder: Path) -> Sequence[Path]:
    """Return the files of a PEFT folder in the order of its object's id."""
    return (folder / CONFIG_FILE, folder / TENSOR_FILE)


def is_whole(folder: Path, identity: str) -> bool:
    """Return whether a folder holds the object of this id."""
    try:
        return not folder.is_symlink() and object_digest(peft_files(folder)) == identity
    except OSError:
        return False


class _FileModules(Modules):
    """Modules of an open file: a module is read and widened to float32 on access."""

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


def _read_config(folder: Path, faults: Faults, *, stored: bool = False) -> dict[str, Any] | None:
    mend = f"correct {CONFIG_FILE}, or copy the one that was saved with the tensors"
    try:
        config = json.loads(atomic.read_file(folder / CONFIG_FILE))  # with or without a byte order mark
    except FileNotFoundError:
        faults.append(f"{CONFIG_FILE} is missing", "give the folder that save_pretrained wrote, which contains it")
        return None
    except OSError as error:
        cure = "replace it with the saved file, readable by you"
        faults.append(f"{CONFIG_FILE} cannot be read: {error.strerror}", cure)
        return None
    except (ValueError, RecursionError) as error:
        found = not_the_file(CONFIG_FILE, folder / CONFIG_FILE)
        faults.extend([found or Fault(f"{CONFIG_FILE} cannot be read: {error}", mend)])
        return None
    if not isinstance(config, dict):
        faults.append(f"{CONFIG_FILE} is not a JSON object", mend)
        return None
    if not encodable(config):
        faults.append(f"{CONFIG_FILE} contains text that is not Unicode (a lone surrogate)", mend)
        return None
    faults.extend(config_faults(config, stored=stored))
    return config


def _config_sum(folder: Path) -> int:
    """Return the CRC-32 of a stored config. Raises AdapterFormatError if the config has disappeared meanwhile."""
    try:
        return crc32(atomic.read_file(folder / CONFIG_FILE))
    except OSError as error:
        raise AdapterFormatError([f"{CONFIG_FILE} cannot be read: {error.strerror}"], where=str(folder)) from error


def _read_tensors(folder: Path, faults: Faults, guard: Guard | None) -> TensorFile | None:
    path = folder / TENSOR_FILE
    if not os.path.lexists(path):
        faults.append(f"{TENSOR_FILE} is missing", "give the folder that save_pretrained wrote, which contains it")
        return None
    if not path.exists():
        faults.append(f"{TENSOR_FILE} is a broken link", "download it again (hf download), or repair the link")
        return None
    try:
        return TensorFile(path, guard)
    except AdapterFormatError as error:
        found = not_the_file(TENSOR_FILE, path)
        faults.extend([found] if found else [reason.at(TENSOR_FILE) for reason in error.reasons])
        return None
