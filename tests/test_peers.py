"""Other codes of adapters: their rules by hand and against other code, their bytes, their cells."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from factory import make_adapter, module_path, write_peft
from lorashelf import Adapter, Factors, Modules
from lorashelf.bench import page
from lorashelf.bench.loraquant import leading, ranged
from lorashelf.bench.peers import PEERS, Kept, nearest
from lorashelf.bench.plot import _lines as points_of
from lorashelf.bench.plot import drawn
from lorashelf.bench.results import read_results
from lorashelf.bench.run import run
from lorashelf.bench.suite import read_suite
from lorashelf.errors import UsageError
from lorashelf.lora.algebra import relative_error
from lorashelf.models.hf import HFBackend
from lorashelf.tasks.folders import Example, Task
from test_evaluation import tiny_adapter
from test_shared_bases import needs
from tiny_base import tiny_base

PACKAGES = ("vlora", "lorashare")


def kept(name: str, *adapters: Adapter, **parameters: object) -> Kept:
    return PEERS[name].rule({f"t{i}-en": x for i, x in enumerate(adapters)}, **parameters)


def one(*modules: Factors) -> Adapter:
    return Adapter(Modules({f"m{i}": f for i, f in enumerate(modules)}))


def signs(*rows: str) -> np.ndarray:
    return np.array([[1.0 if sign == "+" else -1.0 for sign in row] for row in rows], np.float32)


# rank_bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "bytes_"), [(4, 5), (3, 9)])
def test_a_direction_of_signs_takes_a_bit_per_value_and_a_step_per_group(group: int, bytes_: int) -> None:
    """Two directions, of which the larger is kept: 8 bits of signs and 2 or 4 steps of 16 bits."""
    b, a = signs("++++", "+-+-").T * np.array([2.0, 0.5], np.float32), signs("++--", "+--+")
    found = kept("rank_bits", one(Factors(a, b, 2.0)), rank=1, bits=1, group=group)
    assert found.bytes == bytes_
    np.testing.assert_allclose(found.adapters["t0-en"].modules["m0"].delta(), 2 * np.outer(b[:, 0], a[0]), rtol=1e-3)
    described = found.described({"t0-en": one(Factors(a, b, 2.0))})
    assert described == {"t0-en": {"bytes": bytes_, "energy_kept": pytest.approx(16 / 17, abs=1e-3)}}


def test_steps_are_the_best_for_gaussian_values() -> None:
    """The mean squared errors of another search of mid-rise quantisers, groups of 64, with 29 steps, are the bounds."""
    x = np.random.default_rng(0).standard_normal((40, 640)).astype(np.float32)
    for bits, error in ((1, 0.376), (2, 0.121), (3, 0.0356), (4, 0.0094)):
        assert 0.9 * error < np.mean((nearest(x, bits, 64) - x) ** 2) <= error


def test_a_value_is_one_of_the_groups_levels() -> None:
    x = np.random.default_rng(1).standard_normal((3, 20)).astype(np.float32)
    found = nearest(x, 2, 8)
    for row in found:
        for start in (0, 8, 16):
            half = np.unique(np.abs(row[start : start + 8]))
            assert len(half) <= 2
            assert half[0] * 2 == np.float16(half[0] * 2)
            np.testing.assert_allclose(half[-1] / half[0], 3 if len(half) == 2 else 1, rtol=1e-6)
    assert not nearest(np.zeros((1, 5), np.float32), 3, 2).any()


# LoRAQuant ----------------------------------------------------------------------------------------------------------


def test_one_component_fewer_than_the_paper_defines_has_the_high_precision() -> None:
    """Shares of σ² 0.5, 0.3, 0.2: the paper takes 2 directions at 0.8, the released code 1."""
    roots = np.sqrt(np.sqrt(np.array([[0.5], [0.3], [0.2]]))).astype(np.float32)
    assert [leading((roots, roots), ratio) for ratio in (0.1, 0.5, 0.79, 0.81, 1.0)] == [1, 1, 1, 2, 2]


def test_ranges_are_quantised_by_hand() -> None:
    """From −1 to 2 in 2 bits: the step is 1, zero is level 1. From 1 to 4: zero would be level −1, and becomes 0."""
    x = np.array([[-1.0, 2.0, 0.4, 0.6], [1.0, 4.0, 2.0, 3.0]], np.float32)
    index, step = ranged(x, 2)
    np.testing.assert_array_equal(index * step, [[-1, 2, 0, 1], [1, 3, 2, 3]])


def rounded(w: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Round each group to 2^bits levels from its minimum to its maximum, the zero point a whole number of levels."""
    rows, most = w.reshape(-1, group), 2**bits - 1
    top, bottom = rows.amax(dim=1, keepdim=True), rows.amin(dim=1, keepdim=True)
    step = (top - bottom).clamp(min=1e-5) / most
    zero = (-torch.round(bottom / step)).clamp(0, most)
    return ((torch.clamp(torch.round(rows / step) + zero, 0, most) - zero) * step).reshape(w.shape)


