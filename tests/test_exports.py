"""Exports: every object is written, read back and compared; llama.cpp computes what transformers computes; refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import HEEDING, Command
from factory import assert_same_delta, make_adapter, tree
from llama_model import MODELS, Llama, by_pairs, tensor_name, tiny, write_gguf
from lorashelf import Adapter, BaseId, Factors, Modules, Shelf, export_shelf, new_settings, plan_add, read_adapter
from lorashelf.errors import (
    AdapterFormatError,
    CorruptShelf,
    DiskError,
    ModelError,
    NotExportable,
    UnknownName,
    UsageError,
)
from lorashelf.export.formats import FORMATS
from lorashelf.export.target import ROUTES
from lorashelf.formats.gguf.base import ARCHITECTURES, GgufBase, Tensor, base_of
from lorashelf.formats.gguf.header import F16, F32, read_header
from lorashelf.formats.gguf.lora import TOLERANCES, read_lora, write_lora
from lorashelf.formats.mlx import read_mlx
from lorashelf.lora.algebra import relative_error
from lorashelf.models.base_model import located
from tiny_gguf import tiny_gguf

ZOO = Path(__file__).parent.parent / "examples" / "zoo"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
needs_llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
NewShelf = Callable[..., Shelf]
READERS = {  # of the formats that need no base
    "peft": lambda folder: read_adapter(folder).modules,
    "vllm": lambda folder: read_adapter(folder).modules,
    "mlx": read_mlx,
}


def filled(shelf: Shelf, **adapters: Adapter) -> Shelf:
    for task, adapter in adapters.items():
        shelf.commit(plan_add(shelf.snapshot(), adapter, task))
    return shelf


def on(model: Any, seed: int = 1, rank: int = 4, size: float = 0.15, scale: float = 1.7) -> Adapter:
    """A random adapter of every linear layer of a model, with another scale and rank for the value projections."""
    import torch

    rng, modules = np.random.default_rng(seed), {}
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not (path == "lm_head" and model.config.tie_word_embeddings):
            r = 2 * rank if path.endswith("v_proj") else rank
            a = size * rng.standard_normal((r, layer.in_features), dtype=np.float32)
            b = size * rng.standard_normal((layer.out_features, r), dtype=np.float32)
            modules[path] = Factors(a, b, 3 * scale if path.endswith("v_proj") else scale)
    return Adapter(Modules(modules), BaseId("acme/tiny"))


def logits_with(model: Any, adapter: Adapter, ids: list[int]) -> np.ndarray:
    """The logits of transformers' model with s B A added to its weights."""
    import torch

    layers = dict(model.named_modules())
    with torch.inference_mode():
        for sign in (1, -1):
            for path, f in adapter.modules.items():
                layers[path].weight += sign * torch.from_numpy(f.delta())
            if sign == 1:
                found = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return found


# llama.cpp ------------------------------------------------------------------------------------------------------------


@needs_llama
@pytest.mark.parametrize("outtype", TOLERANCES)
@pytest.mark.parametrize("architecture", MODELS)
def test_llama_cpp_computes_what_transformers_computes(
    tmp_path: Path, new_shelf: NewShelf, one_thread: None, architecture: str, outtype: str
) -> None:
    """Random weights and adapters of every linear layer, so that a wrong name, order of rows or scale changes much."""
    import torch

    model = tiny(architecture)
    base, adapter = write_gguf(model, architecture, tmp_path / "base.gguf"), on(model)
    shelf = filled(new_shelf(1), task=adapter)
    export_shelf(shelf.snapshot(), tmp_path / "out", "gguf", {"base": str(base), "outtype": outtype})
    ids = [int(i) for i in np.random.default_rng(3).integers(5, 260, 40)]
    with torch.inference_mode():
        bare = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    llama = Llama(base)
    apart = np.abs(llama.logits(ids) - bare).max()
    wanted, found = logits_with(model, adapter, ids), llama.logits(ids, tmp_path / "out" / "slot-0.gguf")
    llama.close()
    assert np.abs(wanted - bare).max() > 1  # the adapter matters
    assert apart < 5e-3  # gemma3's GELU is a table in llama.cpp; the others agree to 1e-5
    moved = {"f32": 0.0, "f16": 0.01, "q8_0": 0.1}[outtype] * np.abs(wanted - bare).max()
    assert np.abs(found - wanted).max() < 3 * apart + 1e-5 + moved


