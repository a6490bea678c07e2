"""Commands that compute for seconds tell what they wait for: on a terminal at once, else when it takes long."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest

from factory import make_adapter, write_peft
from lorashelf.cli import base, main, output
from lorashelf.models.protocol import Model


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def stderr_of(words: list[str], monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert not exit_.value.code
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_plan_tells_which_number_of_slots_it_is_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    folders = [str(write_peft(tmp_path / name, make_adapter(i))) for i, name in enumerate("abc")]
    words = ["plan", *folders, "--slots", "1..2"]
    assert "planning" not in stderr_of(words, monkeypatch, io.StringIO())  # done before it is worth a line
    monkeypatch.setattr(output, "INTERVAL", 0.0)
    told = stderr_of(words, monkeypatch, Terminal() if terminal else io.StringIO())
    assert "planning 2 slots" in told


@pytest.mark.parametrize(("terminal", "seconds", "told"), [(True, 0.05, True), (False, 0.0, False), (False, 0.3, True)])
def test_a_base_model_that_is_being_loaded_is_named(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, seconds: float, told: bool
) -> None:
    monkeypatch.setattr(base, "PATIENCE", 0.05)
    monkeypatch.setattr(base, "open_model", lambda *_, **__: time.sleep(seconds))
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    base.open_named("acme/tiny", Model, device=None, dtype=None, template=None, learns=False)
    assert stream.getvalue() == ("loading the base model acme/tiny …\n" if told else "")
