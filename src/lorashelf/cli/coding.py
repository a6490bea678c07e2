"""Commands on a single coded adapter: compress, extract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..atomic import check_output
from ..errors import UsageError
from ..formats.coded import LEVELS
from ..formats.coded.decoder import decode, inspect
from ..formats.coded.encoder import Encoder
from ..formats.coded.files import encode_for, encode_within, read_levels, write_coded
from ..formats.peft import write_adapter
from ..lora.adapter import in_16_bits
from ..report.numbers import size
from . import arguments as arg
from .output import show, table


def compress(
    adapter: arg.OneAdapter,
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
    json: arg.Json = False,
) -> None:
    """Code an adapter in few bytes (docs/coded.md)."""
    if sum(value is not None for value in (budget, percent, quality)) != 1:
        raise UsageError("one of --bytes, --percent and --quality is needed", cure="for example --percent 5")
    if percent is not None and not 0 < percent <= 100:
        raise UsageError(f"--percent {percent:g} is not above 0 and at most 100", cure="for example --percent 5")
    if quality is not None and not 0 <= quality <= 1:
        raise UsageError(f"--quality {quality:g} is not between 0 and 1", cure="for example --quality 0.95")
    check_output(output, "file")
    read = arg.read_one(adapter)
    arg.note_adapters({arg.name_of(adapter): read})
    arg.note_untrained({arg.name_of(adapter): read})
    encoder = Encoder(read)
    if quality is not None:
        coded = encode_for(encoder, quality, levels)
    else:
        most = budget if budget is not None else int(in_16_bits(read.parameters) * (percent or 0) / 100)
        coded = encode_within(encoder, most, levels)
    write_coded(coded, output)
    show({"output": str(output), **_document(coded, str(output))}, json, _listed)


def extract(
    file: Annotated[Path, typer.Argument(help="A file written by `compress`.", metavar="FILE", show_default=False)],
    output: arg.NewFolder,
    levels: Annotated[int | None, typer.Option("--levels", help="Use only this many levels, from the first.")] = None,
    dtype: arg.Dtype = None,
    json: arg.Json = False,
) -> None:
    """Decode a coded adapter into a PEFT folder."""
    coded = read_levels(file, levels)
    decoded = decode(coded, str(file))
    write_adapter(replace(decoded, dtype=dtype or decoded.dtype), output)
    show({"output": str(output), **_document(coded, str(file))}, json, _listed)


def _document(coded: list[bytes], where: str) -> dict[str, Any]:
    _, parameters, levels = inspect(coded, where)
    total = sum(level.bytes for level in levels)
    rows, so_far = [], 0
    for level in levels:
        so_far += level.bytes
        rows.append(
            {
                "bytes": so_far,
                "percent": 100 * so_far / in_16_bits(parameters),
                "energy_kept": level.kept,
                "predicted_quality": level.quality,
                "directions": level.directions,
            }
        )
    last = rows[-1]
    names = ("energy_kept", "predicted_quality")
    return {"bytes": total, "percent": last["percent"], **{name: last[name] for name in names}, "levels": rows}


def _listed(document: dict[str, Any]) -> list[Any]:
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
    return [f"{document['output']}: {size(document['bytes'])}", table(columns, rows)]


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "compress": (compress, "lorashelf compress adapters/gec-de -o gec-de.lsc --percent 2.5"),
    "extract": (extract, "lorashelf extract gec-de.lsc -o gec-de"),
}
