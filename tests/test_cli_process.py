"""The command as a process: streams that cannot be written, signals, and what ends it otherwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from command import HEEDING
from factory import make_adapter, write_peft
from lorashelf import Shelf, new_settings, plan_add, read_adapter
from lorashelf.cli import process

Words = list[object]
LORASHELF = f"'{sys.executable}' -m lorashelf"


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """A shelf that holds "one"; the adapter "two" is beside it."""
    made = Shelf.create(tmp_path / "s", new_settings(2))
    made.commit(plan_add(made.snapshot(), read_adapter(write_peft(tmp_path / "one", make_adapter(1))), "one"))
    write_peft(tmp_path / "two", make_adapter(2))
    return made


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of the shell, which can close streams as Python cannot."""
    return subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=60)


def program(text: str, *words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command after some lines of Python."""
    command = [sys.executable, "-c", f"{text}\nfrom lorashelf.cli import main\nmain()", *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


READS = ["ls s", "ls s --json", "route s", "log s", "verify s", "show one", "--help", "add --help", "--version"]
WRITES = ["init new --slots 2", "add s two", "add s two --json", "remove s one", "update s one two", "undo s"]


@pytest.mark.parametrize("words", READS + WRITES)
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
def test_output_that_cannot_be_written_is_an_error_and_commits_stay(
    shelf: Shelf, tmp_path: Path, words: str, redirect: str
) -> None:
    before = shelf.snapshot().head
    done = shell(f"{LORASHELF} {words} {redirect}", tmp_path)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    reason = "No space left on device" if redirect == ">/dev/full" else "Bad file descriptor"
    assert f"cannot write: {reason}\n  where: standard output\n" in done.stderr
    assert "committed changes are kept" in done.stderr
    changed = shelf.snapshot().head != before or (tmp_path / "new" / "HEAD").exists()
    assert changed == (words in WRITES)
    assert shelf.verify() == []


@pytest.mark.parametrize(("words", "code"), [("add s two", 0), ("ls nowhere", 4), ("nonsense", 2), ("add s gone", 3)])
@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-"])
def test_notices_that_cannot_be_written_change_nothing(
    shelf: Shelf, tmp_path: Path, words: str, code: int, redirect: str
) -> None:
    done = shell(f"{LORASHELF} {words} --json {redirect}", tmp_path)
    assert (done.returncode, done.stderr) == (code, "")
    assert ("error" in json.loads(done.stdout)) == (code != 0)
    assert len(shelf.snapshot().manifest.tasks) == (2 if code == 0 else 1)


def test_no_file_of_the_shelf_gets_the_number_of_a_closed_stream(shelf: Shelf, tmp_path: Path) -> None:
    noisy = "import os; from lorashelf.formats.peft import PeftFiles as m; f = m.write\n"
    noisy += "def g(*a):\n    r = f(*a)\n    [os.write(n, b'x') for n in (1, 2) if os.fstat(n).st_size]\n    return r\n"
    noisy += "m.write = g\n"
    script = tmp_path / "noisy.py"
    script.write_text(f"{noisy}from lorashelf.cli import main\nmain()\n")
    done = shell(f"'{sys.executable}' noisy.py add s two <&- >&- 2>&-", tmp_path)
    assert done.returncode == 4
    assert sorted(shelf.snapshot().manifest.tasks) == ["one", "two"]
    assert shelf.verify() == []


def test_a_reader_that_leaves_is_told_on_stderr_what_was_added(tmp_path: Path) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(3))
    for i in range(40):
        write_peft(tmp_path / "in" / f"t{i:02}", make_adapter(i))
    done = shell(f"{LORASHELF} add s in/* | head -1; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stdout.count("\n")) == (141, 1)
    added = list(shelf.snapshot().manifest.tasks)
    assert f"added before that, and kept: {', '.join(added)}\n" in done.stderr
    assert 0 < len(added) < 40
    assert shelf.verify() == []


@pytest.mark.parametrize(("raised", "code"), [("SystemExit(7)", 7), ("SystemExit('why')", 1), ("SystemExit(0)", 1)])
def test_an_exit_inside_a_command_is_not_the_end_of_a_pipe(shelf: Shelf, raised: str, code: int) -> None:
    broken = f"import lorashelf.shelf.shelf as m\ndef log(self):\n    raise {raised}\nm.Shelf.log = log"
    done = program(broken, "log", shelf.path, "--json", folder=shelf.path)
    assert done.returncode == code
    assert "SystemExit" in done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == "error"


def test_a_bug_shows_its_traceback_and_prints_a_document(shelf: Shelf) -> None:
    broken = "import lorashelf.shelf.shelf as m\ndef log(self):\n    return 1 // 0\nm.Shelf.log = log"
    done = program(broken, "log", shelf.path, "--json", folder=shelf.path)
    assert done.returncode == 1
    assert "return 1 // 0" in done.stderr or "ZeroDivisionError" in done.stderr
    assert "ZeroDivisionError" in json.loads(done.stdout)["error"]["message"]


# a minute in short sleeps: a signal that arrives just before a sleep begins is seen after it
ASLEEP = "[__import__('time').sleep(0.05) for _ in range(1200)]"


def started(command: list[str], ready: Callable[[], bool], **options: object) -> subprocess.Popen[str]:
    """A process in which Ctrl-C is not ignored, once it is ready."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    begun = subprocess.Popen([*HEEDING, *command], **pipes, **options)
    deadline = time.monotonic() + 30
    while not ready():
        assert begun.poll() is None, begun.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return begun


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["for people", "--json"])
@pytest.mark.parametrize("module", ["numpy", "typer"])
def test_ctrl_c_while_importing_is_one_line_and_130(tmp_path: Path, module: str, options: list[str]) -> None:
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(f"begun = open('importing', 'w'); {ASLEEP}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "lorashelf", "ls", "s", *options]
    begun = started(command, (tmp_path / "importing").exists, cwd=tmp_path, env=environment)
    begun.send_signal(signal.SIGINT)
    out, err = begun.communicate(timeout=30)
    assert (begun.returncode, err) == (130, "lorashelf: interrupted before anything was done\n")
    assert set(json.loads(out)["error"]) == {"kind", "message", "where", "cure"} if options else out == ""


def test_who_imports_the_library_keeps_their_own_ctrl_c() -> None:
    asked = "import signal, lorashelf\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    assert subprocess.run([*HEEDING, sys.executable, "-c", asked]).returncode == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_any_command_with_its_number(shelf: Shelf, tmp_path: Path, name: str) -> None:
    slow = "import lorashelf.shelf.shelf as m\n"
    slow += f"m.Shelf.undo = lambda *a, **k: (open('there', 'w'), {ASLEEP})\n"
    command = [sys.executable, "-c", f"{slow}from lorashelf.cli import main\nmain()", "undo", "s", "--json"]
    begun = started(command, (tmp_path / "there").exists, cwd=tmp_path)
    begun.send_signal(getattr(signal, name))
    out, err = begun.communicate(timeout=30)
    assert begun.returncode == 128 + getattr(signal, name)
    assert err == "lorashelf: interrupted; committed changes are kept\n"
    assert json.loads(out)["error"]["kind"] == "interrupted"
    with Shelf(shelf.path).writing():  # no lock is left
        pass


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process.signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
