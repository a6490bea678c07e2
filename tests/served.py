"""A server in this process, on a port of its own, over a tiny base."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from lorashelf import Adapter, BaseId, Factors, Modules, Shelf, new_settings, plan_add
from lorashelf.models.hf import HFBackend
from lorashelf.server.app import Limits, Server
from lorashelf.server.process import Process, listening, url
from lorashelf.server.served_shelf import ServedShelf
from lorashelf.serving.scheduler import Scheduler

PROMPT = "Mend this:"


def adapter(seed: int, width: int = 16) -> Adapter:
    """A random adapter of the tiny base that changes its answers."""
    rng = np.random.default_rng(seed)
    modules = {}
    for layer in range(2):
        for projection, dout in (("q_proj", 16), ("v_proj", 8)):
            a, b = rng.standard_normal((2, width)), 0.6 * rng.standard_normal((dout, 2))
            path = f"model.layers.{layer}.self_attn.{projection}"
            modules[path] = Factors(a.astype("f4"), b.astype("f4"))
    return Adapter(Modules(modules), BaseId(""))


def shelf_of(path: Path, *tasks: str, slots: int = 8, prompted: bool = True) -> Shelf:
    """A shelf with a slot for each task."""
    shelf = Shelf.create(path, new_settings(slots, policy="kmerge"))
    for seed, task in enumerate(tasks):
        details = {"prompt": PROMPT, "max_new_tokens": 12} if prompted else {}
        shelf.commit(plan_add(shelf.snapshot(), adapter(seed), task, details=details))
    return shelf


@dataclass
class Served:
    """A running server; its parts can be reached."""

    url: str
    served: ServedShelf
    scheduler: Scheduler
    server: Server
    process: Process
    steps: threading.Semaphore | None = None
    key: str = "none"
    clients: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def openai(self, **options: Any) -> openai.OpenAI:
        """A client that does not try again."""
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60, **options)
        return self.clients.enter_context(made)

    def http(self) -> httpx.Client:
        """A client without anything of OpenAI's."""
        headers = {"authorization": f"Bearer {self.key}"}
        return self.clients.enter_context(httpx.Client(base_url=self.url, timeout=60, headers=headers))

    def held(self, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
        """From now on every forward pass that continues texts waits for the semaphore."""
        step, gate = self.scheduler._batch.step, threading.Semaphore(0)

        def gated() -> Any:
            gate.acquire()
            return step()

        monkeypatch.setattr(self.scheduler._batch, "step", gated)
        self.steps = gate
        return gate


@contextlib.contextmanager
def serving(
    shelf: Path, model: HFBackend, *, rows: int = 8, waiting: int = 64, limits: Limits | None = None, **options: Any
) -> Iterator[Served]:
    """A server over a shelf for the block."""
    served, scheduler = ServedShelf(shelf), Scheduler(model, rows=rows, waiting=waiting)
    server = Server(served, model, scheduler, limits=limits, **options)
    with listening("127.0.0.1", 0) as taken:
        process = Process(server.application(), 20, server.stop)
        thread = threading.Thread(target=process.run, args=([taken],))
        thread.start()
        made = Served(url(taken), served, scheduler, server, process, key=options.get("key") or "none")
        try:
            until(lambda: process.started)
            yield made
        finally:
            if made.steps is not None:
                made.steps.release(10_000)
            made.clients.close()
            process.handle_exit(15, None)
            thread.join(30)
            scheduler.close()
        assert not thread.is_alive()


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