def with_signs(w: torch.Tensor, group: int) -> torch.Tensor:
    flat = w.reshape(-1)
    rows = torch.cat([flat, torch.zeros(-flat.numel() % group)]).reshape(-1, group)
    return (torch.sign(rows) * rows.abs().mean(dim=1, keepdim=True)).reshape(-1)[: flat.numel()].reshape(w.shape)


def released(f: Factors, bits: int, ratio: float, group: int, descent: bool) -> torch.Tensor:
    """LoRAQuant's ΔW on dense matrices, with PyTorch's own gradients, as the released code has it."""
    u, s, vh = torch.linalg.svd(torch.tensor(f.b) @ torch.tensor(f.a))
    r = f.shape.rank
    share = torch.cumsum(s[:r] ** 2, dim=0) / (s[:r] ** 2).sum()
    h = max(int((share >= ratio).nonzero()[0]), 1)
    b, a = u[:, :r] @ torch.diag(s[:r].sqrt()), torch.diag(s[:r].sqrt()) @ vh[:r]
    for i in range(h if descent else 0):
        target = b[:, i : i + 1] @ a[i : i + 1]
        left, right = (torch.nn.Parameter(x.clone()) for x in (b[:, i : i + 1], a[i : i + 1]))
        optimizer = torch.optim.SGD([left, right], lr=1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            torch.norm(target - rounded(left.T, bits, group).T @ rounded(right, bits, group)).backward()
            optimizer.step()
        b[:, i : i + 1], a[i : i + 1] = left.detach(), right.detach()
    high = rounded(b[:, :h].T, bits, group).T @ rounded(a[:h], bits, group)
    low = with_signs(b[:, h:].T, group).T @ with_signs(a[h:], group)
    return f.scale * (high + low)


@pytest.mark.parametrize("descent", [False, True])
@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.8), (3, 0.9), (2, 0.0)])
def test_it_is_what_the_released_code_computes(bits: int, ratio: float, descent: bool) -> None:
    rng = np.random.default_rng(3)
    b, a = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 4), (4, 16)))
    f = Factors(a * np.array([[2], [1], [0.5], [0.2]], np.float32), b, 4.0)
    found = kept("loraquant", one(f), bits=bits, ratio=ratio, group=8, descent=descent).adapters["t0-en"].modules["m0"]
    expected = released(f, bits, ratio, 8, descent).numpy()
    np.testing.assert_allclose(found.delta(), expected, atol=1e-4 * np.abs(expected).max())


def test_descent_lowers_the_error_of_large_factors() -> None:
    adapter = make_adapter(2, rank=2)
    errors = [
        relative_error(adapter, kept("loraquant", adapter, bits=2, group=4, descent=each).adapters["t0-en"].modules)
        for each in (False, True)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("ratio", "h"), [(0.0, 1), (1.0, 3)])
