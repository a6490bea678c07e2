"""The demo's beginning: all adapters coded into the bytes of a few."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..formats.peft import encode
from ..lora.adapter import Adapter
from ..lora.algebra import norm
from ..lora.similarity import similarity
from ..report.numbers import size
from ..shelf.allocation import rate
from ..shelf.packing import plan_pack
from ..shelf.settings import new_settings
from ..shelf.shelf import Shelf
from ..shelf.snapshot import Snapshot
from .output import coding, table

if TYPE_CHECKING:
    from rich.console import Console

FIVE = 5


def packed(adapters: Mapping[str, Adapter], count: int, path: Path) -> Snapshot:
    """Pack adapters into as many bytes as `count` of them take as PEFT folders; return the new shelf's snapshot."""
    limit = count * max(encode(x).size for x in adapters.values())
    settings = new_settings(None, bytes=limit, floor=0)
    made, _ = Shelf.create_with(path, settings, lambda snapshot: plan_pack(snapshot, adapters, watch=coding))
    return made


def show_coded(console: Console, named: Mapping[str, Adapter]) -> None:
    """Show what is left of all adapters in the bytes of a few."""
    console.rule(f"{len(named)} adapters, coded into the bytes of {FIVE} and of 1", align="left")
    rows = []
    with tempfile.TemporaryDirectory(prefix="lorashelf-") as folder:
        for count in (FIVE, 1):
            snapshot = packed(named, count, Path(folder) / f"{count}.shelf")
            found = (rate(slot)["predicted_quality"] for slot in snapshot.manifest.slots)
            rates = [each for each in found if each is not None]
            served = {task: snapshot.adapter(task) for task in named}
            share = snapshot.bytes / sum(encode(x).size for x in named.values())
            predicted = f"{float(np.mean(rates)):.3f} ({min(rates):.3f})"
            rows.append((size(snapshot.bytes), f"{100 * share:.1f} %", predicted, cosines(served, named)))
    columns = [">all files", ">of all bytes", ">predicted gain kept", ">cosine to own ΔW"]
    console.print(table(columns, rows))
    console.print("  means, and the least of all tasks in brackets; a cosine is the mean over modules")


def cosines(served: Mapping[str, Adapter], own: Mapping[str, Adapter]) -> str:
    """Return the mean and the least cosine of ΔW as served to ΔW as given, untrained adapters left out."""
    found = [float(similarity([served[task]], [x])[0, 0]) for task, x in own.items() if norm(x)]
    return f"{float(np.mean(found)):.3f} ({min(found):.3f})" if found else "-"
