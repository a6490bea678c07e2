"""The header of a GGUF file: as the package gguf reads it, and no surprise from a damaged one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashelf.errors import ModelError, UnknownName
from lorashelf.formats.gguf.base import base_of
from lorashelf.formats.gguf.header import read_header
from tiny_gguf import tiny_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_fields_and_tensors_are_those_that_the_package_gguf_reads(tmp_path: Path, whole: Path) -> None:
    import gguf

    typed = tmp_path / "typed.gguf"
    writer = gguf.GGUFWriter(typed, "llama")
    numbers = {"UINT8": 255, "INT8": -3, "UINT16": 65535, "INT16": -300, "UINT32": 2**32 - 1, "INT32": -7}
    numbers |= {"UINT64": 2**63, "INT64": -(2**62), "FLOAT32": 0.5, "FLOAT64": 0.1, "BOOL": True}
    for kind, value in numbers.items():
        writer.add_key_value(kind, value, gguf.GGUFValueType[kind])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("words", ["ä", "", "x"])
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    matrices = {"a": rng.standard_normal((3, 64), np.float32), "b": rng.standard_normal((5, 32)).astype(np.float16)}
    for name, values in matrices.items():
        writer.add_tensor(name, values)
    blocks = gguf.quants.quantize(matrices["a"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path in (typed, whole):
        found, reader = read_header(path), gguf.GGUFReader(path)
        theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert found.fields == theirs
        shapes = {tensor.name: tuple(int(n) for n in tensor.shape[::-1]) for tensor in reader.tensors}
        assert {name: place.shape for name, place in found.tensors.items()} == shapes
        assert {name: place.start for name, place in found.tensors.items()} == {
            tensor.name: tensor.data_offset for tensor in reader.tensors
        }
    found = read_header(typed)
    for name, values in matrices.items():
        assert np.array_equal(found.array(name), values.astype(np.float32))
    wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(found.array("q"), wanted)


@given(st.data())
def test_a_damaged_file_is_refused_or_read_and_nothing_else(whole: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    header = len(content) - 20_000
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header))
        content[place : place + 1] = data.draw(st.binary(min_size=0, max_size=9))
    damaged = whole.with_name("damaged.gguf")
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(ModelError, UnknownName):
        base_of(damaged, "x")


@pytest.mark.parametrize(
    ("name", "value"), [("llama.block_count", "two"), ("llama.attention.head_count", []), ("general.alignment", "wide")]
)
def test_a_field_of_another_type_is_an_error_of_the_file(tmp_path: Path, name: str, value: object) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    fields = {"llama.block_count": 1, "llama.attention.head_count": 2, name: value}
    for key, each in fields.items():
        if isinstance(each, int):
            writer.add_uint32(key, each)
        elif isinstance(each, str):
            writer.add_string(key, each)
        else:
            writer.add_array(key, each or [0, 0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError) as refused:
        base_of(tmp_path / "x.gguf", "x")
    assert str(tmp_path / "x.gguf") in str(refused.value.where)
