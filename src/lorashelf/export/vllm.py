"""The format `vllm`: one PEFT folder per task, laid out for vLLM's filesystem resolver."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from .. import atomic
from ..errors import AdapterFormatError, Fault, UsageError
from ..faults import Faults
from ..formats.peft import read_adapter, write_adapter
from ..lora.adapter import Adapter, BaseId
from ..lora.folding import uniform
from ..lora.module_names import split
from .target import ROUTES, TOLERANCES, Format, Item, Target, Written, dtype_in

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's --max-lora-rank that are worth a choice; it has also 1."""
README = "README.md"
_TEXT = """# Adapters for vLLM

One folder per task; the folders of tasks that share an adapter are links to one.

A request's model is the name of a task. Either vLLM loads its adapter when it is first asked for, in this folder:

```bash
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_PLUGINS=lora_filesystem_resolver VLLM_LORA_RESOLVER_CACHE_DIR="$PWD" \\
  vllm serve {served} --enable-lora --max-lora-rank {rank} --max-loras {count}
```

or all are loaded at the start:

```bash
vllm serve {served} --enable-lora --max-lora-rank {rank} --max-loras {count} \\
  --lora-modules {modules}
```

vLLM compares the name of the base as text: it must be served as `{plain}`.
An adapter was trained with its task's prompt: give it before the text, with an empty line between.
"""


class Vllm(Format):
    """PEFT folders as vLLM's filesystem resolver finds them."""

    name = "vllm"
    summary = "folders by task for vLLM's filesystem resolver"
    options: ClassVar[Sequence[str]] = ("served-base", "max-lora-rank", "dtype")

    def target(self, options: Mapping[str, str], base: str | None) -> Target:
        """Return the target; the served base is by default the shelf's.

        Raises UnknownName for a dtype, UsageError without a base and for a rank that vLLM does not take.
        """
        served = options.get("served-base", base)
        if not served:
            cure = "give the name that vLLM serves the base under: --served-base NAME"
            raise UsageError("the shelf names no base", cure=cure)
        return _Folders(served, _rank(options), dtype_in(options))


class _Folders(Target):
    def __init__(self, served: str, most: int | None, dtype: str | None) -> None:
        self._served, self._most, self._dtype, self._rank, self._count = served, most, dtype, RANKS[0], 0

    def faults(self, adapter: Adapter) -> Sequence[Fault]:
        """Return what vLLM cannot hold: ranks beyond its largest, and modules outside the language model."""
        faults, most = Faults(), self._most or RANKS[-1]
        for path, shape in adapter.shapes.items():
            if shape.rank > most:
                higher = next((rank for rank in RANKS if rank >= shape.rank), None)
                cure = f"give --max-lora-rank {higher}" if higher else f"store it with rank {most}: init --rank {most}"
                faults.append(f"rank {shape.rank} is beyond vLLM's {most}", cure, at=path)
            if split(path)[0]:
                cure = "serve --format peft with vLLM's --enable-tower-connector-lora, if the base has it"
                faults.append("vLLM drops the LoRA of modules outside the language model", cure, at=path)
        return faults.listed()

    def write(self, item: Item, folder: Path) -> Written:
        if taken := {README, ROUTES}.intersection(item.tasks):
            what = f"the task {min(taken)!r} has the name of a file of the export"
            raise AdapterFormatError([Fault(what, "give it another name, or leave it out: --task")])
        adapter = uniform(replace(item.adapter, dtype=self._dtype or item.adapter.dtype, base=BaseId(self._served)))
        path = folder / item.tasks[0]
        write_adapter(adapter, path)
        self._rank, self._count = max(self._rank, adapter.rank), self._count + 1
        return Written(path, read_adapter(path).modules, TOLERANCES[adapter.dtype])

    def finish(self, paths: Mapping[str, str], folder: Path) -> None:
        for task, path in paths.items():
            if task != path:
                atomic.link(Path(path), folder / task)
        text = _TEXT.format(
            served=shlex.quote(self._served),
            plain=self._served,
            rank=self._most or next(rank for rank in RANKS if rank >= self._rank),
            count=self._count,
            modules=" ".join(_module(task) for task in paths),
        )
        atomic.write_file(folder / README, [text.encode()])


def _rank(options: Mapping[str, str]) -> int | None:
    """Return the option `max-lora-rank`. Raises UsageError for another value than vLLM takes."""
    text = options.get("max-lora-rank")
    if text is None:
        return None
    if text not in map(str, RANKS):
        cure = f"give one of {', '.join(map(str, RANKS))}, or omit it for the next that fits"
        raise UsageError(f"vLLM has no --max-lora-rank {text}", cure=cure)
    return int(text)


def _module(task: str) -> str:
    """Return a task's argument of --lora-modules: NAME=PATH, or JSON where a name would be cut."""
    if "=" in task or "," in task:
        return shlex.quote(json.dumps({"name": task, "path": f"./{task}"}, ensure_ascii=False))
    return shlex.quote(f"{task}=./{task}")
