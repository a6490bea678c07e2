"""Adapters in few bytes: the error of ΔW at seven sizes, and what coding and decoding take.

    python benchmarks/coded.py [--adapters DIR] [--sample N]

Every byte of the file is counted. A file of one level has the smallest error for its size; of one of six each prefix is
half the next. Times are CPU seconds of one thread. A Llama-3.2-1B-shaped adapter of rank 32 is coded and decoded by
children, whose anonymous memory is watched.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from common import megabytes, seconds

PERCENTS = (26.6, 13.3, 6.6, 3.3, 1.8, 1.0, 0.5)
LARGE = 12.5  # percent, of the large adapter
ENCODE, DECODE, LARGE_ENCODE, LARGE_DECODE, MEMORY, EXCESS = 1.0, 0.03, 10.0, 0.5, 300.0, 1.1


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def decoded(levels: list[bytes]) -> Any:
    from lorashelf.formats.coded.decoder import decode

    adapter = decode(levels)
    for _ in adapter.modules.values():
        pass
    return adapter


def measured(adapter: Any, percent: float, levels: int) -> dict[str, float]:
    """The error that decoding leaves (as coded, without the restored norm), bytes, and seconds both ways."""
    from lorashelf.formats.coded.encoder import Encoder
    from lorashelf.formats.coded.files import encode_within

    def encode() -> Encoder:
        encoder = Encoder(adapter)
        encode_within(encoder, int(adapter.parameters * percent / 50), levels)
        return encoder

    encoding, encoder = timed(encode)
    decoding = min(timed(lambda: decoded(encoder.levels))[0] for _ in range(3))
    share = encoder.size / (2 * adapter.parameters)
    return {"error": 1 - encoder.kept, "encode": encoding, "decode": decoding, "percent": 100 * share}


def excess(adapter: Any, percent: float) -> float:
    """Bytes of a file of levels over those of one level that keeps as much."""
    from lorashelf.formats.coded.encoder import Encoder
    from lorashelf.formats.coded.files import encode_within
    from lorashelf.lora.allocation import slope_keeping

    many, one = Encoder(adapter), Encoder(adapter)
    encode_within(many, int(adapter.parameters * percent / 50))
    options = one.options()
    one.add(slope_keeping([options], many.kept), options)
    return many.size / one.size


# the large adapter, each step in a child --------------------------------------------------------------------------


def large(seed: int = 0) -> Any:
    """Singular values that fall by a seventh from one to the next, as those of trained adapters do on average."""
    import numpy as np

    from lorashelf import Adapter, BaseId, Factors, Modules

    rng, fall = np.random.default_rng(seed), (6 / 7) ** np.arange(common.RANK)
    modules = {
        f"model.layers.{layer}.self_attn.{name}": Factors(
            rng.standard_normal((common.RANK, din), dtype=np.float32),
            (rng.standard_normal((dout, common.RANK), dtype=np.float32) * fall).astype(np.float32),
        )
        for layer in range(common.LAYERS)
        for name, (dout, din) in common.SHAPES.items()
    }
    return Adapter(Modules(modules), BaseId(common.BASE), "f16", {"target_modules": sorted(common.SHAPES)})


def side(name: str, path: Path, count: int) -> None:
    from lorashelf import read_adapter, write_adapter
    from lorashelf.formats.coded.files import encode_within, read_levels, write_coded

    if name == "make":
        write_adapter(large(), path)
        return
    if name == "encode":
        from lorashelf.formats.coded.encoder import Encoder

        adapter = read_adapter(path)
        taken, levels = timed(lambda: encode_within(Encoder(adapter), int(adapter.parameters * LARGE / 50), count))
        path.with_suffix(f".{count}").unlink(missing_ok=True)
        write_coded(levels, path.with_suffix(f".{count}"))
    else:
        levels = read_levels(path.with_suffix(f".{count}"))
        taken, _ = timed(lambda: decoded(levels))
    print(json.dumps({"seconds": taken}))


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--adapters", type=Path, default=Path(__file__).parent.parent / "examples" / "zoo")
    parser.add_argument("--sample", type=int, help="only every so manieth adapter", default=1)
    options = parser.parse_args()
    if options.side:
        name, path, count = options.side
        side(name, Path(path), int(count))
        return 0
    with common.confined(1):
        return run(options)


def run(options: argparse.Namespace) -> int:
    os.environ |= dict.fromkeys(common.THREAD_VARIABLES, "1")  # before NumPy is imported
    from lorashelf import read_adapter

    folders = sorted(path.parent for path in options.adapters.glob("*/adapter_config.json"))[:: options.sample]
    common.heading(f"Coding {len(folders)} adapters in few bytes", 1, ["constriction"])
    adapters = [read_adapter(folder) for folder in folders]
    measured(adapters[0], 5, 6)  # tables are made once
    rows, found = [], {}
    for percent in PERCENTS:
        cells = [f"{percent:g} %"]
        for levels in (1, 6):
            results = [measured(adapter, percent, levels) for adapter in adapters]
            found[percent, levels] = results
            errors = [result["error"] for result in results]
            cells += [f"{statistics.mean(errors):.4f}", f"{max(errors):.4f}"]
            cells += [seconds(statistics.median(r[key] for r in results)) for key in ("encode", "decode")]
        rows.append(cells)
    names = ["error", "worst", "encode", "decode"]
    common.table(["of 16 bits", *(f"{name}, {count}" for count in ("1 level", "6") for name in names)], rows)
    more = {percent: [excess(adapter, percent) for adapter in adapters[::4]] for percent in (12.5, 5.0, 2.5, 1.0)}
    common.table(
        ["bytes of levels / bytes of one level that keeps as much", "mean", "worst"],
        [[f"{p:g} %", f"{statistics.mean(x):.3f}", f"{max(x):.3f}"] for p, x in more.items()],
    )
    targets = [
        ("encode, seconds, worst median", max(_median(r, "encode") for r in found.values()), "<=", ENCODE),
        *((f"decode at {p:g} %, one level", _median(found[p, 1], "decode"), "<=", DECODE) for p in (6.6, 1.0)),
        ("bytes of levels over one level, worst", max(max(x) for x in more.values()), "<=", EXCESS),
    ]
    return common.verdicts([*targets, *in_children()], 1)


def _median(results: list[dict[str, float]], name: str) -> float:
    return statistics.median(result[name] for result in results)


def in_children() -> list[tuple[str, float, str, float]]:
    """Code and decode the large adapter; what is held against targets."""
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large"
        common.child([sys.executable, __file__, "--side", "make", path, "1"], 1)
        for count in (1, 6):
            for name in ("encode", "decode"):
                words = [sys.executable, __file__, "--side", name, path, str(count)]
                plain, watched = common.child(words, 1), common.child(words, 1, watch=True)
                found[name, count] = plain.result["seconds"], watched.peak
                rows.append([f"{name}, {count} level{'s' * (count > 1)}", seconds(found[name, count][0])])
                rows[-1].append(megabytes(watched.peak))
    common.table([f"Llama-3.2-1B-shaped, r 32, at {LARGE:g} %", "CPU", "peak anonymous"], rows)
    return [
        ("large: encode, seconds", max(found["encode", n][0] for n in (1, 6)), "<=", LARGE_ENCODE),
        ("large: decode, seconds", max(found["decode", n][0] for n in (1, 6)), "<=", LARGE_DECODE),
        ("large: peak anonymous memory, MB", max(peak for _, peak in found.values()) / 1e6, "<=", MEMORY),
    ]


if __name__ == "__main__":
    sys.exit(main())
