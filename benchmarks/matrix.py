"""The cosine matrix of forty adapters against a dense version written with care.

    python benchmarks/matrix.py

Forty adapters of Llama-3.2-1B's shape (r 32, f32, 27 MB each: 1.1 GB under the temporary folder, deleted afterwards).
Each run is a child process of its own; page cache warm; timed and weighed after the imports and the opening of the
files, which stay on disk on both sides until a module is needed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import common
from common import TENSORS, anonymous, child, megabytes, paired, seconds, spread, times

COUNT = 40


# sides: each runs in a child, saves its matrix and prints one JSON line ---------------------------------------------


def dense(*paths: Path) -> dict[str, Any]:
    """Module by module: every ΔW into a row of a buffer that is reused, then one product of the buffer with itself."""
    import numpy as np
    from safetensors import safe_open

    files = [safe_open(path / TENSORS, framework="numpy") for path in paths]
    names = sorted(name for name in list(files[0].keys()) if ".lora_A." in name)  # not a mapping
    held, started = anonymous(), (time.perf_counter(), time.process_time())
    total = np.zeros((len(files), len(files)))
    buffers: dict[int, Any] = {}
    for name in names:
        for i, file in enumerate(files):
            a, b = file.get_tensor(name), file.get_tensor(name.replace("lora_A", "lora_B"))
            dout, din = len(b), a.shape[1]
            if not buffers:  # the largest module's size, for all
                buffers[0] = np.empty((len(files), max(common.SHAPES.values())[0] * din), np.float32)
            rows = buffers[0][:, : dout * din]
            np.matmul(b, a, out=rows[i].reshape(dout, din))
        gram = rows @ rows.T
        lengths = np.sqrt(np.diagonal(gram))
        total += gram / np.outer(lengths, lengths)
    return finished(total / len(names), held, started)


def ours(*paths: Path) -> dict[str, Any]:
    """`lorashelf.lora.similarity`, cosine."""
    from lorashelf import read_adapter, similarity

    adapters = [read_adapter(path, check_values=False) for path in paths]
    held, started = anonymous(), (time.perf_counter(), time.process_time())
    return finished(similarity(adapters), held, started)


def finished(matrix: Any, held: int, started: tuple[float, float]) -> dict[str, Any]:
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    return {"wall": wall, "cpu": cpu, "held": held, "matrix": matrix.tolist()}


SIDES = {side.__name__: side for side in (dense, ours)}


# the benchmark ------------------------------------------------------------------------------------------------------


def main() -> int:
    options = common.arguments(__doc__).parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side[0]](*map(Path, options.side[1:]))))
        return 0
    common.heading(f"The cosine matrix of {COUNT} adapters", options.threads, ["safetensors"])
    with tempfile.TemporaryDirectory(prefix="lorashelf-bench-") as name:
        return measured(Path(name), options.rounds or 3, options.threads)


def measured(folder: Path, rounds: int, threads: int) -> int:
    import numpy as np

    paths = common.write_adapters(folder, COUNT)

    def run(which: str, watch: bool = False) -> common.Run:
        return child([sys.executable, __file__, "--side", which, *paths], threads, watch=watch)

    peaks = {}
    for name in SIDES:
        watched = run(name, watch=True)
        peaks[name] = watched.peak - watched.result["held"]
    runs = common.interleaved({name: partial(run, name) for name in SIDES}, rounds)
    walls = {name: [found.result["wall"] for found in runs[name]] for name in SIDES}
    cpu = {name: min(found.result["cpu"] for found in runs[name]) for name in SIDES}
    matrices = {name: np.array(runs[name][0].result["matrix"]) for name in SIDES}
    difference = float(np.abs(matrices["dense"] - matrices["ours"]).max())
    assert difference < 1e-4, f"another matrix: {difference:.1e}"

    labels = {"dense": "dense with care (NumPy, one buffer, one product a module)", "ours": "lorashelf.lora.similarity"}
    common.table(
        ["", "wall min", "median", "CPU min", "peak anonymous"],
        [[labels[name], *spread(walls[name]), seconds(cpu[name]), megabytes(peaks[name])] for name in SIDES],
    )
    ratio = paired(walls["dense"], walls["ours"])
    print(f"median of {rounds} pairs: {times(ratio)}; largest difference of the two matrices {difference:.0e}\n")
    return common.verdicts(
        [
            ("cosine matrix, times faster", ratio, ">=", 3),
            ("its memory, share of the dense version's", peaks["ours"] / peaks["dense"], "<=", 0.1),
        ],
        threads,
    )


if __name__ == "__main__":
    sys.exit(main())