@needs_llama
def test_rows_in_transformers_order_are_noticed(
    tmp_path: Path, new_shelf: NewShelf, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above fails if q and k keep the order of their rows."""
    monkeypatch.setitem(ARCHITECTURES, "llama", {})
    with pytest.raises(AssertionError):
        test_llama_cpp_computes_what_transformers_computes(tmp_path, new_shelf, one_thread, "llama", "f32")


@needs_llama
@pytest.mark.long
def test_a_real_base_agrees_with_the_exported_adapter_as_it_does_without(
    tmp_path: Path, new_shelf: NewShelf, one_thread: None, smollm2: Any
) -> None:
    """SmolLM2's dequantised weights in float32 in both runtimes, an adapter of the example zoo."""
    import torch

    adapter = read_adapter(ZOO / "gec-de")
    shelf = filled(new_shelf(1), task=adapter)
    base = write_gguf(smollm2.base.model, "llama", tmp_path / "base.gguf")
    export_shelf(shelf.snapshot(), tmp_path / "out", "gguf", {"base": str(base), "outtype": "f32"})
    ids = smollm2.text.query("Correct the grammar of the text.", "Er gehen gestern in die Schule und lernt viel.")
    with torch.inference_mode():
        bare = smollm2.base.model(input_ids=torch.tensor([ids])).logits[0].numpy()
    wanted = logits_with(smollm2.base.model, adapter, ids)
    llama = Llama(base)
    apart = np.abs(llama.logits(ids) - bare).max()
    found = np.abs(llama.logits(ids, tmp_path / "out" / "slot-0.gguf") - wanted).max()
    llama.close()
    assert np.abs(wanted - bare).max() > 1
    assert apart < 1e-3
    assert found < 3 * apart


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", MODELS)
def test_names_and_order_follow_an_independent_table(tmp_path: Path, new_shelf: NewShelf, architecture: str) -> None:
    adapter = on(tiny(architecture))
    base = GgufBase("tiny", architecture, blocks=2, heads=4, kv_heads=2)
    tensors, faults = base.tensors(adapter)
    assert not faults
    names = {path: f"{tensor_name(architecture, path)}.weight" for path in adapter.modules}
    assert {path: tensor.name for path, tensor in tensors.items()} == names
    for path, tensor in tensors.items():
        b = adapter.modules[path].b
        heads = {"q_proj": 4, "k_proj": 2}.get(path.rpartition(".")[2]) if architecture == "llama" else None
        assert np.array_equal(tensor.ordered(b), by_pairs(b, heads) if heads else b)
        assert np.array_equal(tensor.restored(tensor.ordered(b)), b)


@pytest.mark.parametrize("outtype", TOLERANCES)
def test_a_file_is_what_the_package_gguf_reads(tmp_path: Path, new_shelf: NewShelf, outtype: str) -> None:
    """Rank 32 in q8_0 on both sides, rank 8 with B in f16; scales folded, so that llama.cpp's own is 1."""
    import gguf

    rng = np.random.default_rng(0)
    draw = partial(rng.standard_normal, dtype=np.float32)
    modules = {
        "model.layers.0.self_attn.q_proj": Factors(draw((32, 64)), 0.001 * draw((32, 32)), 2.0),
        "model.layers.1.mlp.down_proj": Factors(draw((8, 64)), 0.001 * draw((32, 8)), -0.7),
    }
    shelf = filled(new_shelf(1), task=Adapter(Modules(modules), BaseId("acme/tiny")))
    document = export_shelf(shelf.snapshot(), tmp_path / "out", "gguf", {"arch": "qwen2", "outtype": outtype})
    reader = gguf.GGUFReader(tmp_path / "out" / "slot-0.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert (fields["adapter.type"], fields["general.architecture"]) == ("lora", "qwen2")
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    types = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    beside = {"q8_0": "f16"}.get(outtype, outtype)
    assert types == {
        "blk.0.attn_q.weight.lora_a": outtype,
        "blk.0.attn_q.weight.lora_b": outtype,
        "blk.1.ffn_down.weight.lora_a": outtype,
        "blk.1.ffn_down.weight.lora_b": beside,
    }
    read = {}
    for path, name in zip(modules, ("blk.0.attn_q", "blk.1.ffn_down"), strict=True):
        a, b = (found[f"{name}.weight.lora_{side}"] for side in "ab")
        read[path] = Factors(a, b, fields["adapter.lora.alpha"] / len(a))
        assert 0.5 <= np.abs(a).max() / np.abs(b).max() <= 2  # the same range on both sides
    error = relative_error(shelf.snapshot().adapter("task"), read)
    assert error == pytest.approx(document["objects"][0]["error"], abs=1e-8)
    assert error <= document["objects"][0]["tolerance"] == TOLERANCES[outtype]


def test_auto_is_f16_unless_a_value_or_the_error_is_beyond_it(tmp_path: Path, new_shelf: NewShelf) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 16), dtype=np.float32), rng.standard_normal((8, 2), dtype=np.float32)
    path = "model.layers.0.self_attn.v_proj"
    apart = np.array([1e6, 1e-3], np.float32)
    pairs = {
        "plain": (a, b),
        "uneven": (a, 1e-9 * b),
        "large": (a * apart[:, None], b * apart[::-1]),
        "small": (1e-6 * a, 1e-6 * b),
    }
    shelf = filled(
        new_shelf(4, policy="kmerge"),
        **{name: Adapter(Modules({path: Factors(*sides, 1.3)}), BaseId("acme/tiny")) for name, sides in pairs.items()},
    )
    document = export_shelf(shelf.snapshot(), tmp_path / "out", "gguf", {"arch": "qwen2"})
    kinds = {
        each["tasks"][0]: {place.kind for place in read_header(tmp_path / "out" / each["path"]).tensors.values()}
        for each in document["objects"]
    }
    assert kinds == {"plain": {F16}, "uneven": {F16}, "large": {F32}, "small": {F32}}
    assert all(each["error"] <= each["tolerance"] for each in document["objects"])
    with pytest.raises(NotExportable, match=r"slot 2 \(large\): .*beyond what f16") as refused:
        export_shelf(shelf.snapshot(), tmp_path / "other", "gguf", {"arch": "qwen2", "outtype": "f16"})
    assert refused.value.exit_code == 6
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("options", [{"encoding": "peft"}, {"encoding": "coded"}, {"dtype": "bf16"}], ids=str)
@pytest.mark.parametrize(
    "format", sorted(FORMATS.keys() - {"onnx"})
)  # which needs its extra: tests/test_export_onnx.py
def test_every_encoding_is_exported_in_every_format(
    tmp_path: Path, new_shelf: NewShelf, format: str, options: dict[str, Any]
) -> None:
    """What is written is the slot's adapter, a fold's average as well as a coded object."""
    adapters = {name: read_adapter(ZOO / name) for name in ("gec-de", "gec-en", "qa-de")}
    snapshot = filled(new_shelf(2, policy="kmerge", **options), **adapters).snapshot()
    base = {} if format in READERS else {"base": SMOLLM2}
    document = export_shelf(snapshot, tmp_path / "out", format, base)
    routes = json.loads((tmp_path / "out" / ROUTES).read_text())
    assert routes == document["routes"]
    assert set(routes) == set(adapters)
    assert set(document["files"]) == set(tree(tmp_path / "out"))
    assert len(document["objects"]) == 2
    for task, path in routes.items():
        slot = snapshot.adapter(task)
        tensors, _ = base_of(located(SMOLLM2), SMOLLM2).tensors(slot)
        read = READERS.get(format, partial(read_lora, tensors=tensors))
        assert_same_delta(slot, replace(slot, modules=Modules(read(tmp_path / "out" / path))), tolerance=2e-3)


