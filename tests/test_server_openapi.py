"""The OpenAPI document: schemathesis asks what it promises, and more; every answer keeps to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorashelf.models.hf import HFBackend
from lorashelf.server.app import Limits
from lorashelf.server.schema import faults
from served import serving, shelf_of
from tiny_base import tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = ("mend", "talk")


@pytest.mark.long
def test_every_answer_keeps_to_the_document(tmp_path: Path) -> None:
    """Requests are drawn for tasks that exist, else all would be 404. That valid ones are accepted is not demanded: a
    schema cannot state that roles take turns or that the prompt fits the context.
    """
    model = HFBackend.open(str(tiny_base(tmp_path / "base")), device="cpu", dtype="f32")
    shelf_of(tmp_path / "a.shelf", *TASKS)
    with serving(tmp_path / "a.shelf", model, limits=Limits(tokens=8, seconds=20), key="secret") as made:
        document = made.http().get("/openapi.json").json()
        for path in ("/v1/chat/completions", "/v1/completions"):
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            body["schema"]["properties"]["model"] = {"enum": TASKS}
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", made.url]
        options = ["-H", "Authorization: Bearer secret", "--max-examples", "40", "--seed", "1", "--no-color"]
        without = ["--exclude-checks", "positive_data_acceptance"]
        run = subprocess.run([*command, *options, *without], capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stdout + run.stderr
        assert "Tested: 8" in run.stdout
        counted = made.http().get("/metrics").text
    for task in TASKS:
        assert f'lorashelf_requests_total{{status="200",task="{task}"}}' in counted
    assert 'status="500"' not in counted


@pytest.mark.parametrize(
    ("value", "schema", "found"),
    [
        (1.0, {"type": "integer"}, []),
        (True, {"type": "integer"}, ["x is true; give integer"]),
        (None, {"type": ["string", "null"]}, []),
        ("a", {"enum": ["b", None]}, ['x is "a"; give "b" or null']),
        (False, {"enum": [0]}, ["x is false; give 0"]),
        (0.0, {"enum": [0]}, []),
        ([1, "a"], {"type": "array", "items": {"type": "integer"}}, ['x[1] is "a"; give integer']),
        ({"a": 1}, {"type": "object", "properties": {}, "additionalProperties": False}, ["x.a is not supported"]),
        ("y" * 99, {"type": "null"}, [f'x is "{"y" * 56}…; give null']),
    ],
)
def test_a_value_is_compared_with_its_schema(value: object, schema: dict[str, object], found: list[str]) -> None:
    assert list(faults(value, schema, "x")) == found
