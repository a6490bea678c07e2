"""What the benchmarks share: adapters of a real model's shape, children measured from outside, tables and verdicts.

Linux only: CPU seconds and bytes written come from wait4, anonymous memory from /proc/PID/status.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048)}  # (dout, din)
LAYERS, RANK, SCALE = 16, 32, 4.0  # Llama-3.2-1B's attention, r 32, alpha 128: 27 MB in f32
BASE = "acme/llama-1b-shaped"
TENSORS = "adapter_model.safetensors"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
QUIET = 0.05  # the share of the machine's CPU time that other work may take
TICK = 0.001  # seconds between two samples of a watched child's memory


# adapters ------------------------------------------------------------------------------------------------------------


def random_adapters(count: int, layers: int = LAYERS, shapes: Mapping[str, tuple[int, int]] | None = None) -> Any:
    """Yield `count` adapters as training leaves them: A of a linear layer's init, B small; related, each a little more.

    All share a component, so that cosines are spread between about 0.03 and 0.3 and the nearest is not a tie.
    """
    import numpy as np

    from lorashelf import Adapter, BaseId, Factors, Modules

    def draw(seed: int) -> dict[str, tuple[Any, Any]]:
        rng = np.random.default_rng(seed)
        return {
            f"model.layers.{layer}.self_attn.{name}": (
                rng.standard_normal((RANK, din), dtype=np.float32),
                rng.standard_normal((dout, RANK), dtype=np.float32),
            )
            for layer in range(layers)
            for name, (dout, din) in (shapes or SHAPES).items()
        }

    common = draw(0)
    for i in range(count):
        share = np.float32(0.3 + 0.7 * ((7 * i) % count) / count)
        modules = {
            path: Factors(
                (0.02 * (common[path][0] + a)).astype("f4"), (0.01 * (share * common[path][1] + b)).astype("f4"), SCALE
            )
            for path, (a, b) in draw(1 + i).items()
        }
        yield Adapter(Modules(modules), BaseId(BASE), "f32", {"target_modules": sorted(shapes or SHAPES)})


def write_adapters(folder: Path, count: int) -> list[Path]:
    """Write `count` PEFT folders of 27 MB each; their paths."""
    from lorashelf import write_adapter

    paths = [folder / f"task{i:02d}-en" for i in range(count)]
    for path, adapter in zip(paths, random_adapters(count), strict=True):
        write_adapter(adapter, path)
    return paths


# children ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished child: its wall and CPU seconds from start to exit, and what it printed last, as JSON."""

    wall: float
    cpu: float
    written: int
    """Bytes it made dirty in the file systems (ru_oublock)."""
    peak: int
    """Largest anonymous memory seen, bytes; 0 if it was not watched."""
    result: Any


def child(command: Sequence[str | Path], threads: int, *, watch: bool = False) -> Run:
    """Run a command to its end; watched, its anonymous memory is sampled every millisecond (that slows it a little)."""
    os.sync()  # what the run before left to write back is not this one's cost
    words, pipe = list(map(str, command)), subprocess.PIPE
    started = time.perf_counter()
    with confined(threads):
        process = subprocess.Popen(words, env=environment(threads), stdout=pipe, stderr=pipe, text=True)
    assert process.stdout
    assert process.stderr
    if watch:
        peak, status, usage = _watched(process.pid)
        printed = process.stdout.read()
    else:
        printed = process.stdout.read()  # ends with the process
        peak, (_, status, usage) = 0, os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    with process:
        if process.returncode:
            sys.exit(f"{' '.join(words)}: exit code {process.returncode}\n{process.stderr.read()}")
    last = printed.strip().rpartition("\n")[2]
    result = json.loads(last) if last.startswith("{") else None
    return Run(wall, usage.ru_utime + usage.ru_stime, 512 * usage.ru_oublock, peak, result)


def _watched(pid: int) -> tuple[int, int, Any]:
    peak, done = 0, 0
    while not done:
        peak = max(peak, anonymous(pid))
        time.sleep(TICK)
        done, status, usage = os.wait4(pid, os.WNOHANG)
    return peak, status, usage


@contextlib.contextmanager
def confined(threads: int) -> Iterator[None]:
    """Only so many cores for what starts here: it bounds the threads of any library, whatever it asks for."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def environment(threads: int) -> dict[str, str]:
    """This environment with the thread counts of every BLAS, and with bytecode written as usual."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | dict.fromkeys(THREAD_VARIABLES, str(threads))


def anonymous(pid: int | str = "self") -> int:
    """RssAnon of a process in bytes: heap, stacks, private mappings; no pages of mapped files. 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


# measuring -----------------------------------------------------------------------------------------------------------


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores, and BLAS threads, for either side"
    )
    parser.add_argument("--rounds", type=int, help="how often everything is measured")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)  # what a child runs
    return parser


def interleaved(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """What each side returns, in the order A B C A B C …: round i of all sides ran within seconds."""
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            results[name].append(run())
    return results


def timed(work: Callable[..., Any]) -> tuple[float, Any]:
    """The wall seconds of the work, and what it returns."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def paired(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median over rounds of theirs / ours."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def spread(values: Sequence[float]) -> tuple[str, str]:
    """Minimum and median of seconds, for a table."""
    return seconds(min(values)), seconds(statistics.median(values))


def seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def times(ratio: float) -> str:
    return f"{ratio:.3g}x"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns, the first one to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, ["-" * width for width in widths], *rows]:
        first, *rest = (str(cell) for cell in row)
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]))
    print()


def heading(title: str, threads: int, packages: Sequence[str]) -> None:
    """Print what runs, on which machine, with which versions."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ["lorashelf", "numpy", *packages])
    print(f"{title}\n{model}, {os.cpu_count()} cores, {threads} threads a side")
    print(f"Python {platform.python_version()}, {versions}\n")


def cpu_seconds() -> tuple[float, float, float]:
    """Now; the CPU seconds of the whole machine since it started; of this process and the children it waited for."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = sum(os.times()[:4])
    return time.perf_counter(), (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own


_STARTED = cpu_seconds()


def others() -> float:
    """The share of the machine's CPU time that other work has taken since this benchmark started."""
    wall, machine, own = (now - then for now, then in zip(cpu_seconds(), _STARTED, strict=True))
    return max(0.0, machine - own) / (wall * (os.cpu_count() or 1))


def verdicts(targets: Sequence[tuple[str, float, str, float]], threads: int) -> int:
    """Print one line a target (what, measured, '>=' or '<=', bound); 1 if any was missed."""
    missed, share = 0, others()
    busy = share > QUIET and threads > 1
    print(f"other work took {share:.0%} of this machine's CPU time", end="")
    print(": too much to trust threads that wait for each other; try --threads 1" if busy else "", end="\n\n")
    for what, measured, relation, bound in targets:
        met = measured >= bound if relation == ">=" else measured <= bound
        missed |= not met
        print(f"target {what} {relation} {bound:g}: {measured:.3g} {'ok' if met else 'MISSED'}")
    print()
    return missed