def test_a_dtype_is_a_choice_of_peft(tmp_path: Path, new_shelf: NewShelf) -> None:
    shelf = filled(new_shelf(1), task=make_adapter())
    assert export_shelf(shelf.snapshot(), tmp_path / "as-stored", "peft")["objects"][0]["error"] == 0
    (half,) = export_shelf(shelf.snapshot(), tmp_path / "half", "peft", {"dtype": "bf16"})["objects"]
    assert read_adapter(tmp_path / "half" / half["path"]).dtype == "bf16"
    assert 0 < half["error"] < half["tolerance"] == 1e-2


def test_tasks_choose_the_objects(tmp_path: Path, new_shelf: NewShelf) -> None:
    shelf = filled(new_shelf(3, policy="kmerge"), **{name: make_adapter(i) for i, name in enumerate(("a", "b", "c"))})
    document = export_shelf(shelf.snapshot(), tmp_path / "out", "peft", tasks=["c", "a"])
    assert document["routes"] == {"a": "slot-0", "c": "slot-2"}
    with pytest.raises(UnknownName, match="unknown task 'd'"):
        export_shelf(shelf.snapshot(), tmp_path / "other", "peft", tasks=["d"])


def test_other_spellings_of_a_module_are_the_same_tensor(tmp_path: Path, new_shelf: NewShelf) -> None:
    """Text modules of a multimodal model, and of one without a head."""
    spelled = ("model.language_model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj")
    base = GgufBase("tiny", "gemma3", blocks=1)
    for path in spelled:
        tensors, faults = base.tensors(Adapter(Modules({path: Factors(np.ones((1, 4), "f4"), np.ones((4, 1), "f4"))})))
        assert [tensor.name for tensor in tensors.values()] == ["blk.0.ffn_up.weight"], faults


