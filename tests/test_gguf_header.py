"""The header of a GGUF file: as the package gguf reads it, and no surprise from a damaged one."""

from __future__ import annotations

import contextlib
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashelf.errors import MissingExtra, ModelError, UnknownName
from lorashelf.formats.gguf.base import base_of, package
from lorashelf.formats.gguf.header import read_header
from lorashelf.models.gguf_chat import GgufChat
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


def written(path: Path, fields: dict[str, object]) -> Path:
    """A file with these fields and no tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        kind = gguf.GGUFValueType.INT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind, sub_type=gguf.GGUFValueType.INT32 if isinstance(value, list) else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


SOUND = {"llama.block_count": 1, "llama.attention.head_count": 2}
ODD: list[tuple[str, object, str]] = [
    ("llama.block_count", "two", "llama.block_count is not a number"),
    ("llama.block_count", -1, "llama.block_count is not a number"),
    ("llama.block_count", 0, "no number of heads or blocks"),
    ("llama.attention.head_count", [0, 0], "no number of heads or blocks"),
    ("general.alignment", "wide", "general.alignment is not a number"),
]


@pytest.mark.parametrize(("name", "value", "message"), ODD)
def test_a_field_that_no_base_has_is_an_error_of_the_file(
    tmp_path: Path, name: str, value: object, message: str
) -> None:
    assert base_of(written(tmp_path / "sound.gguf", SOUND), "x").kv_heads == 2
    with pytest.raises(ModelError, match=message) as refused:
        base_of(written(tmp_path / "x.gguf", {**SOUND, name: value}), "x")
    assert str(tmp_path / "x.gguf") in str(refused.value.where)


def raw(*parts: bytes | int) -> bytes:
    """A header of version 3: bytes as they are, numbers as u64."""
    made = [part if isinstance(part, bytes) else struct.pack("<Q", part) for part in parts]
    return b"GGUF" + struct.pack("<I", 3) + b"".join(made)


def key(name: bytes, kind: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)


DAMAGED = {
    "another magic": b"GGUX" + raw(0, 0)[4:],
    "another version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "an unknown type": raw(0, 1, key(b"a", 99), 0),
    "five dimensions": raw(1, 0, struct.pack("<Q", 1), b"t", struct.pack("<I5QIQ", 5, 1, 1, 1, 1, 1, 0, 0), bytes(64)),
    "data that are not there": raw(1, 0, struct.pack("<Q", 1), b"t", struct.pack("<I2QIQ", 2, 4, 4, 0, 4096)),
    "a text without an end": raw(0, 1, 2**63),
    "a number that is cut off": raw(0, 1, key(b"a", 10), b"123"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_no_writer_makes_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.gguf").write_bytes(DAMAGED[kind])
    with pytest.raises(ModelError, match="not a GGUF file, or it is cut off"):
        read_header(tmp_path / "x.gguf")


def test_a_tensor_that_is_cut_off_or_of_another_type_is_refused(tmp_path: Path, whole: Path) -> None:
    header = read_header(whole)
    last = max(header.tensors, key=lambda name: header.tensors[name].start)
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[: header.tensors[last].start + 8])
    with pytest.raises(ModelError, match="is cut off or of another type"):
        read_header(tmp_path / "cut.gguf").array(last)
    other = replace(header, tensors={last: header.tensors[last]._replace(kind=3)})
    with pytest.raises(ModelError, match="is cut off or of another type"):
        other.array(last)


def test_what_is_not_installed_is_named_with_its_extra(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(whole)
    for module, needing in {
        "gguf": package,
        "jinja2.sandbox": lambda: GgufChat(replace(header, fields={"tokenizer.chat_template": "x"}), "x"),
    }.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtra) as refused:
            needing()
        assert refused.value.cure == "pip install 'lorashelf[gguf]'"


CONFIGS = {
    "no JSON": "{",
    "a list": "[]",
    "no sizes": '{"model_type": "llama"}',
    "a size that is no number": '{"model_type": "llama", "num_attention_heads": null, "num_hidden_layers": 2}',
    "a text that is no config": '{"model_type": "llama", "text_config": "x"}',
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_cannot_be_used_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(CONFIGS[kind])
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        base_of(tmp_path, "x")