def test_its_bits_are_those_of_values_scales_and_zero_points(ratio: float, h: int) -> None:
    adapter = one(make_adapter(0, rank=4, layers=1, projections=("q_proj",)).modules[module_path(0, "q_proj")])
    found = kept("loraquant", adapter, bits=3, ratio=ratio, group=4, descent=False)
    values, groups = 12 + 16, 3 + 4
    bits = h * (3 * values + (16 + 3) * groups) + (4 - h) * (values + 16 * groups) + 8
    assert found.bytes == found.sizes["t0-en"] == -(-bits // 8)


def test_groups_that_its_released_code_does_not_take_are_refused() -> None:
    for descent, lengths in ((True, "8, 12, 16"), (False, "24, 36, 48")):
        with pytest.raises(UsageError, match=f"groups of 7 do not divide {lengths} values in a row") as error:
            kept("loraquant", make_adapter(0), ratio=1.0, group=7, descent=descent)
        assert "divisor of all widths" in (error.value.cure or "")


def test_an_untrained_module_stays_zero() -> None:
    adapter = one(Factors(np.ones((2, 8), np.float32), np.zeros((8, 2), np.float32)))
    for name in ("rank_bits", "loraquant"):
        found = kept(name, adapter, group=4)
        assert not found.adapters["t0-en"].modules["m0"].delta().any()
        assert found.described({"t0-en": adapter})["t0-en"]["energy_kept"] == 1


# the packages -------------------------------------------------------------------------------------------------------


@needs
@pytest.mark.parametrize(("name", "few", "all_"), [("vlora", 1, 4), ("lorashare", 2, 8)])
def test_the_packages_keep_more_with_more_components(name: str, few: int, all_: int) -> None:
    """With every component, what is lost is that of 4 bits per value (vlora) or next to nothing (lorashare)."""
    adapters = [make_adapter(i, scales={"q_proj": 3.0}) for i in range(4)]
    own = {f"t{i}-en": x for i, x in enumerate(adapters)}
    coarse, fine = (kept(name, *adapters, k=k) for k in (few, all_))
    energies = [np.mean([each["energy_kept"] for each in x.described(own).values()]) for x in (coarse, fine)]
    assert energies[0] < energies[1]
    assert energies[1] > {"vlora": 0.95, "lorashare": 0.5}[name]
    assert coarse.bytes < fine.bytes
    assert coarse.sizes is None
    assert all(x.modules.scales == own[task].modules.scales for task, x in fine.adapters.items())


@needs
def test_vlora_s_bytes_are_those_of_its_packed_files() -> None:
    """Per component and value 4 bits and, per 64 of them, a scale of 32 bits; per component a singular value and per
    task a loading of 16 bits, for either side. Beside them only headers grow, by at most 8 bytes per file.
    """
    adapters = [make_adapter(i, layers=1, projections=("q_proj",)) for i in range(10)]  # 64 values of A, 48 of B
    few, more = (kept("vlora", *adapters, k=k).bytes for k in (2, 8))
    packed = (6 * 64 // 2 + 6 * 4) + ((384 - 128) // 2 + (6 - 2) * 4)  # whole blocks: 2 of B hold 96 values
    numbers = 6 * 2 * (1 + 10) * 2
    assert 0 <= more - few - packed - numbers <= 8 * 12


@needs
def test_lorashare_s_bytes_are_what_it_writes_itself_less_half_of_the_values(tmp_path: Path) -> None:
    from lorashare import SHAREModel

    adapters = {f"t{i}-en": make_adapter(i) for i in range(3)}
    for name, adapter in adapters.items():
        write_peft(tmp_path / name, adapter)
    made = SHAREModel.from_adapters({name: str(tmp_path / name) for name in adapters}, num_components=5)
    made.adapter_sources = {}
    made.save_pretrained(tmp_path / "own")
    written = sum(path.stat().st_size for path in (tmp_path / "own").rglob("*") if path.is_file())
    tensors = [*made.components.values(), *(x for each in made.all_loadings.values() for x in each.values())]
    halved = written - 2 * sum(x.numel() for x in tensors)
    assert abs(kept("lorashare", *adapters.values(), k=5).bytes - halved) < 200  # of 2000 bytes


@needs
@pytest.mark.parametrize("name", PACKAGES)
def test_adapters_that_a_package_does_not_take_are_refused_in_its_words(name: str) -> None:
    ranks = [make_adapter(0, rank=4), make_adapter(1, rank=2)]
    with pytest.raises(
        UsageError, match=f"{name} does not take these adapters: (Adapters have inconsistent|Rank mism)"
    ):
        kept(name, *ranks, k=1)
    with pytest.raises(UsageError, match=name):
        kept(name, make_adapter(0), make_adapter(1, projections=("q_proj",)), k=1)


@needs
def test_more_components_than_there_are_is_refused() -> None:
    with pytest.raises(UsageError, match="k is 3, but vlora finds at most 2 components"):
        kept("vlora", make_adapter(0), make_adapter(1), k=3)
    with pytest.raises(UsageError, match="lorashare does not take these adapters: num_components=99 exceeds"):
        kept("lorashare", make_adapter(0), make_adapter(1), k=99)


@pytest.mark.parametrize(("name", "distribution"), [("vlora", "vlora-dev"), ("lorashare", "lorashare")])
def test_a_package_that_is_not_installed_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, name: str, distribution: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "lorashare.io", None)
    with pytest.raises(UsageError, match=f"a cell of {name} needs the package {distribution}") as error:
        kept(name, make_adapter(0), make_adapter(1), k=1)
    assert f"pip install --no-deps {distribution}" in (error.value.cure or "")


# cells --------------------------------------------------------------------------------------------------------------

SUITE = """
format = 1
[[cells]]
serve = ["base", "own"]
[[cells]]
code = "rank_bits"
rank = 1
bits = [2, 4]
[[cells]]
code = "loraquant"
ratio = [0.0, 1.0]
group = 4
"""


def test_a_list_makes_a_cell_per_element_of_each_method_s_own_options(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('format = 1\n[[cells]]\ncode = ["loraquant", "lorashare", "vlora"]\nk = [8, 16]\nratio = 0.9\n')
    assert [cell.label for cell in read_suite(path).cells] == [
        "loraquant ratio=0.9",
        "lorashare k=8",
        "lorashare k=16",
        "vlora",
        "vlora k=16",
    ]


def test_their_cells_are_measured_with_their_bytes(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    adapters = {name: tiny_adapter(seed, str(base)) for seed, name in enumerate(("a-en", "b-en"))}
    examples = tuple(Example(f"text {i}", f"answer {i}") for i in range(3))
    tasks = {name: Task(name, f"Do {name}:", name[0], "en", "f1", 4, {"validation": examples}) for name in adapters}
    (tmp_path / "a.toml").write_text(SUITE)
    suite = read_suite(tmp_path / "a.toml")
    assert len(list(run(suite, adapters, tasks, HFBackend.open(str(base), dtype="f32"), suite.folder))) == 6
    results = read_results(suite, suite.folder)
    for cell in suite.cells[2:]:
        result, alone = results[cell.id], PEERS[cell.method].rule(adapters, **cell.options)
        assert result["bytes"] == alone.bytes == sum(task["bytes"] for task in result["tasks"].values())
        assert {task: record["adapter"] for task, record in result["tasks"].items()} == {
            task: x.digest for task, x in alone.adapters.items()
        }
    rows = {(row["method"], row["options"]): row for row in page.rows(suite, results)}
    assert rows["rank_bits", "rank=1 bits=2"]["storage"] < rows["rank_bits", "rank=1"]["storage"] < 0.2
    points = points_of(suite, results, list(rows.values()), "storage", "loss_kept")
    assert {label: len(each) for label, each in points.items()} == {"own": 1, "rank_bits": 2, "loraquant group=4": 2}
    dashes = re.findall(r"stroke-dasharray: ([^;\"]+)", drawn(suite, results, "svg").decode())
    assert len(set(dashes)) >= 2  # the dots of worst tasks, and the dashes of the second curve