# ollama ---------------------------------------------------------------------------------------------------------------


def test_a_modelfile_names_the_base_the_adapter_and_the_prompt(tmp_path: Path, new_shelf: NewShelf) -> None:
    shelf = filled(new_shelf(1), **{"gec-de": read_adapter(ZOO / "gec-de")})
    export_shelf(shelf.snapshot(), tmp_path / "out", "ollama")
    assert (tmp_path / "out" / "slot-0.Modelfile").read_text() == (
        f"FROM {located(SMOLLM2)}\nADAPTER ./slot-0.gguf\n"
        'TEMPLATE """<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\n'
    )
    assert "ollama create gec-de -f slot-0.Modelfile" in (tmp_path / "out" / "README.md").read_text()


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(new_shelf: NewShelf) -> Shelf:
    """Two slots whose modules fit a llama of one layer of 16; they have names of two layers."""
    return filled(new_shelf(2, policy="kmerge"), a=make_adapter(0), b=make_adapter(1))


def test_everything_that_llama_cpp_cannot_hold_is_refused_at_once(tmp_path: Path, new_shelf: NewShelf) -> None:
    a, b = np.ones((1, 16), "f4"), np.ones((16, 1), "f4")
    odd = {
        "model.vision_tower.encoder.layers.0.self_attn.q_proj": Factors(a, b),
        "model.layers.0.self_attn.kv_a_proj": Factors(a, b),
        "model.layers.0.self_attn.q_proj": Factors(a, np.ones((12, 1), "f4")),
        "model.layers.0.self_attn.v_proj": Factors(a, b),
        "model.layers.7.self_attn.v_proj": Factors(a, b),
        "lm_head": Factors(a, b),
    }
    shelf = filled(new_shelf(2), a=Adapter(Modules(odd), BaseId("acme/tiny")))
    base = tiny_gguf(tmp_path / "base.gguf")
    before = tree(tmp_path)
    with pytest.raises(NotExportable) as refused:
        export_shelf(shelf.snapshot(), tmp_path / "out", "gguf", {"base": str(base)})
    shown = "\n".join(refused.value.faults)
    for part in (
        "vision_tower",
        "kv_a_proj",
        "ΔW is 12x16",
        "16x16",
        "layers.7",
        "has 1 block",
        "lm_head: ΔW is 16x16",
        "slot 0 (a)",
    ):
        assert part in shown
    assert "model.layers.0.self_attn.v_proj" not in shown
    assert "--format peft" in str(refused.value.cure)
    assert "give the base it was trained on: acme/tiny" in str(refused.value.cure)
    assert tree(tmp_path) == before


def test_rows_that_are_not_whole_heads_are_refused() -> None:
    x = Adapter(Modules({"model.layers.0.self_attn.k_proj": Factors(np.ones((1, 16), "f4"), np.ones((16, 1), "f4"))}))
    tensors, (fault,) = GgufBase("tiny", "llama", blocks=1, heads=9, kv_heads=3).tensors(x)
    assert not tensors
    assert "16 rows are not 3 heads" in fault.what


def test_a_head_that_is_the_embedding_has_no_lora(tmp_path: Path, new_shelf: NewShelf) -> None:
    head = Adapter(Modules({"lm_head": Factors(np.ones((1, 16), "f4"), np.ones((32, 1), "f4"))}), BaseId("acme/tiny"))
    for tied in (True, False):
        tensors, faults = GgufBase("tiny", "gemma3", blocks=1, tied=tied).tensors(head)
        assert (len(tensors), len(faults)) == (1 - tied, int(tied))


