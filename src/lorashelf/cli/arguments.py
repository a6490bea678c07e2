"""Arguments of the commands: options shared by several, and ADAPTER arguments."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..atomic import expanded
from ..errors import AdapterError, AdapterFormatError, Fault, TaskNameError, UsageError, numbered
from ..formats.coded import SUFFIX
from ..formats.objects import CONFIG_FILE
from ..formats.peft import read_adapter
from ..lora.adapter import Adapter
from ..lora.alignment import FEW
from ..lora.kernels import squared_norms
from ..lora.similarity import SHARED_INIT, similarity
from ..models.engines import ENGINES
from ..placement.policies import median_similarity
from .output import note

ShelfPath = Annotated[Path, typer.Argument(help="The shelf's folder.", metavar="SHELF", show_default=False)]
Adapters = Annotated[
    list[str],
    typer.Argument(
        help="PEFT folders, hub ids in the local cache, or files of `compress`; NAME=ADAPTER gives the task's name.",
        metavar="ADAPTER...",
        show_default=False,
    ),
]
OneAdapter = Annotated[
    str,
    typer.Argument(
        help="A PEFT folder, a hub id in the cache, or a file of `compress`.", metavar="ADAPTER", show_default=False
    ),
]
Originals = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="The original adapter of a task; may be repeated.", metavar="TASK=ADAPTER"),
]
NewShelf = Annotated[Path, typer.Option("-o", "--output", help="The shelf to create.", show_default=False)]
NewFolder = Annotated[Path, typer.Option("-o", "--output", help="The PEFT folder to write.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Parameters = Annotated[
    list[str] | None, typer.Option("-p", "--parameter", help="A parameter of the merge method.", metavar="KEY=VALUE")
]
Slots = Annotated[int, typer.Option("--slots", help="K, the number of slots.", show_default=False)]
Floor = Annotated[
    float | None,
    typer.Option(
        "--floor", help="Without slots: the least predicted quality of every task; default 0.8.", show_default=False
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="The base model: hub id, folder or GGUF file; default: SmolLM2, if its package is installed."
    ),
]
Engine = Annotated[
    str, typer.Option("--engine", help=f"What runs the base: {', '.join(ENGINES)} (llama.cpp, for a GGUF file).")
]
Device = Annotated[str | None, typer.Option("--device", help="cuda, mps or cpu; default: the first available.")]
ModelDtype = Annotated[
    str | None,
    typer.Option("--model-dtype", help="Dtype of the base: f32, f16 or bf16; default: the fastest safe one."),
]
TemplateArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        help="An argument of the base's chat template (enable_thinking=false); may be repeated.",
        metavar="NAME=VALUE",
    ),
]
Merge = Annotated[str, typer.Option("--merge", help="Merge method (docs/methods.md).")]
Rank = Annotated[int | None, typer.Option("--rank", help="Cap on the stored rank; ranks are never padded.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Storage dtype: f32, f16 or bf16.")]
Threshold = Annotated[
    str | None,
    typer.Option("--threshold", help="For kmerge++: a similarity, or 'auto', the default.", show_default=False),
]
HeldOut = Annotated[Path | None, typer.Option("--held-out", help="Adapters whose median similarity is the threshold.")]
SEED = typer.Option("--seed", help="Seed of every random draw.")
Seed = Annotated[int, SEED]
KEEP = typer.Option("--keep", help="Number of other states that undo and redo can reach.")
Keep = Annotated[int, KEEP]
BaseName = Annotated[str | None, typer.Option("--base-name", help="Accept only adapters of this base model.")]
Aliases = Annotated[
    list[str] | None, typer.Option("--base-alias", help="Another name of the same base model.", metavar="NAME")
]
AssumeBase = Annotated[bool, typer.Option("--assume-base", help="Accept another base name; shapes are still checked.")]
TaskFile = Annotated[
    Path | None,
    typer.Option("--task-file", help="The task.toml to store with a task, or a folder of task folders."),
]
Encoding = Annotated[
    str,
    typer.Option("--encoding", help="How slots are stored: peft, or coded (compressed; `route` writes PEFT folders)."),
]
Quality = Annotated[
    float, typer.Option("--quality", help="With --encoding coded: the predicted share of each adapter that is kept.")
]
RestoreNorm = Annotated[
    bool, typer.Option("--restore-norm", help="Scale merged slots to the mean norm of their members.")
]


_UNITS = {"": 1, "b": 1} | {
    f"{letter}{i}b": (1024 if i else 1000) ** power for power, letter in enumerate("kmgt", 1) for i in ("", "i")
}


def byte_count(text: str) -> int:
    """Parse a number of bytes, with kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024); a fraction of a
    byte is dropped. Raises UsageError.

    >>> byte_count("1600000"), byte_count("1.6MB"), byte_count("1.5 KiB")
    (1600000, 1600000, 1536)
    """
    match = re.fullmatch(r"([0-9]+)(?:\.([0-9]+))? ?([a-z]*)", text.strip().lower())
    whole, part, unit = match.groups("") if match else ("0", "", "")
    count: int = int(whole + part) * _UNITS.get(unit, 0) // 10 ** len(part)
    if count < 1:
        cure = "give a number of bytes, or one with a unit: 1600000, 1.6MB, 1.5MiB"
        raise UsageError(f"{text!r} is not a size of at least one byte", cure=cure)
    return count


BYTES = typer.Option(
    "--bytes",
    parser=byte_count,
    metavar="SIZE",
    help="Limit for all files of the shelf at rest: 1600000, 1.6MB, 1.5MiB.",
    show_default=False,
)
Bytes = Annotated[int | None, BYTES]


def stated(context: typer.Context, options: Mapping[str, str]) -> list[str]:
    """Return the options, of parameter → option, that are on the command line, whatever their values."""
    sources = {option: context.get_parameter_source(name) for name, option in options.items()}
    return [option for option, source in sources.items() if source is not None and source.name != "DEFAULT"]


def named(text: str) -> tuple[str | None, str]:
    """Split an ADAPTER argument NAME=ADAPTER into NAME, None if absent, and the rest."""
    name, separator, rest = text.partition("=")
    given, rest = (name, rest) if separator and not os.path.lexists(expanded(text)) else (None, text)
    if not rest:
        raise UsageError(f"{text!r} does not name an adapter", cure="give a PEFT folder, or NAME=FOLDER")
    return given, rest


def name_of(text: str, default: str | None = None) -> str:
    """Return the task name of an ADAPTER argument: NAME, else `default`, else the folder's (a link's own) or the coded
    file's without `.lsc`, else the last part of the hub id, without its revision.
    """
    name, rest = named(text)
    place = rest if os.path.lexists(expanded(rest)) else rest.partition("@")[0]
    own = os.path.basename(os.path.abspath(expanded(place)))
    if _coded(rest):
        own = own.removesuffix(SUFFIX)
    return next(each for each in (name, default, own) if each is not None)


def read_one(text: str) -> Adapter:
    """Read the adapter of an ADAPTER argument."""
    place = named(text)[1]
    if _coded(place):
        from ..formats.coded.files import read_coded

        return read_coded(place)
    return read_adapter(place)


def _coded(place: str) -> bool:
    """Return whether a place is a file of `compress`."""
    path = expanded(place)
    if not os.path.isfile(path):
        return False
    from ..formats.coded.files import is_coded

    return is_coded(path)


def without_files(texts: Sequence[str]) -> Sequence[str]:
    """Return the ADAPTER arguments without other files among adapters; all if there is no adapter."""
    return [text for text in texts if not os.path.isfile(expanded(text)) or _coded(text)] or texts


def read_each(texts: Sequence[str], task: str | None = None) -> list[tuple[str, Adapter]]:
    """Read the task name and adapter of every ADAPTER argument; other files among adapters (a README in adapters/*) are
    ignored with a notice. Raises AdapterFormatError with the faults of all.
    """
    given = without_files(texts)
    for text in texts:
        if text not in given:
            note(f"{text}: ignored: a file, not an adapter")
    found: list[tuple[str, Adapter]] = []
    faults: list[Fault] = []
    for text in given:
        name = name_of(text, task)
        try:
            found.append((name, read_one(text)))
        except AdapterError as error:
            if len(texts) == 1:
                raise
            faults += [reason.at(name) for reason in error.reasons]
    if faults:
        raise AdapterFormatError(faults, cure="fix or leave out these adapters; lorashelf show ADAPTER prints more")
    return found


def read_named(texts: Sequence[str]) -> dict[str, Adapter]:
    """Return task name → adapter of several ADAPTER arguments. Raises TaskNameError for a name given twice, and as
    `read_each`.
    """
    found = read_each(texts)
    by_name = dict(found)
    if len(by_name) < len(found):
        repeated = [name for name in by_name if sum(other == name for other, _ in found) > 1]
        raise TaskNameError(
            f"task names given twice: {', '.join(repeated)}", cure="give each its own name: NAME=ADAPTER"
        )
    return by_name


def details(names: Sequence[str], task_file: Path | None) -> dict[str, Mapping[str, Any]]:
    """Return the fields of a task file, or of a folder of task folders, per task; a notice lists tasks without any."""
    if task_file is None:
        return {name: {} for name in names}
    from ..tasks.folders import fields_for

    found: dict[str, Mapping[str, Any]] = {name: fields_for(task_file, name) for name in names}
    if without := [name for name, fields in found.items() if not fields]:
        note(f"{task_file} has no task file for {', '.join(without)}")
    return found


def note_adapters(adapters: Mapping[str, Adapter]) -> None:
    """Print notices, equal ones once: adapters that do not name a base, and what is not kept of adapters' folders."""
    alike: dict[str, list[str]] = {}
    for name, adapter in adapters.items():
        nameless = () if adapter.base.name else ("the config does not name a base model; only shapes can be checked",)
        for notice in (*nameless, *adapter.notices):
            alike.setdefault(notice, []).append(name)
    for notice, names in alike.items():
        note(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {notice}")


def note_few_shared(
    name: str, shared: Mapping[str, int], lacking: str = "is merged as if the others had not changed it"
) -> None:
    """Warn if adapters have few modules in common; `lacking` states what happens to a module of one adapter alone."""
    if shared["modules"] < FEW * shared["of"]:
        count = f"{shared['modules']} of {shared['of']} modules in common"
        note(f"{name}: {count}; a module of one adapter alone {lacking}")


def note_shared_init(merges: Mapping[str, tuple[float, int]], cure: str = "--merge svd averages it") -> None:
    """Warn, once, of merges that add up adapters because these share an initialisation: name → their `init_similarity`
    and number.
    """
    found = {name: cosine for name, (cosine, count) in merges.items() if (count - 1) * cosine > SHARED_INIT}
    if found:
        what = f"{', '.join(found)}: adapters share an initialisation (mean cosine of A {max(found.values()):.2f})"
        note(f"{what}: this method adds up their ΔW instead of averaging it, and answers get worse; {cure}")


def note_untrained(adapters: Mapping[str, Adapter]) -> None:
    """Print a notice for adapters and modules whose ΔW is 0."""
    for name, adapter in adapters.items():
        idle = sum(not squared for squared in squared_norms(adapter).values())
        if idle == len(adapter.modules):
            note(f"{name}: untrained (ΔW is 0 in every module): without effect, and left out of averages")
        elif idle and not adapter.modules.coded:
            note(f"{name}: {idle} of {len(adapter.modules)} modules are untrained (ΔW is 0) and left out of averages")


def adapters_in(folder: Path) -> dict[str, Adapter]:
    """Read the adapters in the subfolders of a folder, by name."""
    if not os.path.isdir(folder):
        raise UsageError("no such folder", where=str(folder), cure="give a folder of PEFT folders")
    found = sorted(child for child in folder.iterdir() if (child / CONFIG_FILE).exists())
    if len(found) < 2:
        raise UsageError(
            f"{numbered(len(found), 'adapter')} here, two are needed",
            where=str(folder),
            cure="give a folder of PEFT folders",
        )
    return read_named([f"{path.name}={path}" for path in found])


def parameters(texts: Iterable[str] | None) -> dict[str, Any]:
    """Parse `key=value` options of a merge method; numbers become numbers, true and false become booleans."""
    return {key: _value(value) for key, value in _pairs(texts, "-p", "KEY=VALUE", "density=0.3")}


def template_arguments(texts: Iterable[str] | None) -> dict[str, Any]:
    """Parse `name=value` arguments of a chat template; true, false, null and numbers are read as JSON."""
    found: dict[str, Any] = {}
    for name, value in _pairs(texts, "--template-arg", "NAME=VALUE", "enable_thinking=false"):
        try:
            found[name] = json.loads(value, parse_constant=str)
        except ValueError:
            found[name] = value
    return found


def _pairs(texts: Iterable[str] | None, option: str, form: str, example: str) -> Iterator[tuple[str, str]]:
    """Yield the two sides of each text. Raises UsageError."""
    for text in texts or ():
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UsageError(f"{option} {text!r} is not {form}", cure=f"for example {option} {example}")
        yield key, value


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def slot_range(text: str, most: int) -> list[int]:
    """Parse `1..8`, `3` or `2,5` as numbers of slots; a range ends at `most`, where every adapter has its own slot.

    >>> slot_range("1..3", 31), slot_range("2,5", 31), slot_range("1..100000000", 3)
    ([1, 2, 3], [2, 5], [1, 2, 3])
    """
    cure = "for example --slots 1..8"
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    try:
        ends = [int(part) for part in (match.groups() if match else text.split(","))]
    except ValueError:
        raise UsageError(f"--slots {text!r} is not a number, a list or a range", cure=cure) from None
    if min(ends) < 1:
        raise UsageError(f"--slots {text!r} contains {min(ends)}; the minimum is 1", cure=cure)
    if match and ends[0] > ends[1]:
        raise UsageError(f"--slots {text!r} runs backwards", cure=f"give {ends[1]}..{ends[0]}")
    return list(range(ends[0], min(ends[1], max(ends[0], most)) + 1)) if match else ends


def threshold(text: str | None, held_out: Path | None, policy: str) -> float | str:
    """Return a similarity, 'auto' (also for None), or the median similarity of held-out adapters. Raises UsageError,
    also if the policy would ignore it.
    """
    given = [option for option, value in (("--threshold", text), ("--held-out", held_out)) if value is not None]
    if len(given) > 1:
        raise UsageError("--threshold and --held-out exclude each other", cure="give one of them")
    if given and policy != "kmerge++":
        raise UsageError(f"policy {policy!r} has no threshold", cure=f"omit {given[0]}, or give --policy kmerge++")
    if held_out is not None:
        return median_similarity(similarity(list(adapters_in(held_out).values())))
    return "auto" if text is None else similarity_or_auto(text)


def similarity_or_auto(text: str) -> float | str:
    """Parse a threshold. Raises UsageError."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise UsageError(f"--threshold {text!r} is not a number or 'auto'", cure="for example 0.02") from None
