"""`lorashelf serve` as a process: what it prints, how it stops, and what it refuses before a model is loaded."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from command import Command
from lorashelf import Shelf, plan_add, write_adapter
from served import PROMPT, adapter, shelf_of, until
from tiny_base import tiny_base

USER = [{"role": "user", "content": "a text"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return shelf_of(tmp_path / "a.shelf", "mend")


@contextlib.contextmanager
def started(shelf: Path, base: Path, *words: str, before: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and its address; `before` is run before it."""
    code = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{before}\n"
    code += "from lorashelf.cli import main\nmain()"
    options = ["--base", str(base), "--model-dtype", "f32", "--port", "0", "--json", *words]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(shelf), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        document = json.loads(line)
        assert document["base"] == str(base)
        yield process, document["url"]
    finally:
        process.kill()
        process.communicate()


def refuses(url: str) -> bool:
    """Whether no new connection is accepted."""
    with contextlib.suppress(httpx.TransportError):
        return not httpx.get(f"{url}/healthz", timeout=5)
    return True


SLOWLY = "import time, lorashelf.models.rows as r\nstep = r.Rows.step\n"
SLOWLY += "r.Rows.step = lambda self: (time.sleep(0.05), step(self))[1]"


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_running_answers_finish_and_ends_with_0(shelf: Shelf, base: Path, name: str) -> None:
    with started(shelf.path, base, before=SLOWLY) as (process, url):
        body = {"model": "mend", "messages": USER, "max_tokens": 20, "stream": True}
        with httpx.Client(timeout=60) as client, client.stream("POST", f"{url}/v1/chat/completions", json=body) as got:
            lines = got.iter_lines()
            assert "assistant" in next(lines)
            process.send_signal(getattr(signal, name))
            assert [line for line in lines if line][-1] == "data: [DONE]"
        out, error = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in error
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


@pytest.mark.long
def test_a_second_signal_ends_it_at_once(shelf: Shelf, base: Path) -> None:
    slower = SLOWLY.replace("0.05", "1.0")
    with started(shelf.path, base, "--grace", "60", before=slower) as (process, url):
        body = {"model": "mend", "messages": USER, "max_tokens": 20, "stream": True}
        with httpx.Client(timeout=60) as client, client.stream("POST", f"{url}/v1/chat/completions", json=body) as got:
            assert "assistant" in next(got.iter_lines())
            process.send_signal(signal.SIGINT)
            until(lambda: refuses(url))
            process.send_signal(signal.SIGINT)
            process.wait(timeout=15)


@pytest.mark.long
def test_grace_bounds_how_long_answers_may_run_on(shelf: Shelf, base: Path) -> None:
    with started(shelf.path, base, "--grace", "1", before=SLOWLY.replace("0.05", "0.5")) as (process, url):
        body = {"model": "mend", "messages": USER, "max_tokens": 400, "stream": True}
        with httpx.Client(timeout=60) as client, client.stream("POST", f"{url}/v1/chat/completions", json=body) as got:
            assert "assistant" in next(got.iter_lines())
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
        assert process.returncode == 0


@pytest.mark.long
def test_a_commit_of_another_process_is_served(shelf: Shelf, base: Path, tmp_path: Path) -> None:
    write_adapter(adapter(5), tmp_path / "later")
    with started(shelf.path, base) as (_, url):
        add = [sys.executable, "-m", "lorashelf", "add", str(shelf.path), str(tmp_path / "later")]
        subprocess.run(add, check=True, capture_output=True)
        body = {"model": "later", "messages": USER, "max_tokens": 3}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys, "serve")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("lorashelf.cli.serving.open_named", fail)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--host", "0.0.0.0"], 2, "--api-key"),
        (["--host", "example.org"], 2, "--api-key"),
        (["--host", "0.0.0.0", "--api-key", " "], 2, "the key is empty"),
        (["--host", "no.such.host.invalid", "--api-key", "x"], 2, "cannot be found"),
        (["--host", "203.0.113.7", "--api-key", "x"], 2, "cannot listen"),
        (["--port", "70000"], 2, "70000"),
        (["--rows", "0"], 2, "rows"),
        (["--body", "many"], 2, "not a size"),
        (["--examples", "/no/such/folder"], 2, "/no/such/folder"),
    ],
)
def test_a_faulty_option_is_refused_before_a_model_is_loaded(
    shelf: Shelf, command: Command, words: list[str], code: int, said: str
) -> None:
    found, document = command(shelf.path, *words)
    error = document["error"]
    assert found == code
    assert said in " ".join(str(error[key]) for key in ("message", "where", "cure"))


@pytest.mark.usefixtures("no_model")
def test_a_port_in_use_is_refused(shelf: Shelf, command: Command) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, document = command(shelf.path, "--port", port)
    assert (code, document["error"]["message"]) == (2, "the port is in use")
    assert str(port) in document["error"]["where"]


@pytest.mark.usefixtures("no_model")
def test_a_corrupt_or_missing_shelf_is_refused(shelf: Shelf, command: Command, tmp_path: Path) -> None:
    (shelf.path / "HEAD").write_text("nonsense")
    assert command(shelf.path)[0] == 4
    assert command(tmp_path / "none")[0] == 4


@pytest.mark.usefixtures("no_model")
def test_without_the_extra_its_installation_is_named(
    shelf: Shelf, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("uvicorn",)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "lorashelf.server.process", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, document = command(shelf.path)
    assert (code, document["error"]["kind"]) == (2, "missing_extra")
    assert "lorashelf[serve]" in document["error"]["cure"]


def test_another_engine_name_is_refused(shelf: Shelf, command: Command) -> None:
    code, document = command(shelf.path, "--port", 0, "--engine", "hff")
    assert (code, document["error"]["kind"]) == (2, "unknown_name")


@pytest.mark.long
def test_the_key_may_come_from_the_environment(shelf: Shelf, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASHELF_API_KEY", "secret")
    with started(shelf.path, base) as (process, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert process.poll() is None


@pytest.mark.long
def test_the_shelfs_base_is_compared_with_the_model(tmp_path: Path, base: Path) -> None:
    from dataclasses import replace

    from lorashelf import BaseId

    shelf = shelf_of(tmp_path / "b.shelf")
    named = replace(adapter(0), base=BaseId("acme/other"))
    shelf.commit(plan_add(shelf.snapshot(), named, "mend", details={"prompt": PROMPT}))
    with started(shelf.path, base) as (process, url):
        assert httpx.get(f"{url}/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
        assert "the shelf is for acme/other" in error