def folder_with(path: Path, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_folder_with_a_configuration_is_a_base(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2}
    base = base_of(folder_with(tmp_path / "m", model_type="mistral", **sizes), "m")
    assert (base.architecture, base.blocks, base.heads, base.kv_heads) == ("llama", 2, 4, 2)
    nested = base_of(folder_with(tmp_path / "g", model_type="gemma3", text_config={**sizes, "x": 1}), "g")
    assert (nested.architecture, nested.blocks, nested.tied) == ("gemma3", 2, True)


def adapter_file(tmp_path: Path) -> Path:
    shelf = filled(Shelf.create(tmp_path / "s", new_settings(1)), a=make_adapter())
    export_shelf(shelf.snapshot(), tmp_path / "l", "gguf", {"arch": "qwen2"})
    return tmp_path / "l" / "slot-0.gguf"


def not_a_lora(tmp_path: Path) -> Path:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_type("model")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def cut_short(tmp_path: Path) -> Path:
    whole = tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 3])
    return tmp_path / "cut.gguf"


def not_gguf(tmp_path: Path) -> Path:
    (tmp_path / "x.gguf").write_bytes(b"GGUX" + bytes(100))
    return tmp_path / "x.gguf"


def huge_count(tmp_path: Path) -> Path:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 200)
    return tmp_path / "x.gguf"


BASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none.gguf", "the base model does not exist"),
    "cut off": (cut_short, "cannot be read"),
    "of another format": (not_gguf, "not a GGUF file"),
    "with absurd sizes": (huge_count, "cannot be read"),
    "an adapter": (adapter_file, "of a adapter|of an adapter|not of a model"),
    "a folder without a configuration": (lambda folder: (folder / "f").mkdir() or folder / "f", "config.json"),
    "an unknown architecture": (
        lambda folder: folder_with(folder / "f", model_type="gpt2", num_attention_heads=2, num_hidden_layers=2),
        "unknown architecture 'gpt2'",
    ),
}


@pytest.mark.parametrize("kind", BASES)
def test_a_base_that_cannot_be_used_is_refused(tmp_path: Path, two: Shelf, kind: str) -> None:
    make, message = BASES[kind]
    base = make(tmp_path)
    with pytest.raises((ModelError, UnknownName), match=message) as refused:
        export_shelf(two.snapshot(), tmp_path / "out", "gguf", {"base": str(base)})
    assert str(base) in str(refused.value.where)
    assert refused.value.cure
    assert not (tmp_path / "out").exists()


