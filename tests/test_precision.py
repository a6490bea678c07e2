"""The number format that a base computes in where none is named."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lorashelf.errors import ModelError
from lorashelf.models import precision
from lorashelf.models.base_model import open_base
from lorashelf.models.precision import GAIN, ROUNDS, bfloat16_gain
from tiny_base import ARCHITECTURES, tiny_base


@pytest.fixture
def no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU of which its flags do not tell whether bfloat16 pays."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)


@pytest.mark.parametrize(("gain", "dtype"), [(2.0, torch.bfloat16), (GAIN - 0.1, torch.float32), (0.1, torch.float32)])
def test_bfloat16_is_taken_where_it_is_measured_to_be_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_tiles: None, gain: float, dtype: Any
) -> None:
    monkeypatch.setattr(precision, "bfloat16_gain", lambda hidden, inner: gain)
    assert open_base(str(tiny_base(tmp_path / "base")), device="cpu").model.dtype == dtype


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_names_its_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_tiles: None, architecture: str
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(precision, "bfloat16_gain", lambda *sizes: asked.append(sizes) or 1.0)
    open_base(str(tiny_base(tmp_path / "base", architecture)), device="cpu")
    assert asked == [(16, 64 if architecture == "gpt2" else 24)]


@pytest.mark.parametrize("hidden", ['"x"', "-1", "null"])
def test_a_damaged_configuration_is_an_error_of_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_tiles: None, hidden: str
) -> None:
    monkeypatch.setattr(precision, "bfloat16_gain", None)
    base = tiny_base(tmp_path / "base")
    text = (base / "config.json").read_text()
    assert '"hidden_size": 16' in text
    (base / "config.json").write_text(text.replace('"hidden_size": 16', f'"hidden_size": {hidden}'))
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_base(str(base), device="cpu")


def test_nothing_is_measured_where_the_answer_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_gain", None)
    base = str(tiny_base(tmp_path / "base"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert open_base(base, device="cpu").model.dtype == torch.bfloat16
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        assert open_base(base, device="cpu", dtype=name).model.dtype == dtype
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert open_base(base, device="cpu", dtype="f32").model.dtype == torch.float32


@pytest.mark.parametrize(("gain", "warning"), [(0.125, "bf16 takes 8.0 times as long as f32"), (0.9, ""), (2.0, "")])
def test_a_named_bfloat16_that_is_slow_here_is_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_tiles: None,
    caplog: pytest.LogCaptureFixture,
    gain: float,
    warning: str,
) -> None:
    monkeypatch.setattr(precision, "bfloat16_gain", lambda hidden, inner: gain)
    assert open_base(str(tiny_base(tmp_path / "base")), device="cpu", dtype="bf16").model.dtype == torch.bfloat16
    assert warning in caplog.text
    assert ("times as long" in caplog.text) == bool(warning)


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_faster_format_is_found(monkeypatch: pytest.MonkeyPatch, slow: Any) -> None:
    calls: list[Any] = []

    def linear(x: Any, weight: Any) -> None:
        calls.append((tuple(x.shape), tuple(weight.shape)))
        time.sleep(0.1 if x.dtype == slow else 0.01)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    gain = bfloat16_gain(576, 10**6)
    assert (gain > 3) == (slow == torch.float32)
    assert set(calls) == {((precision.TOKENS, 576), (precision.LARGEST, 576))}
    assert 2 <= len(calls) < 2 * ROUNDS  # it ends when its time is over


def test_measuring_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    assert bfloat16_gain(64, 64) > 0
    assert torch.equal(torch.random.get_rng_state(), before)
