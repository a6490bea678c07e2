"""The server: tasks mixed in one batch, against PEFT's adapter_names and one task at a time; overhead; many clients.

    python benchmarks/serving.py

Mixed batches: SmolLM2-135M-Instruct in float32, a text of each of 8 tasks (examples/zoo, rank 8), 16 tokens each,
greedy, the end of a turn ignored; in CPU seconds, the sides alternating. What reading the prompts takes is measured by
answers of one token. The rest asks a server in a process of its own: the time from `add` to the first token of the new
task; requests whose model ends every answer at once, so that what is left is the server; and 200 clients at once on a
base of two tiny layers, whose every answer is compared with that of the model alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
from common import megabytes, paired, seconds

ROOT = Path(__file__).parent.parent
ZOO, FEWSHOT = ROOT / "examples" / "zoo", ROOT / "examples" / "fewshot"
TASKS = ("gec-de", "gec-en", "qa-de", "qa-en", "sum-de", "sum-en", "tone-de", "tone-en")
ROWS, TOKENS = 8, 16
REQUESTS, CLIENTS, SECONDS = 2000, 200, 60.0
CHAT = "/v1/chat/completions"
HEADERS = {"content-type": "application/json"}


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long the clients ask")
    parser.add_argument(
        "--parts", nargs="+", default=["mixed", "first", "overhead", "clients"], help="what is measured"
    )
    options = parser.parse_args()
    if options.side:
        return _idle_server(Path(options.side[0]))
    common.heading("Serving", options.threads, ["torch", "transformers", "peft", "starlette", "uvicorn"])
    targets = []
    with tempfile.TemporaryDirectory() as folder, common.confined(options.threads):
        if "mixed" in options.parts:
            targets += _mixed(options.rounds or 3, options.threads)
        if "first" in options.parts:
            _first_answer(Path(folder), options.threads)
        if "overhead" in options.parts:
            targets += _overhead(Path(folder), options.threads)
        if "clients" in options.parts:
            targets += _clients(Path(folder), options.threads, options.seconds)
    return common.verdicts(targets, options.threads)


# one batch ------------------------------------------------------------------------------------------------------------


def _mixed(rounds: int, threads: int) -> list[tuple[str, float, str, float]]:
    import torch

    from lorashelf import HFBackend, read_adapter, read_tasks

    torch.set_num_threads(threads)
    backend = HFBackend.open(device="cpu", dtype="f32")
    adapters = {name: read_adapter(ZOO / name) for name in TASKS}
    tasks = read_tasks(FEWSHOT)
    names = list(TASKS)
    shortest = {name: min((e.input for e in tasks[name].splits["train"]), key=len) for name in names}
    prompts = [backend.text.query(tasks[name].prompt, shortest[name]) for name in names]
    peft: Any = _peft_model(names)
    sides: dict[str, Callable[[int], list[list[int]]]] = {
        "one task at a time": lambda count: _one_by_one(backend, adapters, names, prompts, count),
        "PEFT, adapter_names": lambda count: _by_peft(peft, backend, names, prompts, count),
        "lorashelf, mixed": lambda count: _by_rows(backend, adapters, names, prompts, count),
    }
    alone, _, mixed = [work(TOKENS) for work in sides.values()]  # warm
    agree = sum(a == b for a, b in zip(alone, mixed, strict=True))
    print(f"{agree} of {ROWS} answers equal those of one task at a time\n")
    timed = common.interleaved({name: partial(_parts, work) for name, work in sides.items()}, rounds)
    rows = []
    for name, found in timed.items():
        read, whole = (statistics.median(each) for each in zip(*found, strict=True))
        step = (whole - read) / (TOKENS - 1)
        rows.append([name, seconds(read), seconds(step), f"{ROWS * TOKENS / whole:.0f}"])
    columns = ["prompts and first tokens", "each further token of all", "tokens per CPU second"]
    common.table([f"{ROWS} texts of {len(TASKS)} tasks, {TOKENS} tokens each", *columns], rows)
    steps = {name: [whole - read for read, whole in found] for name, found in timed.items()}
    wholes = {name: [whole for _, whole in found] for name, found in timed.items()}
    one, theirs, ours = sides
    return [
        ("mixed over one task at a time, whole", paired(wholes[one], wholes[ours]), ">=", 2.0),
        ("mixed over PEFT's adapter_names, whole", paired(wholes[theirs], wholes[ours]), ">=", 1.0),
        ("mixed over PEFT's adapter_names, further tokens", paired(steps[theirs], steps[ours]), ">=", 1.0),
        ("share of answers equal to those alone", agree / ROWS, ">=", 0.9),
    ]


def _parts(work: Any) -> tuple[float, float]:
    """The CPU seconds of an answer of one token, and of a whole one."""
    first, whole = _cpu(lambda: work(1)), _cpu(lambda: work(TOKENS))
    return first, whole


def _cpu(work: Any) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _one_by_one(
    backend: Any, adapters: Any, names: Sequence[str], prompts: Sequence[list[int]], count: int
) -> list[list[int]]:
    """Each text alone, one after the other, as a server without batches does."""
    return [
        _by_rows(backend, adapters, [name], [prompt], count)[0] for name, prompt in zip(names, prompts, strict=True)
    ]


def _by_rows(
    backend: Any, adapters: Any, names: Sequence[str], prompts: Sequence[list[int]], count: int
) -> list[list[int]]:
    from lorashelf.models.protocol import Row
    from lorashelf.models.sampling import Sampler, Sampling

    rows = [Row(prompt, adapters[name], Sampler(Sampling())) for name, prompt in zip(names, prompts, strict=True)]
    batch = backend.decoding(ROWS)
    written = {id(row): [token.id] for row, token in zip(rows, batch.join(rows), strict=True)}
    for _ in range(count - 1):
        for row, token in zip(batch.rows, batch.step(), strict=True):
            written[id(row)].append(token.id)
    return [written[id(row)] for row in rows]


def _peft_model(names: Sequence[str]) -> Any:
    import warnings

    from peft import PeftModel

    from lorashelf import HFBackend

    first, *others = dict.fromkeys(names)
    model = HFBackend.open(device="cpu", dtype="f32").base.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(model, str(ZOO / first), adapter_name=first)
        for name in others:
            wrapped.load_adapter(str(ZOO / name), adapter_name=name)
    return wrapped.eval()


def _by_peft(
    model: Any, backend: Any, names: Sequence[str], prompts: Sequence[list[int]], count: int
) -> list[list[int]]:
    import torch

    from lorashelf.models.batching import padded

    ids, mask = padded(prompts, backend.text.pad, torch.device("cpu"), left=True)
    with torch.inference_mode():
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            adapter_names=list(names),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
        )
    found: list[list[int]] = written[:, ids.shape[1] :].tolist()
    return found


# a server -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _server(command: Sequence[object], threads: int) -> Iterator[tuple[str, int, int]]:
    """A server in a process of its own: its host, port and process id."""
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=common.environment(threads),
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            sys.exit(process.communicate()[1])
        host, port = json.loads(line)["url"].removeprefix("http://").split(":")
        yield host, int(port), process.pid
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _serve(shelf: Path, base: Path | None, *words: object) -> list[object]:
    named = [] if base is None else ["--base", base]
    return [
        sys.executable,
        "-m",
        "lorashelf",
        "serve",
        shelf,
        *named,
        "--port",
        0,
        "--model-dtype",
        "f32",
        "--json",
        *words,
    ]


def _body(task: str, text: str, tokens: int) -> str:
    return json.dumps({"model": task, "messages": [{"role": "user", "content": text}], "max_tokens": tokens})


def _first_answer(folder: Path, threads: int) -> None:
    """Print how long a new task takes from `add` to its first token, beside a known one."""
    from lorashelf import Shelf, new_settings, plan_add, read_adapter

    shelf = Shelf.create(folder / "zoo.shelf", new_settings(len(TASKS)))
    shelf.commit(plan_add(shelf.snapshot(), read_adapter(ZOO / TASKS[0]), TASKS[0]))
    found: dict[str, list[float]] = {"add": [], "first token of the new task": [], "of a known one": []}
    with _server(_serve(shelf.path, None), threads) as (host, port, _):
        known = http.client.HTTPConnection(host, port, timeout=600)
        _ask(known, _body(TASKS[0], "a text", 1))
        for task in TASKS[1:]:
            adapter = read_adapter(ZOO / task)
            found["add"].append(
                common.timed(lambda a=adapter, t=task: shelf.commit(plan_add(shelf.snapshot(), a, t)))[0]
            )
            for name, asked in (("first token of the new task", task), ("of a known one", TASKS[0])):
                found[name].append(common.timed(lambda t=asked: _ask(known, _body(t, "a text", 1)))[0])
        known.close()
    rows = [[name, seconds(statistics.median(values)), seconds(max(values))] for name, values in found.items()]
    common.table(["a task that arrives while the server runs", "median", "most"], rows)


def _ask(connection: http.client.HTTPConnection, body: str) -> dict[str, Any]:
    connection.request("POST", CHAT, body, HEADERS)
    response = connection.getresponse()
    data = response.read()
    if response.status != 200:
        sys.exit(f"{response.status}: {data!r}")
    answer: dict[str, Any] = json.loads(data)
    return answer


def _overhead(folder: Path, threads: int) -> list[tuple[str, float, str, float]]:
    """Requests whose model ends every answer at once: what is left is the server and the loopback."""
    _tiny(folder)
    with _server([sys.executable, __file__, "--side", folder], threads) as (host, port, _):
        connection = http.client.HTTPConnection(host, port, timeout=60)
        body = _body("task-0", "a text of some words", 8)
        for _ in range(200):
            _ask(connection, body)
        taken = sorted(common.timed(lambda: _ask(connection, body))[0] for _ in range(REQUESTS))
        connection.close()
    p50, p99 = 1e3 * taken[len(taken) // 2], 1e3 * taken[int(0.99 * len(taken))]
    print(f"server without a model, {REQUESTS} requests one after the other: median {p50:.2f} ms, p99 {p99:.2f} ms\n")
    return [("overhead per request, p99, ms", p99, "<=", 5.0)]


def _idle_server(folder: Path) -> int:
    """Serve the tiny shelf with a model that ends every answer at its first token."""
    from lorashelf import HFBackend
    from lorashelf.models.sampling import Token
    from lorashelf.server.app import Server
    from lorashelf.server.process import Process, listening, url
    from lorashelf.server.served_shelf import ServedShelf
    from lorashelf.serving.scheduler import Scheduler

    class Ended:
        """A batch whose every row ends at its first token."""

        def __init__(self, stop: int) -> None:
            self.most, self.rows, self._stop = 16, list[Any](), stop

        def join(self, rows: Sequence[Any]) -> list[Any]:
            return [Token(self._stop) for _ in rows]

        def step(self) -> list[Any]:
            return []

        def keep(self, rows: Any) -> None:
            """Nothing is held."""

    class Idle(HFBackend):
        """A base that is not asked."""

        def decoding(self, most: int) -> Any:
            return Ended(self.text.stops[0])

    shelf, base = _tiny(folder)
    model = Idle.open(str(base), device="cpu", dtype="f32")
    scheduler = Scheduler(model)
    server = Server(ServedShelf(shelf), model, scheduler)
    with listening("127.0.0.1", 0) as taken:
        print(json.dumps({"url": url(taken)}), flush=True)
        Process(server.application(), 5, server.stop).run([taken])
    scheduler.close()
    return 0


def _tiny(folder: Path) -> tuple[Path, Path]:
    """A shelf of eight tasks, and a base of two layers with random weights and SmolLM2's tokenizer; made once."""
    shelf, base = folder / "tiny.shelf", folder / "tiny"
    if shelf.exists():
        return shelf, base
    import numpy as np
    import torch
    import transformers

    from lorashelf import Adapter, BaseId, Factors, Modules, Shelf, base_folder, new_settings, plan_add

    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder())
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **ends, num_attention_heads=4, max_position_embeddings=512)
    model: Any = transformers.LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    made = Shelf.create(shelf, new_settings(len(TASKS), policy="kmerge"))
    for i in range(len(TASKS)):
        rng, modules = np.random.default_rng(i), {}
        for layer in range(2):
            a, b = rng.standard_normal((4, 32)), 0.5 * rng.standard_normal((32, 4))
            modules[f"model.layers.{layer}.self_attn.q_proj"] = Factors(a.astype("f4"), b.astype("f4"))
        made.commit(plan_add(made.snapshot(), Adapter(Modules(modules), BaseId("")), f"task-{i}"))
    return shelf, base


