"""Bad adapters: each is refused with what, where and a cure, every fault at once, and nothing on disk changes.

A `spoil` is a function that writes one bad adapter into a folder; `refused` offers it to a shelf in every way there is.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory import BASE, assert_same_delta, make_adapter, peft_tensors, write_peft
from lorashelf import (
    Adapter,
    Clustering,
    Factors,
    LorashelfError,
    Shelf,
    merge,
    new_settings,
    plan_add,
    plan_cluster,
    plan_update,
    read_adapter,
    write_adapter,
)
from lorashelf.cli import main
from lorashelf.cli.output import print_json
from lorashelf.digest import canonical_json
from lorashelf.errors import (
    AdapterError,
    AdapterFormatError,
    BaseMismatch,
    NotStorable,
    ShapeMismatch,
    UnknownName,
    UsageError,
)
from lorashelf.lora.matching import targets

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Spoil = Callable[[Path], Any]


def state(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder, hidden files, empty folders and links too."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = content
    return found


def command(*words: object) -> tuple[int, str]:
    """The exit code of `lorashelf WORDS…` and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert isinstance(end.value.code, int)
    return end.value.code, said.getvalue()


@pytest.fixture(scope="session")
def one_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shelf with one task; writing it takes long enough to do it once."""
    made = Shelf.create(tmp_path_factory.mktemp("one") / "a.shelf", new_settings(3))
    made.commit(plan_add(made.snapshot(), make_adapter(0), "first"))
    return made.path


@pytest.fixture
def shelf(one_task: Path, tmp_path: Path) -> Shelf:
    """A copy of it, for one test."""
    return Shelf(shutil.copytree(one_task, tmp_path / "a.shelf"))


def refused(shelf: Shelf, folder: Path, kind: type[LorashelfError], *fragments: str) -> LorashelfError:
    """The error that adding the folder raises: by the API and by the command line, with nothing changed by either."""
    before = state(shelf.path.parent)
    with pytest.raises(LorashelfError) as caught:
        shelf.commit(plan_add(shelf.snapshot(), read_adapter(folder), "new"))
    error = caught.value
    text = str(error)
    assert type(error) is kind, text
    assert error.exit_code == 3
    code, said = command("add", shelf.path, f"new={folder}")
    assert code == 3
    where = [f"\n  where: {error.where}"] if error.where else []
    cures = [f"\n  cure:  {line}" for line in (error.cure or "no cure").splitlines()]
    for fragment in (*fragments, *where, *cures):
        assert fragment in text
        assert fragment in said
    assert state(shelf.path.parent) == before
    return error


# the tensor file -----------------------------------------------------------------------------------------------------

A, B = "base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"
WIDTHS = {"F32": 4, "BF16": 2, "I8": 1, "F8_E4M3": 1, "F64": 8}


def entry(shape: tuple[int, ...], start: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + math.prod(shape) * WIDTHS[dtype]]}


def with_a(**changes: Any) -> dict[str, Any]:
    """A good header of 56 bytes of values, but for the entry of A."""
    return {A: {**entry((2, 4), 0), **changes}, B: entry((3, 2), 32)}


HEADER = with_a()


def raw(header: dict[str, Any] | bytes, values: int | bytes = 56, length: int | None = None) -> Spoil:
    """Writes an adapter with this header, these value bytes (a number: zeros), and this length for the header."""

    def spoil(folder: Path) -> None:
        write_peft(folder, tensors={}, r=2, target_modules=None)
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = struct.pack("<Q", len(text) if length is None else length)
        (folder / TENSORS).write_bytes(size + text + (bytes(values) if isinstance(values, int) else values))

    return spoil


def file_of(data: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        write_peft(folder)
        (folder / TENSORS).write_bytes(data)

    return spoil


def directory_of_that_name(folder: Path) -> None:
    write_peft(folder)
    (folder / TENSORS).unlink()
    (folder / TENSORS).mkdir()


def twice(text: bytes) -> bytes:
    return b"{" + text + b"," + text + b"}"


ONE = b'"%s":%s' % (A.encode(), json.dumps(entry((2, 4), 0)).encode())
ENTRY_TWICE = b'{"%s":{"dtype":"F32",%s' % (A.encode(), json.dumps(entry((2, 4), 0)).encode()[1:] + b"}")

BAD_FILES: dict[str, tuple[Spoil, str]] = {
    "empty file": (file_of(b""), "truncated: 0 bytes"),
    "truncated length": (file_of(b"\x10\0\0"), "truncated: 3 bytes"),
    "truncated header": (raw(HEADER, 0, length=1000), "truncated: header of 1000 bytes"),
    "truncated values": (raw(HEADER, 55), f"{B}: bytes 32:56 are outside"),
    "header of 2^60 bytes": (raw(HEADER, length=2**60), f"header of {2**60} bytes; at most"),
    "header of 2^64 - 1 bytes": (raw(HEADER, length=2**64 - 1), f"header of {2**64 - 1} bytes; at most"),
    "header is no JSON": (raw(b"{]"), "header is not JSON"),
    "header is no text": (raw(b"\xff\xfe\xfd\xfc{}"), "header is not JSON"),
    "header is no object": (raw(b"[]"), "header is not a JSON object"),
    "header is nested deeply": (raw(b"[" * 100_000), "header is not JSON"),
    "overlapping offsets": (raw({A: HEADER[A], B: entry((3, 2), 28)}, 52), f"{B}: bytes 28:52 overlap"),
    "the same bytes twice": (raw({A: HEADER[A], B: entry((4, 2), 0)}, 32), "overlap"),
    "offsets out of the file": (raw({A: HEADER[A], B: entry((3, 2), 2**40)}), "are outside the file's 56"),
    "offsets back to front": (raw(with_a(data_offsets=[32, 0])), "bytes 32:0 are outside"),
    "a hole between tensors": (raw({A: HEADER[A], B: entry((3, 2), 40)}, 64), "leave a gap"),
    "a hole before the first": (raw({A: entry((2, 4), 8), B: entry((3, 2), 40)}, 64), "leave a gap"),
    "bytes after the last": (raw(HEADER, 60), "4 bytes after the last tensor"),
    "duplicate key": (raw(twice(ONE), 32), f"duplicate key {A!r}"),
    "duplicate key in an entry": (raw(ENTRY_TWICE, 32), "duplicate key 'dtype'"),
    "shape too large for its bytes": (raw(with_a(shape=[2, 5])), f"{A}: F32 of shape [2, 5]"),
    "shape beyond all numbers": (raw(with_a(shape=[10**4000, 10**4000])), A),
    "negative shape": (raw(with_a(shape=[-2, -4])), "not a list of whole numbers"),
    "fractional shape": (raw(with_a(shape=[2.0, 4])), "not a list of whole numbers"),
    "boolean shape": (raw(with_a(shape=[True, 8])), "not a list of whole numbers"),
    "shape is no list": (raw(with_a(shape=8)), "not a list of whole numbers"),
    "fractional offsets": (raw(with_a(data_offsets=[0, 32.0])), "not a list of whole numbers"),
    "three offsets": (raw(with_a(data_offsets=[0, 16, 32])), "not a list of whole numbers"),
    "an entry without a dtype": (raw({A: {"shape": [2, 4], "data_offsets": [0, 32]}}), "needs dtype, shape and"),
    "an entry that is a number": (raw({A: 5}), "needs dtype, shape and data_offsets"),
    "unknown dtype": (raw(with_a(dtype="F7")), "unknown dtype 'F7'"),
    "dtype is a list": (raw(with_a(dtype=["F32"])), "unknown dtype ['F32']"),
    "metadata with numbers": (raw({"__metadata__": {"format": 1}, **HEADER}), "__metadata__ is not a map of strings"),
    "metadata that is a list": (raw({"__metadata__": [], **HEADER}), "__metadata__ is not a map of strings"),
    "a folder in its place": (directory_of_that_name, "cannot be read"),
}


def by_name(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(*value, id=name) for name, value in table.items()]


@pytest.mark.parametrize(("spoil", "fragment"), by_name(BAD_FILES))
def test_a_bad_tensor_file_is_refused(shelf: Shelf, tmp_path: Path, spoil: Spoil, fragment: str) -> None:
    spoil(tmp_path / "bad")
    error = refused(shelf, tmp_path / "bad", AdapterFormatError, fragment, f"where: {tmp_path / 'bad'}", TENSORS)
    assert isinstance(error, AdapterError)
    assert len(error.faults) == 1


def test_the_header_that_the_bad_ones_vary_is_good(shelf: Shelf, tmp_path: Path) -> None:
    raw(HEADER)(tmp_path / "good")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refused(shelf, tmp_path / "good", AdapterFormatError)
    assert read_adapter(tmp_path / "good").shapes == {"m": (3, 2, 4)}


def test_a_header_over_the_cap_is_refused_though_the_file_is_as_large(shelf: Shelf, tmp_path: Path) -> None:
    raw(b"", 0, length=100 * 2**20 + 1)(tmp_path / "bad")
    os.truncate(tmp_path / "bad" / TENSORS, 2**28)  # a hole on the disk: a quarter of a GB that takes no room
    with pytest.raises(AdapterFormatError, match=r"header of 104857601 bytes; at most 104857600"):
        read_adapter(tmp_path / "bad")


def test_every_entry_of_a_header_is_checked_at_once(shelf: Shelf, tmp_path: Path) -> None:
    header = {"x": entry((2,), 2**50), "y": entry((2,), 0) | {"shape": [3]}, "z": entry((2,), 8) | {"shape": [-1]}}
    raw({**header, "__metadata__": {"a": 1}})(tmp_path / "bad")
    error = refused(shelf, tmp_path / "bad", AdapterFormatError, "4 faults")
    assert isinstance(error, AdapterError)
    for fault, start in zip(error.faults, ["__metadata__ is", "x: bytes", "y: F32", "z: shape"], strict=True):
        assert fault.startswith(f"{TENSORS}: {start}")


def test_an_adapter_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "cut", make_adapter(1, layers=1, projections=("v_proj",)))
    whole = (folder / TENSORS).read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        (folder / TENSORS).write_bytes(whole[:size])
        with pytest.raises(AdapterFormatError):
            read_adapter(folder)
    (folder / TENSORS).write_bytes(whole)
    read_adapter(folder)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_any_changed_byte_is_read_or_refused_and_nothing_else(tmp_path: Path, name: str) -> None:
    folder = write_peft(tmp_path / "x", make_adapter(1, layers=1, projections=("v_proj",)))
    whole = (folder / name).read_bytes()
    rng = np.random.default_rng(5)
    outcomes = set()
    for _ in range(250):
        data = bytearray(whole)
        for position in rng.integers(0, min(len(data), 500), size=rng.integers(1, 4)):
            data[position] = rng.integers(0, 256)
        (folder / name).write_bytes(bytes(data))
        try:
            outcomes.add(read_adapter(folder).digest[:3])
        except AdapterFormatError:
            outcomes.add("refused")
    assert outcomes == {"b2-", "refused"}


# the tensors ---------------------------------------------------------------------------------------------------------

Q, V = (f"base_model.model.model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj"))


def tensors(changes: dict[str, np.ndarray | None]) -> Spoil:
    """Writes a good adapter with these tensors changed, added, or (None) left out."""

    def spoil(folder: Path) -> None:
        named = {**peft_tensors(make_adapter(1)), **changes}
        write_peft(folder, tensors={name: value for name, value in named.items() if value is not None})

    return spoil


def ones(*shape: int, value: float = 1.0, dtype: str = "<f4") -> np.ndarray:
    """Ones, the last of them `value`."""
    array = np.ones(shape, dtype)
    array.reshape(-1)[-1:] = value
    return array


def renamed(name: str, old: str, new: str) -> Spoil:
    half = f"{name}.lora_A.weight"
    return tensors({half: None, half.replace(old, new): ones(4, 16)})


def renamed_all(old: str, new: str) -> Spoil:
    return lambda folder: write_peft(
        folder, tensors={name.replace(old, new): value for name, value in peft_tensors(make_adapter(1)).items()}
    )


def called(name: str) -> Spoil:
    """A good adapter of one module, but for its name."""
    return raw({half.replace(".m.", f".{name}."): described for half, described in HEADER.items()})


BF16_NAN = raw({A: entry((2, 4), 0, "BF16"), B: entry((3, 2), 16)}, bytes(14) + b"\xc0\x7f" + bytes(24))
BAD_TENSORS: dict[str, tuple[Spoil, str]] = {
    "A without B": (tensors({f"{V}.lora_B.weight": None}), "model.layers.0.self_attn.v_proj: lora_B is missing"),
    "B without A": (tensors({f"{V}.lora_A.weight": None}), "model.layers.0.self_attn.v_proj: lora_A is missing"),
    "ranks that disagree": (tensors({f"{V}.lora_A.weight": ones(3, 16)}), "lora_A has rank 3, lora_B has rank 4"),
    "NaN": (tensors({f"{V}.lora_A.weight": ones(4, 16, value=math.nan)}), "1 of 64 values are NaN"),
    "infinity": (tensors({f"{V}.lora_B.weight": ones(8, 4, value=-math.inf)}), "1 of 32 values are infinity"),
    "NaN in f16": (tensors({f"{V}.lora_A.weight": ones(4, 16, value=math.nan, dtype="<f2")}), "values are NaN"),
    "infinity in f16": (
        tensors({f"{V}.lora_A.weight": ones(4, 16, value=math.inf, dtype="<f2")}),
        "values are infinity",
    ),
    "NaN in bf16": (BF16_NAN, f"{A}: 1 of 8 values are NaN"),
    "a value of 3e38": (tensors({f"{V}.lora_A.weight": ones(4, 16, value=3e38)}), "3e+38"),
    "zero rank": (
        tensors({f"{V}.lora_A.weight": ones(0, 16), f"{V}.lora_B.weight": ones(8, 0)}),
        "shape (0, 16) is not that of a linear module's factor",
    ),
    "zero width": (tensors({f"{V}.lora_A.weight": ones(4, 0)}), "shape (4, 0) is not"),
    "a convolution": (tensors({f"{V}.lora_A.weight": ones(4, 16, 1, 1)}), "shape (4, 16, 1, 1) is not"),
    "a vector": (tensors({f"{V}.lora_A.weight": ones(16)}), "shape (16,) is not"),
    "float64": (tensors({f"{V}.lora_A.weight": ones(4, 16, dtype="<f8")}), "dtype F64 (supported: F32, F16, BF16)"),
    "int8": (tensors({f"{V}.lora_A.weight": ones(4, 16, dtype="i1")}), "dtype I8 (supported"),
    "float8": (raw({A: entry((2, 4), 0, "F8_E4M3"), B: entry((3, 2), 8)}, 32), "dtype F8_E4M3 (supported"),
    "a name that is not Unicode": (called("\ud800"), "ud800"),
    "a name that clears the screen": (called("\x1b[2J"), "x1b[2J"),
    "DoRA's magnitudes": (tensors({f"{V}.lora_magnitude_vector": ones(8)}), "a DoRA magnitude"),
    "a factor's bias": (tensors({f"{V}.lora_B.bias": ones(8)}), "a bias of a factor"),
    "an embedding's factors": (tensors({f"{V}.lora_embedding_A": ones(4, 16)}), "a factor of an embedding"),
    "a module saved whole": (
        tensors({"base_model.model.lm_head.modules_to_save.weight": ones(2, 2)}),
        "a whole module",
    ),
    "an unknown tensor": (tensors({"base_model.model.norm.weight": ones(2)}), "model.norm.weight: unknown tensor"),
    "a whole head": (tensors({"base_model.model.lm_head.weight": ones(2, 2)}), "lm_head.weight: a whole embedding or"),
    "an adapter's name in the key": (renamed(Q, "lora_A", "lora_A.default"), "a key with an adapter's name in it"),
    "no prefix": (renamed(Q, "base_model.model.", ""), "lacks PEFT's prefix 'base_model.model.'"),
    "kohya's keys": (renamed(Q, f"{Q}.lora_A", "lora_unet_q_proj.lora_down"), "kohya's style"),
    "MLX's keys": (
        renamed(Q, f"{Q}.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_a"),
        "the style of MLX or GGUF",
    ),
    "no tensor at all": (lambda folder: write_peft(folder, tensors={}), "no LoRA factors in the file"),
    "no factor under PEFT's keys": (renamed_all("base_model.model.", ""), "lacks PEFT's prefix"),
    "no tensor file": (lambda folder: (write_peft(folder) / TENSORS).unlink(), f"{TENSORS} is missing"),
    "nothing in the folder": (lambda folder: folder.mkdir(), f"{CONFIG} is missing"),
    "no folder": (lambda folder: None, "cannot be read"),
    "a file in place of the folder": (lambda folder: folder.write_text("{}"), "cannot be read"),
}


@pytest.mark.parametrize(("spoil", "fragment"), by_name(BAD_TENSORS))
def test_bad_tensors_are_refused(shelf: Shelf, tmp_path: Path, spoil: Spoil, fragment: str) -> None:
    spoil(tmp_path / "bad")
    refused(shelf, tmp_path / "bad", AdapterFormatError, fragment, f"where: {tmp_path / 'bad'}")


@pytest.mark.parametrize("value", [1e9, 1e12, 1e14, 1e19, 3e38])
def test_values_near_the_end_of_float32_leave_no_nan_on_the_shelf(shelf: Shelf, tmp_path: Path, value: float) -> None:
    plain = make_adapter(1)
    signs = {p: [np.sign(f.a), np.sign(f.b)] for p, f in plain.modules.items()}
    huge = plain.with_factors({p: Factors(*(side * np.float32(value) for side in sides)) for p, sides in signs.items()})
    for number in range(3):
        folder = write_peft(tmp_path / str(number), huge)
        with contextlib.suppress(AdapterError):
            shelf.commit(plan_add(shelf.snapshot(), read_adapter(folder), f"huge-{number}"))
    snapshot = shelf.snapshot()
    assert all(math.isfinite(score) for score in snapshot.manifest.scores)
    for slot in snapshot.manifest.slots:
        assert all(np.isfinite(f.a).all() and np.isfinite(f.b).all() for f in snapshot.stored(slot).modules.values())


def test_a_pickle_offered_alone_is_refused_and_never_loaded(shelf: Shelf, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.write_text, (tmp_path / "exploded", "boom")

    pickled = pickle.dumps(Bomb())
    for name in ("adapter_model.bin", "pytorch_model.bin"):
        folder = tmp_path / name.replace(".", "-")
        (write_peft(folder) / TENSORS).unlink()
        (folder / name).write_bytes(pickled)
        error = refused(shelf, folder, AdapterFormatError, f"{name} is a pickle", "refused, never opened")
        assert "safe_serialization=True" in (error.cure or "")
    for name in (TENSORS, CONFIG):  # and under another name it is not loaded either
        folder = write_peft(tmp_path / f"as-{name}")
        (folder / name).write_bytes(pickled)
        refused(shelf, folder, AdapterFormatError, name)
    assert not (tmp_path / "exploded").exists()

    pickle.loads(pickled)  # the bomb is a real one
    assert (tmp_path / "exploded").exists()


# the config ----------------------------------------------------------------------------------------------------------


def config(**changes: Any) -> Spoil:
    return lambda folder: write_peft(folder, make_adapter(1), **changes)


def config_text(data: bytes) -> Spoil:
    return lambda folder: (write_peft(folder) / CONFIG).write_bytes(data)


def no_config(folder: Path) -> None:
    (write_peft(folder) / CONFIG).unlink()


def field(name: str, value: Any, fragment: str | None = None) -> tuple[Spoil, str]:
    return config(**{name: value}), fragment or f"{name} is"


BAD_CONFIGS: dict[str, tuple[Spoil, str]] = {
    "missing": (no_config, f"{CONFIG} is missing"),
    "empty": (config_text(b""), f"{CONFIG} cannot be read"),
    "no JSON": (config_text(b"{'r': 4}"), f"{CONFIG} cannot be read"),
    "no text": (config_text(b"\xff\xfe\xfd"), f"{CONFIG} cannot be read"),
    "no object": (config_text(b"[]"), f"{CONFIG} is not a JSON object"),
    "nested deeply": (config_text(b'{"r":' + b"[" * 100_000), f"{CONFIG} cannot be read"),
    "a number of 5000 digits": (config_text(b'{"r":' + b"9" * 5000 + b"}"), f"{CONFIG} cannot be read"),
    "text that is not Unicode": (config(x_note="\ud800"), f"{CONFIG} contains text that is not Unicode"),
    "another method": field("peft_type", "LOHA", "peft_type is 'LOHA', not 'LORA'"),
    "a method that is a list": field("peft_type", ["LORA"]),
    "DoRA": field("use_dora", True, "use_dora is set: DoRA"),
    "lora_bias": field("lora_bias", True, "lora_bias is set: biases"),
    "modules_to_save": field("modules_to_save", ["lm_head"], "modules_to_save is set: whole modules"),
    "target_parameters": field("target_parameters", ["experts.down_proj"], "target_parameters is set"),
    "trained tokens": field("trainable_token_indices", [1], "trainable_token_indices is set"),
    "replicated layers": field("layer_replication", [[0, 2]], "layer_replication is set"),
    "activated LoRA": field("alora_invocation_tokens", [1, 2], "alora_invocation_tokens is set"),
    "QALoRA": field("use_qalora", True, "use_qalora is set"),
    "block-diagonal": field("use_bdlora", {"nblocks": 2}, "use_bdlora is set"),
    "Arrow": field("arrow_config", {"top_k": 2}, "arrow_config is set"),
    "KaSA": field("kasa_config", {"beta": 1}, "kasa_config is set"),
    "a field that nobody knows": field("x_future", {"deep": [1]}, "the field 'x_future' is set to {'deep': [1]}"),
    "a field with a terminal's escape": field("\x1b[31m", 1, r"the field '\x1b[31m' is set to 1"),
    **{
        f"init {name}": field("init_lora_weights", name, f"init_lora_weights is {name!r}")
        for name in ("kasa", "of_the_future")
    },
    "biases of the base": field("bias", "lora_only", "bias is 'lora_only'"),
    **{
        f"init {name}": field("init_lora_weights", name, f"init_lora_weights is {name!r}")
        for name in ("pissa", "PiSSA", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga")
    },
    "base is a number": field("base_model_name_or_path", 5, "base_model_name_or_path is not a string"),
    "base is not Unicode": field("base_model_name_or_path", "\ud800", "not Unicode"),
    "base with a terminal's escape": field("base_model_name_or_path", "\x1b[31mevil", "with a control character"),
    "base on two lines": field("base_model_name_or_path", "acme\nok", "with a control character or a line break"),
    "revision with a bell": field("revision", "main\a", "revision is 'main\\x07', with a control character"),
    "revision is a list": field("revision", ["main"], "revision is not a string"),
    **{f"r is {value!r}": field("r", value) for value in (0, -4, "4", True, None, math.nan, math.inf)},
    "r is 10^400": field("r", 10**400),
    "r is not the tensors' rank": field("r", 8, "the config gives rank 8, the tensors have 4"),
    **{
        f"lora_alpha is {value!r}": field("lora_alpha", value)
        for value in ("8", True, None, [8], math.nan, -math.inf, 1e300)
    },
    "lora_alpha is 10^400": field("lora_alpha", 10**400),
    "use_rslora is a string": field("use_rslora", "true", "use_rslora is 'true', not true or false"),
    "rank_pattern is a list": field("rank_pattern", ["q_proj"], "rank_pattern is not a map"),
    "alpha_pattern is a number": field("alpha_pattern", 3, "alpha_pattern is not a map"),
    "rank_pattern with a string": field("rank_pattern", {"q_proj": "4"}, "rank_pattern['q_proj'] is '4'"),
    "rank_pattern with a zero": field("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj'] is 0"),
    "alpha_pattern with NaN": field("alpha_pattern", {"q_proj": math.nan}, "alpha_pattern['q_proj'] is nan"),
    "rank_pattern of another rank": field(
        "rank_pattern", {"q_proj": 2}, "self_attn.q_proj in model.layers 0-1: the config gives rank 2"
    ),
    **{
        f"{name} with the pattern {text[:12]}": field(name, value, f"{place} is not a regular expression")
        for text in ("q_proj(", "a{99999999999}", "(" * 3000 + ")" * 3000)
        for name, value, place in (
            ("rank_pattern", {text: 4}, f"rank_pattern[{text!r}]"),
            ("alpha_pattern", {text: 4}, f"alpha_pattern[{text!r}]"),
            ("target_modules", text, "target_modules, exclude_modules or layers_pattern"),
        )
    },
    "target_modules is a number": field("target_modules", 5, "target_modules is 5, not a list of names"),
    "every field of the targets at once": (
        config(target_modules=5, layers_to_transform="x", layers_pattern=3),
        "  - target_modules is 5, not a list of names or a pattern\n"
        "  - layers_to_transform is 'x', not a number or a list of numbers\n"
        "  - layers_pattern is 3",
    ),
    "target_modules with a number": field("target_modules", ["q_proj", 5], "target_modules is ['q_proj', 5]"),
    "targets match no module": field("target_modules", ["k_proj"], "matches no module of the file"),
    "no target at all": field("target_modules", [], "matches no module of the file"),
    "a pattern matches no module": field("target_modules", r".*k_proj", "matches no module of the file"),
    "targets match a part": field(
        "target_modules", ["q_proj"], "self_attn.v_proj in model.layers 0-1: not matched by target"
    ),
    "a pattern matches a part": field("target_modules", r".*\.0\..*", "layers.1.self_attn.q_proj: not matched by"),
    "targets excluded": field("exclude_modules", ["q_proj"], "self_attn.q_proj in model.layers 0-1: not matched by"),
    "targets excluded by a pattern": field(
        "exclude_modules", ".*q_proj", "self_attn.q_proj in model.layers 0-1: not matched by"
    ),
    "layers left out": field("layers_to_transform", [0], "layers.1.self_attn.q_proj: not matched by"),
}


@pytest.mark.parametrize(("spoil", "fragment"), by_name(BAD_CONFIGS))
def test_a_bad_config_is_refused(shelf: Shelf, tmp_path: Path, spoil: Spoil, fragment: str) -> None:
    spoil(tmp_path / "bad")
    refused(shelf, tmp_path / "bad", AdapterFormatError, fragment, f"where: {tmp_path / 'bad'}")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": False, "modules_to_save": [], "lora_bias": False, "layer_replication": None},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": False},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        {"exclude_modules": ["k_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"layers_pattern": "", "layers_to_transform": [0, 1]},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {}},
        *({"x_future": off} for off in (None, False, 0, "", [], {})),
        {"merge_weights": True},
        {"lora_dtype": "float16", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6},  # as ms-swift writes them
        {
            "auto_mapping": {  # as Unsloth writes it
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
                "unsloth_fixed": True,
            },
        },
    ],
    ids=str,
)
def test_what_does_not_change_the_update_is_accepted(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = make_adapter(1)
    assert_same_delta(read_adapter(write_peft(tmp_path / "x", plain, **changes)), plain)


def test_the_cure_of_a_field_that_is_not_known_works(tmp_path: Path) -> None:
    plain = make_adapter(1)
    folder = write_peft(tmp_path / "x", plain, x_future=[1])
    with pytest.raises(AdapterFormatError, match="x_future") as caught:
        read_adapter(folder)
    assert caught.value.cure is not None
    assert caught.value.cure.startswith("delete 'x_future' from adapter_config.json")
    config = json.loads((folder / CONFIG).read_text())
    del config["x_future"]
    (folder / CONFIG).write_text(json.dumps(config))
    assert_same_delta(read_adapter(folder), plain)


def test_a_shelf_that_holds_a_field_which_is_not_known_stays_readable(shelf: Shelf) -> None:
    """Earlier versions stored such adapters."""
    adapter = make_adapter(7)
    shelf.commit(plan_add(shelf.snapshot(), replace(adapter, config={**adapter.config, "x_future": [1]}), "old"))
    snapshot = Shelf(shelf.path).snapshot()
    slot = snapshot.manifest.slot_of("old")
    assert slot is not None
    assert json.loads((snapshot.slot_path(slot) / CONFIG).read_text())["x_future"] == [1]
    assert snapshot.stored(slot).shapes == adapter.shapes
    assert shelf.verify() == []


@pytest.mark.parametrize(
    ("path", "pattern"),
    [("model.layers.1.mlp.experts.0.down_proj", None), ("model.layers.1.q_proj", "layers"), ("h.1.q_proj", "h")],
)
def test_the_first_number_of_a_path_is_its_layer_as_in_peft(path: str, pattern: str | None) -> None:
    fields = {"target_modules": [path.rsplit(".", 1)[1]], "layers_pattern": pattern}
    assert targets({**fields, "layers_to_transform": [1]})(path)
    assert not targets({**fields, "layers_to_transform": [0]})(path)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = write_peft(tmp_path / "bad")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    words = [sys.executable, "-m", "lorashelf", "show", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, name in done.stderr) == (3, True)


def test_every_fault_of_an_adapter_is_named_at_once(shelf: Shelf, tmp_path: Path) -> None:
    bad = {
        f"{Q}.lora_A.weight": ones(4, 16, value=math.nan),
        f"{V}.lora_A.weight": None,
        f"{Q.replace('.0.', '.1.')}.lora_B.weight": ones(12, 2),
        f"{V.replace('.0.', '.1.')}.lora_B.weight": ones(8, 4, dtype="<f8"),
        f"{Q}.lora_magnitude_vector": ones(12),
    }
    tensors(bad)(tmp_path / "bad")
    written = json.loads((tmp_path / "bad" / CONFIG).read_text())
    written |= {"use_dora": True, "bias": "all", "init_lora_weights": "pissa", "r": "four", "lora_alpha": None}
    (tmp_path / "bad" / CONFIG).write_text(json.dumps(written))
    expected = [
        "use_dora is set",
        "bias is 'all'",
        "init_lora_weights is 'pissa'",
        "r is 'four'",
        "lora_alpha is None",
        "layers.0.self_attn.v_proj: lora_A is missing",
        "lora_magnitude_vector: a DoRA magnitude",
        "layers.1.self_attn.q_proj: lora_A has rank 4, lora_B has rank 2",
        "layers.1.self_attn.v_proj.lora_B: dtype F64",
        "1 of 64 values are NaN",
    ]
    error = refused(shelf, tmp_path / "bad", AdapterFormatError, "10 faults", *expected)
    assert isinstance(error, AdapterError)
    for fragment in expected:
        assert sum(fragment in fault for fault in error.faults) == 1


def test_config_and_tensors_are_checked_even_if_one_cannot_be_read(shelf: Shelf, tmp_path: Path) -> None:
    raw(b"{]")(tmp_path / "bad")
    (tmp_path / "bad" / CONFIG).unlink()
    refused(shelf, tmp_path / "bad", AdapterFormatError, "2 faults", f"{CONFIG} is missing", "header is not JSON")


def test_cluster_names_the_faults_of_all_adapters_and_makes_no_shelf(tmp_path: Path) -> None:
    write_peft(tmp_path / "good")
    config(use_dora=True)(tmp_path / "one")
    tensors({f"{V}.lora_B.weight": None})(tmp_path / "two")
    before = state(tmp_path)
    folders = [tmp_path / name for name in ("good", "one", "two")]
    code, said = command("cluster", *folders, "-o", tmp_path / "new.shelf", "--slots", 2, "--method", "random")
    assert code == 3
    assert "one: use_dora is set" in said
    assert "two: model.layers.0.self_attn.v_proj: lora_B is missing" in said
    assert state(tmp_path) == before


def test_a_folder_that_is_a_link_is_read(shelf: Shelf, tmp_path: Path) -> None:
    write_peft(tmp_path / "elsewhere" / "run7", make_adapter(1))
    (tmp_path / "mail").symlink_to(tmp_path / "elsewhere" / "run7")
    files = write_peft(tmp_path / "files", make_adapter(2))
    (files / TENSORS).rename(tmp_path / "blob")
    (files / TENSORS).symlink_to(tmp_path / "blob")  # as a hub's cache does
    assert command("add", shelf.path, f"mail={tmp_path / 'mail'}", files)[0] == 0
    assert shelf.verify() == []


# the shelf's base and shapes ------------------------------------------------------------------------------------------


def test_another_shape_is_refused_whatever_the_base_is_called(shelf: Shelf, tmp_path: Path) -> None:
    other = {f"{Q}.lora_A.weight": ones(4, 20), f"{V}.lora_B.weight": ones(9, 4)}
    tensors(other)(tmp_path / "bad")
    fragments = ["layers.0.self_attn.q_proj: ΔW is 12x20, elsewhere 12x16", "v_proj: ΔW is 9x16, elsewhere 8x16"]
    refused(shelf, tmp_path / "bad", ShapeMismatch, "2 faults", f"where: {shelf.path}", *fragments)
    before = state(shelf.path)
    with pytest.raises(ShapeMismatch):
        plan_add(shelf.snapshot(), read_adapter(tmp_path / "bad"), "new", assume_base=True)
    assert command("add", shelf.path, tmp_path / "bad", "--assume-base")[0] == 3
    with pytest.raises(ShapeMismatch):
        merge([make_adapter(0), read_adapter(tmp_path / "bad")], method="linear")
    with pytest.raises(ShapeMismatch):
        plan_cluster(
            Shelf.create(tmp_path / "empty.shelf", new_settings(2)).snapshot(),
            {"a": make_adapter(0), "b": read_adapter(tmp_path / "bad")},
            Clustering((("a",), ("b",)), "by hand"),
        )
    assert state(shelf.path) == before


def test_another_base_and_other_shapes_are_named_together(shelf: Shelf, tmp_path: Path) -> None:
    shapes = {f"{Q}.lora_A.weight": ones(4, 20), f"{V}.lora_B.weight": ones(9, 4)}
    write_peft(tmp_path / "a", make_adapter(0))
    tensors(shapes)(tmp_path / "b")
    written = json.loads((tmp_path / "b" / CONFIG).read_text())
    (tmp_path / "b" / CONFIG).write_text(json.dumps({**written, "base_model_name_or_path": "acme/other"}))
    fragments = ["3 faults", "trained on acme/other", "q_proj: ΔW is 12x20", "v_proj: ΔW is 9x16", "separate shelves"]
    refused(shelf, tmp_path / "b", BaseMismatch, *fragments)
    before = state(tmp_path)
    folders = [tmp_path / "a", tmp_path / "b"]
    for words in (
        ["merge", *folders, "-o", tmp_path / "out", "--method", "linear"],
        ["cluster", *folders, "-o", tmp_path / "new.shelf", "--slots", 2, "--method", "random"],
    ):
        code, said = command(*words)
        both = ["4 faults", "acme/tiny-llama: a", "acme/other: b", *fragments[2:]]  # neither is the right one
        assert (code, [part for part in both if part not in said]) == (3, []), said
    assert state(tmp_path) == before
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(1), "second"))
    with pytest.raises(BaseMismatch, match="3 faults"):
        plan_update(shelf.snapshot(), "second", read_adapter(tmp_path / "b"))


def test_merge_names_every_adapter_that_it_cannot_read(tmp_path: Path) -> None:
    good = write_peft(tmp_path / "good")
    config(use_dora=True)(tmp_path / "one")
    before = state(tmp_path)
    words = ["-o", tmp_path / "out", "--method", "factor_mean"]
    code, said = command("merge", good, tmp_path / "absent", f"x={tmp_path / 'one'}", *words)
    assert (code, "absent: cannot be read" in said, "x: use_dora is set" in said) == (3, True, True), said
    assert state(tmp_path) == before
    assert command("merge", good, good, *words)[0] == 0  # twice is a weight
    assert_same_delta(read_adapter(tmp_path / "out"), read_adapter(good))


@pytest.mark.parametrize(("option", "value"), [("--seed", -1), ("--rank", 0), ("--rank", 2**60)])
def test_merge_refuses_what_cannot_be_before_it_reads(tmp_path: Path, option: str, value: int) -> None:
    words = ["merge", tmp_path / "absent", "-o", tmp_path / "out", "--method", "linear"]
    code, said = command(*words, option, value)
    assert (code, f"{option[2:]} is {value}" in said) == (2, True), said
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "held").touch()  # an empty folder is taken
    code, said = command(*words)
    assert (code, "the output already exists" in said, str(tmp_path / "out") in said) == (2, True, True), said


@pytest.mark.parametrize(
    ("base", "revision", "fragment"),
    [
        ("acme/other-llama", None, "trained on acme/other-llama, expected is acme/tiny-llama"),
        (BASE.upper(), None, f"trained on {BASE.upper()}"),
        (BASE, "v2", "trained on acme/tiny-llama@v2, expected is acme/tiny-llama@v1"),
    ],
)
def test_another_base_is_refused_unless_declared(
    new_shelf: Callable[..., Shelf], tmp_path: Path, base: str, revision: str | None, fragment: str
) -> None:
    shelf = new_shelf()
    first = write_peft(tmp_path / "first", make_adapter(0), revision="v1" if revision else None)
    shelf.commit(plan_add(shelf.snapshot(), read_adapter(first), "first"))
    folder = write_peft(tmp_path / "bad", make_adapter(1, base=base), revision=revision)
    error = refused(shelf, folder, BaseMismatch, fragment, f"where: {shelf.path}")
    assert "--assume-base" in (error.cure or "")
    before = state(shelf.path)
    with pytest.raises(BaseMismatch):
        plan_update(shelf.snapshot(), "first", read_adapter(folder))
    assert state(shelf.path) == before
    assert command("add", shelf.path, folder, "--assume-base")[0] == 0
    assert shelf.snapshot().manifest.base == read_adapter(first).base


def test_a_base_may_be_declared_equal_and_others_are_still_refused(
    new_shelf: Callable[..., Shelf], tmp_path: Path
) -> None:
    shelf = new_shelf(base_aliases=["acme/tiny-llama-4bit"])
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(0), "first"))
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(1, base="acme/tiny-llama-4bit"), "quantised"))
    assert shelf.snapshot().manifest.base.name == BASE
    refused(shelf, write_peft(tmp_path / "x", make_adapter(2, base="acme/tiny")), BaseMismatch, "acme/tiny")


def test_a_base_in_the_settings_is_a_constraint_from_the_first_add_on(
    new_shelf: Callable[..., Shelf], tmp_path: Path
) -> None:
    shelf = new_shelf(base="acme/wanted")
    command("gc", shelf.path)  # the lock's file is there from now on
    refused(shelf, write_peft(tmp_path / "x"), BaseMismatch, f"trained on {BASE}, expected is acme/wanted")
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(0, base="acme/wanted"), "first"))


@pytest.mark.parametrize("base", ["", None])
def test_an_empty_base_is_accepted_with_a_warning(shelf: Shelf, tmp_path: Path, base: str | None) -> None:
    folder = write_peft(tmp_path / "x", make_adapter(1), base_model_name_or_path=base)
    code, said = command("add", shelf.path, folder)
    assert code == 0
    assert "does not name a base model" in said
    assert shelf.snapshot().manifest.base.name == BASE


def test_merge_and_cluster_refuse_bases_that_differ(tmp_path: Path) -> None:
    folders = [write_peft(tmp_path / str(i), make_adapter(i, base=f"acme/{i}")) for i in range(3)]
    before = state(tmp_path)
    code, said = command("merge", *folders, "-o", tmp_path / "out", "--method", "linear")
    assert (code, "trained on acme/1" in said, "trained on acme/2" in said) == (3, True, True)
    options = ["--slots", 2, "--method", "random"]
    code, said = command("cluster", *folders, "-o", tmp_path / "new.shelf", *options)
    assert (code, "trained on acme/1" in said, "trained on acme/2" in said) == (3, True, True)
    assert state(tmp_path) == before
    assert command("merge", *folders, "-o", tmp_path / "out", "--method", "linear", "--assume-base")[0] == 0
    assert command("cluster", *folders, "-o", tmp_path / "new.shelf", *options, "--assume-base")[0] == 0


# what a merge is given, and what writing cannot hold ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "fragment"),
    [
        ({"method": "no_such"}, UnknownName, "unknown merge method 'no_such'"),
        ({"method": "tie"}, UnknownName, "did you mean 'ties'"),
        ({"method": "linear", "density": 0.5}, UsageError, "linear has no parameter 'density'"),
        ({"method": "ties", "densty": 0.5}, UsageError, "ties has no parameter 'densty'"),
        *(
            ({"method": "ties", "density": value}, UsageError, f"density is {value!r}")
            for value in (2, -0.1, math.nan, math.inf, "half", None, True)
        ),
        ({"method": "ties", "majority_sign_method": "most"}, UsageError, "choose from total, frequency"),
        ({"method": "linear", "weights": [1.0]}, UsageError, "1 weight for 2 adapters"),
        ({"method": "linear", "weights": [1.0, 1.0, 1.0]}, UsageError, "3 weights for 2 adapters"),
        ({"method": "linear", "weights": [1.0, math.nan]}, UsageError, "weights [nan] are not finite"),
        ({"method": "linear", "weights": [math.inf, -math.inf]}, UsageError, "weights [inf, -inf] are not finite"),
        ({"method": "linear", "rank": 0}, UsageError, "rank is 0"),
    ],
    ids=str,
)
def test_a_wrong_merge_is_a_usage_error(options: dict[str, Any], kind: type[UsageError], fragment: str) -> None:
    with pytest.raises(UsageError) as caught:
        merge([make_adapter(0), make_adapter(1)], **options)
    assert type(caught.value) is kind
    assert caught.value.exit_code == 2
    assert fragment in str(caught.value)


def test_all_wrong_parameters_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"no parameter 'x'.*density is 2.*majority_sign_method is 'y'"):
        merge([make_adapter(0)] * 2, method="ties", density=2, majority_sign_method="y", x=1)


def test_nothing_cannot_be_merged() -> None:
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([], method="linear")


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "ties", "-p", "density=2"],
        ["--method", "ties", "-p", "density"],
        ["--method", "linear", "-p", "density=0.5"],
        ["--method", "linear", "--weights", "1"],
        ["--method", "linear", "--weights", "1,nan"],
        ["--method", "linear", "--weights", "1,x"],
        ["--method", "linear", "--rank", "0"],
        ["--method", "linear", "--dtype", "f8"],
        ["--method", "average"],
    ],
    ids=" ".join,
)
def test_a_wrong_merge_command_ends_with_2_and_writes_nothing(tmp_path: Path, words: list[str]) -> None:
    folders = [write_peft(tmp_path / name, make_adapter(i)) for i, name in enumerate("ab")]
    before = state(tmp_path)
    code, said = command("merge", *folders, "-o", tmp_path / "out", *words)
    assert code == 2
    assert said.startswith("lorashelf: ")
    assert state(tmp_path) == before


def huge(value: float, dtype: str) -> Adapter:
    plain = make_adapter(1, layers=1)
    factors = {p: Factors(f.a, f.b * 0 + np.float32(value), f.scale) for p, f in plain.modules.items()}
    return replace(plain.with_factors(factors), dtype=dtype)


@pytest.mark.parametrize(
    ("value", "dtype"), [(7e4, "f16"), (3.4e38, "bf16"), (math.inf, "f32"), (math.nan, "f32"), (math.nan, "bf16")]
)
def test_what_a_dtype_cannot_hold_is_not_written(tmp_path: Path, value: float, dtype: str) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        write_adapter(huge(value, dtype), tmp_path / "out")
    assert caught.value.exit_code == 3
    assert "model.layers.0.self_attn.q_proj.lora_B" in str(caught.value)
    assert caught.value.cure
    assert state(tmp_path) == {}


def test_a_shelf_of_f16_refuses_what_f16_cannot_hold(new_shelf: Callable[..., Shelf], tmp_path: Path) -> None:
    shelf = new_shelf(dtype="f16")
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(0), "first"))
    folder = write_peft(tmp_path / "huge", huge(7e4, "f32"))
    refused(shelf, folder, AdapterFormatError, "q_proj.lora_B: 7e+04 is beyond what f16 can hold")
    assert shelf.verify() == []


def test_a_value_that_f16_can_just_hold_is_written(tmp_path: Path) -> None:
    write_adapter(huge(65504.0, "f16"), tmp_path / "out")
    assert float(next(iter(read_adapter(tmp_path / "out").modules.values())).b.max()) == 65504.0


def test_an_output_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "x")
    before = state(tmp_path)
    with pytest.raises(UsageError, match="already exists"):
        write_adapter(make_adapter(1), folder)
    assert command("merge", folder, "-o", folder, "--method", "linear")[0] == 2
    assert state(tmp_path) == before


def test_a_folder_of_adapters_says_so(tmp_path: Path) -> None:
    write_peft(tmp_path / "zoo" / "gec-de")
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(tmp_path / "zoo")
    assert f"cure:  this folder contains adapters: give each one, {tmp_path / 'zoo'}/*/" in str(caught.value)


# numbers that JSON cannot hold ---------------------------------------------------------------------------------------


def test_what_json_cannot_hold_is_an_error_of_ours_or_null_in_a_document(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (math.nan, math.inf, 2**60):
        with pytest.raises(NotStorable, match="cannot be stored"):
            canonical_json({"x": [value]})
    print_json({"a": math.nan, "b": [math.inf, 1.5], "c": ("x", -math.inf)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": ["x", None]}
    folder = write_peft(
        tmp_path / "nan", tensors={**peft_tensors(make_adapter(5)), f"{Q}.lora_A.weight": ones(4, 16) * math.nan}
    )
    before = state(tmp_path)
    with pytest.raises(LorashelfError) as caught:
        shelf.commit(plan_add(shelf.snapshot(), read_adapter(folder, check_values=False), "nan"))
    assert "nan" in str(caught.value).lower()
    assert state(tmp_path) == before
