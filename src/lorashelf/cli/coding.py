"""Commands on a single coded adapter: compress, extract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..atomic import check_output
from ..documents.coded import CodeFile, CodeLevel, Fit
from ..errors import UsageError, numbered
from ..formats.coded import LEVELS
from ..formats.coded.decoder import decode, inspect
from ..formats.coded.encoder import Encoder
from ..formats.coded.files import encode_for, encode_within, read_levels, write_coded
from ..formats.peft import write_adapter
from ..lora.adapter import WIDTHS, Adapter, in_16_bits
from ..report.numbers import size
from ..search.cluster import drawn
from ..tasks.folders import ExampleSet, read_tasks
from ..training.gains import fitted_gains
from . import arguments as arg
from .output import counted, note, show, table

if TYPE_CHECKING:
    from ..models.protocol import GainGradients


FITTING = {
    "limit": "--limit",
    "steps": "--steps",
    "seed": "--seed",
    "base": "--base",
    "device": "--device",
    "model_dtype": "--model-dtype",
    "template_arg": "--template-arg",
}


def compress(
    context: typer.Context,
    adapter: Annotated[
        str, typer.Argument(help="A PEFT folder, or a hub id in the cache.", metavar="ADAPTER", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.", show_default=False)],
    budget: Annotated[
        int | None,
        typer.Option("--bytes", parser=arg.byte_count, metavar="SIZE", help="Largest size of the file: 18000, 18kB."),
    ] = None,
    percent: Annotated[
        float | None, typer.Option("--percent", help="The size as a percentage of the adapter in 16 bits.")
    ] = None,
    quality: Annotated[
        float | None, typer.Option("--quality", help="The predicted share of the gain in loss to keep, 0 to 1.")
    ] = None,
    levels: Annotated[
        int,
        typer.Option(
            "--levels", help="Largest number of levels; every prefix of them is a coarser adapter.", min=1, max=255
        ),
    ] = LEVELS,
    examples: Annotated[
        Path | None,
        typer.Option(
            "--examples",
            help="The task's folder, or a folder of task folders: gains are fitted to examples of its train split, "
            "as long as that lowers the loss of its validation split. Needs the base model (extra llm).",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", help="Number of examples of each split, drawn by --seed.", min=1)
    ] = 24,
    steps: Annotated[int, typer.Option("--steps", help="Largest number of steps of the fit.", min=1)] = 10,
    seed: arg.Seed = 0,
    base: arg.Base = None,
    device: arg.Device = None,
    model_dtype: arg.ModelDtype = None,
    template_arg: arg.TemplateArgs = None,
    json: arg.Json = False,
) -> None:
    """Compress an adapter to a small file (docs/coded.md)."""
    if sum(value is not None for value in (budget, percent, quality)) != 1:
        raise UsageError("one of --bytes, --percent and --quality is needed", cure="for example --percent 5")
    if percent is not None and not 0 < percent <= 100:
        raise UsageError(f"--percent {percent:g} is not above 0 and at most 100", cure="for example --percent 5")
    if quality is not None and not 0 <= quality <= 1:
        raise UsageError(f"--quality {quality:g} is not between 0 and 1", cure="for example --quality 0.95")
    if examples is None and (unread := arg.stated(context, FITTING)):
        raise UsageError(f"{', '.join(unread)}: only for a fit to examples", cure="give --examples, or omit these")
    check_output(output, "file")
    read = arg.read_one(adapter)
    if read.modules.coded:
        cure = "give the adapter it was coded from; lorashelf extract --levels N takes its first levels"
        raise UsageError("this is a coded file already", where=adapter, cure=cure)
    arg.note_adapters({arg.name_of(adapter): read})
    arg.note_untrained({arg.name_of(adapter): read})

    def code(factors: Mapping[str, float] | None = None) -> list[bytes]:
        encoder = Encoder(read, factors)
        if quality is not None:
            return encode_for(encoder, quality, levels)
        most = budget if budget is not None else int(in_16_bits(read.parameters) * (percent or 0) / 100)
        return encode_within(encoder, most, levels)

    if examples is None:
        coded, fit = code(), None
    else:
        name, tasks = arg.name_of(adapter), read_tasks(examples)
        model = _opened(base, device, model_dtype, template_arg)
        both = [drawn(tasks, [name], model.fitting, split, limit, seed) for split in ("train", "validation")]
        (examples_of, held_out), dropped = [sets[name] for sets, _ in both], sum(count for _, count in both)
        if dropped:
            note(f"{dropped} examples are longer than the model's context and were left out")
        coded, fit = _fitted(model, read, code(), examples_of, held_out, steps, code)
    write_coded(coded, output)
    show(_document(coded, str(output), str(output), fit), json, _listed)


def _opened(name: str | None, device: str | None, dtype: str | None, template: Sequence[str] | None) -> GainGradients:
    from ..models.protocol import GainGradients
    from .base import open_named

    return open_named(name, GainGradients, device=device, dtype=dtype, template=template)


def _fitted(
    model: GainGradients,
    read: Adapter,
    coded: list[bytes],
    examples: ExampleSet,
    others: ExampleSet,
    steps: int,
    code: Callable[[Mapping[str, float]], list[bytes]],
) -> tuple[list[bytes], Fit]:
    """Code anew with gains fitted to the examples; also return the losses of the others before and after."""
    from ..models.protocol import mean_loss

    def watch(each: range) -> Iterator[int]:
        return counted(each, lambda step: f"fitting gains: step {step + 1} of {steps}")

    before = decode(coded)
    found = code(fitted_gains(model, before, examples, others, steps=steps, watch=watch))
    own, as_coded, fitted = (
        mean_loss(losses) for losses in model.nll([(x, others) for x in (read, before, decode(found))])
    )
    return found, {"examples": len(others.examples), "own": own, "as_coded": as_coded, "fitted": fitted}


def extract(
    file: Annotated[Path, typer.Argument(help="A file written by `compress`.", metavar="FILE", show_default=False)],
    output: arg.NewFolder,
    levels: Annotated[int | None, typer.Option("--levels", help="Use only this many levels, from the first.")] = None,
    dtype: arg.Dtype = None,
    json: arg.Json = False,
) -> None:
    """Decode a coded adapter into a PEFT folder."""
    if dtype is not None and dtype not in WIDTHS:
        raise UsageError(f"--dtype is {dtype!r}", cure=f"choose from {', '.join(WIDTHS)}")
    coded = read_levels(file, levels)
    decoded = decode(coded, str(file))
    write_adapter(replace(decoded, dtype=dtype or decoded.dtype), output)
    show(_document(coded, str(file), str(output)), json, _listed)


def _document(coded: list[bytes], where: str, output: str, fit: Fit | None = None) -> CodeFile:
    """Return the document of levels read from, or written to, a file."""
    _, parameters, levels = inspect(coded, where)
    rows: list[CodeLevel] = []
    for level, total in zip(levels, accumulate(level.bytes for level in levels), strict=True):
        row: CodeLevel = {
            "bytes": total,
            "percent": 100 * total / in_16_bits(parameters),
            "energy_kept": level.kept,
            "predicted_quality": level.quality,
            "directions": level.directions,
        }
        rows.append(row)
    last = rows[-1]
    document: CodeFile = {
        "output": output,
        "bytes": last["bytes"],
        "percent": last["percent"],
        "energy_kept": last["energy_kept"],
        "predicted_quality": last["predicted_quality"],
        "levels": rows,
    }
    if fit is not None:
        document["fit"] = fit
    return document


def _listed(document: CodeFile) -> list[Any]:
    columns = [">levels", ">size", ">of 16 bits", ">‖ΔW‖² kept", ">predicted quality"]
    rows = [
        (
            str(place),
            size(level["bytes"]),
            f"{level['percent']:.2f} %",
            f"{level['energy_kept']:.4f}",
            f"{level['predicted_quality']:.3f}",
        )
        for place, level in enumerate(document["levels"], 1)
    ]
    shown = [f"{document['output']}: {size(document['bytes'])}", table(columns, rows)]
    if fit := document.get("fit"):
        shown.append(
            f"loss on {numbered(fit['examples'], 'validation example')}, nats per token: own adapter {fit['own']:.4f}, "
            f"as coded {fit['as_coded']:.4f}, gains fitted {fit['fitted']:.4f}"
        )
    return shown


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "compress": (compress, "lorashelf compress adapters/gec-de -o gec-de.lsc --percent 2.5"),
    "extract": (extract, "lorashelf extract gec-de.lsc -o gec-de"),
}