OPTIONS: dict[str, tuple[str, dict[str, str], str]] = {
    "an unknown format": ("onx", {}, "unknown format 'onx'"),
    "an unknown type": ("gguf", {"arch": "qwen2", "outtype": "q3"}, "unknown outtype 'q3'"),
    "an unknown dtype": ("peft", {"dtype": "q3"}, "unknown dtype 'q3'"),
    "an unknown architecture": ("gguf", {"arch": "lama"}, "unknown architecture 'lama'"),
    "an architecture that needs heads": ("gguf", {"arch": "llama"}, "attn_q and attn_k in another order"),
    "an option of another format": ("peft", {"outtype": "f16"}, "--format peft does not read --outtype"),
    "a base that is not here": ("gguf", {}, "acme/tiny-llama is not on this machine"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, two: Shelf, kind: str) -> None:
    format, options, message = OPTIONS[kind]
    with pytest.raises(UsageError, match=message) as refused:
        export_shelf(two.snapshot(), tmp_path / "out", format, options)
    assert refused.value.cure
    assert not (tmp_path / "out").exists()


def test_another_architecture_than_the_base_s_is_refused(tmp_path: Path, two: Shelf) -> None:
    base = str(tiny_gguf(tmp_path / "base.gguf"))
    with pytest.raises(UsageError, match="--arch is qwen2, the base's architecture is llama"):
        export_shelf(two.snapshot(), tmp_path / "out", "gguf", {"base": base, "arch": "qwen2"})


def test_an_existing_folder_is_never_touched(tmp_path: Path, two: Shelf) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("kept")
    with pytest.raises(UsageError, match="already exists"):
        export_shelf(two.snapshot(), tmp_path / "out", "peft")
    assert tree(tmp_path / "out") == {"x": b"kept"}


def test_an_empty_shelf_has_nothing_to_export(tmp_path: Path, new_shelf: NewShelf) -> None:
    with pytest.raises(UsageError, match="no tasks"):
        export_shelf(new_shelf(1).snapshot(), tmp_path / "out", "peft")


def test_what_reads_back_wrong_is_not_reported_as_done(
    tmp_path: Path, two: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "restored", lambda self, b: b[::-1].copy())
    before = tree(tmp_path)
    with pytest.raises(NotExportable, match="as read back differs"):
        export_shelf(two.snapshot(), tmp_path / "out", "gguf", {"arch": "qwen2"})
    assert tree(tmp_path) == before


def test_a_type_that_is_not_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown outtype 'q4_0'"):
        write_lora(make_adapter(), {}, "qwen2", tmp_path / "x.gguf", "q4_0")


def test_a_file_with_other_tensors_is_not_read_as_the_adapter(tmp_path: Path, two: Shelf) -> None:
    export_shelf(two.snapshot(), tmp_path / "out", "gguf", {"arch": "qwen2"})
    with pytest.raises(AdapterFormatError, match="the tensors are not those of the adapter"):
        read_lora(tmp_path / "out" / "slot-0.gguf", {"model.layers.0.x": Tensor("blk.0.attn_q.weight", 0)})
    with pytest.raises(AdapterFormatError, match="the tensors are not those of the adapter"):
        read_lora(not_a_lora(tmp_path), {})


def test_a_damaged_slot_is_not_exported(tmp_path: Path, two: Shelf) -> None:
    (folder,) = (two.snapshot().slot_path(slot) for slot in two.snapshot().manifest.slots if slot.id == 1)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(CorruptShelf):
        export_shelf(two.snapshot(), tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UsageError, match="already exists"):  # before a slot is read
        export_shelf(two.snapshot(), tmp_path / "taken", "peft")
    assert export_shelf(two.snapshot(), tmp_path / "one", "peft", tasks=["a"])["routes"] == {"a": "slot-0"}


@pytest.mark.parametrize("format", ["peft", "gguf"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, two: Shelf, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """No file may be larger than the header of the larger one: the system itself refuses the write."""
    import resource

    before, limits = tree(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(signal, "SIGXFSZ", signal.SIGXFSZ)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
        with pytest.raises(DiskError) as refused:
            export_shelf(two.snapshot(), tmp_path / "out", format, {"arch": "qwen2"} if format == "gguf" else {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert str(tmp_path / "out") in str(refused.value.where)
    assert tree(tmp_path) == before


# the command ----------------------------------------------------------------------------------------------------------


def test_the_command_prints_its_document(tmp_path: Path, two: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    run = Command(capsys)
    code, document = run("export", two.path, "-o", tmp_path / "out", "--format", "gguf", "--arch", "qwen2")
    assert code == 0
    assert set(document) == {"output", "format", "objects", "routes", "files"}
    assert set(document["objects"][0]) == {"slot", "tasks", "path", "bytes", "error", "tolerance"}
    assert document["routes"] == {"a": "slot-0.gguf", "b": "slot-1.gguf"}
    assert document["objects"][0]["bytes"] == (tmp_path / "out" / "slot-0.gguf").stat().st_size
    code, text = run("export", two.path, "-o", tmp_path / "p", "--format", "peft", "--task", "b", as_json=False)
    assert code == 0
    assert "slot-1" in text
    assert "slot-0" not in text
    base = tiny_gguf(tmp_path / "base.gguf")
    code, document = run("export", two.path, "-o", tmp_path / "x", "--format", "gguf", "--base", base)
    assert code == 6
    assert document["error"]["kind"] == "export"
    assert len(document["error"]["faults"]) == len(document["error"]["cures"]) == 8


def test_an_interrupt_leaves_nothing(tmp_path: Path, two: Shelf) -> None:
    """Ctrl-C while the second object is being written."""
    code = """
import sys, time
from lorashelf.cli import main
from lorashelf.export.peft import _Folders
write = _Folders.write
def slowly(self, item, folder):
    done = write(self, item, folder)
    if item.slot == 1:
        print("second", file=sys.stderr, flush=True)
        while True:
            time.sleep(0.05)
    return done
_Folders.write = slowly
main(sys.argv[1:])
"""
    words = ["export", str(two.path), "-o", str(tmp_path / "out"), "--format", "peft"]
    before = sorted(tmp_path.iterdir())
    process = subprocess.Popen([*HEEDING, sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if line == "second\n":
            break
    assert sorted(tmp_path.iterdir()) != before
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.communicate()
    assert sorted(tmp_path.iterdir()) == before
