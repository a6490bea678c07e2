"""safetensors files against the safetensors library: what it writes we map, what we write it loads, bit by bit."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from factory import make_adapter
from lorashelf import write_adapter
from lorashelf.errors import AdapterFormatError
from lorashelf.formats.safetensors import MAX_HEADER, STORED, TensorFile, encode_header

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of random bits, NaN and infinity among them, empty and 0-d shapes too."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    made = {}
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        dtype = TORCH[draw(st.sampled_from(sorted(TORCH)))]
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        integer = BITS[dtype.itemsize][0]
        limits = torch.iinfo(integer)
        made[name] = torch.randint(limits.min, limits.max, shape, dtype=integer, generator=generator).view(dtype)
    return made


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same_tensors(expected: dict[str, torch.Tensor], found: TensorFile) -> None:
    """The same names, shapes and dtypes, and every bit."""
    assert list(found) == sorted(expected)
    for name, tensor in expected.items():
        assert TORCH[found[name].dtype] == tensor.dtype
        assert found[name].shape == tuple(tensor.shape)
        array = found.array(name)
        assert array.shape == tuple(tensor.shape)
        assert array.tobytes() == bits_of(tensor)


def written(named: dict[str, torch.Tensor], path: Path) -> Path:
    """A file by our own writer."""
    dtypes = {torch_dtype: name for name, torch_dtype in TORCH.items()}
    header = encode_header((name, dtypes[t.dtype], tuple(t.shape)) for name, t in named.items())
    path.write_bytes(header + b"".join(bits_of(t) for t in named.values()))
    return path


# both directions ----------------------------------------------------------------------------------------------------


@given(tensors(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_what_the_library_writes_is_read_bit_by_bit(named: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(named, path, metadata or None)
        assert_same_tensors(named, TensorFile(path))


@given(tensors())
def test_what_we_write_is_loaded_by_the_library_bit_by_bit(named: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(named, Path(folder) / "x.safetensors")
        found = load_file(path)
        assert found.keys() == named.keys()
        for name, tensor in named.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert bits_of(found[name]) == bits_of(tensor)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        assert_same_tensors(named, TensorFile(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "x": t["x"] + 1},
        lambda t: {**t, "x": t["x"].reshape(3, 2)},
        lambda t: {**t, "x": t["x"].to(torch.bfloat16)},
        lambda t: {"x": t["x"]},
        lambda t: {**t, "z": t["x"]},
    ],
)
def test_another_value_shape_dtype_or_name_is_seen(change: Callable[[Any], Any], tmp_path: Path) -> None:
    named = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(2, dtype=torch.float16)}
    save_file(named, tmp_path / "x")
    assert_same_tensors(named, TensorFile(tmp_path / "x"))
    with pytest.raises(AssertionError):
        assert_same_tensors(change(named), TensorFile(tmp_path / "x"))


@pytest.mark.parametrize("dtype", sorted(STORED))
def test_an_adapter_is_rounded_as_torch_rounds_and_the_library_loads_it(dtype: str, tmp_path: Path) -> None:
    adapter = make_adapter(0, rank=3)
    write_adapter(replace(adapter, dtype=STORED[dtype]), tmp_path / "a")
    found = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(found) == 2 * len(adapter.modules)
    for path, f in adapter.modules.items():
        for half, side in (("A", f.a), ("B", f.b)):
            tensor = found[f"base_model.model.{path}.lora_{half}.weight"]
            expected = torch.from_numpy(side).to(TORCH[dtype])
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)
            assert not torch.equal(tensor, torch.from_numpy(side * 1.01).to(TORCH[dtype]))


def test_halfway_values_are_rounded_to_even_in_bf16_as_torch_does(tmp_path: Path) -> None:
    values = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e-40, 3.3e38]], np.float32)
    adapter = make_adapter(0, layers=1, projections=("v_proj",), rank=1)
    path, f = next(iter(adapter.modules.items()))
    a = np.resize(values, f.a.shape).astype(np.float32)
    write_adapter(replace(adapter.with_factors({path: replace(f, a=a)}), dtype="bf16"), tmp_path / "a")
    found = load_file(tmp_path / "a" / "adapter_model.safetensors")[f"base_model.model.{path}.lora_A.weight"]
    assert bits_of(found) == bits_of(torch.from_numpy(a).to(torch.bfloat16))


def test_every_dtype_that_torch_can_save_is_described(tmp_path: Path) -> None:
    kinds = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool float8_e4m3fn float8_e5m2 complex64"
    kinds += " uint16 uint32 uint64"
    named = {kind: torch.zeros(3, 2, dtype=getattr(torch, kind)) for kind in kinds.split()}
    save_file(named, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    assert {name: record.shape for name, record in file.items()} == dict.fromkeys(named, (3, 2))
    assert {name: record.stop - record.start for name, record in file.items()} == {
        name: tensor.nbytes for name, tensor in named.items()
    }
    assert {file[name].dtype for name in ("float32", "float16", "bfloat16")} == STORED.keys()


def rewritten(path: Path) -> None:
    """Other values in the same file, of the same size, and its time of change set back."""
    then = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda path: os.truncate(path, 100),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "rewritten": rewritten,
    "written again": lambda path: path.write_bytes(path.read_bytes()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_after_it_was_opened_is_refused_at_the_next_reading(change: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(2, 3), "y": torch.ones(2, 3)}, tmp_path / "z")
    file = TensorFile(tmp_path / "z")
    file.array("x")
    CHANGES[change](tmp_path / "z")
    for read in (lambda: file.array("x"), lambda: file.stack(["x", "y"])):
        with pytest.raises(AdapterFormatError, match="z changed while it was being read") as caught:
            read()
        assert "wait until the program that writes the file is done" in str(caught.value)


def test_a_change_in_the_same_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    for _ in range(20):
        save_file({"x": torch.zeros(2, 3)}, tmp_path / "z")
        file = TensorFile(tmp_path / "z")
        with (tmp_path / "z").open("r+b") as other:
            other.seek(-1, 2)
            other.write(b"\1")
        with pytest.raises(AdapterFormatError, match="changed"):
            file.array("x")


@pytest.mark.parametrize("change", [os.unlink, lambda path: os.replace(path.with_name("new"), path)])
def test_a_file_that_is_deleted_or_replaced_is_read_as_it_was_opened(
    change: Callable[[Path], Any], tmp_path: Path
) -> None:
    save_file({"x": torch.ones(2, 3)}, tmp_path / "z")
    save_file({"x": torch.zeros(2, 3)}, tmp_path / "new")
    file = TensorFile(tmp_path / "z")
    change(tmp_path / "z")
    np.testing.assert_array_equal(file.array("x"), np.ones((2, 3)))


def test_a_header_of_any_length_is_read_though_the_tensors_are_not_aligned(tmp_path: Path) -> None:
    values = np.arange(6, dtype="<f4")
    for padding in range(8):
        path = tmp_path / str(padding)
        header = json.dumps({"x": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}).encode() + b" " * padding
        path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
        np.testing.assert_array_equal(TensorFile(path).array("x"), values)
        np.testing.assert_array_equal(load_file(path)["x"].numpy(), values)


def test_tensors_of_one_shape_are_stacked_in_any_order(tmp_path: Path) -> None:
    rows = {f"layer{i}.{half}": torch.rand(2, 3) for i in range(5) for half in "ab"}
    mixed = {"x0": torch.rand(2, 3), "x1": torch.rand(2, 3).to(torch.float16), "x2": torch.rand(2, 3)}
    save_file(rows, tmp_path / "rows")
    save_file(mixed, tmp_path / "mixed")
    even, names = TensorFile(tmp_path / "rows"), [f"layer{i}.b" for i in range(5)]
    for file, some in (
        (even, names),
        (even, names[1::2]),
        (even, names[:1]),
        (even, names[::-1]),
        (even, [names[0], names[1], names[3]]),
        (TensorFile(tmp_path / "mixed"), list(mixed)),
    ):
        np.testing.assert_array_equal(file.stack(some), np.stack([file.array(x).astype(np.float32) for x in some]))


# faults -------------------------------------------------------------------------------------------------------------


def with_header(document: Any, data: bytes = bytes(24)) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


def described(start: Any = 0, stop: Any = 24, shape: Any = (6,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop]}


GOOD = {"x": described(0, 8, (2,)), "y": described(8, 24, (4,))}
DAMAGED = {
    "empty": b"",
    "short": b"\x10\x00\x00",
    "no header": bytes(8),
    "a header longer than the file": (500).to_bytes(8, "little") + b"{}",
    "a huge header": (2**62).to_bytes(8, "little") + b"{}",
    "not JSON": with_header(b"{'x': 1}"),
    "not UTF-8": with_header(b'{"\xff": 1}'),
    "a list": with_header([1, 2]),
    "deeply nested": with_header(b"[" * 10_000),
    "cut": with_header(GOOD, bytes(20)),
    "bytes too many": with_header(GOOD, bytes(28)),
    "a hole": with_header({"x": described(0, 8, (2,)), "y": described(12, 24, (3,))}),
    "a hole in front": with_header({"x": described(8, 24, (4,))}),
    "overlap": with_header({"x": described(0, 12, (3,)), "y": described(8, 24, (4,))}),
    "the same bytes twice": with_header({"x": described(), "y": described()}),
    "backwards": with_header({"x": described(24, 0)}),
    "beyond the end": with_header({"x": described(0, 2**40, (2**38,))}),
    "negative": with_header({"x": described(-4, 20)}),
    "another shape": with_header({"x": described(shape=(5,))}),
    "a shape that overflows": with_header({"x": described(shape=(2**62, 2**62))}),
    "a negative shape": with_header({"x": described(shape=(-2, -3))}),
    "a fractional shape": with_header({"x": described(shape=(1.5, 4))}),
    "no shape": with_header({"x": {"dtype": "F32", "data_offsets": [0, 24]}}),
    "three offsets": with_header({"x": {"dtype": "F32", "shape": [6], "data_offsets": [0, 12, 24]}}),
    "an unknown dtype": with_header({"x": described(dtype="F31")}),
    "a dtype that is no name": with_header({"x": described(dtype=[1])}),
    "a tensor that is a number": with_header({"x": 3}),
    "metadata that is no map": with_header({**GOOD, "__metadata__": [1]}),
    "metadata that is no text": with_header({**GOOD, "__metadata__": {"a": 1}}),
    "a name twice": with_header(json.dumps(GOOD).replace('"y"', '"x"').encode()),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_is_refused_here_and_by_the_library(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(AdapterFormatError) as caught:
        TensorFile(path)
    assert caught.value.faults
    assert caught.value.where == str(path)
    with pytest.raises(SafetensorError):
        load_file(path)


def test_a_name_twice_is_refused_though_the_library_takes_the_last(tmp_path: Path) -> None:
    """Two readers might take two different ones."""
    path = tmp_path / "x.safetensors"
    one, other = (json.dumps(described(shape=shape)).encode() for shape in ((6,), (2, 3)))
    path.write_bytes(with_header(b'{"x": %b, "x": %b}' % (one, other)))
    assert load_file(path)["x"].shape == (2, 3)
    with pytest.raises(AdapterFormatError, match="duplicate key 'x'"):
        TensorFile(path)


def test_the_undamaged_file_is_accepted_here_and_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for document in (GOOD, {**GOOD, "__metadata__": {"a": "b"}}, dict(reversed(GOOD.items()))):
        path.write_bytes(with_header(document))
        assert list(TensorFile(path)) == ["x", "y"]
        assert load_file(path).keys() == {"x", "y"}


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    document = {"x": described(dtype="F31"), "y": described(stop=99), "z": 3, "good": described()}
    (tmp_path / "x").write_bytes(with_header(document))
    with pytest.raises(AdapterFormatError) as caught:
        TensorFile(tmp_path / "x")
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["x", "y", "z"]


def test_the_bound_of_a_header_is_the_library_s(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterFormatError, match="are allowed"):
        TensorFile(path)
    path.write_bytes(MAX_HEADER.to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterFormatError, match="truncated"):
        TensorFile(path)


@pytest.mark.parametrize("name", ["missing", ".", "fifo"])
def test_a_file_that_cannot_be_opened_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(AdapterFormatError, match="cannot be read"):
        TensorFile(tmp_path / name)
