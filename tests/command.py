"""The command line, called in this process."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from lorashelf.cli import main

HEEDING = [  # a job in the background has Ctrl-C ignored
    *(sys.executable, "-c"),
    "import os, signal, sys\nfor name in (signal.SIGINT, signal.SIGHUP):\n    signal.signal(name, signal.SIG_DFL)\n"
    "os.execv(sys.argv[1], sys.argv[1:])",
]


class Command:
    """command("add", shelf, …) → (exit code, the JSON document or the text on stdout); `stderr` has the notices."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *first: str) -> None:
        self._capsys, self._first = capsys, first
        self.stderr = ""

    def __call__(self, *words: object, as_json: bool = True) -> tuple[int, Any]:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*self._first, *map(str, words), *(["--json"] if as_json else [])])
        printed = self._capsys.readouterr()
        self.stderr = printed.err
        return int(ended.value.code or 0), json.loads(printed.out) if as_json else printed.out