def _clients(folder: Path, threads: int, length: float) -> list[tuple[str, float, str, float]]:
    """Many clients at once, each asking task after task; every answer is compared with the model's alone."""
    from lorashelf import HFBackend, Shelf
    from lorashelf.serving.scheduler import End, Piece, Request, Scheduler

    shelf, base = _tiny(folder)
    model, snapshot = HFBackend.open(str(base), device="cpu", dtype="f32"), Shelf(shelf).snapshot()
    expected: dict[tuple[str, str, int], str] = {}
    alone = Scheduler(model, rows=1, waiting=10_000)
    for i in range(40):
        task, text, tokens = f"task-{i % len(TASKS)}", f"text {'long ' * (i % 5)}{i}", 1 + i % 8
        prompt = model.text.encoded(model.template.conversation([text], []))
        pieces: list[Any] = []
        alone.submit(Request(prompt, snapshot.adapter(task), tokens), pieces.append)
        while not (pieces and isinstance(pieces[-1], End)):
            time.sleep(0.001)
        expected[task, text, tokens] = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
    alone.close()
    with _server(_serve(shelf, base, "--queue", CLIENTS), threads) as (host, port, pid):
        found = asyncio.run(_asked(f"http://{host}:{port}", pid, expected, length))
    answers, wrong, lost, taken, memory = found
    taken.sort()
    rows = [
        ["answers", str(answers)],
        ["answers per second", f"{answers / length:.0f}"],
        ["median", seconds(taken[len(taken) // 2])],
        ["p99", seconds(taken[int(0.99 * len(taken))])],
        ["memory after a third, at the end", " ".join(megabytes(each) for each in memory)],
    ]
    common.table([f"{CLIENTS} clients for {length:.0f} s, {len(TASKS)} tasks", ""], rows)
    return [
        ("answers lost", lost, "<=", 0),
        ("answers of another task or text", wrong, "<=", 0),
        ("memory at the end over that after a third", memory[1] / memory[0], "<=", 1.05),
    ]


async def _asked(
    address: str, pid: int, expected: dict[tuple[str, str, int], str], length: float
) -> tuple[int, int, int, list[float], list[int]]:
    """The number of answers, of wrong and of lost ones, their seconds, and the server's memory at two moments."""
    import httpx

    end, cases = time.perf_counter() + length, list(expected.items())
    taken: list[float] = []
    memory: list[int] = []
    wrong = lost = 0

    async def client(number: int, http: httpx.AsyncClient) -> None:
        nonlocal wrong, lost
        place = number
        while time.perf_counter() < end:
            (task, text, tokens), answer = cases[place % len(cases)]
            place += 7
            started = time.perf_counter()
            response = await http.post(CHAT, content=_body(task, text, tokens), headers=HEADERS)
            taken.append(time.perf_counter() - started)
            if response.status_code != 200:
                lost += 1
            elif (document := response.json())["model"] != task or document["choices"][0]["message"][
                "content"
            ] != answer:
                wrong += 1

    async def watch() -> None:
        await asyncio.sleep(length / 3)
        memory.append(common.anonymous(pid))
        await asyncio.sleep(max(0.0, end - 1 - time.perf_counter()))
        memory.append(common.anonymous(pid))

    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as http:
        await asyncio.gather(watch(), *(client(i, http) for i in range(CLIENTS)))
    return len(taken), wrong, lost, taken, memory


if __name__ == "__main__":
    sys.exit(main())
