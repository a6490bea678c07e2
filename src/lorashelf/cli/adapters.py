"""Commands on adapters: show, compare, plan, threshold, merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..atomic import check_output
from ..documents import Compared
from ..documents.coded import Curve, CurvePoint
from ..errors import UsageError, numbered
from ..formats.peft import write_adapter
from ..lora.adapter import in_16_bits, parameters
from ..lora.algebra import norm
from ..lora.alignment import fitting, shared
from ..lora.similarity import init_similarity, similarity
from ..merging import METHODS, merge_measured
from ..merging.average import one_base
from ..placement.policies import median_similarity
from ..report.formats import format_of
from ..report.heatmap import draw_heatmap, heatmap_format
from ..report.numbers import score, size
from ..report.preview import describe, forecast
from ..report.rate_curve import PERCENTS, draw_curve, rate_curve, within
from ..shelf.settings import new_settings
from . import arguments as arg
from .output import coding, counted, note, progress, show, table

FOR_SLOTS = {"slots": "--slots", "merge": "--merge", "parameter": "-p", "rank": "--rank", "dtype": "--dtype"}
"""Options of `plan` that are not for coded objects."""


def show_adapter(
    adapter: arg.OneAdapter,
    json: arg.Json = False,
) -> None:
    """Show an adapter: modules, ranks, scales, norms, and the share of ‖ΔW‖² that lower ranks keep."""
    read = arg.read_one(adapter)
    arg.note_adapters({arg.name_of(adapter): read})
    show(describe(read), json, _described)


def compare(
    adapters: arg.Adapters,
    metric: Annotated[str, typer.Option("--metric", help="cosine, l1, l2, linf or svd_features.")] = "cosine",
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw a heat map (png, svg or pdf).")] = None,
    keep_order: Annotated[
        bool, typer.Option("--keep-order", help="With --plot: keep the given order, not similar ones side by side.")
    ] = False,
    dark: Annotated[bool, typer.Option("--dark", help="With --plot: draw on a dark background.")] = False,
    json: arg.Json = False,
) -> None:
    """Compare adapters pair by pair: how similar they are."""
    if plot is not None:
        heatmap_format(plot)
    elif keep_order or dark:
        raise UsageError("--keep-order and --dark are for a heat map", cure="give --plot as well")
    named = arg.read_named(adapters)
    matrix = similarity(list(named.values()), metric=metric)
    arg.note_few_shared("all of them", shared(list(named.values())), "has ΔW = 0 in the others")
    if plot is not None:
        missing = draw_heatmap(list(named), matrix, metric, plot, arrange=not keep_order, dark=dark)
        if missing:
            listed = " ".join(missing[:10]) + (" …" if len(missing) > 10 else "")
            note(f"no installed font has {listed}: {plot} shows boxes in their place")
    document: Compared = {"names": list(named), "metric": metric, "matrix": matrix.tolist()}
    show(document, json, _compared)


def plan(
    context: typer.Context,
    adapters: arg.Adapters,
    slots: Annotated[str, typer.Option("--slots", help="A range, list or number of slots.")] = "1..8",
    merge: arg.Merge = "linear",
    parameter: arg.Parameters = None,
    rank: arg.Rank = None,
    dtype: arg.Dtype = None,
    coded: Annotated[
        bool, typer.Option("--coded", help="Instead of slots: what coded objects would keep in how many bytes.")
    ] = False,
    bytes: Annotated[
        int | None,
        typer.Option("--bytes", parser=arg.byte_count, metavar="SIZE", help="With --coded: a row at this size."),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="With --coded: draw the curve (png, svg or pdf).")] = None,
    assume_base: arg.AssumeBase = False,
    json: arg.Json = False,
) -> None:
    """Print what K slots, or bytes of coded objects, would cost and keep; write nothing."""
    if coded:
        if unread := arg.stated(context, FOR_SLOTS):
            listed = ", ".join(unread)
            raise UsageError(f"--coded does not use {listed}", cure=f"omit {listed}, or omit --coded")
        _plan_coded(adapters, bytes, plot, assume_base, json)
        return
    if bytes is not None or plot is not None:
        raise UsageError("--bytes and --plot are for coded objects", cure="give --coded as well")
    named = arg.read_named(adapters)
    settings = new_settings(1, merge=merge, parameters=arg.parameters(parameter), rank=rank, dtype=dtype)
    if assume_base:
        named = dict(zip(named, one_base(list(named.values())), strict=True))
    watch = partial(counted, describe=lambda count: f"planning {numbered(count, 'slot')}")
    rows = forecast(named, arg.slot_range(slots, len(named)), settings.merge, watch=watch)
    arg.note_untrained(named)
    arg.note_few_shared("all of them", shared(list(named.values())))
    columns = [">slots", ">size", ">storage", ">error", ">norm ratio", ">similarity inside", ">between"]
    show(rows, json, lambda d: table(columns, [_forecast_row(row) for row in d]))


def _plan_coded(adapters: list[str], size_wanted: int | None, plot: Path | None, assume_base: bool, json: bool) -> None:
    ending = format_of(plot, "curve") if plot is not None else ""
    named = arg.read_named(adapters)
    arg.note_adapters(named)
    xs = list(named.values())
    fitting(one_base(xs) if assume_base else xs, list(named))
    rows = rate_curve(named, watch=coding)
    arg.note_untrained(named)
    whole = in_16_bits(sum(parameters(x.modules.original_shapes) for x in named.values()))
    wanted = {round(whole * percent / 100) for percent in PERCENTS} | ({size_wanted} if size_wanted else set())
    found = {at: within(rows, at) for at in sorted(wanted)}
    best = found.get(size_wanted) if size_wanted else None
    if size_wanted and best is None:
        least = f"the least for {numbered(len(named), 'adapter')} is {rows[0]['bytes']}"
        cure = f"give --bytes {rows[0]['bytes']}, or omit --bytes"
        raise UsageError(f"{size_wanted} bytes are too few: {least}", cure=cure)
    if plot is not None:
        draw_curve(rows, plot, ending, size_wanted)
    document: Curve = {"adapters": len(named), "budget": size_wanted, "within": best, "curve": rows}
    columns = [">at most", ">of 16 bits", ">taken", ">predicted quality, mean", ">least", "task"]
    shown = [(at, row) for at, row in found.items() if row is not None]
    show(document, json, lambda _: table(columns, [_rate_row(at, whole, row) for at, row in shown]))


def _rate_row(at: int, whole: int, row: CurvePoint) -> tuple[Any, ...]:
    kept = f"{row['mean']:.3f}", f"{row['least']:.3f}"
    return size(at), f"{100 * at / whole:.3g} %", size(row["bytes"]), *kept, row["task"]


def threshold(
    folder: Annotated[
        Path,
        typer.Argument(help="A folder of PEFT folders, held out from the shelf.", metavar="DIR", show_default=False),
    ],
    json: arg.Json = False,
) -> None:
    """Print a threshold for K-Merge++: the median pairwise similarity of held-out adapters."""
    named = arg.adapters_in(folder)
    matrix = similarity(list(named.values()))
    pairs = matrix[np.triu_indices(len(named), 1)]
    quantiles = {f"{q:g}": float(np.quantile(pairs, q)) for q in (0.25, 0.5, 0.75, 0.8, 0.9)}
    document = {"threshold": median_similarity(matrix), "adapters": len(named), "quantiles": quantiles}
    listed = ", ".join(f"q{q} {score(v)}" for q, v in quantiles.items())
    show(document, json, lambda d: f"{d['threshold']:.6f}   (median over {len(pairs)} pairs; {listed})")


def merge_adapters(
    adapters: arg.Adapters,
    output: arg.NewFolder,
    method: Annotated[str, typer.Option("--method", help="Merge method (docs/methods.md).", show_default=False)],
    weights: Annotated[str | None, typer.Option("--weights", help="One weight per adapter: W,W,…")] = None,
    rank: arg.Rank = None,
    dtype: arg.Dtype = None,
    parameter: arg.Parameters = None,
    seed: arg.Seed = 0,
    assume_base: arg.AssumeBase = False,
    json: arg.Json = False,
) -> None:
    """Merge adapters into one PEFT folder."""
    check_output(output)
    checked = new_settings(
        1, merge=method, parameters=arg.parameters(parameter), rank=rank, dtype=dtype, seed=seed
    ).merge
    found = arg.read_each(adapters)
    xs = [adapter for _, adapter in found]
    arg.note_adapters(dict(found))
    if assume_base:
        xs = one_base(xs)
    xs = fitting(xs, [name for name, _ in found])
    arg.note_untrained(dict(found))
    merged, error = merge_measured(
        xs,
        _weights(weights),
        method=method,
        rank=rank,
        seed=seed,
        watch=lambda paths: progress(paths, "merging"),
        **checked.parameters,
    )
    merged = replace(merged, dtype=checked.dtype or merged.dtype)
    write_adapter(merged, output)
    in_common = shared(xs)
    arg.note_few_shared(str(output), in_common)
    ratio = norm(merged) / (float(np.mean([norm(x) for x in xs])) or 1.0)
    document = {
        "output": str(output),
        "method": method,
        "rank": merged.rank,
        "dtype": merged.dtype,
        "error": error,
        "norm_ratio": ratio,
        "shared": in_common,
    }
    if METHODS[method].sums_shared_init:
        document["init_similarity"] = cosine = init_similarity(xs)
        arg.note_shared_init({str(output): (cosine, len(xs))}, "--method svd averages it")
    show(
        document,
        json,
        lambda d: f"{output}: rank {d['rank']}, {d['dtype']}, compression error {error:.4f}, norm ratio {ratio:.3f}",
    )


def _weights(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {text!r} is not a list of numbers", cure="for example 0.7,0.3") from None


def _described(document: dict[str, Any]) -> list[Any]:
    head = [
        ("base", document["base"] or "(unknown)"),
        ("digest", document["digest"]),
        ("as PEFT", f"{document['dtype']}, {size(document['bytes'])}, {document['parameters']:,} parameters"),
        ("norm", f"{document['norm']:.4g}"),
        ("‖ΔW‖² kept", "  ".join(f"rank {rank}: {100 * kept:.1f} %" for rank, kept in document["energy"].items())),
    ]
    rows = [
        (m["module"], "x".join(map(str, m["shape"])), m["rank"], m["scale"], m["norm"]) for m in document["modules"]
    ]
    return [table(["", ""], head), table(["module", ">shape", ">rank", ">scale", ">norm"], rows)]


def _compared(document: Compared) -> Any:
    names, matrix = document["names"], document["matrix"]
    if len(names) <= 12:
        rows = [(name, *(f"{value:.3f}" for value in row)) for name, row in zip(names, matrix, strict=True)]
        return table(["", *(f">{name}" for name in names)], rows)
    rows = []
    for i, name in enumerate(names):
        others = sorted(((matrix[i][j], names[j]) for j in range(len(names)) if j != i), reverse=True)
        mean = float(np.mean([value for value, _ in others]))
        rows.append((name, *(f"{other} {value:.3f}" for value, other in others[:3]), f"{mean:.3f}"))
    return table(["adapter", "nearest", "second", "third", ">mean"], rows)


def _forecast_row(row: dict[str, Any]) -> tuple[Any, ...]:
    ratio = "-" if row["norm_ratio"] is None else f"{row['norm_ratio']:.3f}"
    inside, between = score(row["similarity_inside"]), score(row["similarity_between"])
    return (
        row["slots"],
        size(row["bytes"]),
        f"{100 * row['storage']:.1f} %",
        f"{row['error']:.4f}",
        ratio,
        inside,
        between,
    )


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "show": (show_adapter, "lorashelf show adapters/gec-de"),
    "compare": (compare, "lorashelf compare adapters/* --plot similarity.svg"),
    "plan": (
        plan,
        "lorashelf plan adapters/* --slots 1..8  ·  lorashelf plan adapters/* --coded --bytes 4MB --plot curve.png",
    ),
    "threshold": (threshold, "lorashelf threshold held-out/"),
    "merge": (merge_adapters, "lorashelf merge a b c -o merged --method ties -p density=0.3"),
}
