"""The format onnx: files that ONNX Runtime applies to a graph with inputs for a LoRA, compared with ΔW."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from lorashelf import Adapter, BaseId, Factors, Modules, Shelf, export_shelf, plan_add
from lorashelf.errors import MissingExtra, ModelError, NotExportable, UnknownName, UsageError

needs_runtime = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
SIZES = {Q: (16, 12), UP: (12, 20)}  # module → (din, dout), one after the other in the graph
OLIVE = {path: (f"{path}.lora_A.weight", f"{path}.lora_B.weight") for path in SIZES}
GENAI = {
    path: tuple(f"model.layers.0.{part}.lora_{side}.MatMul.weight" for side in "AB")
    for path, part in ((Q, "attn.q_proj"), (UP, "mlp.up_proj"))
}
NewShelf = Callable[..., Shelf]


def graph(
    file: Path, names: dict[str, tuple[str, ...]] = OLIVE, kind: str = "FLOAT", rank: int = 0
) -> dict[str, np.ndarray]:
    """Write y = (x W + (x A) B) … with A and B as inputs whose default is nothing; return W by module."""
    from onnx import TensorProto, helper, save

    rng, element = np.random.default_rng(0), getattr(TensorProto, kind)
    dtype = np.float32 if kind == "FLOAT" else np.float16
    nodes, held, inputs, weights, x = [], [], [], {}, "x"
    for i, (path, (din, dout)) in enumerate(SIZES.items()):
        weights[path] = rng.standard_normal((din, dout)).astype(dtype)
        held.append(helper.make_tensor(f"W{i}", element, (din, dout), weights[path].tobytes(), raw=True))
        for name, shape, there in zip(names[path], ((din, rank), (rank, dout)), ((din, "r"), ("r", dout)), strict=True):
            held.append(helper.make_tensor(name, element, shape, np.zeros(shape, dtype).tobytes(), raw=True))
            inputs.append(helper.make_tensor_value_info(name, element, shape if rank else there))
        a, b = names[path]
        nodes += [
            helper.make_node("MatMul", [x, f"W{i}"], [f"h{i}"]),
            helper.make_node("MatMul", [x, a], [f"a{i}"]),
            helper.make_node("MatMul", [f"a{i}", b], [f"b{i}"]),
            helper.make_node("Add", [f"h{i}", f"b{i}"], [f"y{i}"]),
        ]
        x = f"y{i}"
    ends = [helper.make_tensor_value_info("x", element, ("n", 16)), *inputs]
    made = helper.make_graph(nodes, "two", ends, [helper.make_tensor_value_info(x, element, ("n", 20))], held)
    save(helper.make_model(made, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), file)
    return weights


def shelf_with(shelf: Shelf, modules: Iterable[str] = SIZES, rank: int = 3, dtype: str = "f32") -> Shelf:
    rng, found = np.random.default_rng(1), {}
    for i, path in enumerate(modules):
        din, dout = SIZES.get(path, (4, 4))
        a = rng.standard_normal((rank + i, din), dtype=np.float32)
        found[path] = Factors(a, rng.standard_normal((dout, rank + i), dtype=np.float32), 0.7 + i)
    shelf.commit(plan_add(shelf.snapshot(), Adapter(Modules(found), BaseId("acme/tiny"), dtype), "task"))
    return shelf


def ran(model: Path, x: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    """What ONNX Runtime computes, with an adapter file active."""
    import onnxruntime

    session, options = onnxruntime.InferenceSession(str(model)), onnxruntime.RunOptions()
    lora = onnxruntime.LoraAdapter()
    if adapter is not None:
        lora.Load(str(adapter))
        options.add_active_adapter(lora)
    return np.asarray(session.run(None, {"x": x}, options)[0])


@needs_runtime
@pytest.mark.parametrize("rank", [0, 8], ids=["any rank", "rank 8"])
@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize("names", [OLIVE, GENAI], ids=["Olive", "GenAI"])
def test_onnx_runtime_computes_w_plus_delta(
    tmp_path: Path, new_shelf: NewShelf, names: dict[str, tuple[str, ...]], kind: str, rank: int
) -> None:
    model = tmp_path / "model.onnx"
    weights = graph(model, names, kind, rank)
    shelf = shelf_with(new_shelf(1))
    (document,) = export_shelf(shelf.snapshot(), tmp_path / "out", "onnx", {"base": str(model)})["objects"]
    assert document["path"] == "slot-0.onnx_adapter"
    assert document["error"] <= document["tolerance"] == (1e-6 if kind == "FLOAT" else 1e-3)
    x = 0.1 * np.random.default_rng(2).standard_normal((5, 16)).astype(weights[Q].dtype)
    adapter, bare, wanted = shelf.snapshot().adapter("task"), x.astype("f8"), x.astype("f8")
    for path, weight in weights.items():
        bare = bare @ weight.astype("f8")
        wanted = wanted @ (weight.astype("f8") + adapter.modules[path].delta().T)
    found = ran(model, x, tmp_path / "out" / document["path"])
    close = {"rtol": 1e-5, "atol": 1e-4} if kind == "FLOAT" else {"rtol": 2e-2, "atol": 0.3}
    np.testing.assert_allclose(ran(model, x), bare, **close)
    np.testing.assert_allclose(found, wanted, **close)
    assert np.abs(wanted - bare).max() > 10  # the adapter matters


@needs_runtime
def test_without_a_graph_the_names_are_olive_s(tmp_path: Path, new_shelf: NewShelf) -> None:
    import onnxruntime

    shelf = shelf_with(new_shelf(1), dtype="bf16")
    (document,) = export_shelf(shelf.snapshot(), tmp_path / "out", "onnx")["objects"]
    assert document["error"] <= 1e-6  # bf16 becomes f32, which holds its values
    file = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "out" / "slot-0.onnx_adapter"))
    found = {name: value.numpy() for name, value in file.get_parameters().items()}
    assert set(found) == {name for names in OLIVE.values() for name in names}
    for path, f in shelf.snapshot().adapter("task").modules.items():
        a, b = (found[name] for name in OLIVE[path])
        np.testing.assert_allclose((a @ b).T, f.delta(), rtol=1e-4, atol=1e-5)


@needs_runtime
def test_what_the_graph_lacks_is_refused_at_once(tmp_path: Path, new_shelf: NewShelf) -> None:
    model = tmp_path / "model.onnx"
    graph(model, rank=3)
    shelf = shelf_with(new_shelf(1), [*SIZES, "model.layers.0.mlp.down_proj"])
    with pytest.raises(NotExportable) as refused:
        export_shelf(shelf.snapshot(), tmp_path / "out", "onnx", {"base": str(model)})
    shown = "\n".join(refused.value.faults)
    assert "down_proj: the graph has no input for it" in shown
    assert "up_proj: A is 12x4, the graph's input 12x3" in shown
    assert "q_proj" not in shown
    assert not (tmp_path / "out").exists()


@needs_runtime
def test_wrong_options_are_refused(tmp_path: Path, new_shelf: NewShelf) -> None:
    model, snapshot = tmp_path / "model.onnx", shelf_with(new_shelf(1)).snapshot()
    graph(model)
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    for options, kind, what in (
        ({"base": str(model), "dtype": "f16"}, UsageError, "LoRA inputs are f32, not f16"),
        ({"dtype": "bf16"}, UnknownName, "unknown dtype 'bf16'"),
        ({"base": str(tmp_path / "broken.onnx")}, ModelError, "cannot open the base model"),
    ):
        with pytest.raises(kind, match=what):
            export_shelf(snapshot, tmp_path / "out", "onnx", options)


def test_without_the_extra_it_is_named(tmp_path: Path, new_shelf: NewShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match="onnxruntime"):
        export_shelf(shelf_with(new_shelf(1)).snapshot(), tmp_path / "out", "onnx")
