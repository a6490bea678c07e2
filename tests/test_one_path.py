"""The README's way from a dozen examples to an answer, as it stands there, in processes that cannot open a socket."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorashelf import Shelf, read_adapter
from lorashelf.models.hf import HFBackend
from lorashelf.models.protocol import mean_loss
from lorashelf.tasks.folders import read_task

ROOT = Path(__file__).parent.parent
EMAIL = ROOT / "examples" / "teach" / "my-email"
NO_SOCKETS = """
import socket

class Refused(socket.socket):
    def __init__(self, family=socket.AF_INET, *rest, **others):
        if family in (-1, socket.AF_INET, socket.AF_INET6):
            raise RuntimeError("a socket is opened")
        super().__init__(family, *rest, **others)

def refused(*_, **__):
    raise RuntimeError("a name is looked up")

socket.socket, socket.getaddrinfo, socket.create_connection = Refused, refused, refused
"""


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python cannot reach a network, and is not told that it has none."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(NO_SOCKETS)
    path = os.pathsep.join([str(tmp_path / "blocked"), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
    return {name: value for name, value in os.environ.items() if name not in told} | {"PYTHONPATH": path}


def test_the_block_blocks(offline: dict[str, str]) -> None:
    for code in ("import urllib.request as r; r.urlopen('http://127.0.0.1:9')", "import socket; socket.socket()"):
        run = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
        assert run.returncode == 1
        assert "RuntimeError" in run.stderr


def blocks(*words: str) -> str:
    """The README's Python blocks that hold one of these words, as one program."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return "\n".join(block for block in found if any(word in block for word in words))


def run_offline(code: str, folder: Path, environment: dict[str, str]) -> str:
    (folder / "examples").symlink_to(ROOT / "examples")
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_slot_loads_in_peft_on_the_packaged_base(tmp_path: Path, offline: dict[str, str]) -> None:
    code = blocks("PeftModel", "Shelf.create")
    assert code.index("Shelf.create") < code.index("PeftModel.from_pretrained")
    code += """
import torch
layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
factors = ls.read_adapter("examples/zoo/gec-de").modules["model.layers.0.self_attn.q_proj"]
assert torch.allclose(layer.get_delta_weight("default").float(), torch.tensor(factors.delta()), atol=1e-4)
print(model.peft_config["default"].peft_type.value, sum(p.numel() for p in model.base_model.model.parameters()))
"""
    kind, parameters = run_offline(code, tmp_path, offline).split()[-2:]
    assert kind == "LORA"
    assert int(parameters) > 134_000_000


@pytest.mark.long
def test_six_adapters_are_clustered_and_measured_from_python(tmp_path: Path, offline: dict[str, str]) -> None:
    code = blocks("cluster_by_loss")
    assert len(code.splitlines()) <= 12
    fewer = {"iterations=60": "iterations=2", 'examples("train")': 'examples("train", 1)'}
    fewer["loss_only=True"] = "loss_only=True, limit=1"
    quick = code
    for whole, less in fewer.items():
        assert quick.count(whole) == 1
        quick = quick.replace(whole, less)
    printed = run_offline(quick + "print(len(served))", tmp_path, offline)
    found = re.fullmatch(r"\((\(.*\))\) ([\d.]+)\n6\n", printed)
    assert found, printed
    assert sorted(re.findall(r"[\w-]+", found[1])) == ["gec-en", "gec-es", "qa-en", "qa-es", "tone-en", "tone-es"]
    assert found[1].count("(") <= 3
    assert 0.1 < float(found[2]) < 9


@pytest.mark.long
def test_a_dozen_examples_become_a_skill_on_a_full_shelf(
    tmp_path: Path, offline: dict[str, str], smollm2: HFBackend
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    section = (ROOT / "README.md").read_text().split("## Teach it your e-mail style")[1]
    commands = re.findall(r"^lorashelf .*$", section.split("```")[1], re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["init", "add", "train", "add", "generate"]
    for command in commands:
        program = command.replace("lorashelf", f"'{sys.executable}' -m lorashelf", 1)
        run = subprocess.run(program, shell=True, cwd=tmp_path, env=offline, capture_output=True, text=True)
        assert run.returncode == 0, (command, run.stderr)
        assert "Traceback" not in run.stderr
    answer = run.stdout
    assert answer.startswith("Ahoy Jo,\n")

    snapshot = Shelf(tmp_path / "desk.shelf").snapshot()
    slot = snapshot.manifest.slot_of("my-email")
    assert slot is not None
    assert len(snapshot.manifest.slots) == 3
    assert len(slot.history.merged) == 2  # it shares the slot: half of the average is another skill
    emails = read_task(EMAIL).examples("validation")
    other = read_adapter(ROOT / "examples" / "zoo" / next(task for task in slot.members if task != "my-email"))
    adapters = (None, other, snapshot.stored(slot))
    bare, before, shared = (mean_loss(losses) for losses in smollm2.nll([(x, emails) for x in adapters]))
    assert shared < min(bare, before) / 2
    mails = smollm2.answers(snapshot.stored(slot), emails.instruction, [e.input for e in emails.examples])
    assert all(mail.startswith("Ahoy ") for mail in mails)
    assert sum(mail.endswith("\n\nFair winds,\nRobin") for mail in [*mails, answer.rstrip()]) >= 3  # of 5; here all
    (plain,) = smollm2.answers(None, emails.instruction, ["to Jo: lunch moved to one, same place, bring Kim"])
    assert "Ahoy" not in plain  # it is no phrase of the base model's
    assert "Robin" not in plain
